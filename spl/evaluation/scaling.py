"""Policies as they are, at fixed temperatures and at temperatures fitted on other questions: their results' records."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from spl.evaluation.asked import Asked
from spl.evaluation.choices import Answers, Measured, crossed
from spl.intervals import resamples
from spl.metrics.opinions import total_variation
from spl.metrics.temperature import answer_law, fit_temperature, match_temperature
from spl.types import UserError

Record = dict[str, Any]

AS_IT_IS = "t 1"
FITTED = "t fitted"
FITS = 100
"""Draws of a fitted temperature."""
COMPARED = ("accuracy", "ece", "ece_equal_mass", "brier", "log_loss", "aurc")
SHOWN = ("accuracy", "temperature", "ece", "ece_if_calibrated", "log_loss", "mass")
"""What the table on the terminal has of all that is measured."""

NOTES = (
    "Calibration errors (ECE) of few questions lie above the truth, and so do their intervals, which are of what the "
    "error is on average with as many questions: compare them with ece_if_calibrated, what a model that is calibrated "
    "perfectly would show with the same confidences and as many questions (mean and 95 % range of 200 simulations).",
    "Where the setting is 't fitted', all log-probabilities of a run are divided by the temperature of least log-loss "
    "on questions that are measured nowhere else; intervals hold that temperature fixed.",
)


@dataclass(frozen=True)
class Scaling:
    """What is measured; the attributes are settings of `spl.evaluation.calibration.calibration`."""

    num_bins: int
    draws: int
    seed: int
    temperatures: tuple[float, ...] = ()
    base: str | None = None
    dpo: str | None = None

    def check(self, models: Mapping[str, Any]) -> None:
        """Refuse settings that cannot be, before any model loads."""
        if not find_spec("scipy"):
            raise UserError("fitting a temperature needs the package scipy: pip install 'spl[evaluation]'.")
        for name, label in (("base", self.base), ("dpo", self.dpo)):
            if label is not None and label not in models:
                raise UserError(f"{name} must be the label of a model, {', '.join(models)}, but is {label!r}.")
        if self.num_bins < 2:
            raise UserError(f"num_bins must be 2 or more, but is {self.num_bins}: 15 is the usual number.")
        if self.draws < 10:
            raise UserError(f"draws must be 10 or more, but is {self.draws}.")
        for temperature in self.temperatures:
            if not 0 < temperature < np.inf:
                raise UserError(f"temperatures must be above 0, but one is {temperature:g}.")


def records_of(group: str, held: Mapping[str, Asked], kept: Mapping[str, Asked], scaling: Scaling) -> list[Record]:
    """Everything about the policies' answers to the questions of one source.

    Args:
        group: name of the source.
        held: answers that temperatures are fitted on, by policy.
        kept: answers that are measured.
        scaling: what is measured.
    """
    fitted = {label: [fit_temperature(run, asked.answers) for run in asked.scores] for label, asked in held.items()}
    records: list[Record] = []
    measured: dict[tuple[str, str], dict[str, Measured]] = {}
    for label, setting, temperatures in _settings(kept, fitted, scaling):
        answers = kept[label].at(temperatures)
        place = {"policy": label, "setting": setting, "group": group}
        measured[label, setting] = answers.measures(scaling.num_bins, scaling.draws, scaling.seed)
        records += _items(answers, place)
        records += [estimate(place, name, of) for name, of in measured[label, setting].items()]
        curves = answers.curves(scaling.num_bins, scaling.draws, scaling.seed)
        records += [{"kind": "curve", **place, **curve} for curve in curves]
    for label, temperatures in fitted.items():
        place = {"policy": label, "setting": FITTED, "group": group}
        records.append(estimate(place, "temperature", _temperature(held[label], temperatures, scaling.seed)))
    return records + list(_differences(measured, group, scaling)) + list(_matches(kept, group, scaling))


def _settings(
    kept: Mapping[str, Asked], fitted: Mapping[str, Sequence[float]], scaling: Scaling
) -> Iterator[tuple[str, str, Sequence[float]]]:
    """Policy, setting and its temperature for each run."""
    for label, asked in kept.items():
        runs = len(asked.scores)
        yield label, AS_IT_IS, [1.0] * runs
        yield label, FITTED, fitted[label]
        for temperature in scaling.temperatures:
            if temperature != 1:
                yield label, f"t {temperature:g}", [temperature] * runs
        if label == scaling.base:
            for other, temperatures in fitted.items():
                if other != label:
                    yield label, f"t of {other}", [float(np.mean(temperatures))] * runs


def _items(answers: Answers, place: Record) -> Iterator[Record]:
    values = answers.values()
    runs = len(answers.law)
    for run in range(runs):
        for k, item in enumerate(answers.items):
            yield {
                "kind": "item",
                **place,
                "train_seed": run if runs > 1 else None,
                "item": item,
                "values": {name: float(value[run, k]) for name, value in values.items()},
            }


def estimate(place: Record, name: str, measured: Measured) -> Record:
    return {"kind": "estimate", **place, "name": name, **measured.interval()._asdict()}


def _temperature(asked: Asked, fitted: Sequence[float], seed: int) -> Measured:
    """The fitted temperature, the mean over runs, with the questions that it was fitted on and runs drawn again."""
    drawn = resamples(len(asked.items), len(asked.scores), FITS, seed)
    values = [
        np.mean([fit_temperature(asked.scores[s, torch.from_numpy(p)], asked.answers[p]) for s in seeds.tolist()])
        for seeds, p in zip(drawn.seeds, drawn.prompts, strict=True)
    ]
    return Measured(float(np.mean(fitted)), np.array(values), len(asked.items))


def _differences(
    measured: Mapping[tuple[str, str], Mapping[str, Measured]], group: str, scaling: Scaling
) -> Iterator[Record]:
    """Of every other policy to the base, at the same setting."""
    for (label, setting), figures in measured.items():
        base = measured.get((scaling.base or "", setting))
        if base and label != scaling.base:
            place = {"policy": label, "setting": setting, "group": group}
            yield from (estimate(place, f"{n}_minus_base", figures[n].minus(base[n])) for n in COMPARED)


def _matches(kept: Mapping[str, Asked], group: str, scaling: Scaling) -> Iterator[Record]:
    """The temperature at which DPO's letters come closest to each other policy's, and how far they then are apart.

    Of several runs the first are compared: a temperature joins two answer laws, not two means of them.
    """
    if scaling.dpo is None:
        return
    dpo = kept[scaling.dpo].scores[0]
    for label, asked in kept.items():
        if label in (scaling.dpo, scaling.base):
            continue
        law = answer_law(asked.scores[0])
        temperature = match_temperature(dpo, law)
        drawn = resamples(len(law), 1, FITS, scaling.seed).prompts
        fits = np.array([match_temperature(dpo[torch.from_numpy(p)], law[torch.from_numpy(p)]) for p in drawn])
        place = {"policy": label, "setting": AS_IT_IS, "group": group}
        yield estimate(place, "temperature_of_dpo", Measured(temperature, fits, len(law)))
        for name, at in (("gap_to_dpo", 1.0), ("gap_to_dpo_at_temperature", temperature)):
            gaps = total_variation(answer_law(dpo, at), law)[None]
            yield estimate(place, name, crossed(_mean_of, gaps, draws=scaling.draws, seed=scaling.seed))


def _mean_of(values: torch.Tensor) -> float:
    return float(values.mean())
