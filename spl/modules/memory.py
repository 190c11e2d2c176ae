"""What a training step holds at its peak, part by part: the start-up report's estimate and the planner's.

The parts that last are counted exactly. Activations are what autograd keeps of a decoder layer, read off the code that
runs (see `_layer_bytes`); tests hold them to the bytes that real steps hold, on several architectures.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from spl.logprobs.forest import Backend
from spl.modules.shape import Shape
from spl.types import PreferenceBatch

Layout = Literal["single", "ddp", "fsdp"]

CONTEXT = 1.5 * 2**30  # bytes a process takes on a GPU besides tensors: CUDA, its libraries, buffers of NCCL
FRAGMENTED = 0.05  # of what is held, that the allocator cannot use


@dataclass(frozen=True)
class Setup:
    """How a model is trained, as far as memory depends on it.

    Attributes:
        layout: one device, a copy on every device, or every weight sharded over the devices.
        devices: that take part.
        mixed: products in bfloat16 of weights in float32.
        checkpointing: activations of a layer are computed again in the backward pass.
        reference_copy: a second, frozen model is held.
        reshards: where sharded, a layer is let go after its forward pass and gathered again for the backward pass.
        sums_whole: where sharded, each device adds a step's micro-batches up in whole gradients, shared out at its end.
        cpu_offload: shards wait in the host's memory.
        head_chunk: response tokens whose logits are held at a time.
        backend: the attention kernel.
        cuda: or a CPU.
    """

    layout: Layout = "single"
    devices: int = 1
    mixed: bool = False
    checkpointing: bool = False
    reference_copy: bool = False
    reshards: bool = True
    sums_whole: bool = False
    cpu_offload: bool = False
    head_chunk: int = 512
    backend: Backend = "auto"
    cuda: bool = True


class Memory(NamedTuple):
    """Bytes on one device, by part."""

    weights: float
    gradients: float
    moments: float  # AdamW's two
    reference: float  # a frozen copy
    gathered: float  # layers that FSDP2 puts together, or DDP's buckets of gradients
    activations: float  # that the layers keep for the backward pass
    head: float  # and on top of them the head: its inputs and a chunk of logits
    layer: float  # or later the backward pass of one layer, which may compute its activations again
    end: float  # or, when activations are gone, the gradient of the embeddings, or a copy that AdamW's loops make
    outside: float  # of what is not tensors

    @property
    def lasting(self) -> float:
        """What is held whatever the batch."""
        return self.weights + self.gradients + self.moments + self.reference + self.gathered + self.outside

    @property
    def working(self) -> float:
        """What is held besides at the worst moment of a step."""
        return max(self.activations + max(self.head, self.layer), self.end)

    @property
    def total(self) -> float:
        return self.lasting + self.working


def peak_memory(shape: Shape, batch: PreferenceBatch, setup: Setup) -> Memory:
    """Bytes on one device at the peak of a training step on a batch.

    Gradients and moments are there when activations are, as in all but the first micro-batch of a run.
    """
    shards = setup.devices if setup.layout == "fsdp" else 1
    stays = 0.0 if setup.cpu_offload else 1.0 / shards
    whole = setup.layout == "fsdp" and setup.sums_whole
    parts = Memory(
        weights=shape.total_bytes * stays,
        gradients=4 * shape.trained if whole else shape.trained_bytes * stays,
        moments=2 * shape.trained_bytes * stays,
        reference=shape.total_bytes * stays if setup.reference_copy else 0.0,
        gathered=_gathered(shape, setup),
        activations=_activations(shape, batch, setup),
        head=_head(shape, batch, setup),
        layer=_layer_backward(shape, batch, setup),
        end=max(_embedding_gradient(shape), shape.trained_bytes * stays if setup.cuda else 0.0),
        outside=0.0,
    )
    return parts._replace(outside=CONTEXT + FRAGMENTED * parts.total) if setup.cuda else parts


def _gathered(shape: Shape, setup: Setup) -> float:
    """What synchronising holds besides.

    DDP copies gradients to buckets of the same size. FSDP2 gathers the root for a whole pass, and layers: one in use,
    the next one both as it arrives and in place; with them goes one layer's whole gradient.
    """
    if setup.layout == "ddp":
        return float(shape.trained_bytes)
    if setup.layout == "single":
        return 0.0
    narrow = 0.5 if setup.mixed and not shape.low else 1.0  # layers travel in bfloat16
    gradient = 0.0 if shape.adapters or setup.sums_whole else shape.layer_bytes
    if not setup.reshards:
        models = 2 if setup.reference_copy else 1
        return models * (shape.root_bytes + narrow * (shape.total_bytes - shape.root_bytes)) + gradient
    return shape.root_bytes + 3 * narrow * shape.layer_bytes + gradient


def _size(shape: Shape, setup: Setup) -> int:
    """Bytes of a number that a product takes in or gives."""
    return 2 if setup.mixed or shape.low else 4


def _activations(shape: Shape, batch: PreferenceBatch, setup: Setup) -> float:
    """What autograd keeps of all layers; the residual stream is in float32 whatever the products are taken in."""
    size, tokens = _size(shape, setup), batch.num_tokens
    layer = 4 * tokens * shape.hidden if setup.checkpointing else _layer_bytes(shape, batch, setup)
    rotary = 2 * size * tokens * shape.query // shape.heads
    return shape.layers * layer + rotary + (0 if setup.checkpointing else _rounded(shape, setup))


def _rounded(shape: Shape, setup: Setup) -> float:
    """Trained weights in bfloat16, which are kept for the backward pass unless they are gathered so."""
    gathered = setup.layout == "fsdp" and setup.mixed
    rounds = _size(shape, setup) == 2 and shape.trained_bytes > 3 * shape.trained
    return 2.0 * shape.trained if rounds and not gathered else 0.0


def _layer_backward(shape: Shape, batch: PreferenceBatch, setup: Setup) -> float:
    """The residual stream's gradient and two of the feed-forward part's width; a tied head's gradient waits."""
    gradients = batch.num_tokens * (4 * shape.hidden + 2 * _size(shape, setup) * shape.inner)
    waits = _embedding_gradient(shape) / 3 if shape.tied else 0
    again = _layer_bytes(shape, batch, setup) + _rounded(shape, setup) / shape.layers if setup.checkpointing else 0
    return gradients + waits + again


def _embedding_gradient(shape: Shape) -> float:
    """Of the embeddings alone, or beside a tied head's and the sum of both."""
    size = 2 if shape.low else 4
    return 0.0 if shape.adapters else size * shape.vocabulary * shape.hidden * (3.0 if shape.tied else 1.0)


def _layer_bytes(shape: Shape, batch: PreferenceBatch, setup: Setup) -> float:
    """What autograd keeps of one decoder layer.

    Of each token: the inputs of norms, in float32; the inputs of matrices (in bfloat16 each rounds its own, else query,
    key and value share one, as do gate and up); queries, keys, values, and what attention gives, with one
    normaliser a head; the feed-forward part's input to its activation and, where it is gated, both factors; the
    low-rank products of adapters. What attention holds of the tree depends on the kernel. Left out: what an activation
    written out in Python keeps (GPT-2's), and the scores of soft-capped attention on a CPU (Gemma 2's).
    """
    size, tokens = _size(shape, setup), batch.num_tokens
    inputs = shape.inputs if size == 2 else 2 * shape.hidden + shape.query + shape.inner
    inner = (3 if shape.gated else 1) * shape.inner
    numbers = inputs + 2 * shape.query + inner + shape.ranks
    seen = _seen(batch)
    kernel = setup.backend
    if kernel == "auto":
        kernel = "sdpa" if not setup.cuda else "varlen" if size == 2 else "flex"
    if kernel == "varlen":  # keys and values of every path; its result is the next matrix's input as it is
        attention = 2 * shape.key * seen.keys - tokens * shape.query
    elif kernel == "flex":
        attention = 2 * shape.key * tokens
    else:  # each branch's path once more, and its mask in numbers
        attention = 2 * shape.key * (tokens + seen.branch_keys) + seen.masked
    return 4 * tokens * (shape.norms + shape.heads) + size * (tokens * numbers + attention)


class _Seen(NamedTuple):
    keys: int  # of all paths
    branch_keys: int  # of those that go on from another node
    masked: int  # (query, key) pairs in their masks


def _seen(batch: PreferenceBatch) -> _Seen:
    ends: list[int] = []
    keys = branch_keys = masked = 0
    for node in batch.nodes:
        queries = node.end - node.start
        ends.append((ends[node.parent] if node.parent >= 0 else 0) + queries)
        keys += ends[-1]
        if node.parent >= 0:
            branch_keys += ends[-1]
            masked += queries * ends[-1]
    return _Seen(keys, branch_keys, masked)


def _head(shape: Shape, batch: PreferenceBatch, setup: Setup) -> float:
    """The last norm's input, the edges' states or the directions of their gradient, and two [chunk, V] buffers.

    The buffers are in float32. With them stand the head in another dtype than it is stored in, and, where it trains,
    the norm's result, the edges' states as well, the head's gradient, and weights that autocast has rounded.
    """
    edges, matrix = batch.edge_source.numel(), shape.vocabulary * shape.hidden
    narrow = setup.cuda and setup.mixed and not shape.low
    widened = not setup.cuda and shape.low
    copy = 2 * matrix if narrow else 4 * matrix if widened else 0
    kept = shape.hidden * (4 * batch.num_tokens + edges * (_size(shape, setup) if setup.cuda else 4))
    logits = 2 * 4 * min(setup.head_chunk, edges) * shape.vocabulary
    if shape.adapters:
        return logits + copy + kept
    return logits + copy + 2 * kept + 4 * matrix + (_rounded(shape, setup) if setup.checkpointing else 0)
