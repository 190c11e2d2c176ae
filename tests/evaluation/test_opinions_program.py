"""`spl evaluate opinions`: shares against brute force, agreement with people by scipy, positions by hand."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.spatial.distance import jensenshannon

from spl.cli import main
from spl.data.opinions import Opinion, read_opinions
from spl.data.propositions import Proposition
from spl.data.source import Source
from spl.data.survey import SURVEY
from spl.evaluation.opinions import opinions
from spl.evaluation.people import UNIFORM, _least, against_people
from spl.evaluation.policies import EvaluatedPolicy
from spl.evaluation.propositions import positions
from spl.evaluation.shares import Said, ask_shares, average
from spl.results import read
from spl.types import UserError


def said(*share: float, mass: float = 0.5) -> Said:
    return Said(torch.tensor(share, dtype=torch.double), mass, torch.nan)


def estimates(records: Any) -> dict[tuple[str, str, str], dict[str, Any]]:
    return {(r["policy"], r["group"], r["name"]): r for r in records if r["kind"] == "estimate"}


@pytest.mark.parametrize("presentation", ["unlisted", "letters", "text"])
def test_shares_are_exact_probabilities_of_whole_answers(presentation: Any) -> None:
    policy = EvaluatedPolicy.load("tiny", device="cpu")
    encoder = policy.encoder(turn_end="eos")
    asked = read_opinions(Source("survey"))[:3]
    found = ask_shares(policy, encoder, asked, presentation, 1, 0, 2048, "tiny")
    for opinion in asked:
        answers = ["A", "B", "C", "D"][: len(opinion.options)] if presentation == "letters" else opinion.options
        text = opinion.render(presentation, range(len(opinion.options)))
        prompt = encoder.render_prompt(({"role": "user", "content": text},))
        start, logps = len(policy.tokenizer.encode(prompt, add_special_tokens=False)), []
        for answer in answers:
            ids = torch.tensor(policy.tokenizer.encode(f"{prompt}{answer}<|end|>", add_special_tokens=False))
            with torch.no_grad():
                law = policy.model(input_ids=ids[None]).logits[0].log_softmax(-1)
            logps.append(law[:-1].gather(1, ids[1:, None])[start - 1 :].sum())
        expected = torch.stack(logps).double()
        assert found[opinion.row].share.tolist() == pytest.approx(expected.softmax(0).tolist(), abs=1e-4)
        assert found[opinion.row].mass == pytest.approx(expected.exp().sum().item(), rel=1e-3)


def test_the_worst_off_of_groups_of_which_a_draw_has_no_question() -> None:
    assert _least(torch.tensor([[0.5, torch.nan], [0.7, torch.nan]])) == pytest.approx(0.6)
    assert math.isnan(_least(torch.full((2, 3), torch.nan)))


def test_orders_are_averaged_as_laws() -> None:
    found = average(torch.tensor([[0.3, 0.1], [0.1, 0.1]]).log())
    assert found.share.tolist() == pytest.approx([(0.75 + 0.5) / 2, (0.25 + 0.5) / 2])
    assert found.mass == pytest.approx((0.4 + 0.2) / 2)
    assert found.order_gap == pytest.approx(0.125)


def test_agreement_with_people_and_the_worst_off_group() -> None:
    asked = [
        Opinion("one", ("a", "b"), {"x": (0.9, 0.1), "y": (0.2, 0.8)}, row="row 1"),
        Opinion("two", ("a", "b", "c"), {"x": (0.2, 0.3, 0.5)}, ordered=True, row="row 2"),
        Opinion("three", ("a", "b"), {"y": (1.0, 0.0), "z": (0.5, 0.5)}, row="row 3"),
    ]
    run = {"row 1": said(0.9, 0.1), "row 2": said(0.5, 0.3, 0.2), "row 3": said(0.6, 0.4, mass=0.2)}
    found = estimates(against_people(asked, {"a": [run]}, "f", 2, None, 50, 0))

    def near(share: list[float], people: tuple[float, ...]) -> float:
        return 1 - float(jensenshannon(share, people, base=2)) ** 2

    x = [near([0.9, 0.1], (0.9, 0.1)), near([0.5, 0.3, 0.2], (0.2, 0.3, 0.5))]
    y = [near([0.9, 0.1], (0.2, 0.8)), near([0.6, 0.4], (1.0, 0.0))]
    z = near([0.6, 0.4], (0.5, 0.5))
    by_question = [(x[0] + y[0]) / 2, x[1], (y[1] + z) / 2]
    assert found["a", "f", "one_minus_jsd"]["value"] == pytest.approx(sum(by_question) / 3)
    assert found["a", "x", "one_minus_jsd"]["value"] == pytest.approx(sum(x) / 2)
    worst = found["a", "f", "worst_group_one_minus_jsd"]
    assert (worst["value"], worst["worst_group"]) == (pytest.approx(sum(y) / 2), "y")
    assert ("a", "z", "one_minus_jsd") not in found  # one question is too few
    # On the scale of three, .3 moves two places of two.
    scaled = found["a", "f", "one_minus_w1"]
    assert (scaled["value"], scaled["num"]) == (pytest.approx(0.7), 1)
    assert found["a", "f", "mass"]["value"] == pytest.approx((0.5 + 0.5 + 0.2) / 3)
    even = [(near([0.5, 0.5], (0.9, 0.1)) + near([0.5, 0.5], (0.2, 0.8))) / 2, near([1 / 3] * 3, (0.2, 0.3, 0.5))]
    even.append((near([0.5, 0.5], (1.0, 0.0)) + 1) / 2)
    assert found[UNIFORM, "f", "one_minus_jsd"]["value"] == pytest.approx(sum(even) / 3)


def test_positions_by_hand() -> None:
    stated = [
        Proposition("p", "x", 1.0, "row 1"),
        Proposition("q", "x", -2.0, "row 2"),
        Proposition("r", "y", 1, "row 3"),
    ]
    scale = ("no", "perhaps", "yes")
    run = {"row 1": said(0, 0, 1), "row 2": said(0.5, 0, 0.5), "row 3": said(0.5, 0.5, 0)}
    found = estimates(positions(stated, [p.opinion(scale) for p in stated], {"a": [run]}, 50, 0))
    # On x: full agreement, and none either way of double weight that counts the other way round.
    assert found["a", "x", "position"]["value"] == pytest.approx((1 * 1 - 2 * 0) / 3)
    assert found["a", "x", "spread"]["value"] == pytest.approx((1 * 0 + 2 * 1) / 3)
    assert found["a", "y", "position"]["value"] == pytest.approx(-0.5)
    assert found["a", "y", "spread"]["value"] == pytest.approx(0.5)
    agreeing = run | {"row 2": said(0, 0, 1)}
    found = estimates(positions(stated, [p.opinion(scale) for p in stated], {"a": [run, agreeing]}, 50, 0))
    assert found["a", "x", "position"]["value"] == pytest.approx((1 / 3 - 1 / 3) / 2)


def test_the_command_writes_what_a_report_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stated = [
        {"proposition": "Taxes should fall.", "axis": "x"},
        {"proposition": "The state should own the railways.", "axis": "x", "weight": -1},
        {"proposition": "Children should obey.", "axis": "y"},
    ]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in stated))
    main(
        [
            *("evaluate", "opinions", "--models", "{base: tiny, spl: tiny}", "--output", str(tmp_path / "o.jsonl")),
            *("--source", "survey", "--presentation", "text", "--propositions", str(tmp_path / "p.jsonl")),
            *("--draws", "20", "--base", "base", "--orders", "2"),
        ]
    )
    found = read(tmp_path / "o.jsonl")
    shares = [r for r in found.of("shares") if r["policy"] == "spl"]
    assert [(r["question"], r["people"]) for r in shares] == [(q.text, list(q.shares.values())) for q in SURVEY]
    assert all(sum(r["model"]) == pytest.approx(1) and 0 < r["mass"] < 1 for r in shares)
    items = [r for r in found.of("item") if r["policy"] == "base" and r["group"] == "survey"]
    assert len(items) == len(SURVEY)
    assert all(r["values"]["order_gap"] is not None and r["values"]["one_minus_w1"] is None for r in items)
    difference = next(r for r in found.of("estimate") if r["name"] == "one_minus_jsd_minus_base")
    assert (difference["policy"], difference["value"], difference["high"]) == ("spl", 0, 0)
    assert {r["group"] for r in found.of("estimate") if r["name"] == "position"} == {"x", "y"}
    assert UNIFORM in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"source": None}, "nothing to ask: give source, propositions or both"),
        ({"base": "b"}, "base must be the label of a model, a, but is 'b'"),
        ({"orders": 0}, "orders must be 1 or more, but is 0"),
        ({"draws": 0}, "draws must be 1 or more"),
        ({"scale": ["Agree"]}, "scale must be two or more different answers, but is Agree"),
        ({"scale": ["No", "Yes", "Yes"]}, "scale must be two or more different answers, but is No, Yes, Yes"),
        ({"models": {}}, "models is empty"),
        ({"max_length": 16}, "no question fits in max_length"),
        ({"source": "no.jsonl"}, "no file or folder 'no.jsonl'"),
    ],
)
def test_a_mistake_is_told(tmp_path: Path, change: dict[str, Any], complaint: str) -> None:
    arguments: dict[str, Any] = {"models": {"a": "tiny"}, "output": tmp_path / "o.jsonl", "source": "survey"}
    with pytest.raises(UserError, match=complaint):
        opinions(**arguments | change)
