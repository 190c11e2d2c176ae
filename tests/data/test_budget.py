"""Micro-batches by tokens, against their definition: the plain plan's steps, and the best division by brute force."""

import json
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spl.data.base import PreferenceDataModule
from spl.data.budget import Balanced, fewest, partition
from spl.data.collate import EncodedExample
from spl.data.loader import BatchLoader, Shuffled
from spl.types import Comparison, UserError

SIZES = st.integers(1, 60)


@st.composite
def items(draw: Any, most: int, groups: int) -> tuple[list[int], int]:
    sizes = draw(st.lists(SIZES, min_size=1, max_size=most))
    return sizes, draw(st.integers(1, min(groups, len(sizes))))


@given(items(40, 40))
def test_groups_are_a_partition_the_largest_first(case: tuple[list[int], int]) -> None:
    sizes, number = case
    groups = partition(sizes, number)
    assert len(groups) == number
    assert all(groups)
    assert sorted(k for group in groups for k in group) == list(range(len(sizes)))
    loads = [sum(sizes[k] for k in group) for group in groups]
    assert loads == sorted(loads, reverse=True)


@given(items(7, 3))
def test_the_largest_group_is_near_the_best(case: tuple[list[int], int]) -> None:
    sizes, number = case
    best = min(
        max(sum(size for size, g in zip(sizes, groups, strict=True) if g == k) for k in range(number))
        for groups in product(range(number), repeat=len(sizes))
    )
    largest = sum(sizes[k] for k in partition(sizes, number)[0])
    assert best <= largest <= best * 4 / 3


def test_a_division_by_hand() -> None:
    # 9 | 7 | then 6 beside 7, 5 beside 9, 2 beside 13.
    assert partition([5, 9, 2, 7, 6], 2) == [[2, 3, 4], [0, 1]]


@given(st.lists(SIZES, min_size=1, max_size=25))
def test_more_groups_never_make_the_largest_larger(sizes: list[int]) -> None:
    largest = [sum(sizes[k] for k in partition(sizes, number)[0]) for number in range(1, len(sizes) + 1)]
    assert largest == sorted(largest, reverse=True)
    assert (largest[0], largest[-1]) == (sum(sizes), max(sizes))


def example(length: int, row: int) -> EncodedExample:
    prompt = (256, *(65 + row % 7 for _ in range(length)))
    return EncodedExample(((*prompt, 1), (*prompt, 2)), (len(prompt),) * 2, (Comparison(0, 1, 1.0),), None, str(row))


@st.composite
def runs(draw: Any) -> dict[str, Any]:
    """A user's settings, with enough examples for a step."""
    found = {name: draw(st.integers(1, 3)) for name in ("batch_size", "accumulate", "world")}
    step = found["batch_size"] * found["accumulate"] * found["world"]
    lengths = draw(st.lists(SIZES, min_size=step, max_size=step + 30))
    return found | {"step": step, "lengths": np.array(lengths), "seed": draw(st.integers(0, 5))}


@settings(max_examples=40, deadline=None)
@given(runs(), st.integers(0, 9), st.integers(0, 2))
def test_a_step_sees_the_plain_steps_examples_at_their_weight(run: dict[str, Any], more: int, epoch: int) -> None:
    lengths, world, step, seed = run["lengths"], run["world"], run["step"], run["seed"]
    number = min(run["accumulate"] + more, step // world)
    plans = [Balanced(lengths, step, number, seed, rank, world) for rank in range(world)]
    plain = [Shuffled(len(lengths), run["batch_size"], seed, rank, world)(epoch) for rank in range(world)]
    examples: Any = [example(int(length), k) for k, length in enumerate(lengths)]
    ranks = [list(BatchLoader(examples, plan, lambda: (epoch, 0))) for plan in plans]
    num_steps = len(lengths) // step
    for plan, batches in zip(plans, ranks, strict=True):
        assert len(plan) == len(plan(epoch)) == len(batches) == num_steps * number
        assert [tuple(map(str, group)) for group in plan(epoch)] == [batch.rows for batch in batches]
    for k in range(num_steps):
        together = [batch for batches in ranks for batch in batches[k * number : (k + 1) * number]]
        accumulate = run["accumulate"]
        expected = [i for own in plain for batch in own[k * accumulate : (k + 1) * accumulate] for i in batch]
        assert sorted(int(row) for batch in together for row in batch.rows) == sorted(expected)
        # The mean over micro-batches and processes of weight * mean loss is the mean over the step's examples.
        for batch in together:
            assert batch.weight / (number * world) == pytest.approx(batch.num_examples / step)
        assert sum(batch.weight for batch in together) == pytest.approx(number * world)


@given(runs(), st.integers(0, 3))
def test_processes_work_on_neighbours_in_size(run: dict[str, Any], more: int) -> None:
    world, lengths = run["world"], run["lengths"]
    number = min(run["accumulate"] + more, run["step"] // world)
    ranks = [Balanced(lengths, run["step"], number, 0, rank, world)(0)[:number] for rank in range(world)]
    loads = [int(lengths[group].sum()) for groups in zip(*ranks, strict=True) for group in groups]
    assert loads == sorted(loads, reverse=True)


def test_plain_batches_weigh_one() -> None:
    examples: Any = [example(k + 1, k) for k in range(6)]
    assert [batch.weight for batch in BatchLoader(examples, Shuffled(6, 2, 0))] == [1.0] * 3


@given(runs(), st.integers(0, 200), st.integers(1, 3))
def test_the_fewest_micro_batches_that_keep_to_the_budget(run: dict[str, Any], room: int, epochs: int) -> None:
    lengths, world, step, seed, least = (run[k] for k in ("lengths", "world", "step", "seed", "accumulate"))
    budget = int(lengths.max()) + room

    def heaviest(number: int) -> int:
        plans = [Balanced(lengths, step, number, seed, rank, world) for rank in range(world)]
        return max(int(lengths[group].sum()) for plan in plans for epoch in range(epochs) for group in plan(epoch))

    number = fewest(lengths, step, budget, least, world, seed, epochs)
    assert heaviest(number) <= budget
    assert least <= number <= step // world
    assert all(heaviest(fewer) > budget for fewer in range(least, number))


def data(
    path: Path, tokenizer: Any, accumulate: int = 1, epochs: int = 1, steps: int = -1, **options: Any
) -> PreferenceDataModule:
    """As a Trainer holds it."""
    module = PreferenceDataModule(str(path), **options)
    progress = SimpleNamespace(current=SimpleNamespace(ready=0))
    module.trainer = SimpleNamespace(  # type: ignore[assignment]
        lightning_module=SimpleNamespace(tokenizer=tokenizer),
        global_rank=0,
        world_size=1,
        accumulate_grad_batches=accumulate,
        limit_train_batches=1.0,
        val_check_interval=1.0,
        max_epochs=epochs,
        max_steps=steps,
        current_epoch=0,
        fit_loop=SimpleNamespace(restarting=False, epoch_loop=SimpleNamespace(batch_progress=progress)),
    )
    return module


@pytest.fixture
def path(tmp_path: Path) -> Path:
    rows = ({"prompt": f"{k}" * (5 + k**2 % 41), "chosen": "yes", "rejected": "no"} for k in range(10))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "a.jsonl"


@pytest.mark.parametrize(("epochs", "steps"), [(1, -1), (6, -1), (-1, 11), (9, 11)])
def test_all_epochs_of_a_run_keep_to_the_budget(path: Path, tiny_tokenizer: Any, epochs: int, steps: int) -> None:
    module: Any = data(path, tiny_tokenizer, 1, epochs, steps, batch_size=5, max_tokens=68)
    module.setup("fit")
    bounds = {module.train[k].row: int(module.train.num_tokens[k]) for k in range(10)}
    batches = []
    for module.trainer.current_epoch in range(1 if epochs == 1 else 6):  # two steps each
        batches += list(module.train_dataloader())
    loads = [sum(bounds[row] for row in batch.rows) for batch in batches]
    assert max(loads) <= 68
    assert module.longest_batch().rows == batches[loads.index(max(loads))].rows
    assert module.first_batch().rows == batches[0].rows
    number = module.trainer.accumulate_grad_batches
    assert number == (3 if epochs == 1 else 4)  # the sixth epoch has a step that three cannot hold
    text = f"10 train, steps of 5 in {number} micro-batches of at most 68 distinct tokens"
    assert module.describe()["training data"].endswith(text)
    module.teardown("fit")
    assert module.trainer.accumulate_grad_batches == 1


def test_the_report_tells_of_grouping(path: Path, tiny_tokenizer: Any) -> None:
    module = data(path, tiny_tokenizer, 2, batch_size=4, group_by_length=True)
    module.setup("fit")
    assert module.describe()["training data"].endswith("10 train, steps of 8 in 2 micro-batches")


@pytest.mark.parametrize(
    ("accumulate", "options", "sentence"),
    [
        (1, {"max_tokens": 0}, r"data\.max_tokens must be 1 or more, but is 0\."),
        (1, {"max_tokens": 99, "streaming": True}, r"a stream does not tell its lengths ahead: .*data\.max_tokens.*\."),
        (1, {"group_by_length": True, "streaming": True}, r"a stream does not tell .*data\.group_by_length.*\."),
        (
            1,
            {"max_tokens": 55},  # row 10: a prompt of 45 bytes between 4 marks, "yes" and "no" with an end each
            r"data\.max_tokens is 55, but \S+a\.jsonl, row 10 alone has 56 distinct tokens: raise it, or lower "
            r"data\.max_length\.",
        ),
        (
            2,
            {"max_tokens": 99, "batch_size": 6},
            r"\S+ has 10 examples .* fewer than the 12 .*lower data\.batch_size\.",
        ),
        (3, {"group_by_length": True, "batch_size": 4}, r"\S+ has 10 examples .* fewer than the 12 that .*\."),
    ],
)
def test_settings_that_cannot_be(
    path: Path, tiny_tokenizer: Any, accumulate: int, options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UserError, match=f"^{sentence}$"):
        data(path, tiny_tokenizer, accumulate, **options).setup("fit")
