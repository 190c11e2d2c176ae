"""How long an optimiser step takes, on paper: operations, the optimiser's bytes, and traffic that nothing hides."""

from typing import NamedTuple

from spl.modules.flops import MatrixSizes, layers_flops
from spl.modules.memory import Setup
from spl.modules.shape import Shape
from spl.planning.traffic import Cluster, collectives
from spl.planning.work import Work

BACKWARD = 0.5  # share of a micro-batch's time during which DDP can reduce gradients


class Model(NamedTuple):
    """What a plan knows of a model."""

    shape: Shape
    sizes: MatrixSizes


class StepTime(NamedTuple):
    """Of one process's optimiser step; all processes take alike long."""

    compute: float  # seconds of operations and of AdamW's pass over its numbers
    sent: float  # bytes a device
    traffic: float  # seconds that these take
    lost: float  # of them, in which nothing is computed
    tokens: float  # distinct tokens, of all processes

    @property
    def seconds(self) -> float:
        return self.compute + self.lost

    @property
    def lost_share(self) -> float:
        return self.lost / self.seconds

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


def step_time(model: Model, work: Work, setup: Setup, cluster: Cluster, reference: bool, mfu: float) -> StepTime:
    """An optimiser step's time.

    Operations run at a share `mfu` of the device's peak; what checkpointing computes again runs at that rate too. AdamW
    reads four numbers of each weight and writes three. Of DDP's traffic the last micro-batch's backward pass hides as
    much as it is long; FSDP2's runs beside everything, but for the root and the first layer of each pass, which it
    waits for (Zhao et al. 2023).

    Args:
        model: to train.
        work: of a step.
        setup: how it is trained.
        cluster: on what.
        reference: whether one runs.
        mfu: share of peak.
    """
    gpu, shape = cluster.gpu, model.shape
    peak = gpu.bf16 if setup.mixed or shape.low else gpu.float32
    running = (work.flops(model.sizes, reference) + _again(model, work, setup)) / (mfu * peak)
    shards = setup.devices if setup.layout == "fsdp" else 1
    updating = 7 * shape.trained_bytes / shards / gpu.bandwidth
    calls = collectives(shape, setup, work.micro_batches, reference)
    traffic = sum(map(cluster.seconds, calls))
    waits = hidden = 0.0
    if setup.layout == "ddp":
        hidden = BACKWARD * running / work.micro_batches
    elif calls:
        layers, root, _ = calls
        waits = cluster.seconds(root) + cluster.seconds(layers) / shape.layers
        hidden = running
    return StepTime(
        compute=running + updating,
        sent=sum(call.sent(cluster.devices) for call in calls),
        traffic=traffic,
        lost=waits + max(traffic - waits - hidden, 0.0),
        tokens=work.tokens * cluster.devices,
    )


def _again(model: Model, work: Work, setup: Setup) -> float:
    """Operations of the layers' forward pass, which checkpointing repeats (but for each layer's last product)."""
    if not setup.checkpointing:
        return 0.0
    return work.accumulated * sum(layers_flops(model.sizes, batch) for batch in work.typical) / len(work.typical)
