"""Diversity of replies against sacrebleu, scipy, zlib, NoveltyBench's own figures, closed forms and brute force."""

import gzip
import json
import math
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cosine_similarity

from spl.metrics import diversity
from spl.metrics.diversity import PromptDiversity

VOCABULARY = st.sampled_from(["the", "cat", "sat", "on", "mat"])
REPLY = st.lists(VOCABULARY, min_size=1, max_size=9)
REPLIES = st.lists(REPLY, min_size=2, max_size=6)


def test_words_are_words_and_marks() -> None:
    assert diversity.words("Don't  stop:\nit's 3.5 Überfälle!") == [
        *("Don", "'", "t", "stop", ":", "it", "'", "s", "3", ".", "5", "Überfälle", "!")
    ]


@pytest.mark.parametrize(
    ("num", "expected"),
    [(1, "  One"), (2, "  One,"), (3, "  One,\n two"), (5, "  One,\n two  three."), (6, None), (0, None)],
)
def test_cutting_keeps_the_text_before_the_cut(num: int, expected: str | None) -> None:
    text = "  One,\n two  three. "
    assert diversity.cut_words(text, num) == (text if expected is None else expected)


@given(st.text(max_size=40), st.integers(1, 8))
def test_a_cut_text_has_the_first_words(text: str, num: int) -> None:
    assert diversity.words(diversity.cut_words(text, num)) == diversity.words(text)[:num]


def test_distinct_n_by_hand() -> None:
    replies = [["a", "b", "a", "b"], ["a", "b", "c"], ["a"]]
    assert diversity.distinct_n(replies, 1) == 3 / 8  # a, b, c
    assert diversity.distinct_n(replies, 2) == 3 / 5  # ab, ba, bc of ab ba ab, ab bc
    assert diversity.distinct_n(replies, 3) == 3 / 3  # aba, bab, abc
    assert math.isnan(diversity.distinct_n(replies, 5))


@settings(deadline=None)
@given(REPLIES)
def test_self_bleu_is_sacrebleu(replies: list[list[str]]) -> None:
    sacrebleu = pytest.importorskip("sacrebleu", reason="pip install sacrebleu")
    lines = [" ".join(reply) for reply in replies]
    expected = [
        sacrebleu.sentence_bleu(line, lines[:i] + lines[i + 1 :], tokenize="none").score / 100
        for i, line in enumerate(lines)
    ]
    assert diversity.self_bleu(replies) == pytest.approx(sum(expected) / len(expected), abs=1e-9)


def test_self_bleu_at_its_ends() -> None:
    same = ["one", "two", "three", "four", "five"]
    assert diversity.self_bleu([same, same, same]) == pytest.approx(1)
    assert diversity.self_bleu([["a", "b"], ["c", "d"], ["e"]]) == 0
    assert diversity.self_bleu([same, [], same]) == pytest.approx(1)  # an empty reply is left out


def test_compression_ratio_by_zlib() -> None:
    texts = ["the cat sat on the mat"] * 8
    joined = "\n".join(texts).encode()
    assert len(joined) == 8 * 22 + 7
    assert diversity.compression_ratio(texts) == len(joined) / len(zlib.compress(joined, level=9))
    assert diversity.compression_ratio(texts) > 4
    squares = " ".join(str(i * i) for i in range(300))
    sizes = {level: len(zlib.compress(squares.encode(), level=level)) for level in (1, 9)}
    assert sizes[1] > sizes[9]  # the level is told apart
    assert diversity.compression_ratio([squares]) == len(squares) / sizes[9]
    assert diversity.compression_ratio(["ß"]) == 2 / len(zlib.compress("ß".encode(), level=9))  # bytes, not characters


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("  The  Cat.\n", "the cat"),
        ("**“Paris!”**", "paris"),
        ("(B)", "b"),
        ("STRASSE", "strasse"),
        ("Straße", "strasse"),
        ("-5", "-5"),
        (".5", ".5"),
        ("5.", "5"),
        ("50%", "50%"),
        ("$1,000", "$1,000"),
        ("well-known, isn't it?", "well-known, isn't it"),
        ("...", ""),
        ("", ""),
    ],
)
def test_canonical_answers(answer: str, expected: str) -> None:
    assert diversity.canonical(answer) == expected


def test_answers_by_hand() -> None:
    answers = ["Paris", "paris.", " PARIS ", "Rome", "London", "rome", "Oslo", "'Oslo'"]
    assert diversity.unique_answers(answers) == 4 / 8
    shares = torch.tensor([3, 2, 1, 2]) / 8
    expected = torch.distributions.Categorical(probs=shares).entropy().item()
    assert diversity.answer_entropy(answers) == pytest.approx(expected, abs=1e-6)
    assert diversity.answer_entropy(["a", "b", "c", "d"]) == pytest.approx(math.log(4))
    assert str(diversity.answer_entropy(["a", "A"])) == "0.0"


@pytest.mark.parametrize("num", [2, 3, 8])
def test_cosine_distance_is_scipys(num: int) -> None:
    spatial = pytest.importorskip("scipy.spatial.distance")
    embeddings = torch.randn(num, 5, generator=torch.Generator().manual_seed(num)) * 3
    u, v = diversity.cosine_distance(embeddings)
    expected = spatial.pdist(embeddings.double().numpy(), "cosine").mean()
    assert u == pytest.approx(expected, abs=1e-12)
    assert v == pytest.approx(expected * (num - 1) / num, abs=1e-12)


def test_the_v_statistic_keeps_equal_pairs() -> None:
    embeddings = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).double()
    pairs = [1 - cosine_similarity(a, b, dim=0).item() for a in embeddings for b in embeddings]
    assert diversity.cosine_distance(embeddings)[1] == pytest.approx(sum(pairs) / 16, abs=1e-12)


def test_the_u_statistic_is_unbiased() -> None:
    """Over all samples of two from a population, its mean is the mean over independent pairs; V's is below it."""
    population = torch.randn(5, 3, generator=torch.Generator().manual_seed(1)).double()
    truth = sum(1 - cosine_similarity(a, b, dim=0).item() for a in population for b in population) / 25
    draws = [diversity.cosine_distance(population[[i, j]]) for i in range(5) for j in range(5)]
    assert sum(u for u, _ in draws) / 25 == pytest.approx(truth, abs=1e-12)
    assert sum(v for _, v in draws) / 25 == pytest.approx(truth / 2, abs=1e-12)


@pytest.mark.parametrize("num", [1, 2, 6])
def test_vendi_counts_orthogonal_replies(num: int) -> None:
    assert diversity.vendi_score(torch.eye(num, 7) * 2) == pytest.approx(num, abs=1e-9)
    assert diversity.vendi_score(torch.ones(num, 7)) == pytest.approx(1, abs=1e-9)


def test_vendi_closed_forms() -> None:
    twice = torch.eye(4).repeat(2, 1)  # four meanings, each said twice
    assert diversity.vendi_score(twice) == pytest.approx(4, abs=1e-9)
    cosine = 0.6  # two replies: eigenvalues of K / 2 are (1 +- cosine) / 2
    shares = [(1 + cosine) / 2, (1 - cosine) / 2]
    expected = math.exp(-sum(share * math.log(share) for share in shares))
    assert diversity.vendi_score(torch.tensor([[1.0, 0.0], [0.6, 0.8]])) == pytest.approx(expected, abs=1e-6)


def test_a_vector_without_direction_is_far_from_all_others() -> None:
    embeddings = torch.tensor([[0.0, 0.0], [0.0, 0.0], [1.0, 0.0]])
    assert diversity.cosine_distance(embeddings) == pytest.approx((1, 2 / 3))
    assert diversity.vendi_score(embeddings) == pytest.approx(3)


def novelty_rows(folder: Path) -> list[dict[str, Any]]:
    with gzip.open(folder / "noveltybench_first50_gemini_scored.jsonl.gz", "rt") as file:
        return [json.loads(line) for line in file]


def test_noveltybench_itself(shared_data: Path) -> None:
    rows = novelty_rows(shared_data)
    assert len(rows) == 50
    for row in rows:
        partition = row["partition"]
        assert diversity.distinct_k(partition) - 1 == row["distinct"]
        by_class = [row["partition_scores"][label] for label in partition]  # repeats must not count
        for utilities in (row["generation_scores"], by_class):
            assert diversity.utility_k(partition, utilities) == pytest.approx(row["utility"], abs=1e-12)


def test_utility_by_hand() -> None:
    expected = (1 - 0.5) / (1 - 0.5**3) * (4 + 0.5 * 0 + 0.25 * 8)
    assert diversity.utility_k([3, 3, 1], [4, 9, 8], patience=0.5) == pytest.approx(expected)
    assert diversity.utility_k([0, 1, 0], [4, 2, 9], patience=1.0) == pytest.approx(6 / 3)


def test_one_reply_and_empty_replies_are_defined() -> None:
    one = diversity.text_diversity(["A b c."])
    assert math.isnan(one.pop("self_bleu"))
    assert one.pop("compression_ratio") == 6 / len(zlib.compress(b"A b c.", level=9))
    assert one == {"distinct_1": 1, "distinct_2": 1, "distinct_3": 1, "unique_answers": 1}
    empty = diversity.text_diversity(["", "", "", ""])
    assert empty.pop("unique_answers") == 1 / 4
    assert all(math.isnan(value) for value in empty.values())
    assert all(math.isnan(value) for value in diversity.text_diversity([]).values())
    alone = diversity.embedding_diversity(torch.ones(1, 3))
    assert math.isnan(alone.pop("cosine_distance"))
    assert alone == {"cosine_distance_v": 0, "vendi": 1}
    assert all(math.isnan(value) for value in diversity.embedding_diversity(torch.ones(0, 3)).values())
    assert math.isnan(diversity.answer_entropy([]))
    assert math.isnan(diversity.utility_k([], []))


def test_measures_are_matched_in_length_but_answers_are_whole() -> None:
    texts = ["a b c d", "a b e f"]
    matched = diversity.text_diversity(texts, match_length=2)
    assert matched["distinct_1"] == 2 / 4
    assert matched["compression_ratio"] == diversity.compression_ratio(["a b", "a b"])
    assert matched["self_bleu"] == pytest.approx(1)
    assert matched["unique_answers"] == 1
    assert diversity.text_diversity(texts, match_length=0)["distinct_1"] == 6 / 8
    assert tuple(matched) == diversity.TEXT_MEASURES
    assert tuple(diversity.embedding_diversity(torch.eye(2))) == diversity.EMBEDDING_MEASURES


def test_means_over_prompts_leave_nan_out() -> None:
    metric = PromptDiversity(("a", "b", "c"))
    metric.update([{"a": 1.0, "b": 2.0}, {"a": 4.0, "b": math.nan}])
    metric.update([])
    metric.update([{"a": 4.0}])
    means = metric.compute()
    assert means.pop("a") == 3
    assert means.pop("b") == 2
    assert math.isnan(means["c"])


def test_a_process_without_prompts_adds_nothing() -> None:
    """What a sum over processes makes of the states: one has three prompts, the other none."""
    busy, idle = PromptDiversity(("a",)), PromptDiversity(("a",))
    busy.update([{"a": 1.0}, {"a": 2.0}, {"a": 6.0}])
    idle.update([])
    for name in ("sums", "counts"):
        gathered = torch.stack([getattr(busy, name), getattr(idle, name)])
        setattr(idle, name, busy._reductions[name](gathered))
    assert idle.compute() == {"a": 3}
