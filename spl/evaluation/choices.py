"""Everything about the calibration of answers to multiple-choice questions, from their log-probabilities.

Two programs come here: `spl evaluate calibration`, which asks models itself, and `spl evaluate lm-eval`, which reads
what a harness has asked; `spl.evaluation.asked` is what both bring.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spl.intervals import Interval, interval, resamples
from spl.metrics.calibration import brier_score, expected_calibration_error, log_loss, reliability_bins
from spl.metrics.risk_coverage import area_under_risk, risk_at

Draws = NDArray[np.float64]

COVERAGES = 20
"""Points of a risk-coverage curve."""
SIMULATED = 200
"""Sets of answers of a perfectly calibrated model."""


class Measured(NamedTuple):
    """A number and what it is in every draw of the bootstrap."""

    value: float
    drawn: Draws
    num: int

    def interval(self) -> Interval:
        return interval(self.value, self.drawn, self.num)

    def centred(self) -> "Measured":
        """Draws of a calibration error lie above it, as it lies above the truth: of that only the spread is kept.

        The interval is then of what the error is on average with so many questions, as is its value for a model that
        is calibrated perfectly.
        """
        return self._replace(drawn=np.clip(self.drawn - self.drawn.mean() + self.value, 0, 1))

    def minus(self, other: "Measured") -> "Measured":
        """Paired, where both were drawn by the same seed."""
        return Measured(self.value - other.value, self.drawn - other.drawn, self.num)


@dataclass(frozen=True)
class Answers:
    """Probabilities of the answers.

    Attributes:
        items: [N] ids of the questions.
        answers: [N] indices of the right ones.
        law: [S, N, K] normalised over the listed answers.
        mass: [S, N] what a run gives the listed answers together, at temperature 1.
    """

    items: list[str]
    answers: Tensor
    law: Tensor
    mass: Tensor

    def values(self) -> dict[str, Tensor]:
        """Numbers of each question, each [S, N]; log-loss in nats, Brier in [0, 2]."""
        labels = torch.nn.functional.one_hot(self.answers, self.law.shape[-1]).double()
        confidence, choice = self.law.max(-1)
        logs = self.law.clamp(min=torch.finfo(torch.double).tiny).log()
        return {
            "p_right": (self.law * labels).sum(-1),
            "confidence": confidence,
            "correct": (choice == self.answers).double(),
            "brier": brier_score(self.law, labels),
            "log_loss": log_loss(logs, labels),
            "mass": self.mass,
        }

    def measures(self, num_bins: int, draws: int, seed: int) -> dict[str, Measured]:
        """Every figure over the questions, drawn with questions and runs again."""
        values = self.values()
        sure, right = values["confidence"], values["correct"]
        found = {name: crossed(_mean, values[of], draws=draws, seed=seed) for name, of in _MEANS.items()}
        for name, equal_mass in (("ece", False), ("ece_equal_mass", True)):
            error = _calibration_error(num_bins, equal_mass)
            found[name] = crossed(error, sure, right, draws=draws, seed=seed).centred()
            found[f"{name}_if_calibrated"] = _if_calibrated(error, sure, seed)
        found["aurc"] = crossed(_area, sure, right, draws=draws, seed=seed)
        return found

    def curves(self, num_bins: int, draws: int, seed: int) -> list[dict[str, Any]]:
        """The reliability diagram in both kinds of bins, and risk against coverage."""
        values = self.values()
        sure, right = values["confidence"], values["correct"]
        return [*(_reliability(sure, right, num_bins, mass) for mass in (False, True)), _risk(sure, right, draws, seed)]


_MEANS = {"accuracy": "correct", "confidence": "confidence", "brier": "brier", "log_loss": "log_loss", "mass": "mass"}


def crossed(statistic: Callable[..., float], *arrays: Tensor, draws: int, seed: int) -> Measured:
    """A statistic of arrays [S, N, ...], the mean over S runs, with questions and runs drawn again, crossed.

    Args:
        statistic: of the arrays' rows [N, ...] of one run.
        arrays: each [S, N, ...].
        draws: of the bootstrap.
        seed: the same for all that is compared in pairs.
    """
    runs, num = arrays[0].shape[:2]
    drawn = resamples(num, runs, draws, seed)

    def mean(seeds: Sequence[int], prompts: Tensor) -> float:
        return float(np.mean([statistic(*(array[s, prompts] for array in arrays)) for s in seeds]))

    values = [mean(s.tolist(), torch.from_numpy(p)) for s, p in zip(drawn.seeds, drawn.prompts, strict=True)]
    return Measured(mean(range(runs), torch.arange(num)), np.array(values), num)


def _mean(values: Tensor) -> float:
    return float(values.mean())


def _area(confidence: Tensor, correct: Tensor) -> float:
    return float(area_under_risk(confidence, correct))


def _calibration_error(num_bins: int, equal_mass: bool) -> Callable[[Tensor, Tensor], float]:
    return lambda sure, right: float(expected_calibration_error(sure, right, num_bins, equal_mass=equal_mass))


def _if_calibrated(error: Callable[[Tensor, Tensor], float], confidence: Tensor, seed: int) -> Measured:
    """The error of a model that is right as often as it is sure, with these confidences and so many questions.

    All runs see the same luck, as runs of one policy mostly err on the same questions.
    """
    luck = torch.from_numpy(np.random.default_rng((seed, 2)).random((SIMULATED, confidence.shape[1])))
    errors = [np.mean([error(run, (u < run).double()) for run in confidence]) for u in luck]
    return Measured(float(np.mean(errors)), np.array(errors), confidence.shape[1])


def _reliability(confidence: Tensor, correct: Tensor, num_bins: int, equal_mass: bool) -> dict[str, Any]:
    """Mean confidence and share right in every bin that holds something, over all runs, with Wilson intervals.

    The weight of a bin is the number of questions in it, of one run: runs answer the same ones.
    """
    bins = reliability_bins(confidence.flatten(), correct.flatten(), num_bins, equal_mass=equal_mass)
    weight, sure, right = bins[:, bins[0] > 0]
    low, high = wilson(right / weight, weight / len(confidence))
    return {
        "name": "reliability_equal_mass" if equal_mass else "reliability",
        "x": (sure / weight).tolist(),
        "y": (right / weight).tolist(),
        "low": low.tolist(),
        "high": high.tolist(),
        "weight": (weight / len(confidence)).tolist(),
        "x_name": "confidence",
        "y_name": "share right",
    }


def wilson(share: Tensor, num: Tensor) -> tuple[Tensor, Tensor]:
    """Ends of the 95 % interval of a share among num (Wilson 1927), which stays within [0, 1] for few."""
    z = 1.959963984540054
    middle, width = share + z * z / (2 * num), z * (share * (1 - share) / num + z * z / (4 * num * num)).sqrt()
    return ((middle - width) / (1 + z * z / num)).clamp(min=0), ((middle + width) / (1 + z * z / num)).clamp(max=1)


def _risk(confidence: Tensor, correct: Tensor, draws: int, seed: int) -> dict[str, Any]:
    coverages = torch.arange(1, COVERAGES + 1, dtype=torch.double) / COVERAGES
    drawn = resamples(confidence.shape[1], len(confidence), draws, seed)

    def risks(seeds: Sequence[int], prompts: Tensor) -> NDArray[np.float64]:
        of = [risk_at(confidence[s, prompts], correct[s, prompts], coverages).numpy() for s in seeds]
        return np.asarray(np.mean(of, axis=0))

    bands = [risks(s.tolist(), torch.from_numpy(p)) for s, p in zip(drawn.seeds, drawn.prompts, strict=True)]
    low, high = np.quantile(bands, [0.025, 0.975], axis=0)
    return {
        "name": "risk_coverage",
        "x": coverages.tolist(),
        "y": risks(range(len(confidence)), torch.arange(confidence.shape[1])).tolist(),
        "low": low.tolist(),
        "high": high.tolist(),
        "weight": None,
        "x_name": "coverage",
        "y_name": "share wrong",
    }
