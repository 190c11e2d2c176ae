"""A stream as a Trainer takes it: endless, shared out, mixed, and resumed to the batch."""

import json
import multiprocessing
import subprocess
import sys
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet as parquet
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_base import data, pairs, rows_of

from spl.data.base import PreferenceDataModule
from spl.data.files import open_file
from spl.data.hub import hub_shards
from spl.data.shards import Retries, read
from spl.data.source import Source
from spl.data.training_stream import TrainingStream
from spl.types import PreferenceBatch, UserError


def stream(path: Path | str, tokenizer: Any, rank: int = 0, world: int = 1, **options: Any) -> PreferenceDataModule:
    module = data(path, tokenizer, rank, world, streaming=True, retry_wait=0.0, **options)
    module.setup("fit")
    return module


def batches(module: PreferenceDataModule, number: int) -> list[PreferenceBatch]:
    loader: Any = module.train_dataloader()
    found = list(islice(iter(loader), number))
    loader.close()
    return found


def folder(path: Path, sizes: list[int]) -> Path:
    path.mkdir(exist_ok=True)
    for k, size in enumerate(sizes):
        pairs(path / f"{k}.jsonl", size)
    return path


def everything(path: Path) -> list[str]:
    return sorted(row.where for row in Source(str(path)).rows())


def same(one: PreferenceBatch, two: PreferenceBatch) -> bool:
    return one.rows == two.rows and torch.equal(one.input_ids, two.input_ids)


@pytest.mark.parametrize("sizes", [[8, 8, 8, 8], [8, 24]], ids=["whole-shards", "rows"])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_processes_share_a_pass_and_none_runs_dry(
    tmp_path: Path, tiny_tokenizer: Any, sizes: list[int], world: int
) -> None:
    folder(tmp_path, sizes)
    seen = [
        rows_of(batches(stream(tmp_path, tiny_tokenizer, rank, world, batch_size=2, buffer_size=5), 48 // world))
        for rank in range(world)
    ]
    for k in range(3):  # each has its rows three times over, in another order
        share = 32 // world
        passes = [rows[k * share : (k + 1) * share] for rows in seen]
        assert sorted(chain.from_iterable(passes)) == everything(tmp_path)
    assert seen[0][:share] != seen[0][share : 2 * share] != sorted(seen[0][share : 2 * share])


def test_workers_are_lanes_that_one_process_may_read_as_well(tmp_path: Path, tiny_tokenizer: Any) -> None:
    folder(tmp_path, [9, 14, 3])
    options: dict[str, Any] = {"batch_size": 2, "buffer_size": 5, "lanes": 4}
    one = batches(stream(tmp_path, tiny_tokenizer, **options), 12)
    two = batches(stream(tmp_path, tiny_tokenizer, num_workers=2, **options), 12)
    ranks = [batches(stream(tmp_path, tiny_tokenizer, rank, 2, **options), 6) for rank in (0, 1)]
    alternating = list(chain.from_iterable(zip(*ranks, strict=True)))
    assert all(same(a, b) and same(a, c) for a, b, c in zip(one, two, alternating, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_checkpoint_goes_on_with_the_next_batch(tmp_path: Path, tiny_tokenizer: Any, workers: int) -> None:
    path = folder(tmp_path, [9, 14])
    options: dict[str, Any] = {"batch_size": 2, "buffer_size": 6, "num_workers": workers}
    straight = batches(stream(path, tiny_tokenizer, **options), 8)
    before = stream(path, tiny_tokenizer, **options)
    loader = iter(before.train_dataloader())
    for _ in range(5):
        next(loader)  # by now workers have more ready
    state = json.loads(json.dumps(before.state_dict()))
    before.teardown("fit")
    after = stream(path, tiny_tokenizer, **options)
    after.load_state_dict(state)
    rest = batches(after, 3)
    assert all(same(a, b) for a, b in zip(straight[5:], rest, strict=True))
    assert after.state_dict()["stream"]["done"] == 8


def test_a_batch_that_was_drawn_and_not_trained_on_is_in_no_checkpoint(tmp_path: Path, tiny_tokenizer: Any) -> None:
    """A checkpoint of a step's end may be taken when the next step's batch is there already."""
    path = folder(tmp_path, [9, 14])
    module = stream(path, tiny_tokenizer, batch_size=2, buffer_size=6)
    loader = iter(module.train_dataloader())
    for _ in range(3):
        next(loader)
    done = module.state_dict()
    trainer: Any = module.trainer
    trainer.processed = repeat(1_000)
    drawn = next(loader)
    assert module.state_dict() == done
    after = stream(path, tiny_tokenizer, batch_size=2, buffer_size=6)
    after.load_state_dict(done)
    assert same(batches(after, 1)[0], drawn)
    trainer.processed = repeat(1_001)
    assert module.state_dict()["stream"]["done"] == 4


def test_signals_to_all_processes_of_a_run_leave_its_workers_at_work(tmp_path: Path, tiny_tokenizer: Any) -> None:
    path = folder(tmp_path, [9, 14])
    straight = batches(stream(path, tiny_tokenizer, batch_size=2), 40)
    script = Path(__file__).with_name("signals_run.py")  # in a process that has started no helpers before
    done = subprocess.run([sys.executable, str(script), str(path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"rows": [list(batch.rows) for batch in straight], "signalled": 3, "ended": 0}


@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    lanes=st.sampled_from([1, 2, 4]),
    buffer_size=st.integers(1, 9),
    batch_size=st.integers(1, 3),
    bad=st.sets(st.integers(0, 11), max_size=4),
    stops=st.lists(st.tuples(st.integers(0, 6), st.sampled_from([1, 2])), max_size=3),
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_stops_change_nothing(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_tokenizer: Any,
    sizes: list[int],
    lanes: int,
    buffer_size: int,
    batch_size: int,
    bad: set[int],
    stops: list[tuple[int, int]],
) -> None:
    """However often a run is stopped and goes on, with other numbers of processes too, its batches are the same."""
    path = folder(tmp_path_factory.mktemp("stream"), [*sizes, 12, 12])
    for file in path.iterdir():
        lines = file.read_text().splitlines()
        file.write_text("".join(("{" if k in bad else line) + "\n" for k, line in enumerate(lines)))
    options: dict[str, Any] = {"batch_size": batch_size, "buffer_size": buffer_size, "lanes": lanes}
    options |= {"bad_rows": "skip", "max_bad_share": 1.0}
    states: list[dict[str, Any]] = [{}]
    found: list[PreferenceBatch] = []
    for number, world in [*((number, min(world, lanes)) for number, world in stops), (6, 1)]:
        modules = [stream(path, tiny_tokenizer, rank, world, **options) for rank in range(world)]
        for module in modules:
            module.load_state_dict(merged(states) if states[0] else {})
        parts = [batches(module, number) for module in modules]
        found += chain.from_iterable(zip(*parts, strict=True))
        states = [alone(module) for module in modules]
    straight = stream(path, tiny_tokenizer, **options)
    assert all(same(a, b) for a, b in zip(batches(straight, len(found)), found, strict=True))
    assert merged([alone(straight)]) == merged(states)


def test_a_run_that_is_stopped_within_a_step_does_the_step_again(tmp_path: Path, tiny_tokenizer: Any) -> None:
    """Five batches are a step of three and two whose gradient is lost: the fourth comes next."""
    path = folder(tmp_path, [9, 14])
    straight = batches(stream(path, tiny_tokenizer, batch_size=2), 4)
    module = stream(path, tiny_tokenizer, batch_size=2)
    trainer: Any = module.trainer
    trainer.accumulate_grad_batches = 3
    batches(module, 5)
    after = stream(path, tiny_tokenizer, batch_size=2)
    after.load_state_dict(module.state_dict())
    assert same(batches(after, 1)[0], straight[3])


def alone(module: PreferenceDataModule) -> dict[str, Any]:
    """What one process knows, without a gathering of all."""
    training = module._training
    assert isinstance(training, TrainingStream)
    training._settle()
    own = [[lane, state] for lane, state in training._progress.items() if training._is_own(lane)]
    return {
        "stream": {"order": training._order(), "num_lanes": training.num_lanes, "done": training._done, "lanes": own}
    }


def merged(states: list[dict[str, Any]]) -> dict[str, Any]:
    lanes = sorted(chain.from_iterable(state["stream"]["lanes"] for state in states))
    return {"stream": states[0]["stream"] | {"lanes": lanes}}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"seed": 1}, "data.seed is 1, where the run had 0"),
        ({"buffer_size": 7}, "data.buffer_size is 7, where the run had 6"),
        ({"num_workers": 3}, r"2 lanes of the stream cannot be shared out to 3 readers"),
        ({"more": True}, "the list of files is"),
    ],
)
def test_a_stream_of_another_order_does_not_go_on(
    tmp_path: Path, tiny_tokenizer: Any, change: dict[str, Any], sentence: str
) -> None:
    path = folder(tmp_path, [5, 5])
    before = stream(path, tiny_tokenizer, batch_size=2, buffer_size=6, lanes=2)
    batches(before, 1)
    if change.pop("more", False):
        pairs(path / "more.jsonl", 3)
    after = stream(path, tiny_tokenizer, **({"batch_size": 2, "buffer_size": 6} | change))
    with pytest.raises(UserError, match=sentence):
        after.load_state_dict(before.state_dict())


def test_sources_are_mixed_by_their_weights(tmp_path: Path, tiny_tokenizer: Any) -> None:
    files = {str(pairs(tmp_path / "a.jsonl", 40)): 3.0, str(pairs(tmp_path / "b.jsonl", 7)): 1.0, "survey": 0.5}
    module = stream("survey", tiny_tokenizer, mixture=files, batch_size=9, buffer_size=5, max_length=64)
    found = [row.split(",")[0] for row in rows_of(batches(module, 8))]
    shares = Counter(found)
    assert all(abs(shares[name] - 72 * weight / 4.5) <= 2 for name, weight in files.items())
    assert "a.jsonl (shards: 1; 66.7%)" in module.describe()["training data"]
    state = module.state_dict()
    after = stream("survey", tiny_tokenizer, mixture=files, batch_size=9, buffer_size=5, max_length=64)
    after.load_state_dict(state)
    straight = stream("survey", tiny_tokenizer, mixture=files, batch_size=9, buffer_size=5, max_length=64)
    assert rows_of(batches(after, 2)) == rows_of(batches(straight, 10)[8:])


def test_bad_rows_are_counted_shown_and_limited(tmp_path: Path, tiny_tokenizer: Any) -> None:
    path = pairs(tmp_path / "a.jsonl", 190)
    with path.open("a") as file:
        file.write('{"prompt": "p", "chosen": "same", "rejected": "same"}\n{broken\n' * 5)
    module = stream(path, tiny_tokenizer, bad_rows="skip", max_bad_share=0.06, batch_size=19, buffer_size=50)
    seen = rows_of(batches(module, 10))
    assert len(set(seen)) == 190
    training = module._training
    assert isinstance(training, TrainingStream)
    report = training.report()
    assert (report.examples, report.rows - report.examples) == (190, report.skipped)
    lines = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert len(lines) == len({line["where"] for line in lines}) == report.skipped
    assert {line["row"] for line in lines} <= {'{"prompt": "p", "chosen": "same", "rejected": "same"}', "{broken\n"}
    after = stream(path, tiny_tokenizer, bad_rows="skip", max_bad_share=0.06, batch_size=19, buffer_size=50)
    after.load_state_dict(module.state_dict())
    batches(after, 20)  # twice more: the same bad rows are not written again
    assert len((tmp_path / "quarantine.jsonl").read_text().splitlines()) == 10
    assert after._training.report().skipped in (29, 30)  # type: ignore[union-attr]
    with pytest.raises(UserError, match=r"\d of the 1\d\d rows read so far .*data.max_bad_share 0.01 allows; one of"):
        batches(stream(path, tiny_tokenizer, bad_rows="skip", max_bad_share=0.01, batch_size=19), 20)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_row_is_named_in_one_sentence(tmp_path: Path, tiny_tokenizer: Any, workers: int) -> None:
    path = pairs(tmp_path / "a.jsonl", 4)
    with path.open("a") as file:
        file.write("{broken\n")
    with pytest.raises(UserError, match=r"^.*a\.jsonl, row 5: expected one JSON object.*to leave such rows out\.$"):
        batches(stream(path, tiny_tokenizer, num_workers=workers, batch_size=2), 9)


def test_a_file_without_a_row_is_named(tmp_path: Path, tiny_tokenizer: Any) -> None:
    (tmp_path / "a.jsonl").touch()
    with pytest.raises(UserError, match=r"a\.jsonl: no row in it to train on"):
        batches(stream(tmp_path / "a.jsonl", tiny_tokenizer), 1)


def test_a_quarantine_that_cannot_be_written_stops_no_run(tmp_path: Path, tiny_tokenizer: Any) -> None:
    path = pairs(tmp_path / "a.jsonl", 9)
    with path.open("a") as file:
        file.write("{broken\n")
    (tmp_path / "quarantine.jsonl").mkdir()
    module = stream(path, tiny_tokenizer, bad_rows="skip", batch_size=3)
    batches(module, 6)
    assert module._training.report().skipped == 2  # type: ignore[union-attr]


def test_a_file_that_grows_changes_no_order(tmp_path: Path, tiny_tokenizer: Any) -> None:
    """The run keeps to the sizes it found, on which its lanes rest, and is not taken for one on other files."""
    path = folder(tmp_path, [9, 9])
    module = stream(path, tiny_tokenizer, lanes=2)
    batches(module, 2)
    before = module.state_dict()["stream"]["order"]
    with (path / "0.jsonl").open("a") as file:
        file.write("\n" * 5000)
    assert module.state_dict()["stream"]["order"] == before


def test_no_usable_row_in_a_whole_pass(tmp_path: Path, tiny_tokenizer: Any) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "p"}\n' * 9)
    with pytest.raises(UserError, match=r"no usable example among its rows \(first: .*row \d: expected the columns"):
        batches(stream(path, tiny_tokenizer, bad_rows="skip", max_bad_share=1.0), 1)


def test_fewer_rows_than_readers(tmp_path: Path, tiny_tokenizer: Any) -> None:
    path = pairs(tmp_path / "a.jsonl", 3)
    with pytest.raises(UserError, match=r"fewer rows than the 4 lanes that read them: lower data.num_workers"):
        batches(stream(path, tiny_tokenizer, lanes=4, batch_size=1), 4)


def test_what_is_known_ahead_is_what_step_1_trains_on(tmp_path: Path, tiny_tokenizer: Any) -> None:
    module = stream(folder(tmp_path, [30]), tiny_tokenizer, batch_size=4, buffer_size=7)
    assert same(module.first_batch(), batches(module, 1)[0])
    assert len(module.prompts(99)) == 30
    assert module.longest_batch().num_examples == 4


def test_a_vanished_file_is_tried_again_and_then_named(tmp_path: Path, tiny_tokenizer: Any) -> None:
    path = folder(tmp_path, [6, 6])
    module = stream(path, tiny_tokenizer, batch_size=1, buffer_size=2, retries=2)
    loader = iter(module.train_dataloader())
    for _ in range(5):
        next(loader)
    for file in path.iterdir():
        file.rename(file.with_suffix(".gone"))
    sentence = r"cannot be read from row 1 on: .*No such file.*, 2 times tried again"
    with pytest.raises(UserError, match=sentence):
        list(loader)


@pytest.mark.parametrize("kind", ["parquet", "json"])
def test_a_data_set_of_the_hub_is_streamed_in_shards(
    tmp_path: Path, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Whose builders for local files stand for the Hub: `datasets` reads and cuts both in the same way."""
    files = [str(tmp_path / f"{k}.{kind}") for k in range(3)]
    for k, name in enumerate(files):
        rows = [{"prompt": f"{k} {n}", "chosen": "a", "rejected": "b"} for n in range(7)]
        if kind == "parquet":
            parquet.write_table(pyarrow.Table.from_pylist(rows), name, row_group_size=3)
        else:
            Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    load = datasets.load_dataset
    monkeypatch.setattr(
        datasets, "load_dataset", lambda path, **o: load(kind, data_files=files, split="train", streaming=True)
    )
    options: dict[str, Any] = {"batch_size": 1, "buffer_size": 4}
    straight = batches(stream("owner/tea", tiny_tokenizer, **options), 30)
    places = [f"owner/tea, shard {s}, row {n}" for s in (1, 2, 3) for n in range(1, 8)]
    assert sorted(rows_of(straight)[:21]) == places
    before = stream("owner/tea", tiny_tokenizer, **options)
    batches(before, 12)
    after = stream("owner/tea", tiny_tokenizer, **options)
    after.load_state_dict(before.state_dict())
    assert rows_of(batches(after, 18)) == rows_of(straight)[12:]


def test_a_hub_that_fails_for_a_while_loses_and_repeats_no_row(caplog: pytest.LogCaptureFixture) -> None:
    failures = [3, 3, 5]

    def rows(shards: list[int]) -> Iterator[dict[str, Any]]:
        for shard in shards:
            for number in range(8):
                if failures and number == failures[0]:
                    failures.pop(0)
                    raise ConnectionError("the Hub does not answer")
                yield {"n": 8 * shard + number}

    dataset = datasets.IterableDataset.from_generator(rows, gen_kwargs={"shards": [0, 1]})
    found = [row for shard in hub_shards("owner/tea", dataset) for row in read(shard, 0, 1, Retries(4, 0.0))]
    assert found == [(number, {"n": 8 * shard + number}) for shard in (0, 1) for number in range(8)]
    assert caplog.text.count("owner/tea, shard 1, row 4: the Hub does not answer; trying again") == 2
    failures += [2] * 6
    with pytest.raises(UserError, match=r"owner/tea, shard 1 cannot be read from row 3 on: .*4 times tried again"):
        list(read(hub_shards("owner/tea", dataset)[0], 0, 1, Retries(4, 0.0)))


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_checkpoint_holds_the_lanes_of_all_processes(tmp_path: Path, tiny_tokenizer: Any) -> None:
    path = folder(tmp_path / "data", [9, 14])
    options: dict[str, Any] = {"batch_size": 2, "buffer_size": 6, "lanes": 4}

    def process(rank: int) -> None:
        store = f"file://{tmp_path}/store"
        torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
        module = stream(path, tiny_tokenizer, rank, 2, **options)
        batches(module, 3)
        (tmp_path / f"{rank}.json").write_text(json.dumps(module.state_dict()["stream"]))
        torch.distributed.destroy_process_group()

    children = [multiprocessing.get_context("fork").Process(target=process, args=(rank,)) for rank in (0, 1)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
        child.kill()
    states = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    alone = stream(path, tiny_tokenizer, **options)
    batches(alone, 6)
    assert states[0] == states[1] == json.loads(json.dumps(alone.state_dict()["stream"]))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_a_file_is_never_in_memory_whole(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    row = json.dumps({"prompt": "p" * 1_000, "chosen": "a", "rejected": "b"})
    with path.open("w") as file:
        if name == "a.json":
            file.write("[" + (row + ",\n") * 9_999 + row + "]")
        elif name == "a.csv":
            file.write("prompt\n" + ("p" * 1_000 + "\n") * 10_000)
        else:
            file.write((row + "\n") * 10_000)
    tracemalloc.start()
    assert sum(1 for _ in open_file(path).read()) == 10_000
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1e6 < path.stat().st_size / 9
