"""The numbers at the end of a run: a chosen few at start and end, and one sentence of what they say."""

import math
from collections.abc import Mapping
from typing import NamedTuple

from rich.console import Group
from rich.table import Table
from rich.text import Text

Figures = Mapping[str, float]
"""Logged values by their names; NAME_se is the standard error of NAME."""

GROUPS = {
    "entropy": {"entropy": "nats a reply", "entropy_per_token": "nats a token", "token_entropy": "nats a token"},
    "divergence": {
        "cross_entropy": "nats a reply",
        "kl": "nats a reply",
        "cross_entropy_per_token": "nats a token",
        "kl_per_token": "nats a token",
    },
    "calibration": {
        "ece": "",
        "brier": "",
        "log_loss": "nats",
        "generative_ece": "",
        "choice_accuracy": "",
        "choice_ece": "",
    },
    "diversity": {"distinct_2": "", "self_bleu": "", "cosine_distance": "", "vendi": "", "unique_answers": ""},
    "length": {"length": "tokens", "eos_rate": "of replies", "truncation_rate": "of replies"},
    "training": {"loss": "", "perplexity": "a token"},
    "preference": {
        "rewards/accuracies": "",
        "rewards/margins": "",
        "logps/chosen_per_token": "nats a token",
    },
}
"""What the table shows, by group: names as logged, without "val/", and units."""


class Change(NamedTuple):
    """From start to end, with the standard error of the difference (NaN where it is not known)."""

    start: float
    end: float
    error: float

    @property
    def by(self) -> float:
        return self.end - self.start

    @property
    def beyond_noise(self) -> bool:
        """More than two standard errors; where these are not known, any change that shows in four digits."""
        if math.isnan(self.error):
            return f"{self.start:.4g}" != f"{self.end:.4g}"
        return abs(self.by) > 2 * self.error

    @property
    def arrow(self) -> str:
        return ("↑" if self.by > 0 else "↓") if self.beyond_noise else "→"


def change(start: Figures, end: Figures, name: str) -> Change | None:
    """Of a figure by its name without "val/"; None where an end lacks it.

    Where the run began as its reference, the paired difference from that (NAME_change) has the error. Else the ends'
    errors are combined as if they were independent; they answer the same prompts, so this is on the careful side.
    """
    first, last = _value(start, name), _value(end, name)
    if math.isnan(first) or math.isnan(last):
        return None
    paired = end.get(f"val/{name}_change_se", math.nan) if start.get(f"val/{name}_change") == 0 else math.nan
    apart = math.hypot(_error(start, name), _error(end, name))
    return Change(first, last, apart if math.isnan(paired) else paired)


def _value(figures: Figures, name: str) -> float:
    """A figure, NaN where there is none. Where policy and reference are one, DPO's margins are ties: no accuracy."""
    tied = name == "rewards/accuracies" and figures.get("val/rewards/margins") == 0
    return math.nan if tied else figures.get(f"val/{name}", math.nan)


def _error(figures: Figures, name: str) -> float:
    """Standard error of a figure; that of a share of comparisons follows from their number, as if independent."""
    count = figures.get("val/rewards/num", 0.0)
    if name == "rewards/accuracies" and count:
        share = _value(figures, name)
        return math.sqrt(share * (1 - share) / count)
    same = "eos_rate" if name == "truncation_rate" else name  # what does not end is cut
    return figures.get(f"val/{same}_se", math.nan)


def summary(start: Figures, end: Figures) -> Group:
    """The table, its caption and the sentence, to print; empty where nothing is known at the end."""
    table = Table(box=None, padding=(0, 1, 0, 0), title="Start → end, held-out data", title_justify="left")
    table.add_column(style="dim", no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column("start", justify="right", no_wrap=True)
    table.add_column()
    table.add_column("end", justify="right", no_wrap=True)
    table.add_column(style="dim")
    for group, units in GROUPS.items():
        present = [name for name in units if not math.isnan(_value(end, name))]
        for name in present:
            found = change(start, end, name)
            cells = (_shown(start, name), found.arrow if found else "", _shown(end, name), _unit(end, name, units))
            still = found is not None and not found.beyond_noise
            table.add_row(group if name == present[0] else "", name, *cells, style="dim" if still else "")
    if not table.rows:
        return Group()
    caption = (
        "± two standard errors, on samples those of other replies to the same prompts; → a change within two of its "
        "own, or none in four digits where no error is known."
    )
    text = sentence(start, end)
    return Group(table, Text(caption, style="dim"), *([Text(text)] if text else []))


def _shown(figures: Figures, name: str) -> str:
    """A figure with four digits, or with as many as two of its standard errors warrant."""
    value = _value(figures, name)
    return "-" if math.isnan(value) else _rounded(value, 2 * _error(figures, name))


def _rounded(value: float, margin: float) -> str:
    if not margin > 0:
        return f"{value:.4g}"
    digits = max(0, 1 - math.floor(math.log10(margin)))
    return f"{value:.{digits}f} ± {margin:.{digits}f}"


def _unit(end: Figures, name: str, units: Mapping[str, str]) -> str:
    num = end.get("val/rewards/num")
    return f"of {num:,.0f}" if name == "rewards/accuracies" and num else units[name]


def sentence(start: Figures, end: Figures) -> str:
    """What became of entropy, of length in the same time, and of accuracy, in one sentence; "" where none is known."""
    parts = [part for part in (_entropy(start, end), _length(start, end), _accuracy(end)) if part]
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}." if text else ""


def _entropy(start: Figures, end: Figures) -> str:
    found, what, unit = change(start, end, "entropy"), "entropy", "nats a reply"
    if found is None:
        found, what, unit = change(start, end, "token_entropy"), "token entropy on held-out responses", "nats"
    if found is None:
        return ""
    verb = "rose" if found.by > 0 else "fell" if found.by < 0 else "moved"
    ends = f"{found.start:.4g} to {found.end:.4g}"
    if math.isnan(found.error):
        return f"{what} {verb} by {abs(found.by):.3g} {unit} ({ends}; its noise is not known)"
    noise = "beyond noise for these prompts" if found.beyond_noise else "within noise"
    return f"{what} {verb} by {_rounded(abs(found.by), 2 * found.error)} {unit} ({ends}), {noise}"


def _length(start: Figures, end: Figures) -> str:
    found = change(start, end, "length")
    if found is None:
        return ""
    noise = "" if math.isnan(found.error) or found.beyond_noise else ", within noise"
    cut = _value(end, "truncation_rate")
    limit = f", with {cut:.0%} of them cut at the most tokens" if cut > 0 else ""
    return f"replies went from {found.start:.4g} to {found.end:.4g} tokens in the same time{noise}{limit}"


def _accuracy(end: Figures) -> str:
    share, num = _value(end, "rewards/accuracies"), end.get("val/rewards/num", 0)
    if math.isnan(share) or not num:
        return ""
    low, high = wilson(share, num)
    chance = "not to be told from chance" if low <= 0.5 <= high else f"{'above' if low > 0.5 else 'below'} chance"
    return (
        f"held-out accuracy is {share:.3g} on {num:,.0f} comparisons "
        f"(95 % interval {low:.3g} to {high:.3g}, taking them as independent), {chance}"
    )


def wilson(share: float, num: float, z: float = 1.96) -> tuple[float, float]:
    """Wilson's interval of a share found among `num` independent trials (Wilson 1927), at 95 % for z = 1.96."""
    centre = (share + z**2 / (2 * num)) / (1 + z**2 / num)
    half = z / (1 + z**2 / num) * math.sqrt(share * (1 - share) / num + z**2 / (4 * num**2))
    return centre - half, centre + half
