"""A policy sharded over processes by PyTorch's FSDP2: weights, gradients and AdamW's moments, each a slice a process.

Every decoder layer is a group that is gathered when it runs and let go after it; embeddings, last norm and head are the
root's group, gathered for a whole forward pass. The numbers are those of one process that takes the whole batch.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from spl.checkpoints import CheckpointError, CheckpointFile, Sharded, Stored, open_tree
from spl.loading import SlicedWeights, WholeOnlyError, own_rows, sharded_like
from spl.logprobs.score import as_forward
from spl.models import Dtype, load_policy, whole
from spl.modules.layers import decoder_layers

T = TypeVar("T")

log = logging.getLogger(__name__)


class ShardedStrategy(ModelParallelStrategy):
    """FSDP2 over all processes of all nodes.

    Args:
        cpu_offload: keep weights, gradients and AdamW's moments in the CPU's memory, where the optimiser then steps;
            each layer's weights visit the GPU when it runs.
        reshard_after_forward: let a layer's weights go after its forward pass and gather them again for the backward
            pass; false keeps them in between, which takes the memory of the whole model and saves a third of the
            traffic.
        reduce_every_micro_batch: add the processes' gradients up at every micro-batch of an optimiser step. Once a step
            is less traffic, but until then each process holds the gradient of all that trains, not its slice of it.
    """

    def __init__(
        self, cpu_offload: bool = False, reshard_after_forward: bool = True, reduce_every_micro_batch: bool = False
    ) -> None:
        super().__init__()
        self.cpu_offload = cpu_offload
        self.reshard_after_forward = reshard_after_forward
        self.reduce_every_micro_batch = reduce_every_micro_batch

    def setup_environment(self) -> None:
        # Lightning's own default shards within a node only, and not at all on one.
        self._data_parallel_size = self.num_nodes * self.num_processes
        self._tensor_parallel_size = 1
        if self.cpu_offload and self.root_device.type == "cuda":
            self._process_group_backend = "cpu:gloo,cuda:nccl"  # norms of gradients are summed where these lie
        self._checkpoint_io = self._checkpoint_io or CheckpointFile()
        super().setup_environment()

    def load_policy(self, name: str, *, dtype: Dtype, revision: str | None, **options: Any) -> nn.Module:
        """`spl.models.load_policy`, sharded, each process reading its own slice of the weights where that can be."""
        weights = self._sliced(name, dtype, revision, options["trust_remote_code"])
        model = None if weights is None else weights.model
        policy = load_policy(name, model=model, dtype=dtype, revision=revision, **options)
        if weights is not None:
            weights.release()
        self._shard(policy)
        if weights is not None:
            weights.read(torch.device("cpu") if self.cpu_offload else self.root_device)
        # A first pass, which does nothing: FSDP2 settles in it the dtype of gradients, by what trains at the time, and
        # with adapters off, as a reference runs, nothing would.
        as_forward(policy, lambda: None)
        return policy

    def _sliced(self, name: str, dtype: Dtype, revision: str | None, trusted: str | None) -> SlicedWeights | None:
        """The model's weights in their files; None where they cannot be read piece by piece."""
        try:
            if trusted:
                raise WholeOnlyError("it runs code of its own")
            return SlicedWeights(name, getattr(torch, dtype), revision)
        except WholeOnlyError as reason:
            log.info("Every process loads the whole of %s before it is sharded: %s.", name, reason)
            return None

    def _shard(self, policy: nn.Module) -> None:
        options: dict[str, Any] = {
            "mesh": self.device_mesh["data_parallel"],
            "reshard_after_forward": self.reshard_after_forward,
            "offload_policy": CPUOffloadPolicy(torch.cuda.is_available()) if self.cpu_offload else OffloadPolicy(),
        }
        mixed = self.precision_plugin.precision == "bf16-mixed"
        low = mixed or any(p.dtype == torch.bfloat16 for p in policy.parameters())
        reduced = torch.float32 if low else None
        layers = MixedPrecisionPolicy(torch.bfloat16 if mixed else None, reduced, cast_forward_inputs=False)
        for layer in decoder_layers(policy):
            fully_shard(layer, mp_policy=layers, **options)
        # The head's sums and the embeddings that layers add to stay in the weights' own precision.
        fully_shard(policy, mp_policy=MixedPrecisionPolicy(None, reduced, cast_forward_inputs=False), **options)
        _let_run_as_forward(policy)

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Within an optimiser step's micro-batches but the last."""
        policy: Any = self.lightning_module.policy  # type: ignore[union-attr]
        policy.set_requires_gradient_sync(self.reduce_every_micro_batch)
        try:
            yield
        finally:
            policy.set_requires_gradient_sync(True)

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """In slices; see `save_checkpoint`."""
        assert self.lightning_module is not None
        return self.lightning_module.state_dict()

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """In slices, under the numbers that one process gives its parameters; see `save_checkpoint`."""
        state: dict[str, Any] = getattr(optimizer, "_optimizer", optimizer).state_dict()
        return state

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """The checkpoint of one process: the first process writes it, gathering tensor after tensor.

        So any number of processes goes on from it, and no process ever holds the whole.

        Raises:
            OSError: the first process could not write it; in all of them.
        """
        shards: list[DTensor] = []
        tree = _replaced(checkpoint, DTensor, lambda tensor: self._listed(tensor, shards))
        error: Exception | None = None
        if self.is_global_zero:
            try:
                self.checkpoint_io.save_checkpoint(tree, filepath)
            except Exception as failure:
                error = failure
            finally:
                self.broadcast(-1)
        else:
            while (number := self.broadcast(-1)) >= 0:
                whole(shards[number])
        if error := self.broadcast(error):
            raise error

    def _listed(self, tensor: DTensor, shards: list[DTensor]) -> Sharded:
        """A shard that the first process can ask the others for by its number."""
        number = len(shards)
        shards.append(tensor)

        def gather() -> Tensor:
            self.broadcast(number)
            return whole(tensor)

        return Sharded(tensor, gather)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """What is no weight and no moment of one; these are read slice by slice where they are asked for.

        Raises:
            CheckpointError: the file is damaged or foreign; in all processes.
        """
        path, error, tree = Path(checkpoint_path), None, dict[str, Any]()
        if self.is_global_zero:
            try:
                tree = open_tree(path)
            except CheckpointError as failure:
                error = failure
        if error := self.broadcast(error):
            raise error
        tree = tree or open_tree(path, verified=False)
        lazy = ("state_dict", "optimizer_states")
        return {k: v if k in lazy else _replaced(v, Stored, Stored.read) for k, v in tree.items()}

    @torch.no_grad()
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        own = self.lightning_module.state_dict()
        for name, stored in checkpoint["state_dict"].items():
            own[name].copy_(_taken(stored, own[name]))

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            moments = {
                number: {name: _taken(value, parameters[number]) for name, value in values.items()}
                for number, values in state["state"].items()
            }
            optimizer.load_state_dict({**state, "state": moments})

    def model_to_device(self) -> None:
        """Moves what is not sharded; an offloaded policy stays where it is."""
        module: Any = self.lightning_module
        policy = module._modules.pop("policy") if self.cpu_offload else None
        super().model_to_device()
        if policy is not None:
            module._modules["policy"] = policy


def _replaced(tree: Any, kind: type, by: Callable[[Any], Any]) -> Any:
    """The tree with its leaves of a kind replaced."""
    if isinstance(tree, kind):
        return by(tree)
    if isinstance(tree, dict):
        return {key: _replaced(value, kind, by) for key, value in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(_replaced(value, kind, by) for value in tree)
    return tree


def _taken(stored: Any, like: Tensor) -> Any:
    """A number or tensor of a checkpoint; in slices where it is as large as the weight it belongs to, which is."""
    if not isinstance(stored, Stored):
        return stored
    if not isinstance(like, DTensor) or stored.shape != like.shape:
        return stored.read()
    rows = own_rows(like.shape[0], like.device_mesh.get_local_rank(), like.device_mesh.size())
    return sharded_like(like, stored.read(rows).to(like.to_local().device))


def _let_run_as_forward(policy: Any) -> None:
    """Give a sharded policy the method that `spl.logprobs.score.as_forward` looks for."""

    def run(compute: Callable[[], T]) -> T:
        return compute()

    policy.run_as_forward = run
    register_fsdp_forward_method(policy, "run_as_forward")
    run_in_hooks = policy.run_as_forward

    def run_or_reset(compute: Callable[[], T]) -> T:
        try:
            result: T = run_in_hooks(compute)
        except Exception:
            if hasattr(policy, "reset_iter_state"):  # torch 2.13: an architecture may refuse, and is then run otherwise
                policy.reset_iter_state()
            raise
        return result

    policy.run_as_forward = run_or_reset


def is_sharded(model: nn.Module) -> bool:
    """Whether all processes must run a model together."""
    return isinstance(model, FSDPModule)
