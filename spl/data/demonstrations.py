"""Rows to imitate, read into one `Demonstration` and tokenised.

Shapes, told apart by their columns (others are ignored):

- `messages`: a conversation, of which every turn of the assistant's that answers another is learned.
- `prompt` (or `question`) and one of `response`, `completion`, `answer` or `chosen`: that reply alone is learned. It
  may be the whole conversation that it ends; then the prompt's column may be left out.
- `responses` beside what the raters said of them, as for preferences: all of them are learned.

Texts, messages, transcripts and `system` are as `spl.data.formats` has them.

Each reply is a response of one example, and its prompt is what stands before it. So where a template writes a longer
conversation as it writes a shorter one and more, all replies lie on one path of the trie, and no token is computed
twice; where it does not (a template that leaves earlier thoughts out), tokens are repeated as they must be.
"""

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

from spl.data import formats
from spl.data.collate import EncodedExample
from spl.data.tokenization import Encoder
from spl.data.values import column_names
from spl.types import Demonstration, Message, PreferenceExample, UserError

_REPLIES = ("response", "completion", "answer", "chosen")
_COLUMNS = (*formats.COLUMNS, "question", *_REPLIES[:3])
_SHAPES = "messages, or prompt (or question) and one of response, completion, answer or chosen, or responses"


def parse_demonstration(
    row: Mapping[str, Any], where: str = "", columns: Mapping[str, str] | None = None
) -> Demonstration | PreferenceExample:
    """Read one row; one with `responses` as the preferences that it holds, whose responses all are learned.

    Args:
        row: column names to values.
        where: "file, row 12", put before every complaint.
        columns: our column names to the row's, where they differ.

    Raises:
        UserError: the row has no known shape, or a value in it cannot be used; the text says which and why.
    """
    try:
        found = formats.renamed(row, columns or {}, _SHAPES, _COLUMNS)
        if "responses" in found:
            return formats.parse_preference(found, where)
        return Demonstration(tuple(_turns(found)), where)
    except UserError as error:
        raise UserError(f"{where}: {error}" if where else str(error)) from None


def _turns(row: dict[str, Any]) -> list[tuple[tuple[Message, ...], str]]:
    replies = [name for name in _REPLIES if name in row]
    if len(replies) > 1:
        raise UserError(f"expected one reply to learn, but found the columns {' and '.join(replies)}.")
    system = row.get("system", "")
    if replies:
        name = replies[0]
        if "question" in row and "prompt" not in row:
            row["prompt"] = row["question"]
        prompt, (reply,) = formats.prompt_and_replies(row, {name: row[name]})
        formats.check_replies({name: reply})
        return [(tuple(formats.with_system(system, prompt)), reply)]
    if "messages" not in row:
        raise UserError(f"expected the columns {_SHAPES}; the columns with a value are {column_names(row)}.")
    turns = formats.with_system(system, formats.conversation(row["messages"], "messages"))
    ends = [k for k, turn in enumerate(turns) if turn["role"] == "assistant" and _can_answer(turns[:k])]
    if not ends:
        raise UserError("messages has no turn of the assistant's that answers another: expected one to learn.")
    for k in ends:
        formats.check_replies({f"messages[{k}]": turns[k]["content"]})
    return [(tuple(turns[:k]), turns[k]["content"]) for k in ends]


def _can_answer(turns: list[Message]) -> bool:
    """Whether a turn that a reply can follow is the last of some."""
    return bool(turns) and turns[-1]["role"] in ("user", "tool")


def encode_demonstrations(
    encoder: Encoder, demonstrations: Sequence[Demonstration]
) -> list[tuple[EncodedExample, int] | UserError]:
    """Tokenise demonstrations together; for each an example and the number of tokens it lost, or why there is none."""
    parts = [PreferenceExample(prompt, (reply,), ()) for d in demonstrations for prompt, reply in d.turns]
    found = iter(encoder.tokenised(parts))
    return [_joined(encoder, one, list(islice(found, len(one.turns)))) for one in demonstrations]


def _joined(
    encoder: Encoder, demonstration: Demonstration, replies: list[tuple[list[list[int]], int] | UserError]
) -> tuple[EncodedExample, int] | UserError:
    try:
        rows = []
        for reply in replies:
            if isinstance(reply, UserError):
                raise reply
            (ids,), start = reply
            rows.append((ids, start))
        rows, cut = _fit(encoder, rows)
    except UserError as error:
        return type(error)(f"{demonstration.row}: {error}" if demonstration.row else str(error))
    sequences, starts = zip(*rows, strict=True)
    return EncodedExample(tuple(map(tuple, sequences)), starts, (), None, demonstration.row), cut


def _fit(encoder: Encoder, rows: list[tuple[list[int], int]]) -> tuple[list[tuple[list[int], int]], int]:
    """Rows of at most max_length, and how many tokens that took.

    The first reply's prompt loses its oldest tokens where it must, as a preference's does, and all others the same;
    then the conversation ends where it is full.
    """
    most, longest = encoder.max_length, max(len(ids) for ids, _ in rows)
    if longest <= most:
        return rows, 0
    encoder.refuse_long(longest)
    ids, start = rows[0]
    _, drop, _ = encoder.fit([ids], start)
    kept = [(encoder.without(ids, drop)[:most], start - drop) for ids, start in rows if start - drop < most]
    return kept, longest - max(len(ids) for ids, _ in kept)
