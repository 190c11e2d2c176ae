"""The prompts that monitors sample replies to, and the batch of what was sampled."""

from collections.abc import Iterable, Sequence
from typing import Any

from spl.data.collate import EncodedExample, collate
from spl.data.tokenization import Encoder
from spl.data.values import text_of
from spl.types import Message, PreferenceBatch, PreferenceExample, Prompt


def example_prompts(examples: Iterable[EncodedExample], num: int, max_tokens: int, tokenizer: Any) -> list[Prompt]:
    """The first `num` distinct prompts of at most max_tokens; where there are fewer, the shortest of the others too.

    Examples are read one after another until enough short prompts are found.
    """
    short: dict[tuple[int, ...], None] = {}  # a dict keeps the order
    long: dict[tuple[int, ...], None] = {}
    for example in examples:
        if len(short) == num:
            break
        ids = example.sequences[0][: example.starts[0]]
        (short if len(ids) <= max_tokens else long)[ids] = None
    chosen = [*short, *sorted(long, key=len)][:num]
    return [Prompt(_decoded(tokenizer, ids), ids) for ids in chosen]


def text_prompts(texts: Sequence[str], encoder: Encoder) -> list[Prompt]:
    """A prompt of each text, a single user turn, tokenised as an example's prompt is in training.

    Raises:
        UserError: a text is empty, the template refuses it, or it is too long and may not be cut.
    """
    return [
        conversation_prompt(({"role": "user", "content": text_of(text, f"prompt {k}")},), f"prompt {k}", encoder)
        for k, text in enumerate(texts, 1)
    ]


def conversation_prompt(turns: tuple[Message, ...], name: str, encoder: Encoder) -> Prompt:
    """The prompt of a conversation's turns, tokenised as an example's is in training.

    Raises:
        UserError: the template refuses it, or it is too long and may not be cut; the text begins with the name.
    """
    # What is common to two replies is the prompt. So there is one rule for BOS, cuts and where a reply begins.
    encoded, _ = encoder.encode(PreferenceExample(turns, ("Yes", "No"), (), row=name))
    ids = encoded.sequences[0][: encoded.starts[0]]
    return Prompt(_decoded(encoder.tokenizer, ids), ids)


def reply_batch(prompts: Sequence[Prompt], replies: Sequence[Sequence[tuple[int, ...]]]) -> PreferenceBatch:
    """The forest of each prompt's replies, without comparisons; responses stand in the order given, prompt by prompt.

    Args:
        prompts: one or more.
        replies: for each prompt the token ids of one or more replies, of a token or more each; equal ones may repeat.
    """
    examples = [
        EncodedExample(
            sequences=tuple((*prompt.input_ids, *reply) for reply in drawn),
            starts=(len(prompt.input_ids),) * len(drawn),
            comparisons=(),
            alpha=None,
            row=f"prompt {number}",
        )
        for number, (prompt, drawn) in enumerate(zip(prompts, replies, strict=True), 1)
    ]
    return collate(examples)


def _decoded(tokenizer: Any, ids: tuple[int, ...]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
