r"""Problems with one checkable answer: GSM8K, MATH, rows of questions and answers, and arithmetic made in code.

Shapes of rows, told apart by their columns (others are ignored):

- `question`, `answer` that ends in a line `#### 18` (GSM8K).
- `problem`, `answer` or a `solution` with a `\boxed{}` answer, perhaps `level` (MATH; "Level 5" and 5 are one).
- `question`, `prompt` or `problem`, and `answer`, a text or a number.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from spl.data.arithmetic import ARITHMETIC, arithmetic
from spl.data.source import Source, named_source
from spl.data.values import column_names, number_of, plain_value, shortened, text_of
from spl.types import UserError

TEMPLATE = "{question}\n\nReason step by step, and put the final answer in \\boxed{}."
"""How a problem is put to a model; not stated by the paper."""

_KNOWN = {"gsm8k": "openai/gsm8k:main:test", "math": "HuggingFaceH4/MATH-500::test"}
_QUESTIONS = ("question", "problem", "prompt")
_IDS = ("id", "uid", "unique_id", "question_id")


@dataclass(frozen=True)
class Problem:
    """A problem and its answer.

    Attributes:
        item: its id in its source: a column `id`, `uid`, `unique_id` or `question_id`, else the row's number from 1.
        question: its text.
        prompt: as it is put to a model.
        answer: the right one, as the source writes it.
        level: of difficulty, as the source has it.
        source: where it came from, as "file, row 12".
    """

    item: str
    question: str
    prompt: str
    answer: str
    level: str | None = None
    source: str = ""


def read_problems(name: str, num: int | None = None, seed: int = 0, template: str | None = None) -> list[Problem]:
    """Problems by the name of their source, in its order.

    Args:
        name: "arithmetic", "gsm8k", "math", a local file or folder, or a data set's id on the Hub as ID, ID:CONFIG or
            ID:CONFIG:SPLIT (split test by default).
        num: of problems, chosen at random by the seed; all by default. Of arithmetic as many of every level.
        seed: of the choice.
        template: how a problem is put to a model, with {question} where it stands. By default the arithmetic ones as
            they are, and others with a request to reason and to box the answer. Not stated by the paper.

    Raises:
        UserError: there is no such source, a row is no problem, or the template has no place for the question.
    """
    if template is not None and "{question}" not in template:
        raise UserError(f"template must hold {{question}}, where the problem stands, but is {shortened(template)}.")
    if num is not None and num < 1:
        raise UserError(f"num_problems must be at least 1, but is {num}.")
    if name == ARITHMETIC:
        return [
            Problem(item, question, _filled(template or "{question}", question), answer, level, f"arithmetic, {item}")
            for item, level, question, answer in arithmetic(num)
        ]
    problems = list(_parsed(named_source(_KNOWN.get(name, name), "test"), template or TEMPLATE))
    if not problems:
        raise UserError(f"{name} holds no problem: expected rows with a question and an answer.")
    if num is None or num >= len(problems):
        return problems
    chosen = np.random.default_rng(seed).choice(len(problems), num, replace=False)
    return [problems[k] for k in sorted(chosen.tolist())]


def _filled(template: str, question: str) -> str:
    # Not str.format: a template may ask for \boxed{}.
    return template.replace("{question}", question)


def _parsed(source: Source, template: str) -> Iterator[Problem]:
    seen: dict[str, str] = {}
    for number, (where, row) in enumerate(source.rows(), 1):
        if isinstance(row, UserError):
            raise row
        problem = parse_problem(row, where, template, str(number))
        if problem.item in seen:
            raise UserError(f"{where}: the id {problem.item!r} is that of {seen[problem.item]} too.")
        seen[problem.item] = where
        yield problem


def parse_problem(row: Mapping[str, Any], where: str = "", template: str = TEMPLATE, item: str = "1") -> Problem:
    """Read one row.

    >>> parse_problem({"question": "What is 9 + 9?", "answer": "9 + 9 = 18\\n#### 18"}).answer
    '18'

    Args:
        row: column names to values, Python's own or numpy's.
        where: "file, row 12", put before every complaint.
        template: see `read_problems`.
        item: of a row that has no id.

    Raises:
        UserError: the row has no known shape, or a value in it cannot be used; the text says which and why.
    """
    values = {name: plain for name, value in row.items() if (plain := plain_value(value)) is not None}
    try:
        column = next((name for name in _QUESTIONS if name in values), None)
        if column is None or not values.keys() & {"answer", "solution"}:
            raise UserError(
                f"expected the columns question (or problem, or prompt) and answer (or solution); the columns with a "
                f"value are {column_names(values)}."
            )
        question, level = text_of(values[column], column).strip(), values.get("level")
        found = next((str(values[name]) for name in _IDS if name in values), item)
        answer = _answer(values)
    except UserError as error:
        raise UserError(f"{where}: {error}" if where else str(error)) from None
    level = None if level is None else str(level).removeprefix("Level ")
    return Problem(found, question, _filled(template, question), answer, level, where)


def _answer(values: dict[str, Any]) -> str:
    if "answer" not in values:
        boxed = last_boxed(text_of(values["solution"], "solution"))
        if boxed is None:
            raise UserError("solution must hold its answer in \\boxed{}, as there is no column answer.")
        return boxed
    answer = values["answer"]
    if isinstance(answer, float):
        return np.format_float_positional(number_of(answer, "answer"), trim="-")  # all its digits, and 18 for 18.0
    if isinstance(answer, int) and not isinstance(answer, bool):
        return str(answer)
    return text_of(text_of(answer, "answer").rpartition("####")[2], "answer after ####").strip()


def last_boxed(text: str) -> str | None:
    r"""What the last \boxed{} (or \fbox{}) of a text holds, braces within it counted; None without a closed one.

    >>> last_boxed(r"so $\boxed{\frac{1}{2}}$.")
    '\\frac{1}{2}'
    """
    for start in sorted((text.rfind(r"\boxed{"), text.rfind(r"\fbox{")), reverse=True):
        depth, begin = 0, text.find("{", start)
        for at in range(begin, len(text)) if start >= 0 else ():
            depth += {"{": 1, "}": -1}.get(text[at], 0)
            if not depth:
                return text[begin + 1 : at].strip()
    return None
