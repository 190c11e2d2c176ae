"""What the reference makes of a policy's replies: -log pi_ref(y|x), whose mean over replies is the cross-entropy."""

from collections.abc import Iterator, Sequence

from spl.data.collate import EncodedExample
from spl.data.tokenization import Encoder
from spl.evaluation.listed import listed_logps
from spl.evaluation.policies import EvaluatedPolicy
from spl.evaluation.sample_files import Reply
from spl.types import Message, PreferenceExample, UserError

Tokens = tuple[tuple[int, ...], int]  # a whole sequence, and where the reply starts in it


def reference_losses(
    reference: EvaluatedPolicy,
    encoder: Encoder,
    conversations: Sequence[Sequence[Message]],
    replies: Sequence[Sequence[Reply]],
    max_tokens: int,
) -> list[list[tuple[float, int]]]:
    """-log pi_ref in nats of every reply to every conversation, and the tokens that it is summed over.

    A reply is tokenised as the reference would write it, so the tokens need not be those that were drawn. Its end is
    scored where it ended; a reply that was cut is scored without one, and one without a token is left out.

    Args:
        reference: to score with.
        encoder: of the reference, with `turn_end="eos"`.
        conversations: the prompts.
        replies: of each.
        max_tokens: of a batch.

    Raises:
        UserError: the template refuses a conversation, or it is too long.
    """
    encoded = [
        [_tokens(encoder, turns, reply) for reply in drawn] for turns, drawn in zip(conversations, replies, strict=True)
    ]
    parts = [part for rows in encoded for part in _parts(rows, max_tokens)]
    logps = listed_logps(reference, parts, max_tokens, "the reference")
    found: dict[Tokens, float] = {}
    for part, values in zip(parts, logps, strict=True):
        found |= dict(zip(zip(part.sequences, part.starts, strict=True), values.tolist(), strict=True))
    return [[(-found[row], len(row[0]) - row[1]) for row in rows if row in found] for rows in encoded]


def _tokens(encoder: Encoder, turns: Sequence[Message], reply: Reply) -> Tokens:
    outcome = encoder.encode_all([PreferenceExample(tuple(turns), (reply.text,), ())])[0]
    if isinstance(outcome, UserError):
        raise outcome
    sequence, start = outcome[0].sequences[0], outcome[0].starts[0]
    return (sequence[:-1] if reply.finish == "length" else sequence), start


def _parts(rows: Sequence[Tokens], max_tokens: int) -> Iterator[EncodedExample]:
    """Different replies to one prompt, as examples of at most max_tokens or of one reply."""
    part: list[Tokens] = []
    for sequence, start in sorted({row for row in rows if len(row[0]) > row[1]}):
        if part and start + sum(len(s) - b for s, b in part) + len(sequence) - start > max_tokens:
            yield _example(part)
            part = []
        part.append((sequence, start))
    if part:
        yield _example(part)


def _example(part: Sequence[Tokens]) -> EncodedExample:
    return EncodedExample(tuple(s for s, _ in part), tuple(b for _, b in part), (), None, "")
