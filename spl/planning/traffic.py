"""How long collectives take: what DDP and FSDP2 send for a step, and at what rate it goes.

Every collective is a ring: of n devices each sends (n - 1)/n of a tensor to gather it whole or to share it out reduced,
and twice that to reduce it everywhere (Patarasu and Yuan 2009). A tensor of S bytes then takes `latency + sent / rate`
(the alpha-beta model; Thakur, Rabenseifner and Gropp 2005).
"""

import math
from typing import Literal, NamedTuple

from spl.modules.memory import Setup
from spl.modules.shape import Shape
from spl.planning.gpus import GPU

Kind = Literal["all_gather", "reduce_scatter", "all_reduce"]

BUCKET = 25 * 2**20  # bytes of gradients that DDP reduces at a time
# Seconds, from NCCL's own model (src/graph/tuning.cc, protocol Simple): of a call, and of a hop along a ring or tree.
CALL = 8.4e-6
HOP_NVLINK, HOP_PCIE, HOP_NETWORK = 3.4e-6, 5.7e-6, 14e-6


class Collective(NamedTuple):
    """Calls that a step makes of one kind."""

    kind: Kind
    size: float  # bytes of one call's whole tensor
    calls: float

    def sent(self, devices: int) -> float:
        """Bytes that each device sends in all calls."""
        rounds = 2 if self.kind == "all_reduce" else 1
        return self.calls * self.size * rounds * (devices - 1) / devices


class Cluster(NamedTuple):
    """Devices that train together.

    Attributes:
        gpu: their kind.
        devices: how many.
        per_node: of a node.
        reached: share of a link's rate that collectives reach.
    """

    gpu: GPU
    devices: int
    per_node: int = 8
    reached: float = 0.8

    @property
    def nodes(self) -> int:
        return -(-self.devices // self.per_node)

    @property
    def rate(self) -> float:
        """Bytes a second that a device sends in a ring.

        Between nodes as many rings run as a node has network cards, and each enters a node once: the whole node's
        network is there for the ring.
        """
        link = self.gpu.link if self.nodes == 1 else min(self.gpu.link, self.gpu.network)
        return self.reached * link

    def latency(self, kind: Kind) -> float:
        """Seconds of a call besides its bytes: the hops of a ring, or of two trees where these are fewer."""
        within = HOP_NVLINK if self.gpu.nvlink else HOP_PCIE
        between = self.nodes - 1
        ring = (self.devices - 1 - between) * within + between * HOP_NETWORK
        if kind != "all_reduce":
            return CALL + ring
        inside = (min(self.devices, self.per_node) - 1) * within
        return CALL + 2 * min(ring, inside + math.log2(self.nodes) * HOP_NETWORK)

    def seconds(self, collective: Collective) -> float:
        """Of all its calls."""
        if self.devices == 1:
            return 0.0
        return collective.calls * self.latency(collective.kind) + collective.sent(self.devices) / self.rate


def collectives(shape: Shape, setup: Setup, micro_batches: int, reference: bool) -> list[Collective]:
    """What a process's optimiser step sends.

    DDP adds up what trains once a step. FSDP2 gathers each layer and the root for the forward pass and again for the
    backward pass of every micro-batch (unless it keeps them), and once more where a reference runs; it shares
    gradients out, in float32, at the end of a step or after every micro-batch.

    Args:
        shape: of the model.
        setup: how it is trained.
        micro_batches: of a step.
        reference: whether one runs, which is sharded like the policy.
    """
    if setup.layout == "single" or setup.devices == 1:
        return []
    if setup.layout == "ddp":
        buckets = max(math.ceil(shape.trained_bytes / BUCKET), 1)
        return [Collective("all_reduce", shape.trained_bytes / buckets, buckets)]
    passes = micro_batches * _passes(setup, reference)
    narrow = 0.5 if setup.mixed and not shape.low else 1.0  # layers travel in bfloat16, the root as it is
    layers = narrow * (shape.total_bytes - shape.root_bytes)
    groups = shape.layers + (0 if shape.adapters else 1)
    reductions = 1 if setup.sums_whole else micro_batches
    return [
        Collective("all_gather", layers / shape.layers, passes * shape.layers),
        Collective("all_gather", shape.root_bytes, passes),
        Collective("reduce_scatter", 4 * shape.trained / groups, reductions * groups),
    ]


def _passes(setup: Setup, reference: bool) -> int:
    """How often a micro-batch gathers a model. Once gathered and kept, the policy with its adapters off is at hand."""
    if setup.reshards:
        return 3 if reference else 2
    return 2 if reference and setup.reference_copy else 1
