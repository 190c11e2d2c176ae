"""What a step holds, against the batches that training makes and against counts by hand."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from spl.data.base import PreferenceDataModule
from spl.modules.flops import MatrixSizes
from spl.planning.work import Work, planned_work
from spl.types import UserError


def settings(**given: Any) -> dict[str, Any]:
    return dict(PreferenceDataModule(**given).hparams)


def planned(tokens: int | None = None, model: str = "tiny", accumulated: int = 1, **given: Any) -> Work:
    return planned_work(model, settings(**given), accumulated, tokens, revision=None, trusted=None)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Ten pairs of ever longer texts. The tiny tokenizer gives a byte a token."""
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    rows = [{"prompt": "p" * k, "chosen": "a" * k, "rejected": "b" * 2 * k} for k in range(1, 11)]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def test_lengths_are_the_datas_own(pairs: str) -> None:
    work = planned(path=pairs, batch_size=5, template="plain", accumulated=3)
    lengths = [example.num_tokens for example in work.examples]
    assert [b - a for a, b in pairwise(lengths)] == [4] * 9  # of each letter one more, or two
    assert (len(work.typical), work.micro_batches) == (2, 3)
    assert work.tokens == 3 * sum(batch.num_tokens for batch in work.typical) / 2
    # The largest holds the five longest; those of smaller budgets are within them, down to the longest example alone.
    (own, largest), *smaller = work.largest
    assert (own, largest.rows) == (None, tuple(work.examples[k].row for k in (9, 8, 7, 6, 5)))
    assert all(batch.num_tokens <= budget for budget, batch in smaller)
    assert smaller[-1][1].rows == (work.examples[9].row,)


def test_a_budget_makes_more_micro_batches(pairs: str) -> None:
    whole = planned(path=pairs, batch_size=10, template="plain")
    budget = max(example.num_tokens for example in whole.examples)
    kept = planned(path=pairs, batch_size=10, template="plain", max_tokens=budget)
    assert whole.micro_batches == 1
    assert kept.micro_batches * budget >= kept.tokens > (kept.micro_batches - 1) * budget
    assert kept.largest[0][1].num_tokens <= budget
    sizes = MatrixSizes(trained=7, frozen=3, head=5, attended=2)
    assert kept.flops(sizes, True) == whole.flops(sizes, True)  # the step is what it was


def test_padding_is_counted_as_rows_of_the_longest(pairs: str) -> None:
    work = planned(path=pairs, batch_size=5, template="plain")
    padded = work.padded()
    longest = [max(len(s) for e in work.examples[k : k + 5] for s in e.sequences) for k in (0, 5)]
    assert padded.tokens == sum(10 * n for n in longest) / 2
    # Two a number and token in one forward pass; pairs of a causal row; the head on every token.
    sizes = MatrixSizes(trained=0, frozen=3, head=5, attended=2)
    forward = [10 * (2 * 3 * n + 4 * 2 * n * (n + 1) // 2 + 2 * 5 * n) for n in longest]
    assert padded.flops(sizes, True) - padded.flops(sizes, False) == sum(forward) / 2


@pytest.mark.parametrize(("tokens", "size"), [(2048, 8), (96, 2), (1000, 3)])
def test_made_up_pairs_have_the_tokens_asked_for(tokens: int, size: int) -> None:
    work = planned(tokens, batch_size=size)
    batch = work.largest[0][1]
    assert batch.num_tokens == size * (tokens // size)
    assert (batch.num_examples, batch.num_responses) == (size, 2 * size)
    # Half are responses; the prompt's last token predicts both of their first ones, and each its end.
    assert batch.edge_source.numel() == size * (-(-(tokens // size) // 2) + 2)
    assert work.source == f"--tokens {tokens:,}"


def test_lengths_that_cannot_be_known_are_said_to_be_assumed(pairs: str) -> None:
    hub = planned(path="Anthropic/hh-rlhf")
    assert (hub.tokens, "Anthropic/hh-rlhf is not a local file" in hub.source) == (2048, True)
    named = planned(path=pairs, model="llama-3.1-8b", max_tokens=4096)
    assert (named.tokens, "llama-3.1-8b has no tokenizer" in named.source) == (4096, True)
    mixed = planned(mixture={pairs: 1.0}, streaming=True)
    assert (mixed.tokens, "data.mixture" in mixed.source) == (2048, True)


def test_a_bad_row_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"chosen": 3, "rejected": "b"}\n')
    with pytest.raises(UserError, match=r"bad.jsonl, row 1"):
        planned(path=str(tmp_path / "bad.jsonl"))
