"""How rewards and margins are spread over held-out comparisons, and how that moves."""

import logging
from typing import Any

import numpy as np
import torch
from lightning import LightningModule, Trainer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from spl.callbacks.held_out import HeldOutMonitor, finite
from spl.callbacks.record import log_figure
from spl.metrics.preference import RewardHistograms, RewardSpread, quantiles
from spl.types import PreferenceBatch

log = logging.getLogger(__name__)

_CHOSEN, _REJECTED, _START, _TEXT = "#1b9e77", "#7570b3", "#b8b8b8", "#444444"
_LEVELS = [k / 200 for k in range(201)]  # of the quantiles that are kept of the first validation
_NUM_BARS = 30
_NARROWEST = 0.2  # nats: no picture zooms in on rounding


class RewardMonitor(HeldOutMonitor):
    """Logs `val/rewards/margins_sd` and `val/rewards/saturated`, the share of comparisons with |margin| > 5, and draws.

    The standard deviation is that of the comparisons seen (divided by n). The chosen side is the one that at least half
    of the raters prefer, as in `val/rewards/accuracies`.

    The picture `rewards` shows the implicit rewards alpha log pi - beta log pi_ref of chosen and of rejected responses
    as they are. They are only defined up to a constant of the prompt, and where alpha is not beta a longer response has
    a lower one, so these two histograms say little by themselves; in the margins beside them, the difference within
    each comparison, the constant cancels. Both show the run's first validation too. Of a reward model the rewards are
    its own.
    """

    def __init__(self) -> None:
        self.histograms = RewardHistograms()
        super().__init__(self.histograms)
        self.warned = False

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: PreferenceBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if "margins" not in outputs:
            if not self.warned:
                log.warning("RewardMonitor needs rewards of replies: this run has none to show.")
            self.warned = True
            return
        first, second = batch.comparisons.unbind(1)
        rewards, chosen_first = outputs["rewards"], batch.shares >= 0.5
        figures = (
            rewards[torch.where(chosen_first, first, second)],
            rewards[torch.where(chosen_first, second, first)],
            torch.where(chosen_first, 1, -1) * outputs["margins"],
            batch.shares != 0.5,
        )
        # Updated in any case: a process whose batches are all left out is asked for its sums like the others.
        self.histograms.update(*(figures if finite(outputs) else (figure[:0] for figure in figures)))

    on_test_batch_end = on_validation_batch_end

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            self.histograms.reset()
            return
        spread = self._log(pl_module, "val")
        if spread is None:
            return
        found = [quantiles(row, _LEVELS) for row in spread.counts]
        self.keep_first(trainer, found)
        if trainer.is_global_zero:
            kind = "implicit reward" if getattr(pl_module, "task", "") == "preference" else "reward"
            log_figure(trainer, "rewards", self._draw(spread, found, trainer.global_step, kind))

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log(pl_module, "test")

    def _log(self, pl_module: LightningModule, stage: str) -> RewardSpread | None:
        """Log what all processes have seen, and begin anew; None where there was nothing."""
        if not self.histograms.update_called:
            return None
        spread: RewardSpread = self.histograms.compute()
        self.histograms.reset()
        if spread.num == 0:
            return None
        for name in ("margins_sd", "saturated"):
            pl_module.log(f"{stage}/rewards/{name}", spread.figures[name])
        return spread

    def _draw(self, spread: RewardSpread, found: list[list[float]], step: int, kind: str) -> Figure:
        first: list[list[float]] = self.first if step > self.first_step and self.first else []
        figure = Figure(figsize=(9.6, 3.9), layout="constrained")
        left, right = figure.subplots(1, 2)
        then = f"step {self.first_step:,}"
        edges = _edges(found[:2] + first[:2])
        for quantile, colour, label in ((found[0], _CHOSEN, "chosen"), (found[1], _REJECTED, "rejected")):
            _bars(left, quantile, edges, colour, label)
        _outline(left, first[:2], edges, [f"chosen, {then}", f"rejected, {then}"])
        edges = _edges([*found[2:], *first[2:], [0.0] * len(_LEVELS)])
        for side, colour, label in ((edges >= 0, _CHOSEN, "right"), (edges <= 0, _REJECTED, "wrong")):
            _bars(right, found[2], edges[side], colour, label)
        _outline(right, first[2:], edges, [then])
        right.axvline(0, color=_TEXT, linewidth=0.8)
        accuracy, sd = spread.figures["accuracy"], spread.figures["margins_sd"]
        _finish(left, f"{kind.capitalize()}s at step {step:,}", f"{kind} (nats)", "responses (%)")
        decided = int(spread.figures["decided"])
        title = f"Margins: {accuracy:.1%} right of {decided:,}, sd {sd:.2g}"
        _finish(right, title, "chosen \N{MINUS SIGN} rejected (nats)", "comparisons (%)")
        return figure


def _edges(quantiles_of: list[list[float]]) -> NDArray[np.float64]:
    """Even edges of bars about the middle 98 % of every distribution, zero one of them if it lies within."""
    low = min(q[len(q) // 100] for q in quantiles_of)
    high = max(q[-1 - len(q) // 100] for q in quantiles_of)
    spare = max(_NARROWEST - (high - low), 0) / 2
    low, high = low - spare, high + spare
    width = (high - low) / _NUM_BARS
    return width * np.arange(np.floor(low / width), np.ceil(high / width) + 1)


def _percent(quantile: list[float], edges: NDArray[np.float64]) -> NDArray[np.float64]:
    """Share of a distribution between each two edges, in percent."""
    return 100 * np.diff(np.interp(edges, quantile, _LEVELS))


def _bars(axes: Axes, quantile: list[float], edges: NDArray[np.float64], colour: str, label: str) -> None:
    if len(edges) > 1:
        axes.stairs(_percent(quantile, edges), edges, color=colour, fill=True, alpha=0.5, label=label)


def _outline(axes: Axes, first: list[list[float]], edges: NDArray[np.float64], labels: list[str]) -> None:
    """The start, in grey; a spike far above the bars is cut off, or they could not be seen."""
    top = axes.get_ylim()[1]
    for quantile, label, style in zip(first, labels, ("solid", "dotted"), strict=False):
        axes.stairs(_percent(quantile, edges), edges, color=_START, linestyle=style, linewidth=1.5, label=label)
    axes.set_ylim(0, min(axes.get_ylim()[1], 2 * top))


def _finish(axes: Axes, title: str, x_label: str, y_label: str) -> None:
    axes.set_title(title, fontsize=10, color=_TEXT)
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=_TEXT, labelsize=9)
    axes.xaxis.label.set_color(_TEXT)
    axes.yaxis.label.set_color(_TEXT)
    axes.legend(frameon=False, fontsize=9, labelcolor=_TEXT)
