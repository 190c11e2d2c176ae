"""From numbers per prompt to what a diversity-quality file says of each policy: means, examples, stories, caveats."""

import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from spl.evaluation.fronts import Arm, Array
from spl.evaluation.judge_prompts import conversation_text
from spl.evaluation.measuring import Replies, Rules
from spl.intervals import bootstrap
from spl.metrics.stories import FEATURES, feature_shares
from spl.results import Record

_EXAMPLE_REPLIES = 4
_MOST_OPTIONS = 8
_EQUAL = {
    "exact": "where their texts are the same but for case and marks, which parts replies that say the same",
    "embedding": "where the cosine of their sentence vectors is high",
    "judge": "where the judge calls them the same",
    "own": "where the files' own classes say so",
}
_UNREAD = ("judge_unread", "judge_scores_unread", "judge_classes_unread")


class Measured:
    """Item records by measure and arm.

    Attributes:
        matrices: a measure to the values [training seeds, prompts] of every arm that has any.
        arms: in order.
    """

    def __init__(self, records: Sequence[Record], items: Sequence[str]) -> None:
        place = {item: k for k, item in enumerate(items)}
        rows: dict[str, dict[Arm, dict[int | None, Array]]] = {}
        for record in records:
            arm = Arm(record["policy"], record["setting"])
            for name, value in record["values"].items():
                if value is not None and math.isfinite(value):
                    seeds = rows.setdefault(name, {}).setdefault(arm, {})
                    row = seeds.setdefault(record["train_seed"], np.full(len(items), np.nan))
                    row[place[record["item"]]] = value
        self.matrices = {
            name: {a: np.stack([seeds[seed] for seed in sorted(seeds, key=str)]) for a, seeds in arms.items()}
            for name, arms in rows.items()
        }
        self.arms = list(dict.fromkeys(Arm(record["policy"], record["setting"]) for record in records))

    def estimates(self, draws: int, seed: int) -> list[Record]:
        """The mean of every measure of every arm."""
        return [
            {"kind": "estimate", **arm._asdict(), "train_seed": None, "name": name, "group": None}
            | bootstrap(matrix, draws, seed)._asdict()
            for name, arms in self.matrices.items()
            for arm, matrix in arms.items()
        ]


def examples(drawn: Iterable[Replies], num: int) -> list[Record]:
    """The first replies to the first `num` prompts, to hover over and to browse."""
    return [
        {
            "kind": "example",
            "policy": replies.file.policy,
            "setting": replies.file.setting,
            "train_seed": replies.file.train_seed,
            "item": item,
            "prompt": conversation_text(messages),
            "texts": texts[:_EXAMPLE_REPLIES],
        }
        for replies in drawn
        for item, messages, texts in list(zip(replies.items, replies.conversations, replies.texts, strict=True))[:num]
    ]


def story_shares(drawn: Sequence[Replies], rules: Rules) -> list[Record]:
    """How often each name, gender and relation is told in all stories about a doctor, by policy.

    Options are the most frequent ones over all policies and, last, what is left; `mass` is the share of stories that
    tell the feature at all.
    """
    stories = [_stories(replies, rules) for replies in drawn]
    if not any(stories):
        return []
    records = []
    for feature in FEATURES:
        pooled, _ = feature_shares([story for part in stories for story in part], feature)
        options = list(pooled)[:_MOST_OPTIONS]
        for replies, part in zip(drawn, stories, strict=True):
            shares, told = feature_shares(part, feature)
            listed = [shares.get(option, 0.0) for option in options]
            records.append(
                {
                    "kind": "shares",
                    "policy": replies.file.policy,
                    "setting": replies.file.setting,
                    "train_seed": replies.file.train_seed,
                    "item": f"doctor {feature}",
                    "question": f"The doctor's {feature} in stories",
                    "options": [*options, "other"],
                    "people": None,
                    "model": [*listed, max(0.0, 1 - sum(listed)) if shares else 0.0],
                    "mass": told,
                }
            )
    return records


def _stories(replies: Replies, rules: Rules) -> list[str]:
    pairs = zip(replies.conversations, replies.texts, strict=True)
    return [text for messages, texts in pairs if rules.is_story(messages) for text in texts]


def caveats(estimates: Iterable[Record], rules: Rules, drawn: Iterable[Replies], items: Iterable[Record]) -> list[str]:
    """What a reader must know beside the figures.

    Args:
        estimates: over all prompts.
        rules: by which they were measured.
        drawn: what was measured.
        items: of each prompt.
    """
    own_classes = [replies.has_classes for replies in drawn]
    means: dict[str, dict[str, float]] = {}
    for record in estimates:
        if record["kind"] == "estimate" and record["group"] is None:
            name = ", ".join(filter(None, (record["policy"], record["setting"])))
            means.setdefault(record["name"], {})[name] = record["value"]
    lengths, cut = means.get("length", means["words"]), means.get("truncation_rate", {})
    short, long = min(lengths, key=lengths.__getitem__), max(lengths, key=lengths.__getitem__)
    notes = []
    if lengths[long] > 1.1 * lengths[short]:
        notes.append(
            f"Mean lengths run from {lengths[short]:.0f} ({short}) to {lengths[long]:.0f} ({long}): longer replies "
            "tend to differ more in meaning and to repeat more words, whatever the policy."
        )
    if cut and max(cut.values()) >= 0.01:
        worst = max(cut, key=cut.__getitem__)
        notes.append(
            f"Up to {cut[worst]:.0%} of the replies ({worst}) were cut at the most tokens: measures are of cut replies."
        )
    if unread := [share for name in _UNREAD for share in means.get(name, {}).values()]:
        notes.append(
            "The judge's prompts are this project's, not stated by the paper. Verdicts that could not be read are left "
            f"out: at most {max(unread):.1%} of a policy's."
        )
    notes += _without_kl(items)
    if "distinct_k" in means:
        equal = _EQUAL["own" if all(own_classes) else rules.partition]
        notes.append(f"Replies count as equal for distinct_k and utility_k {equal}.")
        if len(set(own_classes)) > 1:
            notes.append("Files of NoveltyBench have classes and utilities of their own: compare neither with others'.")
    return notes


def _without_kl(items: Iterable[Record]) -> Iterator[str]:
    """Where the KL divergence is of a part of the prompts, which need not be that of another policy."""
    found: dict[str, list[bool]] = {}
    for record in items:
        if record["setting"] == "t 1" and "kl" in record["values"]:
            value = record["values"]["kl"]
            found.setdefault(record["policy"], []).append(value is not None and math.isfinite(value))
    for policy, known in found.items():
        if not all(known):
            yield (
                f"KL of {policy} is over {sum(known)} of {len(known)} prompts: of the others the tokens drawn are "
                "not known, or the reference reads them as other text."
            )
