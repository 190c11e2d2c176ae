"""`spl pairs divpo`: preference pairs from samples and rewards, the recipe of DivPO (arXiv 2501.18101), a baseline.

Of the replies to a prompt, those with a high reward are candidates to be chosen and those with a low one to be
rejected. The most diverse of the first is preferred to the least diverse of the second; `spl fit` trains on such pairs.
"""

import gzip
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch.nn.functional import normalize

from spl.disk import replacing
from spl.encoder import SentenceEncoder
from spl.evaluation.rewards import RewardScorer
from spl.evaluation.sample_files import Reply, read_samples
from spl.metrics.diversity import words
from spl.types import UserError

log = logging.getLogger(__name__)

Criterion = Literal["probability", "word_frequency", "embedding"]


def divpo(
    samples: list[str],
    reward_model: str,
    output: Path,
    criterion: Criterion = "probability",
    rho: float = 0.25,
    per_token: bool = False,
    encoder: str | None = None,
    device: str = "auto",
) -> None:
    """Make preference pairs by DivPO: the most diverse good reply to each prompt over the least diverse bad one.

    Replies that were cut take no part, since training would teach the end that they never came to; nor do empty ones.

    Example: spl pairs divpo samples/sft.jsonl --reward_model runs/reward/export --output pairs.jsonl

    Args:
        samples: files that spl sample wrote, of the policy that is to be trained; several replies to each prompt.
        reward_model: folder or Hub id of a sequence-classification model with one label.
        output: file of rows for spl fit to write (JSON lines).
        criterion: what makes a reply diverse: a low probability under its policy; rare words, those that few of the
            other replies have; or the mean cosine distance of its embedding to the others'.
        rho: good replies lie in the upper and bad ones in the lower share rho of the range of rewards, in (0, 0.5].
        per_token: divide log-probabilities by the tokens, or long replies count as diverse.
        encoder: sentence encoder of the criterion embedding; a folder, also of an installed package, or a Hub id.
        device: "cpu", "cuda" and so on; "auto" takes CUDA where there is one.

    Raises:
        UserError: a setting or file cannot be used, or no pair could be made.
    """
    if not 0 < rho <= 0.5:
        raise UserError(f"rho is a share of the range of rewards in (0, 0.5], but is {rho}.")
    if (criterion == "embedding") != (encoder is not None):
        raise UserError("the criterion embedding needs an encoder, and the others have no use for one.")
    if not output.name.endswith((".jsonl", ".jsonl.gz")):
        raise UserError(f"the output is JSON lines and must be named .jsonl or .jsonl.gz, but is {output.name}.")
    pools = _pools(samples)
    scorer = RewardScorer.load(reward_model, device)
    rewards = scorer.score([messages for messages, _ in pools], [[r.text for r in replies] for _, replies in pools])
    sentences = SentenceEncoder(encoder) if encoder else None
    rows: list[dict[str, Any]] = []
    for (messages, replies), scores in zip(pools, rewards, strict=True):
        scored = diversities(replies, criterion, per_token, sentences)
        if pair := choose_pair(scores, scored, rho):
            best, worst = pair
            rows.append({"prompt": messages, "chosen": replies[best].text, "rejected": replies[worst].text})
            rows[-1] |= {"chosen_reward": scores[best], "rejected_reward": scores[worst]}
    if not rows:
        raise UserError("no prompt has two different whole replies of different reward: sample more, or longer ones.")
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    with replacing(output) as file:
        file.write(gzip.compress(content, mtime=0) if output.suffix == ".gz" else content)
    log.info("%d pairs in %s; %d prompts had no two replies to tell apart.", len(rows), output, len(pools) - len(rows))


def choose_pair(rewards: Sequence[float], diversity: Sequence[float], rho: float) -> tuple[int, int] | None:
    """Indices of the chosen and the rejected reply of a pool; None where rewards do not tell replies apart.

    Args:
        rewards: of the replies.
        diversity: of the replies, the larger the more diverse.
        rho: share of the range of rewards, from either end, within which replies are good or bad.
    """
    low, high = min(rewards, default=0.0), max(rewards, default=0.0)
    if low == high:
        return None
    margin = rho * (high - low)
    good = [k for k, reward in enumerate(rewards) if reward >= high - margin]
    bad = [k for k, reward in enumerate(rewards) if reward <= low + margin and k not in good]
    return max(good, key=lambda k: diversity[k]), min(bad, key=lambda k: diversity[k])


def diversities(
    replies: Sequence[Reply], criterion: Criterion, per_token: bool = False, encoder: SentenceEncoder | None = None
) -> list[float]:
    """How diverse each reply is within its pool; the larger the more.

    Raises:
        UserError: the log-probabilities that the criterion needs are not known.
    """
    if criterion == "probability":
        return list(_surprisals(replies, per_token))
    if criterion == "word_frequency":
        return [-frequency for frequency in word_frequencies([reply.text for reply in replies])]
    assert encoder is not None
    vectors = normalize(encoder.encode([reply.text for reply in replies], torch.device("cpu")), dim=1)
    similar = vectors @ vectors.T
    others = (similar.sum(1) - similar.diagonal()) / max(len(replies) - 1, 1)
    return [float(value) for value in 1 - others]


def word_frequencies(texts: Sequence[str]) -> list[float]:
    """For each text, the share of the other texts that hold a word, as the mean over its distinct words."""
    sets = [set(words(text.lower())) for text in texts]
    found = []
    for k, own in enumerate(sets):
        others = sets[:k] + sets[k + 1 :]
        counts = [sum(word in other for other in others) for word in own]
        found.append(sum(counts) / max(len(counts) * len(others), 1))
    return found


def _surprisals(replies: Sequence[Reply], per_token: bool) -> Iterator[float]:
    for reply in replies:
        length = reply.num_tokens if per_token else 1
        if reply.logp is None or not length:
            raise UserError(
                "the criterion probability needs each reply's log-probability, which these samples lack: draw them "
                "from the model itself, or take word_frequency or embedding."
            )
        yield -reply.logp / length


def _pools(samples: Sequence[str]) -> list[tuple[list[Any], list[Reply]]]:
    """Each prompt's messages, and its whole and different replies."""
    pools = []
    for file in read_samples(samples):
        for item, replies in file.replies.items():
            whole = {reply.text: reply for reply in replies if reply.finish == "stop" and reply.text.strip()}
            pools.append((file.prompts[item], list(whole.values())))
    return pools
