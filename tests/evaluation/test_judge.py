"""A judge behind a real server with scripted verdicts: both orders, ties, what cannot be read, nothing asked twice."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from local_server import Answer, refusal, reply, serving

from spl.evaluation.judge import Comparison, Judge, Question, diversity_scores, win_rates
from spl.evaluation.judge_prompts import APPROACH, COMPARISON, DIVERSITY, EQUIVALENCE, JudgePrompt, two_answers
from spl.evaluation.partitions import embedding_partition, exact_partition, judged_partitions
from spl.sampling.server import ChatServer
from spl.types import Message, UserError

ASKED: list[Message] = [{"role": "user", "content": "Tea or coffee?"}]


def content(body: dict[str, Any]) -> str:
    """What a judge is asked first."""
    return str(body["messages"][1]["content"])


def between(text: str, tag: str) -> str:
    return text.split(f"<{tag}>\n")[1].split(f"\n</{tag}>")[0]


def longer_wins(body: dict[str, Any], number: int = 0) -> Answer:
    a, b = (between(content(body), f"answer_{letter}") for letter in "AB")
    return reply(f"Because.\n\n**Verdict: {'tie' if len(a) == len(b) else 'A' if len(a) > len(b) else 'B'}**")


def a_judge(url: str, folder: Path) -> Judge:
    return Judge(ChatServer(url, "m", retries=0, concurrency=1), folder / "judge.jsonl")


@pytest.mark.parametrize(
    ("prompt", "answer", "expected"),
    [
        (COMPARISON, "Verdict: A", {"verdict": "a"}),
        (COMPARISON, "First, verdict: A.\nOr not.\n\n**Verdict:** tie.\n", {"verdict": "tie"}),
        (COMPARISON, "Verdict: A or B", None),
        (COMPARISON, "Verdict: A\nSo B is worse.", None),
        (COMPARISON, "The answer A.", None),
        (COMPARISON, "my Verdict: A", None),
        (COMPARISON, "", None),
        (EQUIVALENCE, "Verdict: Different", {"verdict": "different"}),
        (
            DIVERSITY,
            "Hm.\nLogical disagreement: 1\nContent diversity: 3\nSurface-form diversity: 5",
            {"judge_logical": "1", "judge_content": "3", "judge_surface": "5"},
        ),
        (DIVERSITY, "Logical disagreement: 1\nContent diversity: 3\nSurface-form diversity: 6", None),
        (DIVERSITY, "Logical disagreement: 1\nContent diversity: 35\nSurface-form diversity: 5", None),
        (DIVERSITY, "Logical disagreement: 1\nSurface-form diversity: 5", None),
    ],
)
def test_verdicts_are_read_strictly(prompt: JudgePrompt, answer: str, expected: dict[str, str] | None) -> None:
    assert prompt.read(answer) == expected


def test_a_prompt_that_changes_gets_another_name() -> None:
    texts = {
        p.name: hashlib.sha256(json.dumps(p.messages("")).encode()).hexdigest()
        for p in (APPROACH, COMPARISON, DIVERSITY, EQUIVALENCE)
    }
    assert {name: digest[:12] for name, digest in texts.items()} == {
        "approach-1": "9b9fc2a730e4",
        "comparison-1": "182a6c543803",
        "diversity-1": "a7ae78279163",
        "equivalence-1": "aef1fd303950",
    }


def test_both_orders_are_asked(tmp_path: Path) -> None:
    with serving(longer_wins) as (url, bodies):
        won, lost, level = win_rates(
            a_judge(url, tmp_path),
            [Comparison(ASKED, "Tea, please.", "Tea."), Comparison(ASKED, "", "Tea."), Comparison(ASKED, "Tea", "Ale")],
        )
    orders = [(between(content(body), "answer_A"), between(content(body), "answer_B")) for body in bodies]
    assert orders[:2] == [("Tea, please.", "Tea."), ("Tea.", "Tea, please.")]
    assert len(bodies) == 6
    assert {body["temperature"] for body in bodies} == {0}
    shared = {"judge_first": 0.5, "judge_ties": 0, "judge_unread": 0}
    assert won == {"win_rate": 1, **shared}
    assert lost == {"win_rate": 0, **shared}
    assert level == {"win_rate": 0.5, **shared, "judge_ties": 1}


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        (("A", "A"), {"win_rate": 0.5, "judge_first": 1.0, "judge_ties": 0.0}),  # the place alone decides
        (("B", "B"), {"win_rate": 0.5, "judge_first": 0.0, "judge_ties": 0.0}),
        (("A", "tie"), {"win_rate": 0.75, "judge_first": 0.75, "judge_ties": 0.5}),
        (("B", "A"), {"win_rate": 0.0, "judge_first": 0.5, "judge_ties": 0.0}),
    ],
)
def test_points_of_two_orders(tmp_path: Path, verdicts: tuple[str, str], expected: dict[str, float]) -> None:
    with serving(lambda body, number: reply(f"Verdict: {verdicts[number]}")) as (url, _):
        [found] = win_rates(a_judge(url, tmp_path), [Comparison(ASKED, "one", "two")])
    assert found == {**expected, "judge_unread": 0}


def test_what_cannot_be_read_is_asked_once_more_and_never_guessed(tmp_path: Path) -> None:
    def stubborn(body: dict[str, Any], number: int) -> Answer:
        if between(content(body), "answer_A") == "bad":
            return reply("I like A")
        return longer_wins(body) if len(body["messages"]) == 4 else reply("Hm")  # reads the reminder

    with serving(stubborn) as (url, bodies):
        mended, lost = win_rates(
            a_judge(url, tmp_path), [Comparison(ASKED, "long", "st"), Comparison(ASKED, "bad", "worse")]
        )
    assert mended["win_rate"] == 1
    assert lost == {"judge_unread": 0.5}
    assert len(bodies) == 8
    assert "cannot be read" in bodies[-1]["messages"][-1]["content"]
    assert bodies[-1]["messages"][2] == {"role": "assistant", "content": "Hm"}


def test_nothing_is_asked_twice(tmp_path: Path) -> None:
    questions = [Question(COMPARISON, two_answers(ASKED, f"answer {k}", "b")) for k in range(6)]

    def fails(body: dict[str, Any], number: int) -> Answer:
        return longer_wins(body) if number < 3 else refusal("out of credit", 402)

    with serving(fails) as (url, bodies):
        with pytest.raises(UserError, match="out of credit"):
            a_judge(url, tmp_path).ask(questions)
        asked = [content(body) for body in bodies[:3]]
    cache = tmp_path / "judge.jsonl"
    cache.write_bytes(cache.read_bytes()[:-9])  # killed while it wrote the third
    with serving(longer_wins) as (url, bodies):
        first = a_judge(url, tmp_path).ask([*questions, questions[0]])
        assert [content(body) for body in bodies] == [asked[2], *(question.content for question in questions[3:])]
        assert a_judge(url, tmp_path).ask(questions) == first[:-1]
        assert len(bodies) == 4
        other = Judge(ChatServer(url, "other", concurrency=1), cache)
        other.ask(questions[:1])
        assert bodies[4]["model"] == "other"
    assert first == [{"verdict": "a"}] * 7


def test_a_question_that_is_refused_has_no_verdict(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def answer(body: dict[str, Any], _: int) -> Answer:
        return refusal("filtered") if "worse" in content(body) else longer_wins(body)

    pairs = [Comparison(ASKED, "long", "st"), Comparison(ASKED, "bad", "worse")]
    with serving(answer) as (url, bodies):
        judged, refused = win_rates(a_judge(url, tmp_path), pairs)
        assert judged["win_rate"] == 1 and refused == {"judge_unread": 1.0}
        assert caplog.text.count("No verdict on 2 questions") == 1 and "filtered" in caplog.text
        asked = len(bodies)
        win_rates(a_judge(url, tmp_path), pairs)
        assert all("worse" in content(body) for body in bodies[asked:]) and len(bodies) > asked
        with pytest.raises(UserError, match=r"refuses the request: .*filtered"):
            win_rates(Judge(ChatServer(url, "judge"), tmp_path / "new.jsonl"), pairs[1:])


def test_scores_of_diversity(tmp_path: Path) -> None:
    def scores(body: dict[str, Any], number: int) -> Answer:
        count = content(body).count("</answer_")
        lines = ("Logical disagreement", "Content diversity", "Surface-form diversity")
        return reply("\n".join(f"{line}: {count + k}" for k, line in enumerate(lines)))

    with serving(scores) as (url, _):
        two, four = diversity_scores(a_judge(url, tmp_path), [ASKED, ASKED], [["a", "b"], ["a", "b", "c", "d"]])
    assert two == {"judge_logical": 2, "judge_content": 3, "judge_surface": 4, "judge_scores_unread": 0}
    assert four == {"judge_scores_unread": 1}  # a 6 is no score


def test_a_partition_by_the_judge(tmp_path: Path) -> None:
    def same_letter(body: dict[str, Any], number: int) -> Answer:
        a, b = (between(content(body), f"answer_{letter}") for letter in "AB")
        return reply("Verdict: " + ("unsure" if "?" in b else "same" if a[0] == b[0] else "different"))

    texts = ["tea", "Tea.", "coffee", "tisane", "cocoa", "milk", "coffee"]
    with serving(same_letter) as (url, bodies):
        found = judged_partitions(a_judge(url, tmp_path), [ASKED] * 3, [texts, ["a", "?"], ["one"]])
    assert found == [[0, 0, 1, 0, 1, 2, 1], None, [0]]
    # coffee | tisane and cocoa against tea and coffee | milk against both; the other prompt's two times.
    assert len(bodies) == 1 + 2 + 2 + 2 + 2


def test_a_partition_by_text() -> None:
    assert exact_partition(["Tea.", "tea", "Coffee", "*tea*", "-5", "5"]) == [0, 0, 1, 0, 2, 3]
    assert exact_partition([]) == []


def test_a_partition_by_vectors() -> None:
    angles = torch.tensor([0.0, 30.0, 50.0, 80.0, 180.0]).deg2rad()
    vectors = torch.stack([angles.cos(), angles.sin()], dim=1) * torch.tensor([[1.0], [3.0], [0.5], [2.0], [1.0]])
    # 45 degrees: 30 is near 0; 50 is not and begins a class, which 80 joins though it is far from 0.
    assert embedding_partition(vectors, 0.7071) == [0, 0, 1, 1, 2]
