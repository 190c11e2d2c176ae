"""The file of a checkpoint: what goes in comes out, and what is not one is refused with its reason."""

import errno
import hashlib
import json
import math
import os
import pickle
import struct
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from spl.checkpoints import CheckpointError, find, peek, read, write
from spl.disk import sweep
from spl.modules.preference import PreferenceModule
from spl.types import UserError

LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
KEYS = st.integers() | st.text() | st.tuples(st.integers(), st.text())
TREES = st.recursive(
    LEAVES, lambda t: st.lists(t) | st.dictionaries(KEYS, t) | st.lists(t).map(tuple), max_leaves=20
)  # fmt: skip
DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int16,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
]


def same(one: Any, two: Any) -> bool:
    """Equal with their types, NaN among them."""
    if type(one) is not type(two):
        return False
    if isinstance(one, dict):
        return list(one) == list(two) and all(same(one[k], two[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(same, one, two))
    return bool(one == two) or (isinstance(one, float) and math.isnan(one) and math.isnan(two))


@given(TREES)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_tree_comes_back_as_it_was(tmp_path: Path, tree: Any) -> None:
    write(tree, tmp_path / "a.ckpt")
    assert same(read(tmp_path / "a.ckpt"), tree)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_come_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    bits = torch.randint(0, 2, (3, 5), generator=torch.Generator().manual_seed(0)).to(dtype)
    views = [bits, bits.T, bits[1:, 1:], bits[0, 0], bits[:0], torch.nn.Parameter(bits, requires_grad=False)]
    write({"views": views, "dtype": dtype, "one": torch.ones(1)}, tmp_path / "a.ckpt")
    found = read(tmp_path / "a.ckpt")
    assert found["dtype"] is dtype
    for one, two in zip(views, found["views"], strict=True):
        assert (two.dtype, two.shape) == (dtype, one.shape)
        assert torch.equal(one, two)


def test_numbers_that_compare_to_nothing(tmp_path: Path) -> None:
    odd = torch.tensor([math.nan, math.inf, -math.inf, -0.0])
    write({"tensor": odd, "numbers": odd.tolist()}, tmp_path / "a.ckpt")
    found = read(tmp_path / "a.ckpt")
    assert torch.equal(found["tensor"].view(torch.int32), odd.view(torch.int32))
    assert same(found["numbers"], odd.tolist())


def test_a_tied_weight_is_stored_once_and_any_reader_can_open_the_file(tmp_path: Path) -> None:
    weight = torch.randn(100, 100)
    write({"embedding": weight, "head": weight, "half": weight[:50]}, tmp_path / "a.ckpt")
    assert (tmp_path / "a.ckpt").stat().st_size < 1.6 * weight.nbytes
    with safe_open(tmp_path / "a.ckpt", "pt") as file:
        assert file.metadata()["format"] == "spl checkpoint"
        assert torch.equal(file.get_tensor("0"), weight)


def test_what_was_read_is_not_the_file(tmp_path: Path) -> None:
    write(torch.zeros(4096), tmp_path / "a.ckpt")
    read(tmp_path / "a.ckpt").add_(1)
    assert torch.equal(read(tmp_path / "a.ckpt"), torch.zeros(4096))


def test_peeking_tells_all_but_the_tensors(tmp_path: Path) -> None:
    write({"global_step": 7, "weights": [torch.ones(3)]}, tmp_path / "a.ckpt")
    assert peek(tmp_path / "a.ckpt") == {"global_step": 7, "weights": [None]}


@pytest.mark.parametrize(
    ("tree", "place"),
    [
        ({"callbacks": {"Mine": {"seen": {1, 2}}}}, r"\['callbacks'\]\['Mine'\]\['seen'\], which is a builtins.set"),
        ({"a": [1, Path("x")]}, r"\['a'\]\[1\], which is a pathlib"),
        ([torch.ones(2).to_sparse()], r"\[0\], which is a torch.Tensor"),
        (torch.ones(2, device="meta"), "this, which is a torch.Tensor"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_stored_is_named(tmp_path: Path, tree: Any, place: str) -> None:
    with pytest.raises(UserError, match=f"cannot hold {place}"):
        write(tree, tmp_path / "a.ckpt")
    assert not list(tmp_path.iterdir())


def checkpoint(path: Path, step: int) -> bytes:
    write(OrderedDict(global_step=step, weights=torch.full((500,), float(step))), path)
    return path.read_bytes()


def header(metadata: Any) -> bytes:
    text = json.dumps({"__metadata__": metadata}).encode()
    return struct.pack("<Q", len(text)) + text


def refusal(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as raised:
        read(path)
    return str(raised.value)


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = checkpoint(tmp_path / "a.ckpt", 1)
    for length in range(0, len(whole), 7):
        assert f"is not whole: it ends after {length:,} bytes" in refusal(tmp_path / "a.ckpt", whole[:length])
    assert "damaged: 1 bytes follow its end" in refusal(tmp_path / "a.ckpt", whole + b"x")


def test_any_changed_byte_is_found(tmp_path: Path) -> None:
    whole = checkpoint(tmp_path / "a.ckpt", 1)
    for at in range(0, len(whole), 11):
        for flip in (1, 0x80):
            changed = bytearray(whole)
            changed[at] ^= flip
            assert str(tmp_path / "a.ckpt") in refusal(tmp_path / "a.ckpt", bytes(changed))
    changed[-1000] ^= 1
    assert "does not have the SHA-256 that it was written with" in refusal(tmp_path / "a.ckpt", bytes(changed))


class Malice:
    """Makes a file if it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_a_pickle_is_not_opened(tmp_path: Path) -> None:
    trap, path = tmp_path / "trap", tmp_path / "a.ckpt"
    torch.save({"state_dict": Malice(trap)}, path)
    assert "is a pickle, as torch.save writes, which could run any code" in refusal(path, path.read_bytes())
    assert "is a pickle" in refusal(path, pickle.dumps(Malice(trap)))
    assert not trap.exists()
    pickle.loads(path.read_bytes())
    assert trap.exists()


def test_foreign_and_newer_files_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    assert "is no checkpoint of spl" in refusal(path, b"\x89HDF\r\n\x1a\n" + bytes(100))
    assert "is no checkpoint of spl" in refusal(path, header({"format": "pt"}))
    newer = header({"format": "spl checkpoint", "version": "2", "structure": "{}"})
    assert "has version 2 of the format, but this spl reads 1: update spl" in refusal(path, newer)
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        read(tmp_path / "b.ckpt")
    with pytest.raises(CheckpointError, match="cannot be read: Is a directory"):
        read(tmp_path)


@pytest.mark.parametrize(
    "structure",
    ["", "[" * 100_000, "9" * 5_000, '{"dict": 1}', '{"dict": [[[], 1]]}', '{"a": 1}', '{"tensor": 3}',
     '{"dtype": "load"}', '{"dtype": 1}', "{}", '{"dict": [[1]]}'],
    ids=lambda text: text[:20],
)  # fmt: skip
def test_a_header_of_nonsense_is_refused(tmp_path: Path, structure: str) -> None:
    write(None, tmp_path / "a.ckpt")
    whole = (tmp_path / "a.ckpt").read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    entries = json.loads(whole[8 : 8 + length])
    entries["__metadata__"]["structure"] = structure
    text = json.dumps(entries).encode()
    body = struct.pack("<Q", len(text)) + text
    said = refusal(tmp_path / "a.ckpt", body + hashlib.sha256(body).digest())
    assert "its header tells of no tree" in said


def test_the_newest_good_one_beside_it_is_offered(tmp_path: Path) -> None:
    for step in (100, 200, 300, 400):
        checkpoint(tmp_path / f"step={step}.ckpt", step)
    (tmp_path / "last.ckpt").symlink_to("step=400.ckpt")
    assert [step for step, _ in find(tmp_path)] == [400, 300, 200, 100]
    for step in (300, 400):
        content = bytearray((tmp_path / f"step={step}.ckpt").read_bytes())
        content[-100] ^= 1
        (tmp_path / f"step={step}.ckpt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"step=200.ckpt \(step 200\) is good: give that, or --resume"):
        read(tmp_path / "last.ckpt")
    (tmp_path / "step=100.ckpt").write_bytes(b"")
    assert [step for step, _ in find(tmp_path)] == [400, 300, 200]


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = checkpoint(tmp_path / "a.ckpt", 1)

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write(torch.ones(3), tmp_path / "a.ckpt")
    assert [path.name for path in tmp_path.iterdir()] == ["a.ckpt"]
    assert (tmp_path / "a.ckpt").read_bytes() == before


def test_what_killed_writers_leave_is_swept(tmp_path: Path) -> None:
    checkpoint(tmp_path / "a.ckpt", 1)
    (tmp_path / ".writing-0-b.ckpt").write_bytes(b"part")
    (tmp_path / ".writing-0-c.ckpt").mkdir()
    (tmp_path / ".writing-0-c.ckpt" / "rank").write_bytes(b"part")
    sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a.ckpt"]


def test_a_module_is_loaded_from_either_kind_of_file(tmp_path: Path) -> None:
    module = PreferenceModule("tiny", lora_rank=4, alpha=0.5)
    module.configure_model()
    for weight in module.parameters():
        weight.data.add_(0.5 * weight.requires_grad)
    saved: dict[str, Any] = {"state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams)}
    module._trainer = type("T", (), {"datamodule": None, "global_step": 1, "current_epoch": 0})()  # type: ignore
    module.on_save_checkpoint(saved)
    write(saved, tmp_path / "ours.ckpt")
    torch.save(saved | {"pytorch-lightning_version": "2.6.6"}, tmp_path / "theirs.ckpt")
    for name in ("ours", "theirs"):
        again = PreferenceModule.load_from_checkpoint(tmp_path / f"{name}.ckpt", beta=0.2)
        assert (again.hparams["alpha"], again.hparams["beta"], again.untrained) == (0.5, 0.2, False)
        assert all(map(torch.equal, module.state_dict().values(), again.state_dict().values()))
