"""How many different ways to the right answer a policy finds: clusters of its correct solutions to a problem.

All policies' correct solutions to a problem are clustered together. Who solves a problem more often has more solutions
to be different, so clusters are counted among equal numbers of them: the expected number among m of a policy's
solutions, m being the fewest that any policy (and training run) has of the problem. Problems where that is below 2 tell
nothing. The paper does not state how it would count approaches; embedding, threshold and prompt are settings.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from spl.encoder import SentenceEncoder
from spl.evaluation.grading import Graded
from spl.evaluation.judge import Judge
from spl.evaluation.judge_prompts import APPROACH
from spl.evaluation.partitions import judged_partitions
from spl.metrics.pass_at_k import distinct_at_k
from spl.types import Message

Array = NDArray[np.float64]
Clustering = Callable[[Sequence[list[Message]], Sequence[Sequence[str]]], list[list[int] | None]]
"""Prompts and distinct solutions to each -> the cluster of each solution; None for a prompt without clusters."""


def approaches(
    arms: Sequence[Graded], conversations: Sequence[list[Message]], clustering: Clustering
) -> tuple[list[Array], int]:
    """Expected clusters among m correct solutions, for every policy [training runs, problems]; nan where m < 2.

    With it the number of problems that are nan since their solutions could not be clustered.
    """
    correct = [
        [[[s.reply.text.strip() for s in replies if s.correct] for replies in run] for run in arm.solutions]
        for arm in arms
    ]
    fewest = [min(len(run[k]) for arm in correct for run in arm) for k in range(len(conversations))]
    told = [k for k, num in enumerate(fewest) if num >= 2]
    texts = [list(dict.fromkeys(text for arm in correct for run in arm for text in run[k])) for k in told]
    found = [np.full((len(arm), len(conversations)), np.nan) for arm in correct]
    clustered = clustering([conversations[k] for k in told], texts)
    for k, solutions, clusters in zip(told, texts, clustered, strict=True):
        if clusters is None:
            continue
        cluster = dict(zip(solutions, clusters, strict=True))
        for matrix, arm in zip(found, correct, strict=True):
            for run, of_run in enumerate(arm):
                matrix[run, k] = distinct_at_k([cluster[text] for text in of_run[k]], fewest[k])[-1]
    return found, clustered.count(None)


def by_embedding(encoder: SentenceEncoder, distance: float, device: torch.device) -> Clustering:
    """Clusters of sentence vectors: average linkage of cosine distances, cut at a distance."""

    def cluster(_: Sequence[list[Message]], texts: Sequence[Sequence[str]]) -> list[list[int] | None]:
        return [linked(encoder.encode(solutions, device).double().numpy(), distance) for solutions in texts]

    return cluster


def by_judge(judge: Judge) -> Clustering:
    """Clusters of solutions whose approach a judge calls the same as that of the first of a cluster."""

    def cluster(conversations: Sequence[list[Message]], texts: Sequence[Sequence[str]]) -> list[list[int] | None]:
        return judged_partitions(judge, conversations, texts, APPROACH)

    return cluster


def linked(vectors: Array, distance: float) -> list[int]:
    """The cluster of each vector [N, D], by average linkage of cosine distances cut at a distance."""
    from scipy.cluster.hierarchy import fcluster, linkage
    from scipy.spatial.distance import pdist

    if len(vectors) < 2:
        return [0] * len(vectors)
    pairs = np.clip(pdist(vectors, "cosine"), 0, None)
    found: list[int] = fcluster(linkage(pairs, "average"), distance, "distance").tolist()
    return found
