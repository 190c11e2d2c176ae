"""Logs of lm-evaluation-harness, in our measures.

`lm_eval_logs` holds what lm-eval 0.4.13 wrote of a random model and two tasks of six sums, one of multiple choice and
one of generation.
"""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from spl.cli import main
from spl.evaluation.harness import read_logs
from spl.evaluation.lm_eval import lm_eval
from spl.results import read
from spl.types import UserError

LOGS = Path(__file__).parent / "lm_eval_logs"
PLANETS = next(LOGS.glob("samples_planets_*"))

TASK = """
task: sums
dataset_path: json
dataset_kwargs:
  data_files: {test: FILE}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}\\nAnswer:"
doc_to_choice: "{{choices}}"
doc_to_target: "{{choices[answer]}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_both_kinds_of_logs() -> None:
    found = read_logs(str(LOGS))
    assert set(found) == {"planets", "capitals"}
    planets, capitals = found["planets"], found["capitals"]
    assert list(planets.answers.values()) == [1] * 6  # k + 1 among k, k + 1 and k + 2
    assert planets.scores["planets 0 a9f10da1"].tolist() == [
        [-11.23641586303711, -11.467813491821289, -10.96474838256836]
    ]
    assert (planets.metrics, capitals.answers) == ({}, {})
    assert list(capitals.metrics["none"].values()) == [{"exact_match": 0.0}] * 6


def test_accuracy_and_log_loss_are_those_of_the_log(tmp_path: Path) -> None:
    lm_eval(tmp_path / "o.jsonl", logs={"a": str(LOGS), "b": [str(LOGS), str(LOGS)]}, fit=0.34, draws=20)
    results = read(tmp_path / "o.jsonl")
    items = {r["item"]: r["values"] for r in results.of("item") if (r["policy"], r["setting"]) == ("a", "t 1")}
    records = {f"planets {r['doc_id']} {r['doc_hash'][:8]}": r for r in lines(PLANETS)}
    assert len(items) == 4  # two of six were for the temperature
    for item, values in items.items():
        scores = torch.tensor([float(score) for score, _ in records[item]["filtered_resps"]], dtype=torch.double)
        assert values["correct"] == records[item]["acc"]
        assert values["log_loss"] == pytest.approx(-scores.log_softmax(0)[1].item())
        assert values["mass"] == pytest.approx(scores.exp().sum().item())
    generated = [r for r in results.of("estimate") if r["name"] == "exact_match"]
    assert [(r["policy"], r["group"], r["value"], r["num"]) for r in generated] == [
        ("a", "capitals", 0, 6),
        ("b", "capitals", 0, 6),
    ]


def test_a_target_may_be_an_index_or_a_text(tmp_path: Path) -> None:
    records = lines(PLANETS)
    for record in records:
        record["target"] = record["doc"]["choices"][
            1
        ]  # of the first it reads as the index 1, of the last 6 is no index
    assert list(read_logs(str(write(tmp_path / "samples_t.jsonl", records)))["samples_t"].answers.values()) == [1] * 6


def test_the_newest_log_of_a_task_counts(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copy(PLANETS, folder)
    write(folder / "samples_planets_2031-01-01T00-00-00.5.jsonl", lines(PLANETS)[:2])
    assert len(read_logs(str(tmp_path))["planets"].answers) == 2


def test_two_beginnings_of_one_text(tmp_path: Path) -> None:
    """As of winogrande: the target is what both choices end with."""
    records = lines(PLANETS)
    for k, record in enumerate(records):
        scores = [["-1.5", "False"], ["-1.0", "False"]]  # the second is chosen
        arguments = {f"gen_args_{c}": {"arg_0": f"choice {c}", "arg_1": " is right."} for c in range(2)}
        record |= {"filtered_resps": scores, "arguments": arguments, "target": "is right.", "acc": float(k % 2)}
    found = read_logs(str(write(tmp_path / "samples_t.jsonl", records)))["samples_t"]
    assert list(found.answers.values()) == [0, 1, 0, 1, 0, 1]


def test_several_right_choices_have_the_task_s_own_metrics(tmp_path: Path) -> None:
    """As of truthfulqa_mc2, whose acc is the share of probability on the right choices."""
    records = lines(PLANETS)
    for k, record in enumerate(records):
        record |= {"target": "0", "acc": k / 8}
    found = read_logs(str(write(tmp_path / "samples_t.jsonl", records)))["samples_t"]
    assert found.answers == found.scores == {}
    assert [of["acc"] for of in found.metrics["none"].values()] == [k / 8 for k in range(6)]


def test_tasks_of_an_earlier_run_are_passed_over() -> None:
    assert set(read_logs(str(LOGS), {"planets"})) == {"planets"}
    with pytest.raises(UserError, match="no log of lm-eval"):
        read_logs(str(LOGS), {"oceans"})


def test_a_line_ends_where_json_says(tmp_path: Path) -> None:
    """The harness writes characters that str.splitlines takes for ends of lines as they are."""
    records = lines(PLANETS)
    records[0]["doc"]["question"] = "One\u2028two\x85three?"
    path = tmp_path / "samples_t.jsonl"
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    assert len(read_logs(str(path))["samples_t"].answers) == len(records)


def test_a_metric_that_a_question_lacks_is_of_the_others(tmp_path: Path) -> None:
    records = lines(next(LOGS.glob("samples_capitals_*")))
    for k, record in enumerate(records):
        record["exact_match"] = None if k in (0, 3) else k % 2
    log = write(tmp_path / "samples_capitals_2031-01-01T00-00-00.5.jsonl", records)
    lm_eval(tmp_path / "o.jsonl", logs={"a": str(log)}, draws=20)
    [found] = [r for r in read(tmp_path / "o.jsonl").of("estimate") if r["name"] == "exact_match"]
    assert (found["value"], found["num"]) == (2 / 4, 4)  # 1, 2, 4 and 5


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"target": "Pluto"}, "line 1: the target 'Pluto' is not the choice that acc counts as right"),
        ({"filter": None}, "line 1: no sample of lm-eval: filter missing"),
    ],
)
def test_a_broken_log_is_told(tmp_path: Path, change: dict[str, Any], complaint: str) -> None:
    first = {k: v for k, v in (lines(PLANETS)[0] | change).items() if v is not None}
    with pytest.raises(UserError, match=complaint):
        read_logs(str(write(tmp_path / "samples_t.jsonl", [first])))


def test_a_mistake_is_told(tmp_path: Path) -> None:
    output = tmp_path / "o.jsonl"
    with pytest.raises(UserError, match="nothing to read: give models and tasks"):
        lm_eval(output)
    with pytest.raises(UserError, match="no log of lm-eval in"):
        lm_eval(output, logs={"a": str(tmp_path)})
    (tmp_path / "samples_t.jsonl").write_text("{")
    with pytest.raises(UserError, match=r"samples_t\.jsonl, line 1: no JSON"):
        lm_eval(output, logs={"a": str(tmp_path / "samples_t.jsonl")})
    with pytest.raises(UserError, match="no task in common"):
        others = [str(next(LOGS.glob(f"samples_{task}_*"))) for task in ("planets", "capitals")]
        lm_eval(output, logs={"a": others[0], "b": others[1]})


@pytest.mark.skipif(not find_spec("lm_eval"), reason="lm-eval is not installed: pip install 'spl[lm-eval]'")
@pytest.mark.filterwarnings("ignore")  # of a foreign program
def test_the_harness_run_for_real(tmp_path: Path) -> None:
    rows = [{"question": f"{k} + 1?", "choices": ["3", f"{k + 1}.", "none"], "answer": 1} for k in range(6)]
    (tmp_path / "sums.json").write_text(json.dumps(rows))
    (tmp_path / "sums.yaml").write_text(TASK.replace("FILE", str(tmp_path / "sums.json")))
    output = tmp_path / "o.jsonl"
    main(
        [
            *("evaluate", "lm-eval", "--models", "{a: tiny}", "--tasks", "sums", "--include", str(tmp_path)),
            *("--output", str(output), "--draws", "20", "--fit", "0.34", "--device", "cpu", "--limit", "5"),
        ]
    )
    (summary,) = (tmp_path / "o_logs" / "a" / "0").glob("results_*.json")
    accuracy = json.loads(summary.read_text())["results"]["sums"]["acc,none"]
    found = read_logs(str(tmp_path / "o_logs" / "a"))["sums"]
    right = [int(found.scores[row].argmax()) == answer for row, answer in found.answers.items()]
    assert (len(right), sum(right) / 5) == (5, pytest.approx(accuracy))
    assert len(read(output).of("item")) == 2 * 3  # as it is and fitted, what was not for the temperature


@pytest.mark.skipif(not find_spec("lm_eval"), reason="lm-eval is not installed: pip install 'spl[lm-eval]'")
@pytest.mark.filterwarnings("ignore")  # of a foreign program
def test_a_task_that_there_is_not(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="lm-eval cannot run no_such_task"):
        lm_eval(tmp_path / "o.jsonl", models={"a": "tiny"}, tasks=["no_such_task"], include=str(tmp_path))
