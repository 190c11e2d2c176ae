"""What is measured of the replies to one prompt, by name. Formulas and traps are in spl/metrics.

All of a measure's numbers are per prompt; what a prompt cannot tell (no words, no log-probability) is nan.
"""

import math
from collections.abc import Sequence

from spl.evaluation.reference import ReferenceLoss
from spl.evaluation.sample_files import Reply
from spl.metrics.diversity import answer_entropy, distinct_k, text_diversity, utility_k, words
from spl.metrics.lexicon import lexical_integrity

# The way that is better: 1 for more, -1 for less.
DIVERSITY = {
    "cosine_distance": 1,
    "cosine_distance_v": 1,
    "vendi": 1,
    "judge_logical": 1,
    "judge_content": 1,
    "judge_surface": 1,
    "distinct_k": 1,
    "unique_answers": 1,
    "answer_entropy": 1,
    "distinct_1": 1,
    "distinct_2": 1,
    "distinct_3": 1,
    "self_bleu": -1,
    "compression_ratio": -1,
}
QUALITY = {
    "reward": 1,
    "reward_best": 1,
    "utility_k": 1,
    "win_rate": 1,
    "reference_cross_entropy": -1,
    "reference_cross_entropy_per_token": -1,
    "lexical_integrity": 1,
}
BESIDE = (
    "length",
    "words",
    "ended",
    "truncation_rate",
    "sequence_entropy",
    "sequence_entropy_per_token",
    "surprisal",
    "surprisal_per_token",
    "kl",
    "kl_per_token",
)


def reply_measures(replies: Sequence[Reply], match_length: int, own_law: bool) -> dict[str, float]:
    """Measures of the texts, and what must be read beside them: length, and how many ended.

    Args:
        replies: to one prompt.
        match_length: words of each that distinct-n, self-BLEU and compression look at.
        own_law: whether they were drawn from the policy's own law, at temperature 1 without filters. Only then do they
            tell its entropy, as the mean of sum_t H(pi(.|y_<t)), `sequence_entropy`, and as that of -log pi(y),
            `surprisal`: two estimates of one number, that of replies cut as these are.
    """
    texts = [reply.text for reply in replies]
    measures = text_diversity(texts, match_length) | {"answer_entropy": answer_entropy(texts)}
    measures["lexical_integrity"] = mean_of([share for text in texts if (share := lexical_integrity(text)) == share])
    measures["words"] = mean_of([float(len(words(text))) for text in texts])
    lengths = [reply.num_tokens for reply in replies if reply.num_tokens is not None]
    measures["length"] = mean_of([float(length) for length in lengths])
    cut = [float(reply.finish == "length") for reply in replies if reply.finish]
    measures["truncation_rate"] = mean_of(cut)
    measures["ended"] = 1 - measures["truncation_rate"]
    tokens = sum(lengths) if own_law and len(lengths) == len(replies) else 0
    entropies = [reply.entropy for reply in replies if reply.entropy is not None]
    measures |= _per_reply_and_token("sequence_entropy", "sequence_entropy_per_token", entropies, len(replies), tokens)
    surprisals = [-reply.logp for reply in replies if reply.logp is not None]
    return measures | _per_reply_and_token("surprisal", "surprisal_per_token", surprisals, len(replies), tokens)


def _per_reply_and_token(reply: str, token: str, values: Sequence[float], num: int, tokens: int) -> dict[str, float]:
    """Means under two names, of a reply and of a token; nan where a reply has no value or no tokens are known."""
    known = len(values) == num and tokens > 0
    return {reply: mean_of(values) if known else math.nan, token: sum(values) / tokens if known else math.nan}


def class_measures(
    partition: Sequence[int] | None, utilities: Sequence[float] | None, patience: float
) -> dict[str, float]:
    """NoveltyBench's measures of classes of equal replies."""
    if partition is None:
        return {}
    measures = {"distinct_k": float(distinct_k(partition))}
    return measures | ({"utility_k": utility_k(partition, utilities, patience)} if utilities is not None else {})


def reward_measures(rewards: Sequence[float]) -> dict[str, float]:
    """Mean and best of the rewards of N replies; the best of more replies is higher, so compare at one N."""
    return {"reward": mean_of(rewards), "reward_best": max(rewards, default=math.nan)}


def utility_of(reward: float) -> float:
    """A reward as a utility in (0, 1): the probability under Bradley-Terry that the reply beats one of reward 0."""
    return 0.0 if reward <= -700 else 1 / (1 + math.exp(-reward))  # nan of nan


def cross_entropy_measures(
    replies: Sequence[Reply], losses: Sequence[ReferenceLoss | None], own_law: bool
) -> dict[str, float]:
    """Cross-entropy under the reference, and the KL divergence from it, of a reply and of a token.

    `kl` is the mean of log pi(y) - log pi_ref(y), the cross-entropy less the surprisal: both rise with a reply that is
    rare, so that it varies less than either. It is nan where a reply was not drawn from the policy's own law, or the
    reference scored other tokens; of log-probabilities in half precision it has their rounding.

    Args:
        replies: to one prompt.
        losses: -log pi_ref(y|x) of each.
        own_law: as in `reply_measures`.
    """
    known = [loss for loss in losses if loss is not None]
    tokens = sum(loss.num_tokens for loss in known)
    total = sum(loss.value for loss in known)
    ratios = [
        reply.logp + loss.value
        for reply, loss in zip(replies, losses, strict=True)
        if own_law and reply.logp is not None and loss is not None and loss.is_exact
    ]
    return {
        "reference_cross_entropy": total / len(known) if known else math.nan,
        "reference_cross_entropy_per_token": total / tokens if known else math.nan,
    } | _per_reply_and_token("kl", "kl_per_token", ratios, len(replies), tokens)


def mean_of(values: Sequence[float]) -> float:
    """nan of none."""
    return sum(values) / len(values) if values else math.nan
