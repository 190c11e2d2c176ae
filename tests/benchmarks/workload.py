"""What every program of the benchmark works on: the same pairs in the same batches, and the work that is in them."""

import statistics
import time
from pathlib import Path

import torch

from spl.data.collate import EncodedExample, collate
from spl.data.encode import Report, RowEncoder
from spl.data.source import Source
from spl.data.tokenization import Encoder
from spl.models import load_tokenizer
from spl.types import Comparison, PreferenceBatch


def batches(model: str, pairs: Path, steps: int, batch_size: int, max_length: int = 1024) -> list[PreferenceBatch]:
    """The first usable pairs of a file, in its order."""
    encoder = RowEncoder(Encoder(load_tokenizer(model), max_length), bad_rows="skip")
    examples = []
    for _, encoded in encoder.examples(Source(str(pairs)).rows(), Report()):
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
