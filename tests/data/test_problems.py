"""Problems from rows of every shape, and the arithmetic that is made in code."""

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest

from spl.data.arithmetic import arithmetic
from spl.data.problems import TEMPLATE, last_boxed, parse_problem, read_problems
from spl.types import UserError


def rows(path: Path, *values: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return str(path)


def test_arithmetic_is_right_graded_and_the_same_in_every_run() -> None:
    found = list(arithmetic())
    assert len(found) == 120 and len({question for _, _, question, _ in found}) == 120
    for item, level, question, answer in found:
        expression = re.fullmatch(r"Compute ([\d +*-]+)\. Reply with the result only\.", question)
        assert expression and str(eval(expression[1])) == answer
        assert item.startswith(f"{level}.")
    assert [level for _, level, _, _ in found[:7]] == ["1", "2", "3", "4", "5", "6", "1"]
    assert list(arithmetic(9)) == found[:9]
    assert found[0][2:] == ("Compute 3 + 3. Reply with the result only.", "6")


def test_shapes_of_rows() -> None:
    gsm8k = parse_problem({"question": "Nine and nine?", "answer": "9 + 9 = <<9+9=18>>18\n#### 18"}, item="4")
    assert (gsm8k.item, gsm8k.answer, gsm8k.level) == ("4", "18", None)
    assert gsm8k.prompt == TEMPLATE.replace("{question}", "Nine and nine?")
    math = {"problem": "Half?", "solution": r"It is $\boxed{\frac{1}{2}}$.", "level": "Level 5", "unique_id": "t/1"}
    assert parse_problem(math).answer == r"\frac{1}{2}"
    assert (parse_problem(math).level, parse_problem(math).item) == ("5", "t/1")
    assert parse_problem(math | {"answer": "0.5", "level": 2}).answer == "0.5"
    assert parse_problem({"prompt": "7?", "answer": 7, "id": 3}, template="{question}").prompt == "7?"
    numbers = {
        7.5: "7.5",
        18.0: "18",
        12345.678: "12345.678",
        0.1234567: "0.1234567",
        1e21: "1" + 21 * "0",
        1e-7: "0.0000001",
    }
    for number, text in numbers.items():
        assert parse_problem({"prompt": "7?", "answer": number}).answer == text


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"question": "Why?"}, r"expected the columns question .* are .question.\.$"),
        ({"question": "Why?", "answer": "####  "}, "answer after #### is empty"),
        ({"question": "  ", "answer": "1"}, "question is empty"),
        ({"problem": "Why?", "solution": "Because."}, r"solution must hold its answer in \\boxed"),
        ({"problem": "Why?", "answer": ["1"]}, "answer must be text"),
        ({"problem": "Why?", "answer": True}, "answer must be text"),
        ({"problem": "Why?", "answer": float("nan")}, "answer must be a finite number"),
    ],
)
def test_what_is_no_problem_is_refused(row: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=f"^here, row 3: .*{says}"):
        parse_problem(row, "here, row 3")


def test_the_last_box_counts_with_the_braces_in_it() -> None:
    assert last_boxed(r"\boxed{1} or \boxed{\left\{\frac{1}{2}, 3\right\}}.") == r"\left\{\frac{1}{2}, 3\right\}"
    assert last_boxed(r"\boxed{3} and \fbox{4}") == "4"
    assert last_boxed(r"\boxed{3} and \boxed{4") is None
    assert last_boxed("3") is None


def test_a_choice_of_problems_keeps_their_ids_and_order(tmp_path: Path) -> None:
    name = rows(tmp_path / "p.jsonl", *({"question": f"{k}?", "answer": str(k)} for k in range(1, 21)))
    every, some = read_problems(name), read_problems(name, num=6, seed=1, template="Q: {question} {} A:")
    assert [problem.item for problem in every] == [str(k) for k in range(1, 21)]
    numbers = [int(problem.item) for problem in some]
    assert len(numbers) == 6 and numbers == sorted(numbers) and numbers != list(range(1, 7))
    assert all(p.answer == p.item and p.prompt == f"Q: {p.item}? {{}} A:" for p in some)
    assert some == read_problems(name, num=6, seed=1, template="Q: {question} {} A:")
    assert len(read_problems(name, num=99)) == 20


def test_mistakes_end_in_a_sentence(tmp_path: Path) -> None:
    twice = {"id": "a", "question": "1?", "answer": "1"}
    with pytest.raises(UserError, match=r"row 2: the id 'a' is that of .*row 1 too"):
        read_problems(rows(tmp_path / "twice.jsonl", twice, twice))
    with pytest.raises(UserError, match=r"must hold \{question\}"):
        read_problems("arithmetic", template="Answer:")
    with pytest.raises(UserError, match="holds no problem"):
        read_problems(rows(tmp_path / "none.jsonl"))
    with pytest.raises(UserError, match="num_problems must be at least 1"):
        read_problems("arithmetic", num=0)


@pytest.mark.parametrize(("file", "num"), [("gsm8k_test_first659", 659), ("math500_first250", 250)])
def test_the_real_sets_are_read_whole(shared_data: Path, file: str, num: int) -> None:
    path = shared_data / f"{file}.jsonl.gz"
    problems = read_problems(str(path))
    with gzip.open(path, "rt") as lines:
        given = [json.loads(line) for line in lines]
    assert len(problems) == num == len(given)
    for problem, row in zip(problems, given, strict=True):
        assert problem.prompt.startswith(row.get("question", row.get("problem", "")).strip())
        assert row["answer"].endswith(problem.answer) and "####" not in problem.answer
