"""A plan: what a run would take by its settings, as numbers that `show.py` prints and `--json` writes."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from spl.data.base import PreferenceDataModule
from spl.models import Dtype
from spl.modules.memory import Setup, peak_memory
from spl.modules.preference import PreferenceModule
from spl.planning.architectures import ARCHITECTURES, GROWTH
from spl.planning.fits import Fit, fit_on, smallest_fit
from spl.planning.gpus import GPUS
from spl.planning.skeleton import config_of, model_of
from spl.planning.step import Model, StepTime, step_time
from spl.planning.traffic import Cluster
from spl.planning.work import Work, planned_work
from spl.types import UserError

Numbers = dict[str, Any]

COUNTS = (1, 8, 64, 256, 1024)  # GPUs, of the tables of time
LORA_RANK = 16  # of a plan beside one for all weights
KINDS: tuple[tuple[str, Dtype, bool], ...] = (  # of weights and products
    ("float32", "float32", False),
    ("bf16-mixed", "float32", True),
    ("bfloat16", "bfloat16", False),
)


class Options(NamedTuple):
    """What a plan assumes besides a run's settings."""

    gpu: str
    gpus: int
    gpus_per_node: int
    tokens: int | None
    mfu: float
    network: float | None  # GB a second, each way, of a node


class Planner:
    """Reads a run's settings once, and answers for other models, devices and ways to train.

    Args:
        settings: of `spl fit`, by group.
        options: what is assumed.

    Raises:
        UserError: the model or a row of the data is not at hand, or a setting cannot be.
    """

    def __init__(self, settings: Mapping[str, Any], options: Options) -> None:
        _check(options)
        self.options = options
        self.module: Mapping[str, Any] = PreferenceModule(**settings["model"]).hparams  # refuses what cannot be
        trainer = settings["trainer"]
        self.config = config_of(self.module)
        self.mixed = trainer["precision"] in ("bf16", "bf16-mixed")
        self.reference = self.module["beta"] != 0
        self.work = planned_work(
            self.module["model"],
            PreferenceDataModule(**settings["data"]).hparams,
            trainer["accumulate_grad_batches"],
            options.tokens,
            revision=self.module["revision"],
            trusted=self.module["trust_remote_code"],
        )
        self.sharding = _sharding(trainer["strategy"])
        self._models: dict[tuple[int, Dtype], Model] = {}

    def setup(self, rank: int, mixed: bool) -> Setup:
        """Of one GPU, with adapters of a rank or (0) all weights trained."""
        return Setup(
            mixed=mixed,
            checkpointing=self.module["gradient_checkpointing"],
            reference_copy=self.reference and not rank,
            reshards=self.sharding.get("reshard_after_forward", True),
            sums_whole=self.work.micro_batches > 1 and not self.sharding.get("reduce_every_micro_batch", False),
            cpu_offload=self.sharding.get("cpu_offload", False),
            head_chunk=self.module["head_chunk"],
            backend=self.module["attention"],
        )

    def cluster(self, devices: int) -> Cluster:
        gpu, network = GPUS[self.options.gpu], self.options.network
        gpu = gpu if network is None else gpu._replace(network=1e9 * network)
        return Cluster(gpu, devices, self.options.gpus_per_node)

    def model(self, rank: int, dtype: Dtype) -> Model:
        """The run's own, with adapters of a rank or (0) all weights trained."""
        if (rank, dtype) not in self._models:
            self._models[rank, dtype] = model_of(self.config, self.module, rank, dtype)
        return self._models[rank, dtype]

    def plan(self) -> Numbers:
        """All of it, in bytes, seconds and operations."""
        own = self.model(self.module["lora_rank"], self.module["dtype"])
        return {
            "assumed": self.options._asdict(),
            "model": {
                "name": self.module["model"],
                "parameters": own.shape.total,
                "trained": own.shape.trained,
                "lora_rank": self.module["lora_rank"],
                "dtype": self.module["dtype"],
                "bf16_mixed": self.mixed,
            },
            "step": self._step(own),
            "memory": self._memory(own),
            "kinds": self._kinds(),
            "fits": self._fits(),
            "time": self._time(own),
            "growth": self._growth(),
        }

    def _step(self, own: Model) -> Numbers:
        work, padded = self.work, self.work.padded()
        policy = work.flops(own.sizes, False)
        return {
            "lengths": work.source,
            "tokens": work.tokens,
            "micro_batches": work.micro_batches,
            "largest_tokens": work.largest[0][1].num_tokens,
            "policy_flops": policy,
            "reference_flops": work.flops(own.sizes, True) - policy if self.reference else 0.0,
            "padded_tokens": padded.tokens,
            "padded_flops": padded.flops(own.sizes, self.reference),
        }

    def _memory(self, own: Model) -> Numbers:
        """By part, on one GPU and on each of several."""
        setup, batch = self.setup(self.module["lora_rank"], self.mixed), self.work.largest[0][1]
        gpus = self.options.gpus
        ways = {
            "one": replace(setup, cpu_offload=False),
            "ddp": replace(setup, layout="ddp", devices=gpus, cpu_offload=False),
            "fsdp": replace(setup, layout="fsdp", devices=gpus),
        }
        found = {name: peak_memory(own.shape, batch, way) for name, way in ways.items()}
        return {name: memory._asdict() | {"total": memory.total} for name, memory in found.items()}

    def _kinds(self) -> list[Numbers]:
        """Bytes in all, of adapters and of all weights, in each precision and layout."""
        gpus, batch, rows = self.options.gpus, self.work.largest[0][1], []
        for rank in (self.module["lora_rank"] or LORA_RANK, 0):
            for name, dtype, mixed in KINDS:
                setup, shape = replace(self.setup(rank, mixed), cpu_offload=False), self.model(rank, dtype).shape
                sharded = replace(setup, layout="fsdp", devices=gpus)
                ways = {
                    "one": replace(setup, checkpointing=False),
                    "one_checkpointing": replace(setup, checkpointing=True),
                    "ddp": replace(setup, layout="ddp", devices=gpus, checkpointing=False),
                    "fsdp": replace(sharded, checkpointing=False),
                    "fsdp_checkpointing": replace(sharded, checkpointing=True),
                    "fsdp_offload": replace(sharded, checkpointing=True, cpu_offload=True),
                }
                totals = {way: peak_memory(shape, batch, one).total for way, one in ways.items()}
                rows.append({"lora_rank": rank, "kind": name, **totals})
        return rows

    def _fits(self) -> list[Numbers]:
        """The smallest way on each GPU, of adapters and of all weights."""
        ranks = (self.module["lora_rank"] or LORA_RANK, 0)
        shapes = {rank: self.model(rank, self.module["dtype"]).shape for rank in ranks}
        rows = []
        for name, gpu in GPUS.items():
            fits = {rank: smallest_fit(shapes[rank], self.work, self.setup(rank, self.mixed), gpu) for rank in ranks}
            lora, full = (None if fit is None else _numbers_of(fit) for fit in fits.values())
            rows.append({"gpu": name, "bytes": gpu.memory, "lora": lora, "full": full})
        return rows

    def _time(self, own: Model) -> list[Numbers]:
        """The run's own model by DDP and by FSDP2, on more and more GPUs."""
        setup, rows = self.setup(self.module["lora_rank"], self.mixed), []
        batch = self.work.largest[0][1]
        for devices in COUNTS:
            for layout in ("ddp", "fsdp") if devices > 1 else ("single",):
                way = replace(setup, layout=layout, devices=devices)
                memory = peak_memory(own.shape, batch, way).total
                taken = self._step_time(own, self.work, way)
                rows.append({"gpus": devices, "layout": layout, "memory": memory, **_numbers_of_time(taken)})
        return rows

    def _growth(self) -> list[Numbers]:
        """Models from small to large with the run's settings, each in the first way that fits."""
        rank, dtype = self.module["lora_rank"], self.module["dtype"]
        rows = []
        for name in GROWTH:
            model = model_of(ARCHITECTURES[name].config(), self.module, rank, dtype)
            cells = [self._cell(model, devices) for devices in COUNTS]
            rows.append({"model": name, "parameters": ARCHITECTURES[name].parameters, "cells": cells})
        return rows

    def _cell(self, model: Model, devices: int) -> Numbers | None:
        gpu = GPUS[self.options.gpu]
        fit = fit_on(devices, model.shape, self.work, self.setup(self.module["lora_rank"], self.mixed), gpu)
        if fit is None:
            return None
        taken = self._step_time(model, replace(self.work, max_tokens=fit.max_tokens), fit.setup)
        return _numbers_of(fit) | _numbers_of_time(taken)

    def _step_time(self, model: Model, work: Work, setup: Setup) -> StepTime:
        return step_time(model, work, setup, self.cluster(setup.devices), self.reference, self.options.mfu)


def _numbers_of(fit: Fit) -> Numbers:
    setup = fit.setup
    return {
        "gpus": setup.devices,
        "layout": setup.layout,
        "checkpointing": setup.checkpointing,
        "max_tokens": fit.max_tokens,
        "reduce_every_micro_batch": fit.reduces_each,
        "memory": fit.memory.total,
    }


def _numbers_of_time(taken: StepTime) -> Numbers:
    return taken._asdict() | {
        "seconds": taken.seconds,
        "lost_share": taken.lost_share,
        "tokens_per_second": taken.tokens_per_second,
    }


def _sharding(strategy: Any) -> Mapping[str, Any]:
    """The settings of ShardedStrategy, where it is chosen."""
    chosen = isinstance(strategy, Mapping) or hasattr(strategy, "class_path")
    return dict(strategy["init_args"]) if chosen and "Sharded" in strategy["class_path"] else {}


def _check(options: Options) -> None:
    if options.gpu not in GPUS:
        raise UserError(f"--gpu must be one of {', '.join(GPUS)}, but is {options.gpu}.")
    for name in ("gpus", "gpus_per_node", "tokens", "network"):
        value = getattr(options, name)
        if value is not None and value <= 0:
            raise UserError(f"--{name} must be above 0, but is {value}.")
    if not 0 < options.mfu <= 1:
        raise UserError(f"--mfu must be a share of the GPU's peak, above 0 and at most 1, but is {options.mfu}.")
