"""`spl evaluate best-of-n` from files to records, on replies made by hand and on those of a real model."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from real_model import smollm2

from spl import results
from spl.cli import main
from spl.data.problems import read_problems
from spl.evaluation.best_of_n import best_of_n
from spl.evaluation.rewards import RewardScorer
from spl.evaluation.sample import sample
from spl.evaluation.sample_files import read_samples
from spl.metrics.pass_at_k import pass_at_k
from spl.types import UserError

NUM = 16


def problem_file(path: Path, num: int) -> Path:
    rows = [
        {"id": f"p{k}", "question": f"What is {k} + {k}?", "answer": str(2 * k), "level": k % 2} for k in range(num)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def sample_file(
    path: Path,
    policy: str,
    correct: Sequence[int | None],
    train_seed: int | None = None,
    shift: int = 0,
    num: int = NUM,
    seed: int | None = None,
) -> str:
    """A file where so many of the replies to each problem are right; the wrong ones are all different.

    None is a problem that the sampler gave up.
    """
    first = results.header("sample", {}, seed=seed, policy=policy, setting="t 1", train_seed=train_seed)
    records: list[dict[str, Any]] = []
    for k, count in enumerate(correct):
        if count is None:
            records.append({"kind": "note", "item": f"p{k}", "text": f"prompt p{k} is left out"})
            continue
        question = {"role": "user", "content": f"What is {k} + {k}?\n\nAnswer with a number."}
        records.append({"kind": "prompt", "item": f"p{k}", "messages": [question]})
        for index in range(num):
            answer = 2 * k if (index + shift) % num < count else 1000 + index
            said = {"text": f"({shift}) The answer is {answer}.", "num_tokens": 6, "finish": "stop", "logp": -2.0}
            records.append({"kind": "sample", "item": f"p{k}", "index": index, **said})
    results.write(path, first, records)
    return str(path)


def estimates(path: Path) -> dict[tuple[str, str, str | None], dict[str, Any]]:
    records = results.read(path).of("estimate")
    return {(record["policy"], record["name"], record["group"]): record for record in records}


@pytest.fixture
def drawn(tmp_path: Path) -> dict[str, str]:
    """Samples of two policies, one of them trained twice, and of a base, which sorts p0 to p2 as easy and so on."""
    problem_file(tmp_path / "problems.jsonl", 6)
    return {
        "dpo": sample_file(tmp_path / "dpo.jsonl", "dpo", [16, 9, 4, 1, 0, 0]),
        "spl 1": sample_file(tmp_path / "spl1.jsonl", "spl 1.2", [16, 8, 4, 2, 1, 0], 0),
        "spl 2": sample_file(tmp_path / "spl2.jsonl", "spl 1.2", [15, 8, 5, 2, 0, 1], 1, shift=1),
        "base": sample_file(tmp_path / "base.jsonl", "base", [12, 9, 8, 3, 0, 0], shift=2),
    }


def test_from_the_command_line(
    tmp_path: Path, drawn: dict[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    output = tmp_path / "results" / "best.jsonl"
    main(
        [
            *("evaluate", "best-of-n", drawn["dpo"], drawn["spl 1"], drawn["spl 2"], "--difficulty", drawn["base"]),
            *("--problems", str(tmp_path / "problems.jsonl"), "--easy_samples", "2", "--medium_samples", "8"),
            *("--rival", "dpo", "--output", str(output), "--draws", "200"),
        ]
    )
    found, told = results.read(output), estimates(output)
    assert found.header["program"] == "best-of-n" and found.header["num_samples"] == NUM
    assert set(found.header["inputs"]) == {*drawn.values(), str(tmp_path / "problems.jsonl")}
    # Of the base 17 / 13, 17 / 10 and 17 / 9 samples solve the first three, 17 / 4 the next, 17 the last two.
    groups = {record["item"]: record["group"].removeprefix("problems, ") for record in found.of("item")}
    assert groups == {"p0": "easy", "p1": "easy", "p2": "easy", "p3": "medium", "p4": "hard", "p5": "hard"}
    hard = told["spl 1.2", "pass@4", "problems, hard"]
    assert hard["value"] == pytest.approx(np.mean([pass_at_k(NUM, c, 4)[-1] for c in (1, 0, 0, 1)]))
    assert hard["num"] == 2 and hard["low"] <= hard["value"] <= hard["high"]
    assert told["dpo", "pass@16", "problems"]["value"] == pytest.approx(4 / 6)
    assert told["spl 1.2", "pass@16_difference", "problems"]["value"] == pytest.approx((5 + 5) / 12 - 4 / 6)
    # All 16 vote: the right answer wins with 16, 9 or 4 votes, where all others have one, and ties with 15 at one vote.
    assert told["dpo", "majority@16", "problems"]["value"] == pytest.approx((1 + 1 + 1 + 1 / 16) / 6)
    assert ("dpo", "samples_to_match", "problems") not in told
    assert told["spl 1.2", "samples_to_match", "problems"]["value"] <= NUM
    assert told["dpo", "repeats", "problems"]["value"] == pytest.approx(1 - np.mean([1, 8, 13, 16, 16, 16]) / 16)
    assert told["dpo", "surprisal", "problems"]["value"] == 2.0 and told["dpo", "ended", "problems"]["value"] == 1.0
    curve = next(
        r for r in found.of("curve") if (r["policy"], r["name"], r["group"]) == ("dpo", "pass@k", "problems, hard")
    )
    assert curve["y"] == [0.0] * len(curve["x"]) and curve["x"][-1] == NUM
    assert any("Only 1 problems are medium" in note["text"] for note in found.of("note"))
    assert "pass@16" in capsys.readouterr().out


def test_other_protocols(tmp_path: Path, drawn: dict[str, str]) -> None:
    settings: dict[str, Any] = {"problems": str(tmp_path / "problems.jsonl"), "draws": 50}
    samples = [drawn["dpo"], drawn["spl 1"]]
    best_of_n(samples, output=tmp_path / "level.jsonl", protocol="level", **settings)
    assert {group for _, _, group in estimates(tmp_path / "level.jsonl")} == {
        "problems",
        "problems, level 0",
        "problems, level 1",
    }
    same = {"protocol": "paper", "easy_samples": 2, "medium_samples": 8, "rival": "dpo, t 1"}
    best_of_n(samples, output=tmp_path / "paper.jsonl", **same, **settings)
    found = results.read(tmp_path / "paper.jsonl")
    groups = {record["item"]: record["group"].removeprefix("problems, ") for record in found.of("item")}
    assert groups == {"p0": "easy", "p1": "easy", "p2": "medium", "p3": "hard", "p4": "hard", "p5": "hard"}
    assert "biased" in found.of("note")[0]["text"]
    best_of_n(samples, output=tmp_path / "none.jsonl", **settings)
    assert {group for _, _, group in estimates(tmp_path / "none.jsonl")} == {"problems"}


def test_fewer_samples_of_one_policy(tmp_path: Path, drawn: dict[str, str]) -> None:
    """pass@k is unbiased for each policy whatever it has; only k ends at the fewest."""
    few = sample_file(tmp_path / "few.jsonl", "few", [8, 4, 2, 1, 0, 0], num=8)
    settings: dict[str, Any] = {"problems": str(tmp_path / "problems.jsonl"), "draws": 50}
    best_of_n([drawn["dpo"], few], output=tmp_path / "few_results.jsonl", **settings)
    told = estimates(tmp_path / "few_results.jsonl")
    expected = np.mean([pass_at_k(NUM, c, 8)[-1] for c in (16, 9, 4, 1, 0, 0)])
    assert told["dpo", "pass@8", "problems"]["value"] == pytest.approx(expected)
    assert ("dpo", "pass@16", "problems") not in told
    notes = [note["text"] for note in results.read(tmp_path / "few_results.jsonl").of("note")]
    assert any("up to 8 samples" in note for note in notes)


def test_the_best_rewarded_reply(tmp_path: Path, drawn: dict[str, str]) -> None:
    problems, output = tmp_path / "problems.jsonl", tmp_path / "rewarded.jsonl"
    none = sample_file(tmp_path / "none.jsonl", "none", [0] * 6)
    best_of_n([drawn["dpo"], none], str(problems), output, reward_model="tiny", rival="none", device="cpu", draws=50)
    told = estimates(output)
    [file] = read_samples([drawn["dpo"]])
    replies = [[reply.text for reply in found] for found in file.replies.values()]
    rewards = RewardScorer.load("tiny", device="cpu").score(list(file.prompts.values()), replies)
    # Of all 16 replies the best-rewarded one; equal texts have equal rewards and are equally right.
    right = [
        texts[int(np.argmax(row))].endswith(f" {2 * k}.")
        for k, (texts, row) in enumerate(zip(replies, rewards, strict=True))
    ]
    assert told["dpo", "reward_chosen@16", "problems"]["value"] == pytest.approx(np.mean(right))
    assert told["dpo", "reward_chosen@1", "problems"]["value"] == pytest.approx(
        told["dpo", "pass@1", "problems"]["value"]
    )
    assert ("dpo", "samples_to_match", "problems") not in told  # of a rival that solves nothing


def test_problems_that_a_sampler_gave_up_are_left_out_for_all(tmp_path: Path, drawn: dict[str, str]) -> None:
    smc = sample_file(tmp_path / "smc.jsonl", "smc", [None, 8, 4, 2, 1, 0])
    apart = sample_file(tmp_path / "apart.jsonl", "apart", [12, 9, None, 3, 0, 0], shift=2)
    settings: dict[str, Any] = {"problems": str(tmp_path / "problems.jsonl"), "draws": 50}
    groups = {"difficulty": [apart], "easy_samples": 2, "medium_samples": 8}
    best_of_n([smc, drawn["dpo"]], output=tmp_path / "o.jsonl", **groups, **settings)
    found = results.read(tmp_path / "o.jsonl")
    assert {record["item"] for record in found.of("item")} == {"p1", "p3", "p4", "p5"}
    assert found.of("note")[0]["text"] == "2 of 6 problems are left out for all, as a sampler gave them up."
    assert estimates(tmp_path / "o.jsonl")["dpo", "pass@16", "problems"]["value"] == 2 / 4
    none = sample_file(tmp_path / "none.jsonl", "none", [None] * 6)
    with pytest.raises(UserError, match="no problem has replies of every policy"):
        best_of_n([drawn["dpo"], none], output=tmp_path / "p.jsonl", **settings)


def test_samples_of_another_seed_are_apart_though_they_say_the_same(tmp_path: Path) -> None:
    problems = str(problem_file(tmp_path / "problems.jsonl", 3))
    first, other, again = (
        sample_file(tmp_path / f"{k}.jsonl", name, [16, 16, 0], seed=seed)
        for k, (name, seed) in enumerate([("dpo", 0), ("base", 1), ("base", 0)])
    )
    settings: dict[str, Any] = {"easy_samples": 2, "medium_samples": 8, "draws": 50}
    best_of_n([first], problems, tmp_path / "o.jsonl", difficulty=[other], **settings)
    assert ("dpo", "pass@16", "problems, easy") in estimates(tmp_path / "o.jsonl")
    with pytest.raises(UserError, match="evaluated too: draw others"):
        best_of_n([first], problems, tmp_path / "p.jsonl", difficulty=[again], **settings)


def test_mistakes_end_in_a_sentence(tmp_path: Path, drawn: dict[str, str]) -> None:
    output, problems = tmp_path / "out.jsonl", str(tmp_path / "problems.jsonl")
    with pytest.raises(UserError, match="evaluated too: draw others"):
        best_of_n([drawn["dpo"]], problems, output, difficulty=[drawn["dpo"]])
    with pytest.raises(UserError, match="names none of them"):
        best_of_n([drawn["dpo"]], problems, output, rival="spl")
    with pytest.raises(UserError, match="rests on 16 of each"):
        best_of_n([drawn["dpo"]], problems, output, difficulty=[drawn["base"]])
    with pytest.raises(UserError, match="not that of these problems"):
        best_of_n([drawn["dpo"]], "arithmetic", output)
    fewer = sample_file(tmp_path / "fewer.jsonl", "fewer", [1, 1])
    with pytest.raises(UserError, match="of different problems: 'p2'"):
        best_of_n([drawn["dpo"], fewer], problems, output)
    with pytest.raises(UserError, match="max_k must be"):
        best_of_n([drawn["dpo"]], problems, output, max_k=0)
    with pytest.raises(UserError, match="draws must be 10 or more"):
        best_of_n([drawn["dpo"]], problems, output, draws=0)
    with pytest.raises(UserError, match="protocol level makes no use of samples drawn apart"):
        best_of_n([drawn["dpo"]], problems, output, difficulty=[drawn["base"]], protocol="level")
    with pytest.raises(UserError, match="medium_samples must be above easy_samples"):
        best_of_n(["none.jsonl"], problems, output, easy_samples=4, medium_samples=4)  # before anything is read
    with pytest.raises(UserError, match="device must be"):
        best_of_n(["none.jsonl"], problems, output, device="cuad")
    assert not output.exists()


def test_a_real_model_on_arithmetic(tmp_path: Path) -> None:
    """SmolLM2 draws replies to the two easiest kinds of problems; every record is checked against its own replies."""
    drawn = str(tmp_path / "drawn.jsonl")
    sample(smollm2(), problems="arithmetic", num_prompts=2, num_samples=8, max_new_tokens=12, output=Path(drawn))
    best_of_n([drawn], "arithmetic", tmp_path / "found.jsonl", protocol="level", draws=50, last_number="always")
    [file], found = read_samples([drawn]), results.read(tmp_path / "found.jsonl")
    problems = {problem.item: problem for problem in read_problems("arithmetic", 2)}
    assert [record["item"] for record in found.of("item")] == list(problems)
    for record in found.of("item"):
        # Last numbers by another way: what remains when all else is blanked.
        numbers = [re.sub(r"[^\d]+", " ", reply.text).split() for reply in file.replies[record["item"]]]
        correct = sum(bool(n) and n[-1] == problems[record["item"]].answer for n in numbers)
        assert record["values"]["correct"] == correct
        assert record["values"]["pass@8"] == float(correct > 0)
        assert record["values"]["surprisal"] > 0
        assert record["group"] == f"arithmetic, level {problems[record['item']].level}"
