"""What the reference makes of a policy's replies: -log pi_ref(y|x), whose mean over replies is the cross-entropy."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from spl.data.prompts import conversation_prompt
from spl.data.tokenization import Encoder
from spl.evaluation.listed import Tokens, listed_logps, tries
from spl.evaluation.policies import EvaluatedPolicy
from spl.evaluation.sample_files import Reply
from spl.types import Message, PreferenceExample, UserError


class ReferenceLoss(NamedTuple):
    """Of one reply."""

    value: float  # -log pi_ref(y|x), nats
    num_tokens: int  # that it is summed over
    is_exact: bool  # whether they are the very tokens that were drawn


def reference_losses(
    reference: EvaluatedPolicy,
    encoder: Encoder,
    conversations: Mapping[str, Sequence[Message]],
    replies: Sequence[Sequence[Reply]],
    max_tokens: int,
) -> list[list[ReferenceLoss | None]]:
    """-log pi_ref of every reply to every conversation.

    The very tokens that were drawn are scored where they are known and mean the same to the reference. Any other reply
    is tokenised as the reference would write it: its end is scored where it ended, a reply that was cut is scored
    without one, and one without a token has no loss.

    Args:
        reference: to score with.
        encoder: of the reference, with `turn_end="eos"`.
        conversations: the prompts by their items.
        replies: of each.
        max_tokens: of a batch.

    Raises:
        UserError: the template refuses a conversation, or it is too long.
    """
    encoded = []
    for (item, turns), drawn in zip(conversations.items(), replies, strict=True):
        prompt = conversation_prompt(tuple(turns), f"prompt {item}", encoder).input_ids
        exact = [_drawn(reference, encoder, prompt, reply) for reply in drawn]
        rows = [tokens or _retokenised(encoder, item, turns, reply) for tokens, reply in zip(exact, drawn, strict=True)]
        encoded.append([(row, tokens is not None) for row, tokens in zip(rows, exact, strict=True)])
    parts = [part for rows in encoded for part in tries([tokens for tokens, _ in rows], max_tokens)]
    logps = listed_logps(reference, parts, max_tokens, "the reference")
    found: dict[Tokens, float] = {}
    for part, values in zip(parts, logps, strict=True):
        found |= dict(zip(map(Tokens, part.sequences, part.starts), values.tolist(), strict=True))
    return [
        [
            ReferenceLoss(-found[row], len(row.sequence) - row.start, is_exact) if row in found else None
            for row, is_exact in rows
        ]
        for rows in encoded
    ]


def _drawn(reference: EvaluatedPolicy, encoder: Encoder, prompt: tuple[int, ...], reply: Reply) -> Tokens | None:
    """The tokens that were drawn; None where they are not known, too many, or another reply in the reference's eyes."""
    if not reply.token_ids or len(prompt) + len(reply.token_ids) > encoder.max_length:
        return None
    ids, ended = tuple(reply.token_ids), reply.finish != "length"
    is_known = min(ids) >= 0 and max(ids) < len(encoder.tokenizer)
    if not is_known or ended != (ids[-1] in reference.eos_token_ids):
        return None
    text = encoder.decode_reply(ids[:-1] if ended else ids, whole=True)
    return Tokens((*prompt, *ids), len(prompt)) if text == encoder.before_reply + reply.text else None


def _retokenised(encoder: Encoder, item: str, turns: Sequence[Message], reply: Reply) -> Tokens:
    example = PreferenceExample(tuple(turns), (reply.text,), (), row=f"a reply to prompt {item}")
    outcome = encoder.encode_all([example])[0]
    if isinstance(outcome, UserError):
        raise outcome
    sequence, start = outcome[0].sequences[0], outcome[0].starts[0]
    return Tokens(sequence[:-1] if reply.finish == "length" else sequence, start)
