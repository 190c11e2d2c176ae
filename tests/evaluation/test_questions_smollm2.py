"""`spl evaluate calibration` and `opinions` run for real, small; the model is loaded once for both."""

from pathlib import Path

import pytest

from spl.evaluation.calibration import calibration
from spl.evaluation.opinions import opinions
from spl.evaluation.policies import EvaluatedPolicy
from spl.results import Results, read


@pytest.fixture(autouse=True)
def loaded_once(smollm2_policy: EvaluatedPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EvaluatedPolicy, "load", lambda name, **_: smollm2_policy)


def values(results: Results) -> list[dict[str, float]]:
    return [r["values"] for r in results.of("item") if (r["policy"], r["setting"]) == ("smollm2", "t 1")]


def test_the_survey(tmp_path: Path) -> None:
    output = tmp_path / "o.jsonl"
    opinions({"smollm2": "smollm2"}, output, "survey", presentation="unlisted", num_questions=4, draws=20)
    assert len(values(read(output))) == 4
    assert all(0 < value["mass"] < 1 and value["entropy"] > 0 for value in values(read(output)))


def test_questions_of_mmlu(tmp_path: Path, shared_data: Path) -> None:
    output, questions = tmp_path / "c.jsonl", str(shared_data / "mmlu_val.jsonl.gz")
    calibration({"smollm2": "smollm2"}, output, [questions], fit=0.5, num_questions=6, draws=20)
    assert len(values(read(output))) == 3
    # It has learned to answer with a letter, if not always the right one.
    assert all(0.3 < value["mass"] <= 1 and 0.25 <= value["confidence"] < 1 for value in values(read(output)))
