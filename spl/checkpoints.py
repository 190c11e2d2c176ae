"""Checkpoints: one safetensors file each, written whole or not at all, verified when read, never unpickled.

Tensors lie in the file under numbers. Its header's metadata hold the tree they belong to, as JSON: numbers, strings and
lists stand for themselves, all else is an object with one key, its kind ("dict", "tuple", "tensor", "dtype"). The last
tensor is the SHA-256 of all bytes before it, header included.
"""

import hashlib
import json
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from safetensors import SafetensorError, safe_open
from torch import Tensor

from spl.disk import replacing
from spl.types import UserError

FORMAT = "spl checkpoint"
VERSION = 1
_DIGEST = "sha256"
_MOST_HEADER = 100_000_000  # bytes; safetensors' own limit
_KINDS = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.uint16: "U16", torch.int16: "I16",
    torch.uint32: "U32", torch.int32: "I32", torch.uint64: "U64", torch.int64: "I64", torch.float16: "F16",
    torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64", torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
"""safetensors' names of dtypes."""
_FOREIGN = "is no checkpoint of spl: expected a file that a run saved in its checkpoints/"
_PICKLE = (
    "is a pickle, as torch.save writes, which could run any code, so it is not opened: expected one that spl saved"
)


class Sharded:
    """A tensor that lies in slices with several processes, and is gathered when it is its turn to be written.

    Args:
        like: gives shape and dtype; may hold no numbers.
        gather: the whole tensor.
    """

    def __init__(self, like: Tensor, gather: Callable[[], Tensor]) -> None:
        self.shape, self.dtype, self.itemsize = like.shape, like.dtype, like.itemsize
        self.nbytes = like.numel() * like.itemsize
        self.gather = gather


class Stored(NamedTuple):
    """A tensor in a checkpoint that is not read yet."""

    path: Path
    name: str

    @property
    def shape(self) -> torch.Size:
        with safe_open(self.path, "pt") as file:
            return torch.Size(file.get_slice(self.name).get_shape())

    def read(self, rows: slice | None = None) -> Tensor:
        """All of it, or some of its rows; its own memory, or an optimiser would work on pages of the file."""
        with safe_open(self.path, "pt") as file:
            tensor: Tensor = file.get_tensor(self.name) if rows is None else file.get_slice(self.name)[rows]
            return tensor.clone()


class CheckpointError(UserError):
    """A file cannot be taken for a checkpoint; the text says why, and names a good one beside it if there is one."""


def write(tree: Any, path: Path) -> None:
    """Store a tree of dicts, lists, tuples, numbers, strings, None, dtypes and tensors; see `replacing`.

    A subclass of these comes back as what it is a subclass of, a tensor on the CPU, and a tensor that stands in several
    places lies in the file once.

    Raises:
        UserError: something of another kind is in the tree; names its place.
        OSError: it cannot be written; a file that was there before is untouched.
    """
    tensors: list[Tensor | Sharded] = []
    structure = json.dumps(_encode(tree, "", tensors, {}))
    # Wide numbers first, so that each lies at a multiple of its size.
    order = sorted(range(len(tensors)), key=lambda k: -tensors[k].itemsize)
    header = _header(structure, {str(k): tensors[k] for k in order})
    digest = hashlib.sha256()
    with replacing(path) as file:
        parts: Iterator[bytes | memoryview] = chain([header], (_bytes(tensors[k]) for k in order))
        for part in parts:
            digest.update(part)
            file.write(part)
        file.write(digest.digest())


def read(path: Path) -> Any:
    """The tree that `write` stored, verified.

    Raises:
        CheckpointError: the file is damaged, not whole, foreign, of a newer version or cannot be read.
    """
    with _offering(path):
        return _read(path)


def open_tree(path: Path, verified: bool = True) -> Any:
    """The tree with a Stored for each tensor, which stays in the file.

    Args:
        path: the checkpoint.
        verified: read its every byte first; false where another process does.

    Raises:
        CheckpointError: as `read` does.
    """
    with _offering(path):
        if verified:
            verify(path)
        return _decode_all(path, lambda number: Stored(path, str(number)))


def verify(path: Path) -> None:
    """Read a checkpoint's every byte.

    Raises:
        CheckpointError: as `read` does.
    """
    _structure(path)
    digest, left = hashlib.sha256(), path.stat().st_size - 32
    try:
        with path.open("rb") as file:
            while left > 0 and (part := file.read(min(left, 1 << 20))):
                digest.update(part)
                left -= len(part)
            intact = file.read() == digest.digest()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from None
    if not intact:
        raise CheckpointError(f"{path} is damaged: its content does not have the SHA-256 that it was written with.")


def peek(path: Path) -> Any:
    """The tree without its tensors, each of which is None; only the header is read, and nothing verified.

    Raises:
        CheckpointError: the file is not whole, foreign, of a newer version or cannot be read.
    """
    return _decode_all(path, lambda number: None)


def find(folder: Path) -> list[tuple[int, Path]]:
    """(step, checkpoint) of a folder's checkpoints, newest first, as far as their headers tell; no verification."""
    found = []
    for path in folder.glob("*.ckpt"):
        try:
            found += [] if path.is_symlink() else [(int(peek(path)["global_step"]), path)]
        except (CheckpointError, LookupError, TypeError, ValueError):
            continue
    return sorted(found, key=lambda entry: (entry[0], entry[1].name), reverse=True)


class CheckpointFile(CheckpointIO):
    """Has a Trainer keep its checkpoints in this format: `Trainer(plugins=[CheckpointFile()])`."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        write(checkpoint, Path(path))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> Any:
        return read(Path(path))

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)


def _header(structure: str, tensors: Mapping[str, Tensor | Sharded]) -> bytes:
    """What stands before the tensors in a safetensors file: the length of a JSON object, and the object."""
    metadata = {"format": FORMAT, "version": str(VERSION), "structure": structure}
    end, header = 0, dict[str, Any](__metadata__=metadata)
    for name, tensor in tensors.items():
        offsets = [end, end := end + tensor.nbytes]
        header[name] = {"dtype": _KINDS[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
    header[_DIGEST] = {"dtype": "U8", "shape": [32], "data_offsets": [end, end + 32]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _encode(value: Any, where: str, tensors: list[Tensor | Sharded], seen: dict[Any, int]) -> Any:
    """JSON of a tree; appends its tensors, each ready to be written."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {"dict": [[_encode(k, where, tensors, seen), _encode(v, f"{where}[{k!r}]", tensors, seen)]
                         for k, v in value.items()]}  # fmt: skip
    if isinstance(value, list | tuple):
        items = [_encode(v, f"{where}[{k}]", tensors, seen) for k, v in enumerate(value)]
        return items if isinstance(value, list) else {"tuple": items}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, Sharded):
        tensors.append(value)
        return {"tensor": len(tensors) - 1}
    if _is_plain(value):
        # A tied weight has two names. Its storage's address tells it from what only looks alike.
        key = (value.data_ptr(), value.shape, value.stride(), value.dtype, value.device)
        if key not in seen or not value.numel():
            seen[key] = len(tensors)
            tensors.append(value.detach())
        return {"tensor": seen[key]}
    raise UserError(
        f"a checkpoint cannot hold {where or 'this'}, which is a {type(value).__module__}.{type(value).__qualname__}: "
        "keep numbers, strings, lists, dicts and whole tensors in what state_dict() returns."
    )


def _is_plain(value: Any) -> bool:
    """A tensor with its own numbers, of a kind that safetensors knows; no shard, and no other subclass."""
    plain = type(value) in (Tensor, torch.nn.Parameter) and value.layout == torch.strided
    return plain and not value.is_meta and value.dtype in _KINDS


def _bytes(tensor: Tensor | Sharded) -> memoryview:
    """A tensor's content, of which no copy is made if it lies on the CPU in one piece."""
    tensor = tensor.gather() if isinstance(tensor, Sharded) else tensor
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _decode_all(path: Path, tensor: Callable[[int], Any]) -> Any:
    """The tree, with what `tensor` gives for the number of each."""
    try:
        return _decode(json.loads(_structure(path)), tensor)
    except (LookupError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: its header tells of no tree ({error}).") from None


def _decode(value: Any, tensor: Callable[[int], Any]) -> Any:
    if isinstance(value, list):
        return [_decode(v, tensor) for v in value]
    if not isinstance(value, dict):
        return value
    [(kind, content)] = value.items()
    if kind == "dict":
        return {_decode(k, tensor): _decode(v, tensor) for k, v in content}
    if kind == "tuple":
        return tuple(_decode(v, tensor) for v in content)
    if kind == "tensor":
        return tensor(content)
    if kind == "dtype" and isinstance(dtype := getattr(torch, content), torch.dtype):
        return dtype
    raise ValueError(f"unknown kind {kind!r}")


def _read(path: Path) -> Any:
    verify(path)
    try:
        with safe_open(path, "pt") as file:  # checks that the tensors fill the file
            # Clones, or an optimiser would work on pages of the file.
            tensors = {int(name): file.get_tensor(name).clone() for name in file.keys() if name != _DIGEST}  # noqa: SIM118
    except (SafetensorError, ValueError, OSError) as error:
        raise CheckpointError(f"{path} is damaged: {error}.") from None
    return _decode_all(path, tensors.__getitem__)


def _structure(path: Path) -> str:
    """The JSON of a checkpoint's tree."""
    metadata = _metadata(path)
    if metadata.get("format") != FORMAT:
        raise CheckpointError(f"{path} {_FOREIGN}.")
    version, structure = metadata.get("version"), metadata.get("structure")
    if version != str(VERSION) or not isinstance(structure, str):
        raise CheckpointError(f"{path} has version {version} of the format, but this spl reads {VERSION}: update spl.")
    return structure


def _metadata(path: Path) -> dict[str, Any]:
    """The metadata of a safetensors file that is as long as its header says; empty where it has none."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(9)
            length = struct.unpack("<Q", start[:8])[0] if len(start) == 9 else 0
            text = file.read(length - 1) if 0 < length <= min(size - 8, _MOST_HEADER) else b""
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from None
    if start[8:] not in (b"{", b""):
        pickle = start.startswith((b"PK", b"\x80"))
        raise CheckpointError(f"{path} {_PICKLE if pickle else _FOREIGN}.")
    tensors, metadata = _parse(start[8:] + text)
    if tensors is None or size < (end := 8 + length + tensors):
        raise CheckpointError(f"{path} is not whole: it ends after {size:,} bytes.")
    if size > end:
        raise CheckpointError(f"{path} is damaged: {size - end:,} bytes follow its end.")
    return metadata


def _parse(header: bytes) -> tuple[int | None, dict[str, Any]]:
    """(bytes of all tensors, metadata) of a header; None where it is not whole."""
    try:
        entries = json.loads(header)
        metadata = entries.pop("__metadata__", {})
        end = max((int(entry["data_offsets"][1]) for entry in entries.values()), default=0)
    except (LookupError, ValueError, TypeError, AttributeError, RecursionError, OverflowError):
        return None, {}
    return end, metadata if isinstance(metadata, dict) else {}


@contextmanager
def _offering(path: Path) -> Iterator[None]:
    """A refusal of a checkpoint names a good one."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{error}{_offer(path)}") from None


def _offer(path: Path) -> str:
    """Names the newest good checkpoint beside one that is refused."""
    for step, other in find(path.parent):
        try:
            if not path.exists() or not other.samefile(path):
                verify(other)
                return f" {other} (step {step:,}) is good: give that, or --resume, which takes the newest good one."
        except (CheckpointError, OSError):
            continue
    return ""
