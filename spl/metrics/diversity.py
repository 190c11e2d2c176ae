"""How different the N replies to one prompt are: words, answers, meanings.

Each function looks at the replies to one prompt; `PromptDiversity` takes means over prompts. A measure that is not
defined for what it is given (one reply, no words) is nan, and means leave it out.

Length alone moves distinct-n, self-BLEU and the compression ratio: a longer reply repeats more words. They are
therefore taken over the first `match_length` words of each reply. That does not cure replies that are shorter still,
so compare them only between models whose replies are about as long, and look at the lengths beside them. The ratio,
distinct-n and self-BLEU also depend on N: compare them at one N.
"""

import math
import re
import zlib
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional
from torchmetrics import Metric

_WORD = re.compile(r"\w+|[^\w\s]")
_BLEU_ORDER = 4
# Marks that wrap or end an answer. Signs that carry meaning stay: "-5" is not "5", nor is ".5".
_OPENING = "\"'`*_([{<“\u2018«¿¡,;:… "
_CLOSING = "\"'`*_)]}>”\u2019»?!.,;:… "

TEXT_MEASURES = ("distinct_1", "distinct_2", "distinct_3", "self_bleu", "compression_ratio", "unique_answers")
EMBEDDING_MEASURES = ("cosine_distance", "cosine_distance_v", "vendi")


def words(text: str) -> list[str]:
    """Words and single marks of punctuation, in order; white space parts them and is dropped."""
    return _WORD.findall(text)


def cut_words(text: str, num: int = 32) -> str:
    """The text up to the end of its word number `num`; 0 keeps it whole, and shorter texts stay as they are."""
    if num:
        for count, match in enumerate(_WORD.finditer(text), 1):
            if count == num:
                return text[: match.end()]
    return text


def distinct_n(tokens: Sequence[Sequence[Hashable]], n: int) -> float:
    """Distinct n-grams over all n-grams of all replies, in (0, 1]; nan where no reply has n tokens.

    Li et al., arXiv 1510.03055.
    """
    grams = [gram for reply in tokens for gram in _ngrams(reply, n)]
    return len(set(grams)) / len(grams) if grams else math.nan


def self_bleu(tokens: Sequence[Sequence[Hashable]]) -> float:
    """Mean over replies of the sentence BLEU-4 against all the others, in [0, 1]: 1 where all are the same.

    Zhu et al., arXiv 1802.01886. BLEU is sacrebleu's `sentence_bleu` over 100: exponential smoothing, n-gram orders up
    to the reply's own length, brevity penalty by the reference nearest in length, the shorter of two. Replies without
    tokens are left out; with fewer than two others it is nan.
    """
    replies = [reply for reply in tokens if reply]
    if len(replies) < 2:
        return math.nan
    counts = [Counter(g for n in range(1, _BLEU_ORDER + 1) for g in _ngrams(reply, n)) for reply in replies]
    highest: dict[tuple[Hashable, ...], tuple[int, int]] = {}  # the two highest counts of an n-gram in any reply
    for gram, count in (item for counter in counts for item in counter.items()):
        first, second = highest.get(gram, (0, 0))
        highest[gram] = (max(first, count), max(min(first, count), second))
    lengths = [len(reply) for reply in replies]
    scores = []
    for i, counter in enumerate(counts):
        nearest = min(lengths[:i] + lengths[i + 1 :], key=lambda length: (abs(length - lengths[i]), length))
        scores.append(_bleu(counter, highest, lengths[i], nearest))
    return sum(scores) / len(scores)


def _ngrams(tokens: Sequence[Hashable], n: int) -> list[tuple[Hashable, ...]]:
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def _bleu(
    counter: Counter[tuple[Hashable, ...]],
    highest: Mapping[tuple[Hashable, ...], tuple[int, int]],
    length: int,
    reference_length: int,
) -> float:
    """Sentence BLEU of a reply whose own counts are among the `highest`."""
    matched = [0] * _BLEU_ORDER
    for gram, count in counter.items():
        first, second = highest[gram]
        # The highest count among the other replies is `second` only where this reply holds `first`.
        matched[len(gram) - 1] += count if count < first else second
    if not any(matched):
        return 0.0
    orders = min(_BLEU_ORDER, length)
    logs, halved = 0.0, 1.0
    for n in range(orders):
        if not matched[n]:
            halved /= 2
        logs += math.log((matched[n] or halved) / (length - n))
    return math.exp(logs / orders + min(0.0, 1 - reference_length / length))


def compression_ratio(texts: Sequence[str]) -> float:
    """Bytes of the replies, joined by line breaks, over their bytes when compressed (zlib, level 9); high: repetitive.

    Shaib et al., arXiv 2403.00553. Below 1 where texts are too short to gain; nan where all are empty.
    """
    joined = "\n".join(texts).encode()
    return len(joined) / len(zlib.compress(joined, 9)) if any(texts) else math.nan


def canonical(answer: str) -> str:
    """The answer case-folded, with single spaces, without the marks that wrap or end it."""
    return " ".join(answer.casefold().split()).lstrip(_OPENING).rstrip(_CLOSING)


def unique_answers(answers: Sequence[str]) -> float:
    """Share of distinct answers in canonical form, in [1/N, 1]; an empty answer is one too. nan where N is 0."""
    return len({canonical(answer) for answer in answers}) / len(answers) if answers else math.nan


def answer_entropy(answers: Sequence[str]) -> float:
    """Entropy in nats of the law of canonical answers, in [0, log N]; nan where N is 0.

    It is the entropy of the observed shares, which lies below that of the law they were drawn from.
    """
    if not answers:
        return math.nan
    shares = [count / len(answers) for count in Counter(map(canonical, answers)).values()]
    return -sum(share * math.log(share) for share in shares) + 0.0  # not -0.0


def cosine_distance(embeddings: Tensor) -> tuple[float, float]:
    """Mean of 1 - cos over pairs of replies, in [0, 2] -> (U-statistic, V-statistic).

    U is over pairs i != j, unbiased. V is the paper's (arXiv 2511.08594), where pairs i = j count with distance 0, so
    that it is (N-1)/N of U. U is nan at N = 1, both at N = 0. A vector of zeros has no direction: its cosine with
    every other is 0.

    Args:
        embeddings: [N, D], of any length.
    """
    num = len(embeddings)
    total = (1 - _cosines(embeddings)).sum().item()
    return (total / (num * (num - 1)) if num > 1 else math.nan), (total / num**2 if num else math.nan)


def vendi_score(embeddings: Tensor) -> float:
    """Effective number of different replies, in [1, N]: exp of the entropy of the eigenvalues of K / N.

    Friedman and Dieng, arXiv 2210.02410, with K [N, N] the cosines. nan at N = 0.

    Args:
        embeddings: [N, D], of any length.
    """
    if not len(embeddings):
        return math.nan
    values = torch.linalg.eigvalsh(_cosines(embeddings) / len(embeddings)).clamp(min=0)
    return math.exp(-torch.xlogy(values, values).sum().item())


def _cosines(embeddings: Tensor) -> Tensor:
    """Cosines of all pairs [N, N] in float64, with 1 on the diagonal whatever the rounding."""
    unit = functional.normalize(embeddings.detach().cpu().double(), dim=1)
    return (unit @ unit.T).clamp(-1, 1).fill_diagonal_(1.0)


def distinct_k(partition: Sequence[int]) -> int:
    """Number of classes of functionally equal answers among k generations (NoveltyBench, arXiv 2504.05228).

    NoveltyBench's own files hold this less 1 under `distinct`.

    Args:
        partition: the class of each generation, in the order they were drawn.
    """
    return len(set(partition))


def utility_k(partition: Sequence[int], utilities: Sequence[float], patience: float = 0.8) -> float:
    """Utility to a reader who asks on with probability `patience` after each generation (NoveltyBench).

    (1 - p) / (1 - p^k) sum_i p^(i-1) u_i, where u_i counts only if generation i is the first of its class. On the scale
    of the utilities; nan where k is 0.

    Args:
        partition: the class of each generation, in the order they were drawn.
        utilities: of each generation, as if it were new.
        patience: p in (0, 1]; at 1 all generations weigh the same.
    """
    seen: set[int] = set()
    gained, weights = 0.0, 0.0
    for i, (label, utility) in enumerate(zip(partition, utilities, strict=True)):
        weights += patience**i
        gained += 0.0 if label in seen else patience**i * utility
        seen.add(label)
    return gained / weights if weights else math.nan


def text_diversity(texts: Sequence[str], match_length: int = 32) -> dict[str, float]:
    """TEXT_MEASURES of the replies to one prompt: over their first `match_length` words, unique answers over all."""
    cut = [cut_words(text, match_length) for text in texts]
    tokens = [words(text) for text in cut]
    measures = {f"distinct_{n}": distinct_n(tokens, n) for n in (1, 2, 3)}
    return measures | {
        "self_bleu": self_bleu(tokens),
        "compression_ratio": compression_ratio(cut),
        "unique_answers": unique_answers(texts),
    }


def embedding_diversity(embeddings: Tensor) -> dict[str, float]:
    """EMBEDDING_MEASURES of the replies to one prompt, [N, D]."""
    u, v = cosine_distance(embeddings)
    return {"cosine_distance": u, "cosine_distance_v": v, "vendi": vendi_score(embeddings)}


class PromptDiversity(Metric):
    """Means over prompts of named measures. A prompt where a measure is nan or missing does not count for it.

    Args:
        names: of the measures, in an order that all processes share.
    """

    full_state_update = False
    sums: Tensor  # [Q] float64
    counts: Tensor  # [Q] prompts that count

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = tuple(names)
        for state in ("sums", "counts"):
            self.add_state(state, torch.zeros(len(self.names), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, prompts: Sequence[Mapping[str, float]]) -> None:
        """Add the measures of some prompts; of none, where a process has none."""
        rows = [[prompt.get(name, math.nan) for name in self.names] for prompt in prompts]
        values = torch.tensor(rows, dtype=torch.float64, device=self.sums.device).view(len(rows), len(self.names))
        # Not in place: a state reset under inference mode takes no update in place outside of it.
        self.sums = self.sums + values.nansum(0)
        self.counts = self.counts + (~values.isnan()).sum(0)

    def compute(self) -> dict[str, float]:
        """Mean of each measure; nan where no prompt counts."""
        return dict(zip(self.names, (self.sums / self.counts).tolist(), strict=True))
