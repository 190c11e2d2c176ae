"""How much of the model's diversity is left: entropy, cross-entropy and KL on samples, and lengths beside them."""

import logging
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from spl.callbacks.record import log_figure, log_now
from spl.callbacks.sampler import PromptSamples, SampleRound, ensure_sampler
from spl.metrics.entropy import PromptMean
from spl.types import ResponseLaws

_POLICY, _REFERENCE, _TEXT = "#1b9e77", "#8c8c8c", "#444444"
# Of each sample, each with a standard error; the first five are sums over the reply, logged per token as well.
_QUANTITIES = (
    "entropy",
    "surprisal",
    "cross_entropy",
    "kl",
    "log_z",
    "length",
    "eos_rate",
    "entropy_change",
    "length_change",
)
_SUMS = _QUANTITIES[:5]
_OF_REFERENCE = ("cross_entropy", "kl", "entropy_change", "length_change")

log = logging.getLogger(__name__)


class EntropyMonitor(Callback):
    """Sequence entropy, cross-entropy under the reference and their difference KL, on samples at temperature 1.

    Logged in nats a reply, with the standard error for other samples of the same prompts, and per token (the ratio of
    the means): `val/entropy`, the sum of the next token's entropies along a sample (Rao-Blackwellised), beside
    `val/surprisal`, the plain -log pi(y); `val/cross_entropy` and `val/kl`, sums of conditional expectations too;
    `val/length`, `val/eos_rate` and `val/truncation_rate`, without which longer replies pass for more entropy. They
    are of replies cut at the sampler's most tokens. `val/reference_...` are the reference's own; `val/entropy_change`
    and `val/length_change` are differences from it, paired by prompt and random numbers, so that their standard errors
    are smaller than those of the two ends.

    Once, on the reference's samples, `val/forecast_log_z`: the mean of sum_t log Z_t at alpha / beta. The exact global
    temperature prefers a reply to what the same token temperature makes of it by this much, so it leans to paths of
    high entropy and to long ones. The picture `figures/entropy.png` shows it beside what then happens.
    """

    def __init__(self) -> None:
        self.metric = PromptMean(len(_QUANTITIES))
        self.history: list[dict[str, float]] = []
        self.reference: dict[str, float] = {}
        self.forecast: list[list[float]] = []  # (length, sum_t log Z_t) of this process's samples of the reference

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        ensure_sampler(trainer)
        if stage == "fit":  # what a checkpoint knows is loaded after this
            self.history, self.reference, self.forecast = [], {}, []

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history, "reference": self.reference, "forecast": self.forecast}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history, self.reference = state_dict["history"], state_dict["reference"]
        self.forecast = state_dict["forecast"]

    def on_samples(self, trainer: Trainer, pl_module: LightningModule, samples: SampleRound) -> None:
        found = self._measure(samples.policy, samples.laws, samples.reference_laws)
        found = {name: value for name, value in found.items() if not name.startswith("log_z")}
        values = {f"val/{name}": value for name, value in found.items()}
        if samples.reference_laws is None:
            values = {f"val/{name}": value for name, value in found.items() if not name.startswith(_OF_REFERENCE)}
        elif not self.reference:
            values |= self._reference_values(samples.reference, samples.reference_laws)
        log_now(trainer, values)
        if trainer.state.fn == "fit":
            self.history = [past for past in self.history if past["step"] < samples.step]
            self.history.append({"step": samples.step} | found)
            if trainer.is_global_zero:
                log_figure(trainer, "entropy", self.draw())

    def _measure(
        self, samples: tuple[PromptSamples, ...], laws: ResponseLaws, reference: ResponseLaws | None
    ) -> dict[str, float]:
        """Means over all processes' samples, standard errors, and means per token."""
        self.metric.to(laws.logps.device)
        ended = [end for replies in samples for end in replies.ended]
        rows = _quantities(laws, laws.logps.new_tensor(ended), reference or laws)
        for own in torch.split(rows, [len(replies.texts) for replies in samples]):
            self.metric.update(own)
        mean, error = self.metric.compute()
        self.metric.reset()
        found = dict(zip(_QUANTITIES, mean.tolist(), strict=True))
        errors = zip(_QUANTITIES, error.tolist(), strict=True)
        return {
            **found,
            "truncation_rate": 1 - found["eos_rate"],
            **{f"{name}_se": value for name, value in errors},
            **{f"{name}_per_token": found[name] / found["length"] for name in _SUMS},
        }

    def _reference_values(self, samples: tuple[PromptSamples, ...], laws: ResponseLaws) -> dict[str, float]:
        """What is logged once, of the reference's samples; keeps it for the pictures."""
        found = self._measure(samples, laws, None)
        names = ("entropy", "entropy_per_token", "length", "eos_rate")
        self.reference = {name: found[name] for name in names}
        values = {f"val/reference_{name}": value for name, value in self.reference.items()}
        if not laws.log_normalizers.isnan().any():
            self.forecast = torch.stack([laws.num_tokens, laws.log_normalizers], 1).tolist()
            forecast = ("log_z", "log_z_se", "log_z_per_token")
            values |= {f"val/forecast_{name}": found[name] for name in forecast}
            self.reference["log_z"] = found["log_z"]
        return values

    def draw(self) -> Figure:
        """Entropy and cross-entropy, KL, length and endings over steps; the forecast."""
        figure = Figure(figsize=(12.5, 7.5), layout="constrained")
        entropy, kl, length, forecast = figure.subplots(2, 2).flat
        self._draw_entropy(entropy)
        self._draw_kl(kl)
        self._draw_length(length)
        self._draw_forecast(forecast)
        for axis in (entropy, kl, length, forecast):
            axis.spines["top"].set_visible(False)
        for axis in (entropy, kl, forecast):
            axis.spines["right"].set_visible(False)
        figure.supxlabel(
            "Bands: two standard errors, of entropy and length those of the paired difference from the reference.\n"
            "Last panel, the forecast: what the global temperature favours beyond token temperature.",
            fontsize=9,
            color=_TEXT,
        )
        return figure

    def _draw_line(self, axis: Axes, name: str, color: str, label: str, band: str = "") -> None:
        """A quantity over steps, in a band of two standard errors of the quantity `band`."""
        steps, values = ([row[key] for row in self.history] for key in ("step", name))
        axis.plot(steps, values, "o-", color=color, label=label, markersize=4)
        if band:
            errors = [2 * row[f"{band}_se"] for row in self.history]
            low, high = ([v + sign * e for v, e in zip(values, errors, strict=True)] for sign in (-1, 1))
            axis.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)

    def _draw_entropy(self, axis: Axes) -> None:
        if self.reference:
            self._draw_line(axis, "cross_entropy", "#d95f02", "cross-entropy, policy to reference")
            axis.axhline(self.reference["entropy"], color=_REFERENCE, linestyle="--", label="reference's entropy")
        self._draw_line(axis, "entropy", _POLICY, "policy's entropy", "entropy_change" if self.reference else "")
        _finish(axis, "nats a reply")

    def _draw_kl(self, axis: Axes) -> None:
        if not self.reference:
            axis.set_axis_off()
            return
        self._draw_line(axis, "kl", "#7570b3", "KL divergence from the reference", "kl")
        axis.set_ylim(bottom=0)
        _finish(axis, "nats a reply")

    def _draw_length(self, axis: Axes) -> None:
        if self.reference:
            axis.axhline(self.reference["length"], color=_REFERENCE, linestyle="--", label="of the reference")
        self._draw_line(axis, "length", _TEXT, "mean length", "length_change" if self.reference else "")
        rate: Axes = axis.twinx()
        steps, ended = ([row[key] for row in self.history] for key in ("step", "eos_rate"))
        rate.plot(steps, ended, "o:", color="#e7298a", label="ended by EOS", markersize=4)
        rate.set_ylim(-0.02, 1.02)
        rate.set_ylabel("share of replies ended by EOS", color="#e7298a")
        rate.spines["top"].set_visible(False)
        _finish(axis, "tokens", [*axis.get_lines(), *rate.get_lines()])

    def _draw_forecast(self, axis: Axes) -> None:
        if not any(log_z for _, log_z in self.forecast):
            axis.set_axis_off()
            why = "is 1: no length is favoured" if self.forecast else "is not defined: no forecast"
            why = f"$\\alpha / \\beta$ {why}"
            axis.text(0.5, 0.5, why, transform=axis.transAxes, ha="center", color=_TEXT)
            return
        lengths, log_z = zip(*self.forecast, strict=True)
        axis.scatter(lengths, log_z, color=_REFERENCE, s=18, alpha=0.7, label="a reply of the reference")
        mean = self.reference["log_z"]
        axis.axhline(mean, color=_TEXT, linestyle="--", linewidth=1, label=f"mean, {mean:.3g} nats")
        _finish(axis, r"$\sum_t\ \log Z_t$ at $\alpha/\beta$, nats")
        axis.set_xlabel("tokens")


def _finish(axis: Axes, label: str, lines: list[Any] | None = None) -> None:
    """Labels, and a legend above the plot, where it hides nothing."""
    axis.set_xlabel("step")
    axis.xaxis.set_major_locator(MaxNLocator(7, integer=True))
    axis.ticklabel_format(axis="y", useOffset=False)
    axis.set_ylabel(label)
    handles = axis.get_legend_handles_labels()[0] if lines is None else lines
    names = [str(handle.get_label()) for handle in handles]
    axis.set_title(" ", fontsize=15)  # room for the legend, which would narrow the plot if the layout knew of it
    legend = axis.legend(
        handles, names, frameon=False, fontsize=9, ncols=3, loc="lower left", bbox_to_anchor=(-0.02, 1)
    )
    legend.set_in_layout(False)


def _quantities(laws: ResponseLaws, ended: Tensor, reference: ResponseLaws) -> Tensor:
    """Of S samples, [S, Q] in the order of _QUANTITIES, beside the reference's samples of the same random numbers."""
    columns = (
        laws.entropies,
        -laws.logps,
        laws.cross_entropies,
        laws.cross_entropies - laws.entropies,
        laws.log_normalizers,
        laws.num_tokens,
        ended,
        laws.entropies - reference.entropies,
        laws.num_tokens - reference.num_tokens,
    )
    return torch.stack([column.float() for column in columns], 1)
