"""The newcomer's run, shortened: the tiny model climbs the same ladder to the same closed form."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from real_model import smollm2

from spl.data.survey import SURVEY
from spl.objective.optimum import two_outcome_share
from spl.quickstart import Ladder, Record, gap, run

KEYS = {
    "question", "answers", "population", "reference", "dpo", "spl", "alpha", "beta",
    "closed_form_dpo", "closed_form_spl",
    "reference_logps", "mass_base", "mass_reference", "mass_dpo", "mass_spl", "free_reference", "free_dpo", "free_spl",
}  # fmt: skip


def check(records: list[Record], folder: Path, samples: int) -> None:
    """What holds of any ladder, however far it climbed."""
    assert json.loads((folder / "shares.json").read_text()) == records
    with Image.open(folder / "shares.png") as picture:
        assert picture.size[0] > 1000
    assert [r["population"] for r in records] == [list(q.shares.values()) for q in SURVEY]
    for record in records:
        assert record.keys() >= KEYS
        for name in ("reference", "dpo", "spl", "closed_form_dpo", "closed_form_spl"):
            assert sum(record[name]) == pytest.approx(1, abs=1e-6)
            assert len(record[name]) == len(record["answers"])
        for name in ("reference", "dpo", "spl"):
            assert sum(record[f"free_{name}"].values()) == pytest.approx(1)
            assert all(
                share * samples == pytest.approx(round(share * samples)) for share in record[f"free_{name}"].values()
            )
        # The reference's shares are its log-probabilities, normalised.
        assert torch.tensor(record["reference_logps"]).softmax(0).tolist() == pytest.approx(
            record["reference"], abs=1e-5
        )
        assert torch.tensor(record["reference_logps"]).exp().sum() == pytest.approx(record["mass_reference"], rel=1e-4)
        if len(record["answers"]) == 2:
            expected = two_outcome_share(
                record["population"][0], record["reference"][0], record["alpha"], record["beta"]
            )
            assert record["closed_form_spl"][0] == pytest.approx(expected, abs=1e-6)


def test_the_tiny_model_climbs_towards_the_closed_form(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ladder = Ladder(
        model="tiny", output=tmp_path, warmup_steps=150, dpo_steps=150, spl_steps=150, warmup_lr=2e-2, dpo_lr=2e-2,
        spl_lr=1e-2, samples=50,
    )  # fmt: skip
    records = run(ladder)
    check(records, tmp_path, 50)
    said = capsys.readouterr().out
    assert "The mass term is on in both runs" in said
    assert all(record["question"].removesuffix(" Answer with one word.") in said for record in records)
    before = [sum(abs(a - b) for a, b in zip(r["reference"], r["closed_form_spl"], strict=True)) / 2 for r in records]
    assert sum(gap(r, "spl") for r in records) < sum(before) / 2


def test_the_real_model_begins_to_climb(tmp_path: Path) -> None:
    ladder = replace(Ladder(), model=smollm2(), output=tmp_path, warmup_steps=3, dpo_steps=2, spl_steps=2, samples=50)
    records = run(ladder)
    check(records, tmp_path, 50)
    # Asked for one word, the model as it came hardly ever gives a listed one; a few steps change that.
    assert max(r["mass_base"] for r in records) < 0.05
    assert sum(r["mass_reference"] for r in records) > 3 * sum(r["mass_base"] for r in records)
