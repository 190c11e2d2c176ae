"""Whether the policy's probabilities mean anything: calibration on validation comparisons and on multiple choice."""

from typing import Any, NamedTuple

import torch
from lightning import LightningModule, Trainer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch.nn.utils.rnn import pad_sequence

from spl.callbacks.held_out import HeldOutMonitor, finite
from spl.callbacks.record import log_figure
from spl.metrics.calibration import Calibration, ChoiceCalibration, ComparisonCalibration
from spl.types import PreferenceBatch

Bins = list[list[float]]  # rows of sums: weight, weighted predictions, weighted labels


class _Panel(NamedTuple):
    title: str
    x_label: str
    y_label: str
    unit: str  # what is counted


_FIRST, _SHARE = "probability that the first is preferred", "share of raters who prefer it"
_PANELS = {  # by prefix of the logged names
    "": _Panel(r"Rewards: $\sigma$(margin)", _FIRST, _SHARE, "comparisons"),
    "generative_": _Panel(r"Generative: $\sigma(\Delta\,\log\,\pi)$", _FIRST, _SHARE, "comparisons"),
    "choice_": _Panel("Multiple choice", "probability of the top answer", "share right", "questions"),
}
_POLICY, _START, _TEXT = "#1b9e77", "#b8b8b8", "#444444"


class CalibrationMonitor(HeldOutMonitor):
    """Logs calibration on held-out comparisons, and on multiple choice where there is a set of questions.

    `val/ece`, `val/ece_equal_mass`, `val/brier` and `val/log_loss` are of the implicit preference, sigma(margin), their
    `generative_` siblings of sigma(log pi(y_i) - log pi(y_j)), both against the shares of raters; where shares are
    neither 0, 1/2 nor 1 also `share_gap` and `share_correlation`. Each comparison counts in both directions, see
    `spl.metrics.calibration.ComparisonCalibration`. A module without margins (SFT) gets the generative ones, a reward
    model those of its own margins.

    The `choice_` figures are of the answers that the data module's `choice_batches()` yields as (batch, answers): an
    example a question, its responses the possible answers, `answers` the indices of the right ones. Each process yields
    its own questions, and as many batches as the others where the model's weights are sharded.

    The picture `calibration` has a reliability diagram of each, beside that of the run's first validation.

    Args:
        num_bins: bins of the calibration errors and of the diagrams.
    """

    def __init__(self, num_bins: int = 15) -> None:
        self.comparisons = {prefix: ComparisonCalibration(num_bins) for prefix in ("", "generative_")}
        self.choices = ChoiceCalibration(num_bins)
        super().__init__(*self.comparisons.values(), self.choices)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: PreferenceBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if not finite(outputs):
            return
        first, second = batch.comparisons.unbind(1)
        none = batch.shares[:0]  # of a module that has no such numbers
        margins, logps = outputs.get("margins", none), outputs.get("policy_logps")
        differences = none if logps is None else logps[first] - logps[second]
        self.comparisons[""].update(margins, batch.shares[: len(margins)])
        self.comparisons["generative_"].update(differences, batch.shares[: len(differences)])

    on_test_batch_end = on_validation_batch_end

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            for metric in self.comparisons.values():
                metric.reset()
            return
        results = self._log(trainer, pl_module, "val")
        self.keep_first(trainer, {prefix: result.bins.tolist() for prefix, result in results.items()})
        if trainer.is_global_zero and results:
            log_figure(trainer, "calibration", self._draw(results, trainer.global_step))

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log(trainer, pl_module, "test")

    def _log(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> dict[str, Calibration]:
        """Log what all processes have seen, and begin anew; what has seen nothing is left out."""
        metrics: dict[str, Any] = dict(self.comparisons)
        if hasattr(getattr(trainer, "datamodule", None), "choice_batches"):
            self._answer(trainer, pl_module)
            metrics["choice_"] = self.choices
        results = {}
        for prefix, metric in metrics.items():
            result: Calibration = metric.compute()
            metric.reset()
            if result.num > 0:
                results[prefix] = result
                for name, value in result.figures.items():
                    pl_module.log(f"{stage}/{prefix}{name}", value)
        return results

    @torch.no_grad()
    def _answer(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put this process's multiple-choice questions to the policy."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        module: Any = pl_module
        rows, answers = [torch.zeros(0, device=module.device)], list[int]()
        with trainer.precision_plugin.forward_context():
            for batch, right in data.choice_batches():
                moved = module.transfer_batch_to_device(batch, module.device, 0)
                counts = moved.response_example.bincount(minlength=moved.num_examples)
                rows += module.score(moved).logps.split(counts.tolist())
                answers += right
        scores = pad_sequence(rows, batch_first=True, padding_value=-torch.inf)[1:]
        self.choices.update(scores, torch.tensor(answers, dtype=torch.long))

    def _draw(self, results: dict[str, Calibration], step: int) -> Figure:
        figure = Figure(figsize=(4.3 * len(results), 5.4), layout="constrained")
        columns = figure.subplots(2, len(results), sharex=True, squeeze=False, height_ratios=(3, 1)).T
        for (prefix, result), (diagram, histogram) in zip(results.items(), columns, strict=True):
            bins: Bins = result.bins.tolist()
            if step > self.first_step and prefix in (self.first or {}):
                _draw_bins(diagram, histogram, self.first[prefix], _START, f"step {self.first_step:,}")
            _draw_bins(diagram, histogram, bins, _POLICY, f"step {step:,}")
            panel = _PANELS[prefix]
            _finish(diagram, histogram, panel)
            ece, equal_mass = result.figures["ece"], result.figures["ece_equal_mass"]
            title = f"{panel.title}, n = {int(result.num):,}\nECE {ece:.3f}, equal mass {equal_mass:.3f}"
            diagram.set_title(title, fontsize=10, color=_TEXT)
        return figure


def _draw_bins(diagram: Axes, histogram: Axes, bins: Bins, colour: str, label: str) -> None:
    """One curve of the bins that hold something, points sized by how much, and the counts of all bins below."""
    weights, now = bins[0], colour == _POLICY
    filled = [(w, p / w, y / w) for w, p, y in zip(*bins, strict=True) if w > 0]
    sizes = [8 + 110 * w / max(weights) for w, _, _ in filled]
    x, y = [p for _, p, _ in filled], [y for _, _, y in filled]
    diagram.plot(x, y, color=colour, linewidth=1, alpha=0.7, zorder=2)
    diagram.scatter(x, y, s=sizes, color=colour, edgecolor="white", linewidth=0.6, label=label, zorder=2 + now)
    edges = [k / len(weights) for k in range(len(weights) + 1)]
    histogram.stairs(weights, edges, color=colour, fill=now, linewidth=1.5, zorder=2 + (not now))
    # The start comes first; a spike of it far above the present bars is cut off, or they could not be seen.
    top = 1.05 * max(weights)
    histogram.set_ylim(0, max(top, min(histogram.get_ylim()[1], 2 * top)) if now else top)


def _finish(diagram: Axes, histogram: Axes, panel: _Panel) -> None:
    diagram.plot([0, 1], [0, 1], color=_TEXT, linewidth=0.8, linestyle=(0, (4, 4)), zorder=1)
    diagram.set(xlim=(-0.02, 1.02), ylim=(-0.03, 1.03), ylabel=panel.y_label)
    diagram.legend(frameon=False, loc="upper left", fontsize=9, labelcolor=_TEXT)
    histogram.set(xlabel=panel.x_label, ylabel=panel.unit)
    for axes in (diagram, histogram):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=_TEXT, labelsize=9)
        axes.xaxis.label.set_color(_TEXT)
        axes.yaxis.label.set_color(_TEXT)
