"""What a report reads: files of every program, runs, and what is said of broken ones."""

import json
from pathlib import Path
from typing import Any

import pytest
from made_results import make_run

from spl.cli import main
from spl.reporting.evidence import Arm, arm_order, gather, policy_order
from spl.results import ResultsError, header, write

ESTIMATE = {"kind": "estimate", "policy": "dpo", "setting": "t 1", "name": "reward", "group": None, "value": 1.0}


def results(path: Path, *records: dict[str, Any], program: str = "diversity-quality", **more: Any) -> Path:
    write(path, header(program, {}, **more), records)
    return path


def test_a_record_has_its_program_and_what_it_leaves_out(tmp_path: Path) -> None:
    sample = {"kind": "sample", "item": "a", "index": 0, "text": "Hi."}
    results(tmp_path / "s.jsonl", sample, program="sample", policy="spl 2", setting="t 1", train_seed=3)
    results(tmp_path / "e.jsonl", ESTIMATE | {"low": 0.5, "high": 1.5}, {"kind": "other", "of": "no one"})
    evidence = gather([tmp_path])
    (found,) = evidence.of("sample")
    assert (found["policy"], found["train_seed"], found["logp"], found["file"]) == ("spl 2", 3, None, "s.jsonl")
    assert evidence.of("estimate", "best-of-n") == evidence.of("other") == []
    key, arm = ("reward", None), Arm("dpo", "t 1")
    assert evidence.estimates("diversity-quality")[key][arm]["high"] == 1.5
    assert evidence.policies() == ["dpo", "spl 2"]


def test_policies_stand_in_an_order_that_means_something() -> None:
    given = ["zeta", "spl 11", "fdpo js", "spl 1.2", "dpo", "spl 2", "base"]
    assert sorted(given, key=policy_order) == ["base", "dpo", "spl 1.2", "spl 2", "spl 11", "fdpo js", "zeta"]
    arms = [Arm("dpo", s) for s in ("top_p 0.9", "t 1.5", "t 1", "t 1.1")]
    assert [arm.setting for arm in sorted(arms, key=arm_order)] == ["t 1", "t 1.1", "t 1.5", "top_p 0.9"]


def test_families_are_no_policies(tmp_path: Path) -> None:
    area = {"name": "hypervolume", "policy": "dpo + temperature", "group": "vendi / reward", "setting": ""}
    evidence = gather([results(tmp_path / "a.jsonl", ESTIMATE, ESTIMATE | area)])
    assert evidence.policies() == ["dpo"]
    assert list(evidence.estimates("diversity-quality")) == [("reward", None)]
    assert [record["policy"] for record in evidence.of_families("vendi / reward")] == ["dpo + temperature"]


def test_a_run_folder(tmp_path: Path) -> None:
    make_run(tmp_path, "dpo")
    (run,) = gather([tmp_path]).runs
    assert run.curves["val/entropy"] == [(0, 160.0), (10, 130.0), (19, 103.0)]  # as made_results writes them
    assert run.facts == {"steps": 20.0, "seconds": 12.5}
    assert (run.policy, run.setting) == ("dpo", "")
    (tmp_path / "dpo" / "summary.json").unlink()
    assert gather([tmp_path]).runs[0].facts == {}


def test_runs_of_a_sweep_are_of_its_policies(tmp_path: Path) -> None:
    for name in ("spl-1.2_model.lr=1e-5_seed=0", "my_run"):
        make_run(tmp_path, name)
    found = [(run.policy, run.setting) for run in gather([tmp_path]).runs]
    assert found == [("my_run", ""), ("spl 1.2", "model.lr=1e-5, seed=0")]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"value": "high"}, "record 3: 'estimate' has \"high\" as 'value'"),
        ({"name": None}, "'estimate' has null as 'name'"),
        ({"kind": "curve", "x": [1, "2"], "y": [1, 2]}, "'curve' has [1, \"2\"] as 'x'"),
        ({"kind": "curve", "x": [1, 2], "y": [1]}, "its lists differ in length"),
        ({"kind": "curve", "x": [1], "y": [1], "low": [1, 2]}, "its lists differ in length"),
        ({"kind": "shares", "item": "q", "question": "?", "options": ["a", "b"], "model": [1.0]}, "differ in length"),
        ({"kind": "item", "item": "a", "values": {"reward": [1]}}, "as 'values'"),
        ({"kind": "item", "item": "a", "values": {}, "group": ["hard"]}, "as 'group'"),
        ({"kind": "prompt", "item": "a", "messages": ["hello"]}, "as 'messages'"),
        ({"kind": "sample", "text": "Hi."}, "'sample' has nothing as 'item'"),
        ({"policy": 3}, "has 3 as 'policy'"),
    ],
)
def test_a_broken_record_is_one_sentence(
    change: dict[str, Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = results(tmp_path / "a.jsonl", ESTIMATE, ESTIMATE | change)
    with pytest.raises(SystemExit) as stopped:
        main(["report", str(path), "-o", str(tmp_path / "page.html")])
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error.count("\n") == 1 and error.startswith(f"error: {path}, record 3: ") and said in error
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("metrics.csv", "epoch,step,train/loss\n0,zero,1.0\n", "is not the metrics.csv of a run"),
        ("metrics.csv", "a,b\n1,2\n", "is not the metrics.csv of a run"),
        ("summary.json", '{"steps": ', "is not the summary.json of a run"),
        ("summary.json", "[]", "is not the summary.json of a run"),
    ],
)
def test_a_broken_run_is_one_sentence(name: str, content: str, said: str, tmp_path: Path) -> None:
    (make_run(tmp_path, "dpo") / name).write_text(content)
    with pytest.raises(ResultsError, match=said):
        gather([tmp_path])


def test_a_number_that_json_does_not_have_is_refused(tmp_path: Path) -> None:
    path = results(tmp_path / "a.jsonl", ESTIMATE)
    path.write_text(path.read_text().replace("1.0", "NaN"))
    with pytest.raises(ResultsError, match="record 2: 'estimate' has NaN as 'value'"):
        gather([path])


def test_two_files_that_would_be_drawn_over_each_other_are_refused(tmp_path: Path) -> None:
    """As of best-of-n on two sets of problems: either's numbers would stand for both."""
    for name in ("gsm8k", "math"):
        results(tmp_path / f"{name}.jsonl", ESTIMATE | {"name": "pass@1", "group": "hard"}, program="best-of-n")
    with pytest.raises(ResultsError, match=r"math\.jsonl both hold an estimate of pass@1, dpo, t 1, hard: report them"):
        gather([tmp_path])
    results(tmp_path / "math.jsonl", ESTIMATE | {"name": "pass@1", "group": "easy"}, program="best-of-n")
    assert len(gather([tmp_path]).of("estimate")) == 2


def test_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match="no results in"):
        gather([tmp_path])
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "no header"}) + "\n")
    with pytest.raises(ResultsError, match="line 1: expected an object with a kind"):
        gather([tmp_path / "a.jsonl"])
