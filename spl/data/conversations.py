"""Conversations to reply to, from rows of any shape that holds a prompt.

Shapes of rows, told apart by their columns (others are ignored):

- a preference row of any shape that `formats` knows, of which the prompt is taken.
- `turns`, a list of user turns, of which the first is taken (MT-Bench).
- `prompt` or `messages`: a text, a list of messages or a raw transcript; an assistant's last turn is left out.
- `question`, `problem` or `instruction`, a text.

An id is a column `id`, `uid`, `unique_id` or `question_id`, else the row's number from 1.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from spl.data.formats import conversation, parse_prompt
from spl.data.source import named_source
from spl.data.values import column_names, plain_value, shortened, text_of
from spl.types import Message, UserError

_TEXTS = ("question", "problem", "instruction")
_IDS = ("id", "uid", "unique_id", "question_id")
_PREFERENCES = ({"chosen", "rejected"}, {"responses"}, {"response_a", "response_b"})


@dataclass(frozen=True)
class Conversation:
    """A conversation that a reply can follow.

    Attributes:
        item: its id in its source.
        messages: its turns, the last of which is no assistant's.
    """

    item: str
    messages: tuple[Message, ...]


def read_conversations(name: str, num: int | None = None, split: str = "train") -> list[Conversation]:
    """The conversations of a source, in its order.

    Args:
        name: a local file or folder, or a data set's id on the Hub as ID, ID:CONFIG or ID:CONFIG:SPLIT.
        num: of them, the first; all by default.
        split: of a data set on the Hub where none is named.

    Raises:
        UserError: there is no such source, a row has no known shape, or two have one id.
    """
    if num is not None and num < 1:
        raise UserError(f"num_prompts must be at least 1, but is {num}.")
    found: dict[str, Conversation] = {}
    for number, (where, row) in enumerate(islice(named_source(name, split).rows(), num), 1):
        if isinstance(row, UserError):
            raise row
        one = parse_conversation(row, where, str(number))
        if one.item in found:
            raise UserError(f"{where}: the id {one.item!r} is that of an earlier row too.")
        found[one.item] = one
    if not found:
        raise UserError(f"{name} holds no prompt.")
    return list(found.values())


def parse_conversation(row: Mapping[str, Any], where: str = "", item: str = "1") -> Conversation:
    """Read one row.

    >>> parse_conversation({"question_id": 81, "turns": ["Tea?", "Why?"]})
    Conversation(item='81', messages=({'role': 'user', 'content': 'Tea?'},))

    Args:
        row: column names to values, Python's own or numpy's.
        where: "file, row 12", put before every complaint.
        item: of a row that has no id.

    Raises:
        UserError: the row has no known shape, or a value in it cannot be used; the text says which and why.
    """
    if any(shape <= row.keys() for shape in _PREFERENCES):
        messages = parse_prompt(row, where)
    else:
        try:
            messages = tuple(_turns({name: plain_value(value) for name, value in row.items()}))
        except UserError as error:
            raise UserError(f"{where}: {error}" if where else str(error)) from None
    ids = (row[name] for name in _IDS if isinstance(row.get(name), str | int))
    return Conversation(str(next(ids, item)), messages)


def _turns(row: Mapping[str, Any]) -> list[Message]:
    values = {name: value for name, value in row.items() if value is not None}
    if "turns" in values:
        if not isinstance(values["turns"], list) or not values["turns"]:
            raise UserError(f"turns must be a list of texts, but is {shortened(values['turns'])}.")
        return [{"role": "user", "content": text_of(values["turns"][0], "turns[0]")}]
    for name in ("prompt", "messages"):
        if name in values:
            turns = conversation(values[name], name)
            turns = turns[:-1] if turns[-1]["role"] == "assistant" else turns
            if not turns or turns[-1]["role"] == "assistant":
                raise UserError(f"{name} must hold a turn that a reply can follow.")
            return turns
    for name in _TEXTS:
        if name in values:
            return [{"role": "user", "content": text_of(values[name], name)}]
    raise UserError(
        "expected a column prompt, messages, turns, question, problem or instruction, or a preference pair; the "
        f"columns with a value are {column_names(values)}."
    )


def opened_with(system: str | None, conversations: Iterable[Conversation]) -> list[Conversation]:
    """Open every conversation with a system message; those that have one keep their own."""
    if not system:
        return list(conversations)
    opening: Message = {"role": "system", "content": system}
    return [
        one if one.messages[0]["role"] == "system" else Conversation(one.item, (opening, *one.messages))
        for one in conversations
    ]
