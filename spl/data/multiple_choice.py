"""Multiple-choice questions, to ask whether a model's probabilities of the letters mean anything.

Shapes of rows, told apart by their columns (others are ignored):

- `question`, `choices`, `answer` (MMLU): the answer is an index from 0 or a letter. The choices stay in their order,
  which is part of the question ("all of the above").
- `question`, `mc1_choices`, `mc1_labels` (TruthfulQA; on the Hub `mc1_targets` with `choices` and `labels`): one label
  is 1. The right choice comes first in every row, so each row's choices are put in an order of their own.

In CSV a list is written as JSON. A column `subject`, where there is one, is kept: worked examples are of the same one.
"""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from string import ascii_uppercase
from typing import Any, NamedTuple

import numpy as np

from spl.data.collate import EncodedExample, collate, common
from spl.data.encode import Report, RowEncoder
from spl.data.loader import InOrder
from spl.data.shards import Row
from spl.data.source import Source
from spl.data.tokenization import Encoder
from spl.data.values import column_names, index_of, plain_value, shortened, text_of
from spl.types import Message, PreferenceBatch, PreferenceExample, UserError

log = logging.getLogger(__name__)

_COLUMNS = "question, choices and answer, or question, mc1_choices and mc1_labels"


@dataclass(frozen=True)
class MultipleChoice:
    """A question with one right choice.

    Attributes:
        question: its text.
        choices: two to 26 answers, in the order in which they are shown.
        answer: index of the right one.
        row: where it came from.
        subject: what it is about; "" where the row does not say.
    """

    question: str
    choices: tuple[str, ...]
    answer: int
    row: str = ""
    subject: str = ""

    @property
    def letters(self) -> tuple[str, ...]:
        return tuple(ascii_uppercase[: len(self.choices)])

    def render(self) -> str:
        """The question as it is put to the model."""
        lines = [f"{letter}. {choice}" for letter, choice in zip(self.letters, self.choices, strict=True)]
        return "\n".join([self.question, "", *lines, "", "Answer with the letter of the right choice."])

    def turns(self) -> tuple[Message, Message]:
        """The question and its right letter, as a worked example for another."""
        return {"role": "user", "content": self.render()}, {"role": "assistant", "content": self.letters[self.answer]}

    def reordered(self, order: Sequence[int]) -> "MultipleChoice":
        """The same question with choice order[k] in place k."""
        choices = tuple(self.choices[k] for k in order)
        return replace(self, choices=choices, answer=list(order).index(self.answer))


class EncodedChoice(NamedTuple):
    """A tokenised question: its responses are the letters, each a single scored token."""

    example: EncodedExample
    answer: int  # index of the right letter


def parse_choices(row: Mapping[str, Any], where: str = "", seed: Sequence[int] = (0,)) -> MultipleChoice:
    """Read one row.

    >>> parse_choices({"question": "2 + 2?", "choices": ["3", "4"], "answer": "B"}).answer
    1

    Args:
        row: column names to values, Python's own or numpy's.
        where: "file, row 12", put before every complaint.
        seed: of the order of choices, where the row lists the right one first.

    Raises:
        UserError: the row has no known shape, or a value in it cannot be used; the text says which and why.
    """
    try:
        return _parse({name: plain_value(value) for name, value in row.items()}, where, seed)
    except UserError as error:
        raise UserError(f"{where}: {error}" if where else str(error)) from None


def _parse(row: dict[str, Any], where: str, seed: Sequence[int]) -> MultipleChoice:
    row = {name: value for name, value in row.items() if value is not None}
    if isinstance(targets := row.get("mc1_targets"), dict):
        row |= {f"mc1_{name}": values for name, values in targets.items()}
    if row.keys() >= {"question", "choices", "answer"}:
        choices = _texts(row["choices"], "choices")
        answer = _index(row["answer"], len(choices))
    elif row.keys() >= {"question", "mc1_choices", "mc1_labels"}:
        listed = _texts(row["mc1_choices"], "mc1_choices")
        right = _labelled(row["mc1_labels"], len(listed))
        order = np.random.default_rng(seed).permutation(len(listed)).tolist()
        choices, answer = tuple(listed[k] for k in order), order.index(right)
    else:
        raise UserError(f"expected the columns {_COLUMNS}; the columns with a value are {column_names(row)}.")
    question = text_of(row["question"], "question").strip()
    return MultipleChoice(question, choices, answer, where, str(row.get("subject", "")))


def _texts(value: Any, name: str) -> tuple[str, ...]:
    values = _list(value, name)
    if not 2 <= len(values) <= len(ascii_uppercase):
        raise UserError(f"{name} must be 2 to {len(ascii_uppercase)} answers, but are {len(values)}.")
    return tuple(text_of(text, f"{name}[{k}]").strip() for k, text in enumerate(values))


def _list(value: Any, name: str) -> list[Any]:
    if isinstance(value, str):  # of a CSV file
        with suppress(ValueError, RecursionError):
            value = json.loads(value)
    if not isinstance(value, list):
        raise UserError(f"{name} must be a list, but is {shortened(value)}.")
    return value


def _index(value: Any, count: int) -> int:
    """The right choice's index, from an index or a letter."""
    letters, given = ascii_uppercase[:count], value
    if isinstance(value, str):
        text = value.strip().upper()
        number = text.isdecimal() and len(text) < 3  # int() refuses thousands of digits
        given = int(text) if number else letters.find(text) if len(text) == 1 else -1
    answer = index_of(given, count)
    if answer < 0:
        raise UserError(
            f"answer must be the index of a choice, 0 to {count - 1}, or its letter, A to {letters[-1]}, "
            f"but is {shortened(value)}."
        )
    return answer


def _labelled(value: Any, count: int) -> int:
    labels = _list(value, "mc1_labels")
    if len(labels) != count or labels.count(1) != 1 or labels.count(0) != count - 1:
        raise UserError(
            f"mc1_labels must be {count} numbers, one of them 1 and the others 0, but is {shortened(value)}."
        )
    return labels.index(1)


def encode_choice(choice: MultipleChoice, encoder: Encoder, shots: Sequence[MultipleChoice] = ()) -> EncodedChoice:
    """Tokenise a question with each of its letters as the reply; the token that tells them apart is scored, no other.

    What a tokenizer or template writes before every letter (a space, say) counts as prompt. What ends the turn is left
    out, so the scored token's law is the model's choice among the letters (and all else it might write).

    Args:
        choice: the question.
        encoder: tokenises.
        shots: worked examples, which stand before it as turns of the conversation.

    Raises:
        UserError: the template cannot render it, or the tokenizer gives two letters one token.
    """
    turn: Message = {"role": "user", "content": choice.render()}
    turns = (*(turn for shot in shots for turn in shot.turns()), turn)
    encoded, _ = encoder.encode(PreferenceExample(turns, choice.letters, (), row=choice.row))
    start = min(common(encoded.sequences[0], sequence) for sequence in encoded.sequences[1:])
    if len({sequence[start : start + 1] for sequence in encoded.sequences} - {()}) < len(choice.letters):
        name, letters = choice.row or "a question", ", ".join(choice.letters)
        raise UserError(f"{name}: the tokenizer gives two of the letters {letters} the same first token.")
    sequences = tuple(sequence[: start + 1] for sequence in encoded.sequences)
    return EncodedChoice(replace(encoded, sequences=sequences, starts=(start,) * len(sequences)), choice.answer)


def encode_choices(source: Source, encoder: RowEncoder, num: int, seed: int) -> list[EncodedChoice]:
    """The first `num` usable questions of a seeded shuffle: MMLU's rows are sorted by subject.

    A question longer than max_length is never cut, it is left out (unless truncation is "raise"): its beginning would
    be lost.

    Raises:
        UserError: the source cannot be read, nothing in it can be used, or a row cannot be and bad_rows is "raise".
    """
    try:
        rows = list(source.rows())
    except UserError as error:
        raise UserError(f"data.multiple_choice: {error}") from None
    report = Report()
    found = list(islice(_encoded(rows, encoder, seed, report), num))
    if not found:
        why = f" ({report.describe()})" if report.skipped or report.too_long else ""
        raise UserError(f"data.multiple_choice: no usable question among the {len(rows)} rows of {source.path}{why}.")
    if report.skipped or report.too_long:
        log.info("%s: %s.", source.path, report.describe())
    return found


def _encoded(rows: list[Row], encoder: RowEncoder, seed: int, report: Report) -> Iterator[EncodedChoice]:
    tokenise = encoder.encoder
    if tokenise.truncation == "cut":
        tokenise = replace(tokenise, truncation="drop")
    for k in np.random.default_rng(seed).permutation(len(rows)).tolist():
        where, row = rows[k]
        try:
            if isinstance(row, UserError):
                raise row
            encoded = encode_choice(parse_choices(row, where, (seed, k)), tokenise)
        except UserError as error:
            encoder.count(rows[k], error, report)
            continue
        report.examples += 1
        yield encoded


def choice_batches(
    choices: Sequence[EncodedChoice], size: int, rank: int = 0, world: int = 1
) -> Iterator[tuple[PreferenceBatch, list[int]]]:
    """This process's share, about `size` questions a batch, with the index of each question's right letter.

    Every process has the same number of batches, as a sharded model needs.

    Raises:
        UserError: there are fewer questions than processes.
    """
    if len(choices) < world:
        raise UserError(f"{len(choices)} questions cannot be shared by {world} processes: lower trainer.devices.")
    for group in InOrder(len(choices), size, rank, world)(0):
        yield collate([choices[k].example for k in group]), [choices[k].answer for k in group]
