"""Every common shape of a preference row, read into one `PreferenceExample`.

Shapes, told apart by their columns (others are ignored; `prompt` may also be called `messages`):

- `chosen`, `rejected` and perhaps `share`, the share of raters who prefer the chosen reply.
- `responses` and one of `shares` (of a population; p_ij = s_i / (s_i + s_j)), `scores` (the higher is preferred, equal
  ones tie), `ranking` (indices of the responses, best first), `comparisons` ([i, j, p] triples).
- `response_a`, `response_b`, `votes_a`, `votes_b` and perhaps `votes_tie` (half a vote to each side).

A prompt is a text, a list of messages or a raw transcript ("\\n\\nHuman: ... \\n\\nAssistant: ..."). A reply is a text,
a message, or the whole conversation (messages or transcript) that it ends; then the prompt's column may be left out, or
hold the conversation's beginning or end. Any row may carry `alpha` and `system`. None and NaN are an absent column.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

from spl.data.comparisons import compared, vote_share
from spl.data.values import column_names, number_of, plain_value, share_of, shortened, text_of
from spl.types import Comparison, Message, PreferenceExample, UserError

ROLES = ("system", "user", "assistant", "tool")
_TURN = re.compile(r"\n\n(Human|Assistant):")
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}
_SHAPES = (
    "chosen and rejected (with or without prompt), or prompt and responses with shares, scores, ranking or "
    "comparisons, or prompt, response_a, response_b, votes_a and votes_b"
)
COLUMNS = (
    *("prompt", "messages", "system", "alpha", "chosen", "rejected", "share", "responses", "shares", "scores"),
    *("ranking", "comparisons", "response_a", "response_b", "votes_a", "votes_b", "votes_tie"),
)


def parse_row(row: Mapping[str, Any], where: str = "", columns: Mapping[str, str] | None = None) -> PreferenceExample:
    """Read one row.

    >>> parse_row({"prompt": "Tea?", "chosen": "Yes.", "rejected": "No."}).responses
    ('Yes.', 'No.')

    Args:
        row: column names to values, Python's own or numpy's.
        where: "file, row 12", put before every complaint.
        columns: our column names to the row's, where they differ: `{"chosen": "better"}`.

    Raises:
        UserError: the row has no known shape, or a value in it cannot be used; the text says which and why.
    """
    try:
        return parse_preference(renamed(row, columns or {}, _SHAPES, COLUMNS), where)
    except UserError as error:
        raise UserError(f"{where}: {error}" if where else str(error)) from None


def renamed(row: Mapping[str, Any], columns: Mapping[str, str], shapes: str, known: tuple[str, ...]) -> dict[str, Any]:
    """The row under our column names, in Python's own values, without empty columns.

    Args:
        row: as it came.
        columns: our column names to the row's.
        shapes: the columns that are expected, for messages.
        known: our column names.
    """
    if not isinstance(row, Mapping):
        raise UserError(f"a row must be an object with the columns {shapes}, but is {shortened(row)}.")
    for ours, theirs in columns.items():
        if ours not in known:
            raise UserError(f"columns.{ours} is not a column that is read; expected one of {', '.join(known)}.")
        if theirs not in row:
            raise UserError(f"no column {theirs!r} (set as columns.{ours}); the columns found are {column_names(row)}.")
    taken = set(columns.values())
    named = {k: v for k, v in row.items() if k not in taken and k not in columns}
    named |= {ours: row[theirs] for ours, theirs in columns.items()}
    plain = {k: plain_value(v) if k in known else v for k, v in named.items()}
    return {k: v for k, v in plain.items() if v is not None and not (isinstance(v, float) and math.isnan(v))}


def parse_prompt(row: Mapping[str, Any], where: str = "") -> tuple[Message, ...]:
    """The prompt alone of a row with two or more replies, which may be empty or alike.

    Raises:
        UserError: the row has no known shape, or a value in it cannot be used; the text says which and why.
    """
    try:
        plain = renamed(row, {}, _SHAPES, COLUMNS)
        turns, _ = prompt_and_replies(plain, _compared_replies(plain)[0])
        return tuple(with_system(plain.get("system", ""), turns))
    except UserError as error:
        raise UserError(f"{where}: {error}" if where else str(error)) from None


def parse_preference(row: dict[str, Any], where: str) -> PreferenceExample:
    """Read a row that `renamed` gave."""
    replies, comparisons = _compared_replies(row)
    prompt, responses = prompt_and_replies(row, replies)
    prompt = with_system(row.get("system", ""), prompt)
    check_replies(dict(zip(replies, responses, strict=True)))
    return PreferenceExample(tuple(prompt), tuple(responses), tuple(comparisons), _alpha(row.get("alpha")), where)


def _compared_replies(row: dict[str, Any]) -> tuple[dict[str, Any], list[Comparison]]:
    """The replies as they are written, by the names of their columns, and the comparisons among them."""
    if "chosen" in row and "rejected" in row:
        replies = {name: row[name] for name in ("chosen", "rejected")}
        comparisons = [Comparison(0, 1, share_of(row.get("share", 1.0), "share"))]
    elif "response_a" in row and "response_b" in row:
        replies = {name: row[name] for name in ("response_a", "response_b")}
        comparisons = [Comparison(0, 1, vote_share(row))]
    elif "responses" in row:
        if not isinstance(row["responses"], list) or len(row["responses"]) < 2:
            raise UserError(f"responses must be a list of two or more replies, but is {shortened(row['responses'])}.")
        replies = {f"responses[{k}]": reply for k, reply in enumerate(row["responses"])}
        comparisons = compared(row, len(replies))
    else:
        raise UserError(f"expected the columns {_SHAPES}; the columns with a value are {column_names(row)}.")
    return replies, comparisons


def _alpha(value: Any) -> float | None:
    if value is None:
        return None
    alpha = number_of(value, "alpha")
    if alpha <= 0:
        raise UserError(f"alpha must be above 0, but is {alpha:g}.")
    if not 1.2e-38 <= alpha <= 3.4e38:
        raise UserError(f"alpha must be a number that float32 can hold, 1.2e-38 to 3.4e38, but is {alpha:g}.")
    return alpha


def prompt_and_replies(row: dict[str, Any], replies: dict[str, Any]) -> tuple[list[Message], list[str]]:
    """The prompt that all replies share, from its own column or from the conversations they end, and their texts."""
    given = _prompt(row)
    prompts, texts = [], []
    for name, value in replies.items():
        *before, reply = _reply(value, name)
        prompts.append(_joined(given, before, name))
        texts.append(reply["content"])
        if not _same(prompts[0], prompts[-1]):
            raise UserError(
                f"{name} must differ from {next(iter(replies))} in the last reply alone, but an earlier turn differs."
            )
    if prompts[0][-1]["role"] == "assistant":
        raise UserError(
            f"{next(iter(replies))} must answer a turn that a reply can follow, but follows one of the assistant's."
        )
    return prompts[0], texts


def _joined(given: list[Message], before: list[Message], name: str) -> list[Message]:
    """The longer of the prompt's column and the turns before a reply: either may end the other, the column open it."""
    if not given and not before:
        raise UserError(f"{name} must be a whole conversation that ends with a reply where no column prompt is given.")
    short, long = sorted((given, before), key=len)
    if not short or _same(long[-len(short) :], short) or (short is given and _same(long[: len(short)], short)):
        return long
    raise UserError(
        f"{name} is a conversation that must repeat the prompt, but begins {shortened(before[0]['content'])}."
    )


def _same(a: list[Message], b: list[Message]) -> bool:
    return [(t["role"], t["content"].strip()) for t in a] == [(t["role"], t["content"].strip()) for t in b]


def _prompt(row: dict[str, Any]) -> list[Message]:
    """The turns of the prompt's column, none where there is no such column."""
    name = "prompt" if "prompt" in row else "messages"
    if name not in row:
        return []
    turns = conversation(row[name], name)
    if len(turns) > 1 and turns[-1] == {"role": "assistant", "content": ""}:
        turns.pop()  # a transcript may be cut right after "Assistant:", the cue for the reply
    if turns[-1]["role"] == "assistant":
        raise UserError(f"{name} must end with a turn that a reply can follow, but ends with the assistant's.")
    return turns


def _reply(value: Any, name: str) -> list[Message]:
    """A reply, and the turns before it where they are given."""
    if isinstance(value, str) and not _is_transcript(value):
        return [{"role": "assistant", "content": text_of(value, name, empty=True)}]
    turns = conversation(value, name)
    if turns[-1]["role"] != "assistant":
        raise UserError(f"{name} must end with the assistant's reply, but ends with a turn of {turns[-1]['role']}.")
    return turns


def conversation(value: Any, name: str) -> list[Message]:
    """Turns of a list of messages, a message, a transcript, or a text (one user turn)."""
    if isinstance(value, Mapping):
        return [_message(value, name)]
    if isinstance(value, list):
        if not value:
            raise UserError(f"{name} is an empty list of messages.")
        return [_message(turn, f"{name}[{k}]") for k, turn in enumerate(value)]
    text = text_of(value, name, "text or a list of messages")
    if not _is_transcript(text):
        return [{"role": "user", "content": text}]
    parts = _TURN.split("\n\n" + text.lstrip())[1:]
    return [{"role": _SPEAKERS[s], "content": c.strip()} for s, c in zip(parts[::2], parts[1::2], strict=True)]


def _is_transcript(text: str) -> bool:
    """Also where the newlines before the first speaker were stripped."""
    return bool(_TURN.match(text)) or (text.startswith("Human:") and "\n\nAssistant:" in text)


def _message(turn: Any, name: str) -> Message:
    if not isinstance(turn, Mapping) or not {"role", "content"} <= set(turn):
        raise UserError(f"{name} must be a message with role and content, but is {shortened(turn)}.")
    if turn["role"] not in ROLES:
        raise UserError(f"{name} has the role {shortened(turn['role'])}; expected one of {', '.join(ROLES)}.")
    return {"role": turn["role"], "content": text_of(turn["content"], f"{name}.content", empty=True)}


def with_system(value: Any, prompt: list[Message]) -> list[Message]:
    """The prompt opened by the system column's text, where it has one."""
    system: Message = {"role": "system", "content": text_of(value, "system", empty=True)}
    if not system["content"].strip():
        return prompt
    if prompt[0]["role"] != "system":
        return [system, *prompt]
    if not _same(prompt[:1], [system]):
        raise UserError("the column system and the conversation's own system message differ: expected one of the two.")
    return prompt


def check_replies(replies: dict[str, str]) -> None:
    """No reply is empty, and no two are alike."""
    names: dict[str, str] = {}
    for name, reply in replies.items():
        text = reply.strip()
        if not text:
            raise UserError(f"{name} is empty: expected a reply to score.")
        if text in names:
            raise UserError(f"{name} is identical to {names[text]} ({shortened(text)}): nothing tells them apart.")
        names[text] = name
