"""`spl evaluate calibration` from the command line, and letters' probabilities against a plain forward pass."""

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from spl.cli import main
from spl.data.multiple_choice import MultipleChoice
from spl.evaluation.calibration import Asking, calibration
from spl.evaluation.opinions import opinions
from spl.evaluation.policies import EvaluatedPolicy
from spl.results import read
from spl.types import ResponseLogps, UserError


def sums(path: Path, count: int, subject: str = "sums") -> str:
    rows = [
        {"question": f"{k} + 1?", "choices": [str(k + j) for j in range(4)], "answer": 1, "subject": subject}
        for k in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_scores_are_log_probabilities_of_the_letters_in_the_choices_own_order() -> None:
    policy = EvaluatedPolicy.load("tiny", device="cpu")
    choice = MultipleChoice("2 + 2?", ("3", "4", "5"), 1, "f, row 1")
    found = Asking(0, {}, 6, 0, 2048).ask(policy, policy.encoder(), [choice], "tiny")["f, row 1"]
    expected = []
    for order in [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)]:
        text = policy.encoder().render_prompt(({"role": "user", "content": choice.reordered(order).render()},))
        ids = torch.tensor([policy.tokenizer.encode(text, add_special_tokens=False)])
        with torch.no_grad():
            law = policy.model(input_ids=ids).logits[0, -1].log_softmax(-1)
        letters = policy.tokenizer.convert_tokens_to_ids(["A", "B", "C"])
        expected.append([law[letters[order.index(k)]].item() for k in range(3)])
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.double), atol=1e-4, rtol=0)


class FirstPlace:
    """A model that sees places alone: the first letter has odds of 9 to each other one."""

    def score(self, batch: Any) -> ResponseLogps:
        places = torch.cat([torch.arange(n) for n in batch.response_example.bincount().tolist()])
        logps = torch.where(places == 0, 0.9, 0.1).log()
        return ResponseLogps(logps, logps, logps, logps)


def test_averaging_over_orders_cancels_a_position_bias(tiny_tokenizer: Any) -> None:
    encoder = EvaluatedPolicy.load("tiny", device="cpu").encoder()
    choices = [MultipleChoice(f"{k}?", tuple(map(str, range(k))), 0, f"row {k}") for k in (2, 3, 4, 5)]
    biased: Any = FirstPlace()
    for orders, first in ((1, lambda k: 0.9 / (0.9 + 0.1 * (k - 1))), (4, lambda k: 1 / k)):
        found = Asking(0, {}, orders, 0, 2048).ask(biased, encoder, choices, "biased")
        for choice in choices:
            law = found[choice.row].softmax(-1).mean(0)
            assert law[0].item() == pytest.approx(first(len(choice.choices)), abs=1e-6)


@pytest.mark.parametrize("program", [calibration, opinions])
def test_one_policy_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: Any) -> None:
    load, loaded, alive = EvaluatedPolicy.load, [], []

    def counted(name: str, **how: Any) -> EvaluatedPolicy:
        alive.append(sum(model() is not None for model in loaded))
        policy = load(name, **how)
        loaded.append(weakref.ref(policy.model))
        return policy

    monkeypatch.setattr(EvaluatedPolicy, "load", counted)
    asked = {"questions": [sums(tmp_path / "s.jsonl", 4)]} if program is calibration else {"source": "survey"}
    program({"a": ["tiny", "tiny"], "b": "tiny"}, tmp_path / "o.jsonl", device="cpu", draws=10, **asked)
    assert alive == [0, 0, 0]


def test_the_command_writes_what_a_report_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, questions = tmp_path / "results" / "c.jsonl", sums(tmp_path / "sums.jsonl", 12)
    other = sums(tmp_path / "fit.jsonl", 5)
    main(
        [
            *("evaluate", "calibration", "--models", "{base: tiny, dpo: [tiny, tiny]}", "--output", str(output)),
            *("--questions", questions, "--fit", other, "--num_questions", "12", "--draws", "20", "--base", "base"),
            *("--dpo", "dpo", "--few_shot", "1", "--shots", other, "--temperatures", "2"),
        ]
    )
    found = read(output)
    assert found.header["program"] == "calibration"
    assert found.header["settings"]["few_shot"] == 1
    assert len(found.header["inputs"]) == 2
    assert len(set(found.header["fingerprints"]["dpo"])) == 1
    settings = {(r["policy"], r["setting"], r["train_seed"]) for r in found.of("item")}
    shown = {("base", setting, None) for setting in ("t 1", "t fitted", "t 2", "t of dpo")}
    shown |= {("dpo", setting, seed) for setting in ("t 1", "t fitted", "t 2") for seed in (0, 1)}
    assert settings == shown
    assert len(found.of("item")) == 12 * len(settings)
    assert {r["group"] for r in found.of("item")} == {"sums"}
    # Equal policies differ by nothing, in any draw.
    gaps = [r for r in found.of("estimate") if r["name"] == "ece_minus_base"]
    assert gaps and all(r["value"] == r["low"] == r["high"] == 0 for r in gaps)
    assert {r["name"] for r in found.of("curve")} == {"reliability", "reliability_equal_mass", "risk_coverage"}
    assert "lie above the truth" in found.of("note")[0]["text"]
    assert "fitted" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"models": {}}, "models is empty"),
        ({"base": "nobody"}, "base must be the label of a model, a, but is 'nobody'"),
        ({"fit": 1.5}, "fit must be a share between 0 and 1"),
        ({"fit": 1}, "fit must be a share between 0 and 1"),
        ({"fit": "SUMS"}, "fit must be other questions than are measured"),
        ({"fit": "./SUMS"}, "fit must be other questions than are measured"),
        ({"fit": "a/b:all", "questions": ["a/b:all:validation"]}, "fit must be other questions than are measured"),
        ({"questions": ["a/val.jsonl", "b/val.jsonl.gz"]}, "names more than one source 'val'"),
        ({"orders": 0}, "orders must be 1 or more"),
        ({"num_bins": 1}, "num_bins must be 2 or more"),
        ({"draws": 1}, "draws must be 10 or more"),
        ({"temperatures": [0.0]}, "temperatures must be above 0"),
        (
            {"few_shot": 9, "shots": "SUMS"},
            "expected 9 worked examples of its subject 'sums' in shots, but there are 5",
        ),
        ({"max_length": 20}, "fewer than two questions were put to all: raise max_length"),
        ({"questions": ["no.jsonl"]}, "no file or folder 'no.jsonl'"),
    ],
)
def test_a_mistake_is_told(tmp_path: Path, change: dict[str, Any], complaint: str) -> None:
    questions = sums(tmp_path / "sums.jsonl", 5)
    named = {"SUMS": questions, "./SUMS": str(tmp_path / "." / "x" / ".." / "sums.jsonl")}
    given = {k: named.get(v, v) if isinstance(v, str) else v for k, v in change.items()}
    arguments: dict[str, Any] = {"models": {"a": "tiny"}, "output": tmp_path / "o.jsonl", "questions": [questions]}
    with pytest.raises(UserError, match=complaint):
        calibration(**arguments | given)
    assert not (tmp_path / "o.jsonl").exists()
