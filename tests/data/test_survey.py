import math

import pytest

from spl.data.formats import parse_row
from spl.data.survey import SURVEY, Question, prompt, survey_rows
from spl.types import Comparison


def test_there_are_eight_different_questions() -> None:
    assert len({question.text for question in SURVEY}) == len(SURVEY) == 8


@pytest.mark.parametrize("question", SURVEY, ids=lambda question: question.text)
def test_each_has_two_to_four_one_word_answers_and_shares_that_sum_to_one(question: Question) -> None:
    assert 2 <= len(question.shares) <= 4
    assert all(answer.isalpha() and answer.istitle() for answer in question.shares)
    assert all(0 < share < 1 for share in question.shares.values())
    assert math.isclose(sum(question.shares.values()), 1.0, abs_tol=1e-12)


def test_the_prompt_asks_for_one_word() -> None:
    assert prompt(SURVEY[0]) == "Coffee or tea in the morning? Answer with one word."


def test_rows_by_hand() -> None:
    coffee, _, season, *_ = (parse_row(row) for row in survey_rows())
    assert coffee.prompt == ({"role": "user", "content": "Coffee or tea in the morning? Answer with one word."},)
    assert coffee.responses == ("Coffee", "Tea")
    assert coffee.comparisons == (Comparison(0, 1, 0.8),)
    assert season.responses == ("Summer", "Spring", "Autumn", "Winter")
    expected = {(0, 1): 4 / 7, (0, 2): 2 / 3, (0, 3): 4 / 5, (1, 2): 3 / 5, (1, 3): 3 / 4, (2, 3): 2 / 3}
    assert {(i, j): share for i, j, share in season.comparisons} == pytest.approx(expected)


def test_all_pairs_of_answers_are_compared_and_the_reward_is_the_log_share() -> None:
    for question, row in zip(SURVEY, survey_rows(), strict=True):
        parsed = parse_row(row)
        count = len(question.shares)
        assert len({frozenset(c[:2]) for c in parsed.comparisons}) == count * (count - 1) // 2
        reward = [math.log(question.shares[answer]) for answer in parsed.responses]
        for first, second, share in parsed.comparisons:
            assert math.log(share / (1 - share)) == pytest.approx(reward[first] - reward[second])
