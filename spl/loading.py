"""A model's weights read straight into shards: no process ever holds the whole model.

The model is made without memory for its parameters, gets its adapters, and is sharded; then each process reads its own
rows of every tensor from the safetensors files, one after the other. `spl/models.py` loads whole models, which is what
this must equal.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.utils.hub import cached_file

_FILE, _INDEX = "model.safetensors", "model.safetensors.index.json"


class WholeOnlyError(Exception):
    """A model that cannot be read piece by piece, and why."""


class _Slot(NamedTuple):
    """Where a tensor of the files goes: a parameter or buffer, by the modules that hold it (several where tied)."""

    name: str  # in the files
    places: tuple[tuple[nn.Module, str], ...]

    @property
    def tensor(self) -> Tensor:
        module, leaf = self.places[0]
        tensor: Tensor = getattr(module, leaf)
        return tensor

    def fill(self, parameter: nn.Parameter) -> None:
        for module, leaf in self.places:
            setattr(module, leaf, parameter)


class SlicedWeights:
    """An empty model, and the files that its weights lie in.

    Args:
        name: a Hub id or a local folder.
        dtype: of the weights.
        revision: of the model on the Hub.

    Raises:
        WholeOnlyError: the files do not hold the model's tensors one by one, under the model's names.
    """

    def __init__(self, name: str, dtype: torch.dtype, revision: str | None = None) -> None:
        self.files = _tensor_files(name, revision)
        self.model = _empty_model(name, dtype, revision)
        if dtype != torch.float32 and getattr(self.model, "_keep_in_fp32_modules_strict", None):
            raise WholeOnlyError("some of its weights stay in float32")
        self.slots = list(_slots(self.model, self.files))
        with ExitStack() as opened:
            files = {path: opened.enter_context(safe_open(path, "pt")) for path in set(self.files.values())}
            for slot in self.slots:
                shape = tuple(files[self.files[slot.name]].get_slice(slot.name).get_shape())
                if shape != tuple(slot.tensor.shape):
                    raise WholeOnlyError(f"{slot.name} has the shape {list(shape)} in its files")

        # Numbers that all are one in memory: adapters go to the device of the weights they stand beside, and would be
        # lost on the meta device.
        self._replace(lambda empty: torch.zeros((), dtype=empty.dtype).expand(empty.shape))

    def release(self) -> None:
        """Let the model be sharded, its adapters made: its parameters are on the meta device from now on."""
        self._replace(lambda held: torch.empty_like(held, device="meta", memory_format=torch.contiguous_format))

    def _replace(self, by: Callable[[Tensor], Tensor]) -> None:
        for slot in self.slots:
            if isinstance(slot.tensor, nn.Parameter):
                slot.fill(nn.Parameter(by(slot.tensor.data), requires_grad=slot.tensor.requires_grad))

    def read(self, device: torch.device) -> None:
        """Fill the sharded model, each process reading its own rows."""
        held = set(self.model.modules())
        for slot in self.slots:
            if held.isdisjoint(module for module, _ in slot.places):
                continue  # another head took its place
            # Opened anew for each, since pages of a mapped file that were read count as memory until it is closed.
            with safe_open(self.files[slot.name], "pt") as file:
                rows = file.get_slice(slot.name)
                if isinstance(slot.tensor, nn.Parameter):
                    slot.fill(_read_parameter(slot.tensor, rows, device))
                else:
                    slot.tensor.copy_(rows[...])


def own_rows(size: int, rank: int, world: int) -> slice:
    """Which rows of `size` a rank holds of a tensor that is sharded along its first dimension."""
    each = -(-size // world)
    return slice(min(rank * each, size), min((rank + 1) * each, size))


def _read_parameter(empty: Tensor, rows: Any, device: torch.device) -> nn.Parameter:
    if not isinstance(empty, DTensor):  # not sharded: no group took it
        whole = rows[...].to(device=device, dtype=empty.dtype, copy=True)
        return nn.Parameter(whole, requires_grad=empty.requires_grad)
    local = rows[own_rows(empty.shape[0], empty.device_mesh.get_local_rank(), empty.device_mesh.size())]
    # A copy, not a view of the mapped file.
    sharded = sharded_like(empty, local.to(device=device, dtype=empty.dtype, copy=True))
    return nn.Parameter(sharded, requires_grad=empty.requires_grad)


def sharded_like(like: DTensor, rows: Tensor) -> DTensor:
    """A sharded tensor as `like` is one, of the rows that this process holds."""
    return DTensor.from_local(
        rows, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def _tensor_files(name: str, revision: str | None) -> dict[str, Path]:
    """The file of every tensor of a model by its name there."""
    if not (found := _file(name, _INDEX, revision)):
        if not (found := _file(name, _FILE, revision)):
            raise WholeOnlyError(f"it has no file {_FILE}")
        with safe_open(found, "pt") as file:
            return dict.fromkeys(file.keys(), found)
    parts = json.loads(found.read_text())["weight_map"]
    paths = {part: _file(name, part, revision) for part in sorted(set(parts.values()))}
    if missing := [part for part, path in paths.items() if path is None]:
        raise WholeOnlyError(f"its file {missing[0]} is missing")
    return {tensor: path for tensor, part in parts.items() if (path := paths[part])}


def _file(name: str, file: str, revision: str | None) -> Path | None:
    try:
        path = cached_file(name, file, revision=revision, _raise_exceptions_for_missing_entries=False)
    except OSError as error:  # whatever loads the whole model says it better
        raise WholeOnlyError(str(error).split("\n")[0]) from error
    return Path(path) if path else None


def _empty_model(name: str, dtype: torch.dtype, revision: str | None) -> Any:
    """The model with parameters on the meta device; its buffers, such as rotary frequencies, are real."""
    try:
        config = AutoConfig.from_pretrained(name, revision=revision)
    except (OSError, ValueError) as error:
        raise WholeOnlyError(str(error).split("\n")[0]) from error
    if getattr(config, "quantization_config", None):
        raise WholeOnlyError("its weights are quantised")
    with init_empty_weights(include_buffers=False):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    model.tie_weights()
    with suppress(OSError):  # it has no file of these, and those of its config stay
        model.generation_config = GenerationConfig.from_pretrained(name, revision=revision or "main")
    return model


def _slots(model: nn.Module, files: dict[str, Path]) -> Iterator[_Slot]:
    """Every tensor of the model's state dict, and where it goes; a tied one must stand in the files once."""
    kept = set(model.state_dict())
    named: dict[int, list[str]] = {}
    for name, tensor in (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ):
        if name in kept:
            named.setdefault(id(tensor), []).append(name)
    for names in named.values():
        present = [name for name in names if name in files]
        if len(present) != 1:
            said = "stands more than once" if present else "is not"
            raise WholeOnlyError(f"{names[0]} {said} in its files, or under another name")
        yield _Slot(present[0], tuple(_place(model, name) for name in names))


def _place(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    owner, _, leaf = name.rpartition(".")
    return model.get_submodule(owner), leaf
