"""Final answers are found where replies state them, and are the same where math-verify says so."""

import time
from collections.abc import Iterator
from itertools import permutations
from pathlib import Path

import pytest

from spl.data.problems import read_problems
from spl.evaluation.answers import answer_classes, final_answer, plain_number
from spl.evaluation.equality import Equality, _parsed, may_equal
from spl.types import UserError


@pytest.fixture(scope="module")
def equality() -> Iterator[Equality]:
    with Equality() as shared:
        yield shared


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        (r"So $\boxed{3}$, or rather $\boxed{\frac{1}{2}}$.", r"\frac{1}{2}"),
        (r"#### 4" + "\n" + r"\boxed{5}, the answer is 6", "5"),
        ("9 + 9 = <<9+9=18>>18\n#### 18", "18"),
        ("The answer is 5. No, the answer is 6.", "6"),
        ("Final answer: **$1,234.50**", "1,234.50"),
        ("The final answer is $26. I hope it is correct.", "26"),
        ("The answer is:\n\n18 dollars", "18"),
        ("the answer is -7, since 3 - 10 = -7.", "-7"),
        (r"The answer is \(\sqrt{2}\) metres.", r"\sqrt{2}"),
        ("The answer is $x + 1$ because x = 2.", "x + 1"),
        ("The answer is 18 and 19.", "18 and 19"),
        ("The answer is 3 x + 1", "3 x + 1"),
        ("Answer: Evelyn", "Evelyn"),
        ("The answer is therefore **18**.", "18"),
        ("The answer is approximately equal to 3.14.", "3.14"),
        ("The answer is simply $x + 1$.", "x + 1"),
        ("The answer is:\n\\[ \\frac{1}{2} \\]", r"\frac{1}{2}"),
        ("#### Step 1: add\n9 + 9 = 18\nThe answer is 18.", "18"),
        ("#### **Solution**\n9 + 9 = 18", "18"),
        ("#### 1. Add the two\n9 + 9 = 18", "18"),
        ("##### 4\n9 + 9 = 18", "18"),
        ("#### Final answer: 18", "18"),
        ("It is the day after Sunday.\n#### Monday\n", "Monday"),
        ("So x = \u22125.", "-5"),
        ("The answer is \u22125 degrees.", "-5"),
        ("The answer is 7 dozen eggs.", "7"),
        ("The answer is 3 squared", "3 squared"),
        ("The answer is 18 squared meters", "18"),
        ("#### 18 dollars\n\nQuestion: 2 + 2?", "18"),
        (r"#### \sqrt 2" + "\nDone.", r"\sqrt 2"),
        ("3 + 4 equals 7.", "7"),
        ("3-10 is 7 below zero: -7", "-7"),
        ("10-3", "3"),
        ("It costs $1,200, not 3%.", "3%"),
        ("It is .5", ".5"),
        ("The answer is", None),
        (r"\boxed{}", None),
        ("No idea.", None),
        ("", None),
        ("The answer is " + "x" * 400, None),
    ],
)
def test_where_a_reply_states_its_answer(reply: str, answer: str | None) -> None:
    assert final_answer(reply) == answer


def test_the_last_number_of_a_reply_that_was_cut_is_a_step_on_the_way() -> None:
    reply = "First we add 3 and 4, which is 7, then"
    assert final_answer(reply, ended=False) is None
    assert final_answer(reply, ended=False, last_number="always") == "7"
    assert final_answer(reply, ended=True, last_number="never") is None
    assert final_answer("The answer is 8, and", ended=False, last_number="never") == "8"


# Expected values as math-verify's documentation and its own tests state them.
@pytest.mark.parametrize(
    ("right", "answer", "same"),
    [
        (r"\frac{1}{2}", "0.5", True),
        (r"\frac{1}{3}", "0.333333", True),
        (r"\frac{1}{3}", "0.33", False),
        ("1", "x=1", True),
        ("x = 1", "1", True),
        (r"\{1,2,3\}", r"\{3,2,1\}", True),
        (r"\{1,3\} \cup \{2,4\}", r"\{1,2,3,4\}", True),
        ("(1, 2)", r"\left(1, 2\right)", True),
        ("(1, 2)", "(2, 1)", False),
        (r"\sqrt{2}/2", r"\frac{1}{\sqrt{2}}", True),
        ("2x + 1", "1 + 2x", True),
        ("2x + 1", "2y + 1", False),
        (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{bmatrix} 1 \\ 2 \end{bmatrix}", True),
        ("9", "3^2", True),
        ("50", r"50\%", True),
        ("0.5", r"50\%", True),
        ("12", r"12\text{ cm}", True),
        ("1234", "1{,}234", True),
        ("18", "eighteen", False),
        ("18", "18 and 19", False),
    ],
)
def test_answers_are_equal_as_math_verify_says(equality: Equality, right: str, answer: str, same: bool) -> None:
    assert (answer_classes([right, answer], equality) == [0, 0]) is same


def test_plain_numbers_are_compared_without_the_process() -> None:
    with Equality() as never_asked:
        answers = ["18", "18.00", "1,234", "$18", "1234", "-18", ".5", "0.5"]
        assert answer_classes(answers, never_asked) == [0, 0, 1, 0, 1, 2, 3, 3]
        assert never_asked._process is None
    assert plain_number("0.3333333") is None  # math-verify rounds to six decimals
    assert plain_number("12,34") is None and plain_number("1/2") is None


def test_classes_join_forms_of_one_answer(equality: Equality) -> None:
    answers = ["18", "x = 18", "1/2", "18.0", r"\frac{2}{4}", "0.5", "blue", "Blue"]
    assert answer_classes(answers, equality) == [0, 0, 1, 0, 1, 1, 2, 2]


def test_garbage_equals_nothing(equality: Equality) -> None:
    garbage = ["}{", r"\frac{", "(", "\x00", "\ud800", r"\int_0^1", "1" * 300, "a_b^c!!!", r"\text", "$", "**"]
    assert answer_classes(["7", *garbage], equality) == list(range(len(garbage) + 1))
    assert equality.given_up == 0


def test_an_answer_that_takes_too_long_is_given_up() -> None:
    with Equality(seconds=2) as equality:
        before = time.monotonic()
        assert answer_classes(["7", "9^{9^{9^9}}"], equality) == [0, 1]
        assert equality.given_up == 1 and time.monotonic() - before < 60
        assert answer_classes(["1/2", "0.5"], equality) == [0, 0]  # it goes on


@pytest.mark.parametrize("file", ["gsm8k_test_first659", "math500_first250"])
def test_right_answers_are_read_and_equal_themselves(shared_data: Path, equality: Equality, file: str) -> None:
    """In the form that models give them in: boxed, and for GSM8K in the dataset's own form too."""
    problems = read_problems(str(shared_data / f"{file}.jsonl.gz"))
    for problem in problems:
        found = final_answer(rf"Therefore the answer is $\boxed{{{problem.answer}}}$.")
        assert found == problem.answer.strip()
        # A space keeps the texts apart, so that they are compared by their meaning.
        assert plain_number(found) is not None or equality.find([problem.answer], found + " ") == 0
        if file.startswith("gsm8k"):
            assert final_answer(f"So it is 3.\n#### {problem.answer}") == problem.answer
    assert equality.given_up == 0


def test_a_process_that_does_not_start_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/bin/false")
    with Equality() as equality, pytest.raises(UserError, match="does not start: python -m spl"):
        equality.find(["1/2"], "0.5")


def test_what_is_told_apart_beforehand_is_unequal_to_math_verify_too() -> None:
    from math_verify import verify

    answers = ["18", "18%", "0.18", "x=18", r"\frac{1}{3}", "0.333333", "2x+1", "1+2x", "2y+1", r"\{1,2\}", "1e-7"]
    told = 0
    for right, answer in permutations(answers, 2):
        if not may_equal(right, answer):
            told += 1
            assert not verify(_parsed(right), _parsed(answer)), (right, answer)
    assert told > 50
