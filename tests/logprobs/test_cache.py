"""The cache of log-probabilities: its files read without it, and its writers stopped, raced and contradicted."""

import math
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from spl.logprobs.cache import LogpCache
from spl.types import UserError


def keys(*numbers: int) -> list[bytes]:
    return [number.to_bytes(16, "big") for number in numbers]


def bits(numbers: list[float] | None) -> list[bytes]:
    """float32 numbers as bytes, so that -0.0 is not 0.0 and not a number is itself."""
    return [struct.pack("<f", number) for number in numbers or []]


def opened(folder: Path) -> LogpCache:
    return LogpCache(folder, "weights", "float32")


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_numbers_come_back_bit_for_bit(tmp_path: Path) -> None:
    drawn = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 300
    odd = torch.tensor([0.0, -0.0, 1e-45, -1e-38, -3.4e38, 16777217.0, -1 / 3])
    numbers = torch.cat([drawn, odd]).tolist()
    names = keys(*range(len(numbers)))
    first = opened(tmp_path)
    first.add(names, numbers)
    assert bits(first.get(names)) == bits(numbers)
    first.write()
    second = opened(tmp_path)
    assert len(second) == len(numbers)
    assert bits(second.get(names[::-1])) == bits(numbers[::-1])
    (file,) = files(tmp_path)
    tensors = load_file(file)
    assert tensors["keys"].dtype == torch.uint8
    assert [bytes(row.tolist()) for row in tensors["keys"]] == names
    assert tensors["logps"].dtype == torch.float32
    assert bits(tensors["logps"].tolist()) == bits(numbers)


def test_one_that_is_not_known_makes_none(tmp_path: Path) -> None:
    cache = opened(tmp_path)
    cache.add(keys(1, 2), [-1.0, -2.0])
    assert cache.get(keys(2, 1, 2)) == [-2.0, -1.0, -2.0]
    assert cache.get(keys(1, 3)) is None
    assert cache.get([]) == []


def test_a_number_that_stands_is_never_changed(tmp_path: Path) -> None:
    first = opened(tmp_path)
    first.add(keys(1, 1), [-1.0, -5.0])
    first.write()
    second = opened(tmp_path)
    second.add(keys(1, 2), [-9.0, -2.0])
    for cache in (second, opened(tmp_path)):
        assert cache.get(keys(1)) == [-1.0]
    second.write()
    assert opened(tmp_path).get(keys(1, 2)) == [-1.0, -2.0]


def test_two_writers_are_both_read(tmp_path: Path) -> None:
    first, second = opened(tmp_path), opened(tmp_path)
    first.add(keys(1, 2), [-1.0, -2.0])
    second.add(keys(2, 3), [-2.5, -3.0])
    for cache in (first, second, first):
        cache.write()
    assert len(files(tmp_path)) == 2
    third = opened(tmp_path)
    assert third.get(keys(1, 3)) == [-1.0, -3.0]
    assert third.get(keys(2)) in ([-2.0], [-2.5])
    # Whoever wrote goes on with what it saw.
    assert (first.get(keys(2)), second.get(keys(2))) == ([-2.0], [-2.5])


WRITER = """
import sys
from pathlib import Path
from spl.logprobs.cache import LogpCache
cache = LogpCache(Path(sys.argv[1]), "weights", "float32")
for number in range(int(sys.argv[2]), int(sys.argv[2]) + 40):
    cache.add([number.to_bytes(16, "big")], [-float(number)])
    cache.write()
"""


def test_processes_write_while_another_reads(tmp_path: Path) -> None:
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), str(start)]) for start in (0, 100)]
    grown = [len(opened(tmp_path))]
    while any(writer.poll() is None for writer in writers):
        grown.append(len(opened(tmp_path)))  # never half a file
    assert [writer.returncode for writer in writers] == [0, 0]
    assert grown == sorted(grown)
    both = [*range(40), *range(100, 140)]
    assert opened(tmp_path).get(keys(*both)) == [-float(number) for number in both]
    assert [path.suffix for path in files(tmp_path)] == [".safetensors"] * 2


def test_what_is_not_finite_is_used_and_not_kept(tmp_path: Path) -> None:
    cache = opened(tmp_path)
    counted = cache.add(keys(1, 2, 3), [-1.0, math.nan, -math.inf])
    assert counted[0] == -1.0 and math.isnan(counted[1]) and counted[2] == -math.inf
    assert cache.get(keys(1)) == [-1.0]
    assert cache.get(keys(2)) is cache.get(keys(3)) is None


def test_of_two_numbers_the_owner_s_counts_or_else_the_older(tmp_path: Path) -> None:
    caches = {owner: LogpCache(tmp_path, "weights", "float32", owner) for owner in ("a", "b", "c")}
    for number, owner in enumerate("bac"):
        caches[owner].add(keys(1), [-float(number)])
        caches[owner].write()
        caches[owner] = LogpCache(tmp_path, "weights", "float32", owner)
        caches[owner].add(keys(10 + number), [-5.0])
        caches[owner].write()
    found = {owner: LogpCache(tmp_path, "weights", "float32", owner).get(keys(1)) for owner in "abc"}
    assert found == {"b": [0.0], "a": [-1.0], "c": [-2.0]}


def test_refreshing_reads_what_others_wrote_and_changes_nothing(tmp_path: Path) -> None:
    ours, theirs = LogpCache(tmp_path, "w", "float32", "a"), LogpCache(tmp_path, "w", "float32", "b")
    ours.add(keys(1), [-1.0])
    theirs.add(keys(1, 2), [-7.0, -2.0])
    theirs.write()
    assert ours.get(keys(2)) is None
    ours.refresh()
    assert ours.get(keys(1, 2)) == [-1.0, -2.0]


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"the reference cache .*file must be a folder"):
        LogpCache(tmp_path / "file", "w", "float32")


def test_nothing_new_writes_nothing(tmp_path: Path) -> None:
    cache = opened(tmp_path)
    cache.write()
    assert files(tmp_path) == []
    cache.add(keys(1), [-1.0])
    cache.write()
    (file,) = files(tmp_path)
    file.unlink()
    cache.add(keys(1), [-2.0])
    cache.write()
    assert files(tmp_path) == []
    again = opened(tmp_path)
    again.add(keys(2), [-2.0])
    again.write()
    assert len(files(tmp_path)) == 1


def test_a_kill_in_writing_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = opened(tmp_path)
    cache.add(keys(1), [-1.0])
    cache.write()
    cache.add(keys(2), [-2.0])
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", lambda self, target: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            cache.write()
    other = opened(tmp_path)
    assert (other.get(keys(1)), other.get(keys(2))) == ([-1.0], None)
    cache.write()
    assert opened(tmp_path).get(keys(1, 2)) == [-1.0, -2.0]
    assert [path.suffix for path in files(tmp_path)] == [".safetensors"]


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "other"])
def test_a_damaged_file_is_named(tmp_path: Path, damage: str) -> None:
    cache = opened(tmp_path)
    cache.add(keys(1, 2), [-1.0, -2.0])
    cache.write()
    (file,) = files(tmp_path)
    if damage == "other":
        save_file({"keys": torch.zeros(1, 16, dtype=torch.uint8)}, file)
    else:
        file.write_bytes({"cut": file.read_bytes()[:-3], "empty": b"", "text": b"not tensors at all"}[damage])
    with pytest.raises(UserError, match=r"is damaged .*: delete it\.$") as raised:
        opened(tmp_path)
    assert str(file) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_models_and_number_formats_lie_apart(tmp_path: Path) -> None:
    for number, (weights, dtype) in enumerate([("a", "float32"), ("a", "bfloat16"), ("b", "float32")]):
        cache = LogpCache(tmp_path, weights, dtype)
        assert cache.get(keys(1)) is None
        cache.add(keys(1), [-float(number)])
        cache.write()
    assert {path.name for path in tmp_path.iterdir()} == {"a-float32", "a-bfloat16", "b-float32"}
    assert LogpCache(tmp_path, "a", "bfloat16").get(keys(1)) == [-1.0]
