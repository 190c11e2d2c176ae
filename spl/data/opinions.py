"""Closed questions and the shares of people who gave each answer.

Shapes of rows with people's answers, told apart by their columns (others are ignored):

- `question`, `options` and `shares` or `votes`, a number an option; perhaps `group` (whose answers they are) and
  `ordered` (true where the options are a scale).
- `question`, `options`, `distribution`, `country` (GlobalOpinionQA), or as on the Hub `selections` of all countries;
  there lists are written as Python writes them.
- `obs1`, `obs2`, `hyp1`, `hyp2`, `votes` and `premise`, `hypothesis`, `votes` (ChaosNLI: alphaNLI and SNLI). How they
  are asked is ours.
"""

import ast
import json
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from string import ascii_uppercase
from typing import Any, Literal

from spl.data.collate import EncodedExample
from spl.data.parsed import item_of, parsed_rows
from spl.data.source import SURVEY, Source
from spl.data.survey import SURVEY as QUESTIONS
from spl.data.survey import Question, prompt
from spl.data.tokenization import Encoder
from spl.data.values import column_names, number_of, plain_value, shortened, text_of
from spl.types import Message, PreferenceExample, UserError

Presentation = Literal["letters", "text", "unlisted"]

_COLUMNS = (
    "question, options and shares, votes, distribution or selections, or those of ChaosNLI, "
    "obs1, obs2, hyp1, hyp2 and votes or premise, hypothesis and votes"
)
_NO_LITERAL = (ValueError, TypeError, SyntaxError, RecursionError, MemoryError)
# No opinion, but how an interview went; each begins the option.
_NON_ANSWER = re.compile(
    r"\W*(dk|don.?t know|do not know|refused|no (answer|response)|(other )?missing|not (asked|available|applicable))\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Opinion:
    """A closed question.

    Attributes:
        question: its text.
        options: two or more answers, all different.
        people: whose answers to the share of each option; empty where nobody was asked.
        ordered: the options are a scale.
        unlisted: the text that asks where the options are not listed; the question where it is "".
        row: where it came from.
    """

    question: str
    options: tuple[str, ...]
    people: Mapping[str, tuple[float, ...]]
    ordered: bool = False
    unlisted: str = ""
    row: str = ""

    @property
    def item(self) -> str:
        """Its name in results."""
        return item_of(self.row)

    def render(self, presentation: Presentation, order: Sequence[int]) -> str:
        """The question as it is put to the model, option order[k] in place k."""
        if presentation == "unlisted":
            return self.unlisted or self.question
        marks = [f"{letter}." for letter in ascii_uppercase] if presentation == "letters" else ["-"] * len(order)
        lines = [f"{mark} {self.options[k]}" for mark, k in zip(marks, order, strict=False)]
        how = "the letter of your answer" if presentation == "letters" else "one of these, word for word"
        return "\n".join([self.question, "", *lines, "", f"Answer with {how}."])

    def encode(self, encoder: Encoder, presentation: Presentation, order: Sequence[int]) -> EncodedExample:
        """Tokenise the question; its responses are the options, or their letters, in the options' own order.

        Raises:
            UserError: it does not fit, two answers have the same tokens, or there are more options than letters.
        """
        answers = self.options
        if presentation == "letters":
            if len(order) > len(ascii_uppercase):
                raise UserError(f"{self.row}: {len(order)} options are more than letters; set presentation to text.")
            answers = tuple(ascii_uppercase[list(order).index(k)] for k in range(len(order)))
        turn: Message = {"role": "user", "content": self.render(presentation, order)}
        return encoder.encode(PreferenceExample((turn,), answers, (), row=self.row))[0]


def read_opinions(
    source: Source, seed: int = 0, drop_non_answers: bool = True, skip_bad: bool = False
) -> list[Opinion]:
    """The questions of a source in a seeded shuffle, each once however many groups' answers it has.

    The survey is read in its own order.

    Raises:
        UserError: the source cannot be read, or nothing in it can be used.
    """
    if source.path == SURVEY:
        return [_survey(question, f"survey, row {k}") for k, question in enumerate(QUESTIONS, 1)]
    merged: dict[tuple[str, tuple[str, ...], bool, int], Opinion] = {}
    for row in parsed_rows(source, lambda values, where, _: parse_opinion(values, where), None, seed, skip_bad):
        opinion = (without_non_answers if drop_non_answers else with_non_answers)(row)
        if opinion is None:
            continue
        again = 0  # questions that read alike are one, unless they bring the same group's answers
        while (key := (opinion.question, opinion.options, opinion.ordered, again)) in merged:
            if not merged[key].people.keys() & opinion.people.keys():
                break
            again += 1
        before = merged.get(key, opinion)
        merged[key] = replace(before, people={**before.people, **opinion.people})
    if not merged:
        raise UserError(f"{source.path} has no question with two options that are answers.")
    return list(merged.values())


def _survey(asked: Question, where: str) -> Opinion:
    """An embedded question, which without its options is asked as in training."""
    people = {"": tuple(asked.shares.values())}
    return Opinion(asked.text, tuple(asked.shares), people, unlisted=prompt(asked), row=where)


def without_non_answers(opinion: Opinion) -> Opinion | None:
    """Without "Don't know" and the like, shares of the others normalised; None where fewer than two options are left.

    A group of which nobody gave one of the others is left out.
    """
    kept = [k for k, option in enumerate(opinion.options) if not _NON_ANSWER.match(option)]
    chosen = {group: [shares[k] for k in kept] for group, shares in opinion.people.items()}
    people = {group: tuple(s / sum(shares) for s in shares) for group, shares in chosen.items() if sum(shares) > 0}
    if len(kept) < 2 or not people:
        return None
    return replace(opinion, options=tuple(opinion.options[k] for k in kept), people=people)


def with_non_answers(opinion: Opinion) -> Opinion:
    """As it is, but no scale where "Don't know" or the like is one of the options: that has no place on it."""
    return replace(opinion, ordered=opinion.ordered and not any(map(_NON_ANSWER.match, opinion.options)))


def parse_opinion(row: Mapping[str, Any], where: str = "") -> Opinion:
    """Read one row.

    >>> parse_opinion({"question": "Tea?", "options": ["Yes", "No"], "votes": [3, 1]}).people
    {'': (0.75, 0.25)}

    Raises:
        UserError: the row has no known shape, or a value in it cannot be used; the text says which and why.
    """
    try:
        return _parse({name: plain_value(value) for name, value in row.items() if value is not None}, where)
    except UserError as error:
        raise UserError(f"{where}: {error}" if where else str(error)) from None


def _parse(row: dict[str, Any], where: str) -> Opinion:
    if row.keys() >= {"obs1", "obs2", "hyp1", "hyp2", "votes"}:
        before, after = (text_of(row[name], name).strip() for name in ("obs1", "obs2"))
        question = f"It begins: {before}\nIt ends: {after}\n\nWhich is more likely to have happened in between?"
        return _opinion(question, [row["hyp1"], row["hyp2"]], {"": row["votes"]}, False, where)
    if row.keys() >= {"premise", "hypothesis", "votes"}:
        premise, hypothesis = (text_of(row[name], name).strip() for name in ("premise", "hypothesis"))
        question = f"{premise}\n\nIs it true, then, that: {hypothesis}"
        return _opinion(question, ["Yes", "Maybe", "No"], {"": row["votes"]}, True, where)
    given = [name for name in ("shares", "votes", "distribution", "selections") if name in row]
    if not row.keys() >= {"question", "options"} or not given:
        raise UserError(f"expected the columns {_COLUMNS}; the columns with a value are {column_names(row)}.")
    options = _listed(row["options"], "options")
    people = _selections(row[given[0]]) if given[0] == "selections" else {_group(row): row[given[0]]}
    ordered = str(row.get("ordered")).lower() == "true" or _numbered(options)
    return _opinion(text_of(row["question"], "question").strip(), options, people, ordered, where)


def _opinion(question: str, options: list[Any], people: Mapping[str, Any], ordered: bool, where: str) -> Opinion:
    texts = tuple(text_of(str(o) if isinstance(o, int | float) else o, "an option").strip() for o in options)
    if len(set(texts)) < max(len(texts), 2):
        raise UserError(f"options must be two or more different answers, but are {shortened(options)}.")
    shares = {text_of(of, "a group", empty=True): _shares(values, len(texts)) for of, values in people.items()}
    if not shares:
        raise UserError("nobody's answers are given: expected shares or votes of at least one group.")
    return Opinion(question, texts, shares, ordered, row=where)


def _shares(values: Any, count: int) -> tuple[float, ...]:
    numbers = [number_of(v, "a share") for v in _listed(values, "shares")]
    if len(numbers) != count or min(numbers) < 0 or not 0 < sum(numbers) < math.inf:
        raise UserError(
            f"shares or votes must be {count} numbers of 0 or more, one an option, and not all 0, but are "
            f"{shortened(values)}."
        )
    return tuple(number / sum(numbers) for number in numbers)


def _group(row: Mapping[str, Any]) -> str:
    return str(row.get("group", row.get("country", "")))


def _selections(value: Any) -> dict[str, Any]:
    """Countries to their shares; on the Hub "defaultdict(<class 'list'>, {...})" is a text."""
    if isinstance(value, str):
        with suppress(*_NO_LITERAL):
            value = ast.literal_eval(value[value.find("{") : value.rfind("}") + 1])
    if not isinstance(value, dict):
        raise UserError(f"selections must name countries and their shares, but is {shortened(value)}.")
    return {str(country): shares for country, shares in value.items() if shares}


def _listed(value: Any, name: str) -> list[Any]:
    """A list, or its text in JSON or as Python writes it."""
    for read in (json.loads, ast.literal_eval):
        if isinstance(value, str):
            with suppress(*_NO_LITERAL):
                value = read(value)
    if not isinstance(value, list | tuple) or not value:
        raise UserError(f"{name} must be a list, but is {shortened(value)}.")
    return list(value)


def _numbered(options: list[Any]) -> bool:
    """Whether all options between the ends are the numbers of their places: a scale such as Never, 2, ... 9, Always."""
    inner = [str(option).strip() for option in options if not _NON_ANSWER.match(str(option))]
    return len(inner) > 3 and inner[1:-1] == [str(k) for k in range(2, len(inner))]
