"""Signs that a run goes wrong while its loss looks well, each said once with what to do about it."""

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from lightning import Callback, LightningModule, Trainer

from spl.types import UserError

log = logging.getLogger(__name__)


class Rule(NamedTuple):
    """What a warning looks at, and what it says.

    Attributes:
        reads: names of logged figures; with one of them missing or NaN the rule is passed over.
        sentence: takes the limit and those figures; gives the warning with its remedy, or None.
    """

    reads: tuple[str, ...]
    sentence: Callable[..., str | None]


def low_entropy(share: float, entropy: float, reference: float) -> str | None:
    """Token entropies on samples, nats a token."""
    if entropy >= share * reference:
        return None
    return (
        f"The policy's entropy on its own samples is {entropy:.3g} nats a token, below {share:g} of the reference's "
        f"{reference:.3g}: diversity is going; raise model.alpha or model.global_temperature."
    )


def long_replies(factor: float, length: float, reference: float) -> str | None:
    """Mean lengths of samples, tokens."""
    if length <= factor * reference:
        return None
    return (
        f"Replies have grown to {length:.4g} tokens, over {factor:g} times the reference's {reference:.4g}: sums over "
        "a reply grow with them, so compare per token or at matched length; lower model.global_temperature or raise "
        "model.beta."
    )


def missing_ends(drop: float, rate: float, reference: float) -> str | None:
    """Shares of samples that end by the end-of-sequence token."""
    if rate >= reference - drop:
        return None
    return (
        f"Only {rate:.0%} of the replies end by themselves, and {reference:.0%} of the reference's: see that the "
        "training responses end in an end-of-sequence token (data.turn_end), or lower model.global_temperature."
    )


def saturated_margins(limit: float, share: float) -> str | None:
    """Share of held-out comparisons with a margin beyond 5 either way."""
    if share <= limit:
        return None
    return (
        f"The margins of {share:.0%} of the held-out comparisons are beyond 5 either way, a preference of over 99 %: "
        "with hard labels the loss has no finite minimum, so stop earlier, lower model.lr, set model.label_smoothing "
        "above 0, or give the shares of raters."
    )


def unmoved_policy(least: float, divergence: float) -> str | None:
    """KL divergence from the reference after the warm-up, nats a reply."""
    if abs(divergence) >= least:
        return None
    return (
        f"The policy still is its reference after the warm-up (KL {divergence:.1g} nats a reply), so nothing is "
        "learnt: see that model.lr is high enough, and that model.lora_targets or the weights that train are in use."
    )


def cut_replies(limit: float, rate: float) -> str | None:
    """Share of the reference's samples that end by the end-of-sequence token."""
    if 1 - rate <= limit:
        return None
    return (
        f"{1 - rate:.0%} of the reference's replies are cut at samples.max_new_tokens, so lengths can hardly show how "
        "replies grow, and entropies are of what was kept: raise samples.max_new_tokens to see more of them."
    )


RULES = {
    "entropy_share": Rule(("val/entropy_per_token", "val/reference_entropy_per_token"), low_entropy),
    "length_factor": Rule(("val/length", "val/reference_length"), long_replies),
    "eos_drop": Rule(("val/eos_rate", "val/reference_eos_rate"), missing_ends),
    "saturated": Rule(("val/rewards/saturated",), saturated_margins),
    "least_kl": Rule(("val/kl",), unmoved_policy),
    "cut_share": Rule(("val/reference_eos_rate",), cut_replies),
}


class EarlyWarnings(Callback):
    """Warns, each time once in a run, of what the monitors' figures show; without a figure its warning stays away.

    It looks when all callbacks have logged, whatever their order: after a validation, at the step that follows a round
    of samples, and at the end.

    Args:
        entropy_share: of the reference's entropy a token, below which the policy's is low.
        length_factor: times the reference's mean length, above which replies are long.
        eos_drop: of the share of replies that end by themselves, below the reference's.
        saturated: share of held-out comparisons with a margin beyond 5.
        least_kl: nats a reply that a policy differs from its reference by, once its learning rate has been at its peak.
        cut_share: share of the reference's replies cut at the most tokens, above which lengths say little.
    """

    def __init__(
        self,
        entropy_share: float = 0.5,
        length_factor: float = 1.5,
        eos_drop: float = 0.2,
        saturated: float = 0.9,
        least_kl: float = 1e-5,
        cut_share: float = 0.5,
    ) -> None:
        self.limits = {
            "entropy_share": entropy_share,
            "length_factor": length_factor,
            "eos_drop": eos_drop,
            "saturated": saturated,
            "least_kl": least_kl,
            "cut_share": cut_share,
        }
        for name, value in self.limits.items():
            if not value >= 0:
                raise UserError(f"EarlyWarnings: {name} must be 0 or more, but is {value}.")
        self.said: set[str] = set()
        self.reference: dict[str, float] = {}  # its figures, which are logged once in a run
        self._sampled_at = -1  # step of the figures on samples
        self._look = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":  # what a checkpoint knows is loaded after this
            self.said, self.reference, self._sampled_at = set(), {}, -1

    def state_dict(self) -> dict[str, Any]:
        return {"said": sorted(self.said), "reference": self.reference}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.said, self.reference = set(state_dict["said"]), state_dict["reference"]

    def on_sampling_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._sampled_at, self._look = trainer.global_step, True

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._look:
            self._check(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._check(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._check(trainer, pl_module)

    def _check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._look = False
        module: Any = pl_module
        figures = self.reference | {name: value.item() for name, value in trainer.callback_metrics.items()}
        self.reference = {name: value for name, value in figures.items() if name.startswith("val/reference_")}
        # By the step of the samples, not today's, and not by the learning rate, which is 0 at a schedule's end.
        if "val/kl" in figures and self._sampled_at <= getattr(module, "warmup_steps", 0):
            del figures["val/kl"]
        found = find(figures, self.limits)
        if "alpha" not in module.hparams:  # supervised fine-tuning narrows the model, as it should
            found.pop("entropy_share", None)
        for name, sentence in found.items():
            if name not in self.said and trainer.is_global_zero:
                log.warning(sentence)
            self.said.add(name)


def find(figures: Mapping[str, float], limits: Mapping[str, float]) -> dict[str, str]:
    """The warnings that figures give cause for, by the name of their limit."""
    found = {}
    for name, rule in RULES.items():
        values = [figures.get(read, math.nan) for read in rule.reads]
        sentence = None if any(map(math.isnan, values)) else rule.sentence(limits[name], *values)
        if sentence:
            found[name] = sentence
    return found
