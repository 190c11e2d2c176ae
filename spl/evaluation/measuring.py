"""All measures of one policy's replies, each by the tool that it needs; a tool that is not given measures nothing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal, TypeVar

import torch
from torch import Tensor

from spl.encoder import SentenceEncoder
from spl.evaluation.judge import Comparison, Judge, diversity_scores, win_rates
from spl.evaluation.judge_prompts import conversation_text
from spl.evaluation.measures import (
    class_measures,
    cross_entropy_measures,
    mean_of,
    reply_measures,
    reward_measures,
    utility_of,
)
from spl.evaluation.noveltybench import ScoredFile
from spl.evaluation.partitions import embedding_partition, exact_partition, judged_partitions
from spl.evaluation.policies import EvaluatedPolicy
from spl.evaluation.reference import reference_losses
from spl.evaluation.rewards import RewardScorer
from spl.evaluation.sample_files import Reply, SampleFile
from spl.metrics.diversity import embedding_diversity
from spl.metrics.stories import story_diversity
from spl.types import Message

T = TypeVar("T")
Equality = Literal["exact", "embedding", "judge"]
Values = dict[str, float]


@dataclass(frozen=True)
class Tools:
    """What measures; each may be absent.

    Attributes:
        encoder: for cosine distance and Vendi.
        rewards: for the reward.
        reference: for the cross-entropy under it.
        judge: for win rates, scores of diversity and equality.
        baseline: item to the answer that replies are compared with.
        device: of the encoder.
    """

    encoder: SentenceEncoder | None = None
    rewards: RewardScorer | None = None
    reference: EvaluatedPolicy | None = None
    judge: Judge | None = None
    baseline: dict[str, str] | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def fingerprints(self) -> dict[str, str]:
        """Of the weights that measure: a model that was trained again under its name is another."""
        models = {"reward_model": self.rewards, "reference": self.reference}
        return {name: model.fingerprint for name, model in models.items() if model}


@dataclass(frozen=True)
class Rules:
    """How it is measured; `diversity_quality` says what each is."""

    partition: Equality = "exact"
    same_above: float = 0.75
    patience: float = 0.8
    match_length: int = 32
    story: str = "story about a doctor"
    judge_scores: bool = True
    num_compared: int = 1
    max_length: int = 4096
    max_tokens: int = 8192

    def is_story(self, messages: Sequence[Message]) -> bool:
        """Whether a prompt asks for a story about a doctor."""
        return bool(self.story) and self.story.casefold() in conversation_text(messages).casefold()


class Replies:
    """The replies of a policy that are measured: the first `num` to each of some items."""

    def __init__(self, file: SampleFile, items: Sequence[str], num: int) -> None:
        self.file = file
        self.items = items
        self.conversations: list[list[Message]] = [file.prompts[item] for item in items]
        self.replies: list[list[Reply]] = [file.replies[item][:num] for item in items]
        self.texts = [[reply.text for reply in drawn] for drawn in self.replies]
        self.num = num

    @property
    def own_law(self) -> bool:
        """Whether they were drawn from the policy's own law, at temperature 1 without filters."""
        return self.file.setting == "t 1"

    @property
    def has_classes(self) -> bool:
        """Whether classes of equal replies came with them."""
        return isinstance(self.file, ScoredFile) and bool(self.file.partitions)

    def given(self, values: Mapping[str, Sequence[T]]) -> list[Sequence[T] | None]:
        """Of each item what came with its replies."""
        return [values[item][: self.num] if item in values else None for item in self.items]


def measure(drawn: Replies, tools: Tools, rules: Rules) -> list[Values]:
    """The measures of every item that its tools and texts allow.

    Raises:
        UserError: a tool cannot be used on the replies.
    """
    vectors = _vectors(drawn, tools)
    told = zip(drawn.conversations, drawn.texts, strict=True)
    rewards = tools.rewards.score(drawn.conversations, drawn.texts) if tools.rewards else None
    parts = [
        [reply_measures(replies, rules.match_length, drawn.own_law) for replies in drawn.replies],
        [story_diversity(texts) if rules.is_story(messages) else {} for messages, texts in told],
        [embedding_diversity(part) for part in vectors],
        [reward_measures(part) for part in rewards or ()],
        _cross_entropies(drawn, tools, rules),
        diversity_scores(tools.judge, drawn.conversations, drawn.texts) if tools.judge and rules.judge_scores else [],
        _win_rates(drawn, tools, rules),
        _classes(drawn, tools, rules, vectors, rewards),
    ]
    merged: list[Values] = [{} for _ in drawn.items]
    for part in filter(None, parts):
        for values, more in zip(merged, part, strict=True):
            values |= more
    return merged


def _vectors(drawn: Replies, tools: Tools) -> list[Tensor]:
    if not tools.encoder:
        return []
    vectors = tools.encoder.encode([text for texts in drawn.texts for text in texts], tools.device)
    return list(torch.split(vectors, [len(texts) for texts in drawn.texts]))


def _cross_entropies(drawn: Replies, tools: Tools, rules: Rules) -> list[Values]:
    if not tools.reference:
        return []
    encoder = tools.reference.encoder(rules.max_length, turn_end="eos")
    asked = dict(zip(drawn.items, drawn.conversations, strict=True))
    losses = reference_losses(tools.reference, encoder, asked, drawn.replies, rules.max_tokens)
    pairs = zip(drawn.replies, losses, strict=True)
    return [cross_entropy_measures(replies, part, drawn.own_law) for replies, part in pairs]


def _win_rates(drawn: Replies, tools: Tools, rules: Rules) -> list[Values]:
    """Means over the replies that are compared; nothing for prompts that the baseline does not answer."""
    if not tools.judge or not tools.baseline:
        return []
    comparisons = [
        [Comparison(messages, text, tools.baseline[item]) for text in texts[: rules.num_compared]]
        for item, messages, texts in zip(drawn.items, drawn.conversations, drawn.texts, strict=True)
        if item in tools.baseline
    ]
    found = iter(win_rates(tools.judge, [one for several in comparisons for one in several]))
    compared = iter([_means(list(islice(found, len(several)))) for several in comparisons])
    return [next(compared) if item in tools.baseline else {} for item in drawn.items]


def _means(values: Sequence[Values]) -> Values:
    names = dict.fromkeys(name for one in values for name in one)
    return {name: mean_of([one[name] for one in values if name in one]) for name in names}


def _classes(
    drawn: Replies, tools: Tools, rules: Rules, vectors: Sequence[Tensor], rewards: Sequence[Sequence[float]] | None
) -> list[Values]:
    """By classes and utilities that came with the replies, else by the rules and by rewards.

    A prompt of which the judge's verdicts on classes could not be read has none; `judge_classes_unread` counts them.
    """
    partitions: Sequence[Sequence[int] | None]
    utilities: Sequence[Sequence[float] | None] = [None] * len(drawn.items)
    unread: list[Values] = [{} for _ in drawn.items]
    if drawn.has_classes and isinstance(drawn.file, ScoredFile):
        partitions = drawn.given(drawn.file.partitions)
        utilities = drawn.given(drawn.file.utilities)
    else:
        partitions = _partitions(drawn, tools, rules, vectors)
        if rewards is not None:
            utilities = [[utility_of(reward) for reward in part] for part in rewards]
        if rules.partition == "judge":
            unread = [{"judge_classes_unread": float(partition is None)} for partition in partitions]
    pairs = zip(partitions, utilities, unread, strict=True)
    return [class_measures(partition, utility, rules.patience) | more for partition, utility, more in pairs]


def _partitions(
    drawn: Replies, tools: Tools, rules: Rules, vectors: Sequence[Tensor]
) -> Sequence[Sequence[int] | None]:
    if rules.partition == "judge" and tools.judge:
        return judged_partitions(tools.judge, drawn.conversations, drawn.texts)
    if rules.partition == "embedding":
        return [embedding_partition(part, rules.same_above) for part in vectors]
    return [exact_partition(texts) for texts in drawn.texts]
