"""The end's table and sentence, on figures whose answer is plain."""

import io
import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from tiny_fit import fit

from spl.callbacks.run_folder import RunFolder
from spl.callbacks.start import StartEndValidation
from spl.callbacks.summary import GROUPS, change, sentence, summary, wilson

Figures = dict[str, float]


def shown(start: Figures, end: Figures, width: int = 80) -> str:
    text = io.StringIO()
    Console(file=text, width=width).print(summary(start, end))
    return text.getvalue()


def row(text: str, name: str) -> str:
    """A figure's row from its name on, spaces made one; the name of its group may be the same."""
    (cells,) = [line.split() for line in text.splitlines() if name in line.split()[:2]]
    return " ".join(cells[cells[:2].index(name) + (cells[:2] == [name, name]) :])


@pytest.mark.parametrize(("by", "arrow"), [(9.9, "→"), (-9.9, "→"), (10.1, "↑"), (-10.1, "↓"), (0.0, "→")])
def test_an_arrow_is_beyond_two_standard_errors(by: float, arrow: str) -> None:
    """Errors of 3 and 4 make one of 5."""
    found = change({"val/kl": 50.0, "val/kl_se": 3.0}, {"val/kl": 50.0 + by, "val/kl_se": 4.0}, "kl")
    assert found is not None
    assert (found.error, found.arrow) == (5.0, arrow)


def test_a_paired_difference_has_the_smaller_error() -> None:
    start = {"val/length": 50.0, "val/length_se": 3.0, "val/length_change": 0.0, "val/length_change_se": 0.0}
    end = {"val/length": 53.0, "val/length_se": 4.0, "val/length_change": 3.0, "val/length_change_se": 1.0}
    for began, error, arrow in ((start, 1.0, "↑"), (start | {"val/length_change": 2.0}, 5.0, "→")):
        found = change(began, end, "length")
        assert found is not None
        assert (found.error, found.arrow) == (error, arrow)


def test_replies_that_do_not_end_are_cut() -> None:
    start = {"val/eos_rate": 0.2, "val/eos_rate_se": 0.06, "val/truncation_rate": 0.8}
    end = start | {"val/eos_rate": 0.25, "val/truncation_rate": 0.75}
    assert row(shown(start, end), "truncation_rate") == "truncation_rate 0.80 ± 0.12 → 0.75 ± 0.12 of replies"


@pytest.mark.parametrize(("end", "arrow"), [(0.51, "↑"), (0.49, "↓"), (0.50001, "→")])
def test_without_an_error_the_arrow_is_the_sign_of_what_shows(end: float, arrow: str) -> None:
    found = change({"val/ece": 0.5, "val/ece_se": math.nan}, {"val/ece": end}, "ece")
    assert found is not None
    assert found.arrow == arrow


def test_the_error_of_an_accuracy_follows_from_its_count() -> None:
    start = {"val/rewards/accuracies": 0.5, "val/rewards/num": 100.0, "val/rewards/margins": 0.1}
    found = change(start, start | {"val/rewards/accuracies": 0.8}, "rewards/accuracies")
    assert found is not None
    assert found.error == pytest.approx(math.sqrt(0.5 * 0.5 / 100 + 0.8 * 0.2 / 100))


def test_the_table_without_monitors() -> None:
    start = {"val/loss": 0.6931, "val/token_entropy": 2.0, "val/rewards/num": 64.0, "val/logps/chosen": -80.0}
    end = start | {
        "val/loss": 0.5,
        "val/token_entropy": 2.0,
        "val/rewards/accuracies": 0.75,
        "val/rewards/margins": 0.7,
    }
    text = shown(start, end)
    assert row(text, "loss") == "loss 0.6931 ↓ 0.5"
    assert row(text, "token_entropy") == "token_entropy 2 → 2 nats a token"
    # An error of sqrt(0.75 * 0.25 / 64) = 0.054; at the start there is none.
    assert row(text, "rewards/accuracies") == "rewards/accuracies - 0.75 ± 0.11 of 64"
    assert "logps/chosen " not in text and "kl" not in text


def test_a_figure_is_written_as_its_error_warrants() -> None:
    start = {"val/entropy": 37.234, "val/entropy_se": 0.6, "val/kl": 0.0, "val/kl_se": 0.0}
    end = {"val/entropy": 131.02, "val/entropy_se": 11.0, "val/kl": 3.2123, "val/kl_se": 0.02}
    text = shown(start, end)
    assert row(text, "entropy") == "entropy 37.2 ± 1.2 ↑ 131 ± 22 nats a reply"
    assert row(text, "kl") == "kl 0 ↑ 3.212 ± 0.040 nats a reply"


def test_ties_of_the_first_step_are_no_accuracy() -> None:
    """With alpha = beta and the policy still its reference, every margin is 0."""
    start = {"val/rewards/accuracies": 0.0, "val/rewards/num": 50.0, "val/rewards/margins": 0.0}
    end = {"val/rewards/accuracies": 0.6, "val/rewards/num": 50.0, "val/rewards/margins": 0.2}
    assert row(shown(start, end), "rewards/accuracies") == "rewards/accuracies - 0.60 ± 0.14 of 50"
    assert "accuracy" not in sentence(start, start)


def test_every_row_fits_a_terminal_of_80_columns() -> None:
    start = {f"val/{name}": -212.3456 for units in GROUPS.values() for name in units}
    start |= {f"{name}_se": 0.01 for name in start if "rewards" not in name and "logps" not in name}
    start |= {"val/rewards/accuracies": 0.4321, "val/rewards/num": 51_234.0}
    text = shown(start, start)
    assert all(row(text, name.removeprefix("val/")) for name in start if not name.endswith(("_se", "/num")))
    assert all(len(line) <= 80 for line in text.splitlines()) and "…" not in text


def test_nothing_known_prints_nothing() -> None:
    assert shown({}, {}).strip() == sentence({}, {}) == ""


ENTROPY = {"val/entropy": 40.0, "val/entropy_se": 0.3, "val/length": 30.0, "val/length_se": 1.0}


def test_the_sentence_says_what_fell_and_what_length_did() -> None:
    end = ENTROPY | {"val/entropy": 35.0, "val/entropy_se": 0.4, "val/length": 31.0}
    assert sentence(ENTROPY, end) == (
        "Entropy fell by 5.0 ± 1.0 nats a reply (40 to 35), beyond noise for these prompts; "
        "replies went from 30 to 31 tokens in the same time, within noise."
    )
    end = ENTROPY | {"val/entropy": 40.5, "val/entropy_se": 0.4, "val/length": 60.0}
    assert sentence(ENTROPY, end) == (
        "Entropy rose by 0.5 ± 1.0 nats a reply (40 to 40.5), within noise; "
        "replies went from 30 to 60 tokens in the same time."
    )
    assert sentence(ENTROPY, end | {"val/truncation_rate": 0.75}).endswith(", with 75% of them cut at the most tokens.")


def test_the_sentence_says_where_noise_is_unknown() -> None:
    text = sentence({"val/token_entropy": 2.0}, {"val/token_entropy": 1.5})
    assert text == "Token entropy on held-out responses fell by 0.5 nats (2 to 1.5; its noise is not known)."


@pytest.mark.parametrize(
    ("share", "num", "verdict"),
    [(0.6, 50, "not to be told from chance"), (0.6, 500, "above chance"), (0.4, 500, "below chance")],
)
def test_the_sentence_holds_accuracy_to_chance(share: float, num: int, verdict: str) -> None:
    """At 50 comparisons the error is 0.07, so 0.6 is within two; at 500 it is 0.022."""
    text = sentence({}, {"val/rewards/accuracies": share, "val/rewards/num": num, "val/rewards/margins": 0.3})
    assert f"{share} on {num} comparisons" in text and text.endswith(f"{verdict}.")


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilsons_ends_are_those_a_test_would_just_not_reject(drawn: tuple[int, int]) -> None:
    """By definition each end p solves |share - p| = z sqrt(p (1 - p) / n)."""
    share, num = drawn[0] / drawn[1], drawn[1]
    low, high = wilson(share, num)
    for p in (low, high):
        assert (share - p) ** 2 * num == pytest.approx(1.96**2 * p * (1 - p), abs=1e-9)
    assert low <= share + 1e-12 and share <= high + 1e-12 and low < high


@pytest.mark.parametrize("width", ["80", "120"])
def test_a_run_ends_in_the_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, width: str
) -> None:
    monkeypatch.setenv("COLUMNS", width)
    fit(tmp_path, RunFolder(), StartEndValidation(), check_val_every_n_epoch=100)
    out = capsys.readouterr().out
    facts = json.loads((tmp_path / "summary.json").read_text())
    start, end = facts["start"], facts["end"]
    assert f"{start['val/loss']:.4g}" in row(out, "loss").split()
    assert f"{end['val/rewards/margins']:.4g}" in row(out, "rewards/margins").split()
    assert f"of {end['val/rewards/num']:.0f}" in row(out, "rewards/accuracies")
    assert sentence(start, end) in " ".join(out.split())
