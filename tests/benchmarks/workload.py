"""What every program of the benchmark works on: the same pairs in the same batches, and the work that is in them."""

import statistics
import time
from pathlib import Path
from typing import Any

import torch

from spl.data.collate import EncodedExample, collate
from spl.data.encode import Report, RowEncoder
from spl.data.files import read_rows
from spl.data.tokenization import Encoder
from spl.logprobs.score import base_of
from spl.models import load_tokenizer
from spl.types import Comparison, PreferenceBatch


def batches(model: str, pairs: Path, steps: int, batch_size: int, max_length: int = 1024) -> list[PreferenceBatch]:
    """The first usable pairs of a file, in its order."""
    encoder = RowEncoder(Encoder(load_tokenizer(model), max_length), bad_rows="skip")
    examples = []
    for _, encoded in encoder.examples(read_rows([pairs]), Report()):
        examples.append(encoded)
        if len(examples) == steps * batch_size:
            break
    return [collate(examples[k : k + batch_size]) for k in range(0, len(examples), batch_size)]


def four_responses(vocabulary: int, length: int, prompts: int = 1) -> tuple[PreferenceBatch, list[PreferenceBatch]]:
    """Random prompts with four responses as long as the prompt, all six pairs compared; and each pair by itself."""
    draw = torch.Generator().manual_seed(0)

    def text() -> tuple[int, ...]:
        return tuple(torch.randint(vocabulary // 2, vocabulary, (length,), generator=draw).tolist())

    together, pairs = [], []
    for _ in range(prompts):
        prompt = text()
        sequences = [prompt + text() for _ in range(4)]
        couples = [(i, j) for i in range(4) for j in range(i + 1, 4)]
        together.append(_example(sequences, length, couples))
        pairs += [_example([sequences[i], sequences[j]], length, [(0, 1)]) for i, j in couples]
    return collate(together), [collate([pair]) for pair in pairs]


def _example(sequences: list[tuple[int, ...]], start: int, couples: list[tuple[int, int]]) -> EncodedExample:
    comparisons = tuple(Comparison(i, j, 1.0) for i, j in couples)
    return EncodedExample(tuple(sequences), (start,) * len(sequences), comparisons, None, "")


def step_flops(model: Any, batch: PreferenceBatch, reference: bool = True) -> float:
    """Floating-point operations that a batch's distinct tokens ask for: reference forward, policy forward and backward.

    Two a weight and token forwards, two more for the gradient of the activations, two more for that of a weight that
    trains; attention 4 * layers * width for each (query, key) seen. Nothing computed twice counts.
    """
    base = base_of(model)
    config = base.config.get_text_config()
    head = base.get_output_embeddings().weight
    tied_or_head = {p.data_ptr() for p in (head, base.get_input_embeddings().weight)}
    matrices = [p for p in model.parameters() if p.ndim == 2 and p.data_ptr() not in tied_or_head]
    trained = sum(p.numel() for p in matrices if p.requires_grad)
    frozen = sum(p.numel() for p in matrices) - trained
    full = trained > frozen  # adapters are no part of the reference
    width = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    seen = float((batch.position_ids + 1).sum())
    attention = 4.0 * config.num_hidden_layers * width * seen
    of_head = 2.0 * head.numel() * batch.edge_source.numel()
    policy = batch.num_tokens * (4.0 * frozen + 6.0 * trained) + 3 * attention + of_head * (3 if full else 2)
    forward = batch.num_tokens * 2.0 * (trained if full else frozen) + attention + of_head
    return policy + (forward if reference else 0.0)


def matmul_rate(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """Floating-point operations a second of this machine's own matrix product, now."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    took = []
    stop = time.perf_counter() + seconds
    while len(took) < 3 or time.perf_counter() < stop:
        start = time.perf_counter()
        torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize()
        took.append(time.perf_counter() - start)
    return 2.0 * size**3 / statistics.median(took)


class Clock:
    """Wall and CPU seconds since it was made."""

    def __init__(self) -> None:
        self.start = _now()

    def read(self) -> tuple[float, float]:
        wall, cpu = _now()
        return wall - self.start[0], cpu - self.start[1]


def _now() -> tuple[float, float]:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter(), time.process_time()
