"""What a measure is called in full, its unit, and which way is better. One that is not here keeps its own name."""

from collections.abc import Iterable
from typing import NamedTuple


class Measure(NamedTuple):
    """How a number is told.

    Attributes:
        title: in words.
        unit: "" where it has none.
        better: 1 where more is better, -1 where less is, 0 where neither can be said.
    """

    title: str
    unit: str = ""
    better: int = 0

    @property
    def label(self) -> str:
        """Title and unit."""
        return f"{self.title} ({self.unit})" if self.unit else self.title

    @property
    def axis(self) -> str:
        """The title of an axis: an arrow points to the better end, also along an upright axis."""
        return self._with_arrow(self.label)

    @property
    def scale(self) -> str:
        """The title of an axis whose chart says the rest."""
        return self._with_arrow(self.unit)

    def _with_arrow(self, text: str) -> str:
        arrow = {1: "better →", -1: "← better", 0: ""}[self.better]
        return ", ".join(filter(None, (arrow, text) if self.better < 0 else (text, arrow)))


DIVERSITY = {
    "cosine_distance": Measure("Cosine distance of replies (U)", "", 1),
    "cosine_distance_v": Measure("Cosine distance of replies (V, the paper's)", "", 1),
    "vendi": Measure("Vendi score", "effective replies", 1),
    "judge_logical": Measure("Judge: logical disagreement", "1 to 5", 1),
    "judge_content": Measure("Judge: content diversity", "1 to 5", 1),
    "judge_surface": Measure("Judge: surface-form diversity", "1 to 5", 1),
    "distinct_k": Measure("Distinct answers (NoveltyBench)", "classes", 1),
    "unique_answers": Measure("Unique answers", "share", 1),
    "answer_entropy": Measure("Entropy of answers", "nats", 1),
    "distinct_1": Measure("Distinct-1", "share of words", 1),
    "distinct_2": Measure("Distinct-2", "share of 2-grams", 1),
    "distinct_3": Measure("Distinct-3", "share of 3-grams", 1),
    "self_bleu": Measure("Self-BLEU", "", -1),
    "compression_ratio": Measure("Compression ratio at matched length", "", -1),
}
QUALITY = {
    "reward": Measure("Reward", "mean of the replies", 1),
    "reward_best": Measure("Reward of the best reply", "", 1),
    "utility_k": Measure("Utility (NoveltyBench)", "", 1),
    "win_rate": Measure("Win rate against the baseline", "judge", 1),
    "reference_cross_entropy": Measure("Cross-entropy under the reference", "nats a reply", -1),
    "reference_cross_entropy_per_token": Measure("Cross-entropy under the reference", "nats a token", -1),
    "lexical_integrity": Measure("Lexical integrity", "share of real words", 1),
}
BESIDE = {
    "sequence_entropy_per_token": Measure("Sequence entropy", "nats a token"),
    "sequence_entropy": Measure("Sequence entropy", "nats a reply"),
    "surprisal_per_token": Measure("Entropy by -log pi(y)", "nats a token"),
    "surprisal": Measure("Entropy by -log pi(y)", "nats a reply"),
    "kl_per_token": Measure("KL from the reference", "nats a token"),
    "kl": Measure("KL from the reference", "nats a reply"),
    "length": Measure("Length", "tokens"),
    "words": Measure("Length", "words"),
    "ended": Measure("Replies that ended", "share"),
    "truncation_rate": Measure("Replies cut at the most tokens", "share"),
}
SAME = (
    ("sequence_entropy_per_token", "surprisal_per_token"),
    ("sequence_entropy", "surprisal"),
    ("kl", "kl_per_token"),
    ("length", "words"),
    ("ended", "truncation_rate"),
)
"""Of BESIDE, what tells nearly the same."""

BEST_OF_N = {
    "repeats": Measure("Repeated answers", "share of replies", -1),
    "unread": Measure("Replies without a readable answer", "share", -1),
    "approaches": Measure("Approaches among right solutions", "clusters", 1),
    "samples_to_match": Measure("Samples that match the rival's most", "samples", -1),
}
AT_K = {
    "pass": Measure("Solved", "problems", 1),
    "majority": Measure("Right by majority", "problems", 1),
    "reward_chosen": Measure("Right by reward", "problems", 1),
    "distinct": Measure("Distinct answers", "answers", 1),
}
"""Of k samples; the records say pass@16, and pass@16_difference for what it is above a rival's."""
CALIBRATION = {
    "accuracy": Measure("Accuracy", "share", 1),
    "ece": Measure("Calibration error", "equal width", -1),
    "ece_equal_mass": Measure("Calibration error", "equal mass", -1),
    "brier": Measure("Brier score", "0 to 2", -1),
    "log_loss": Measure("Log-loss", "nats", -1),
    "aurc": Measure("Area under risk and coverage", "", -1),
    "temperature": Measure("Fitted temperature"),
    "mass": Measure("Mass on the listed answers", "probability"),
    "gap_to_dpo": Measure("Distance from DPO's answers", "total variation"),
    "temperature_of_dpo": Measure("Temperature at which DPO's answers come closest"),
    "gap_to_dpo_at_temperature": Measure("Distance from DPO's answers at that temperature", "total variation"),
}
OPINIONS = {
    "one_minus_jsd": Measure("Agreement: 1 - Jensen-Shannon divergence", "base 2", 1),
    "worst_group_one_minus_jsd": Measure("Agreement with the worst-off group", "base 2", 1),
    "one_minus_w1": Measure("Agreement on scales: 1 - Wasserstein distance", "", 1),
    "total_variation": Measure("Total variation from people", "", -1),
    "entropy": Measure("Entropy of the answers", "nats"),
    "entropy_gap": Measure("Entropy of the answers less people's", "nats"),
    "mass": Measure("Mass on the listed answers", "probability"),
    "order_gap": Measure("What the order of options moves", "total variation"),
    "position": Measure("Position on an axis of opinion", "-1 to 1"),
    "spread": Measure("Spread behind the position"),
}
TRAINING = {
    "val/loss": Measure("Loss, held-out", "", -1),
    "train/loss": Measure("Loss, training", "", -1),
    "val/rewards/accuracies": Measure("Accuracy, held-out", "share of comparisons", 1),
    "val/entropy": Measure("Sequence entropy", "nats a reply"),
    "val/token_entropy": Measure("Token entropy, held-out responses", "nats"),
    "val/kl": Measure("KL from the reference", "nats a reply"),
    "val/length": Measure("Length of sampled replies", "tokens"),
    "val/eos_rate": Measure("Sampled replies that ended", "share"),
}
MEASURES = DIVERSITY | QUALITY | BESIDE | BEST_OF_N | CALIBRATION | OPINIONS | TRAINING

YARDSTICKS = {"ece": "ece_if_calibrated", "ece_equal_mass": "ece_equal_mass_if_calibrated", "entropy": "people_entropy"}
"""What a measure would be for a policy that is calibrated perfectly, or is people."""

BEST = {
    "diversity-quality": ("cosine_distance", "distinct_k", "reward", "win_rate"),
    "best-of-n": ("pass",),
    "calibration": ("ece", "accuracy"),
    "opinions": ("one_minus_jsd",),
}
"""By what a report says first which policy is best, for every program; "pass" of as many samples as there are."""


def measure(name: str) -> Measure:
    """A measure by its name in the records."""
    of, _, rest = name.partition("@")
    if rest and of in AT_K:
        k, _, difference = rest.partition("_")
        found = AT_K[of]
        return found._replace(title=f"{found.title}, {k} samples{', above the rival' if difference else ''}")
    return MEASURES.get(name, Measure(name.replace("_", " ")))


def at_most_samples(names: Iterable[str]) -> list[str]:
    """Each name once, without those of fewer than the most samples."""
    given = list(dict.fromkeys(names))
    sizes = {name: int(name.partition("@")[2].partition("_")[0]) for name in given if name.partition("@")[0] in AT_K}
    most = max(sizes.values(), default=0)
    return [name for name in given if sizes.get(name, most) == most]
