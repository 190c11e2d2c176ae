"""The rates against a clock of our own, the operations against products written out, the norm against autograd."""

import csv
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning import Callback, Trainer
from tiny_fit import fit

from spl.callbacks import throughput
from spl.callbacks.run_folder import MetricsLogger
from spl.callbacks.throughput import ThroughputMonitor, padded_tokens, peak_flops
from spl.data.collate import EncodedExample, collate
from spl.logprobs.cache import LogpCache
from spl.modules.flops import MatrixSizes, step_flops
from spl.modules.preference import PreferenceModule
from spl.types import Comparison, PreferenceBatch

CPU = torch.device("cpu")


class Clock:
    """One second passes each time it is read."""

    def __init__(self) -> None:
        self.now = 0.0

    def read(self) -> float:
        self.now += 1
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(throughput.time, "perf_counter", clock.read)
    monkeypatch.setattr(throughput, "peak_flops", lambda device, dtype: 1e9)
    return clock


@st.composite
def batches(draw: st.DrawFn) -> tuple[PreferenceBatch, list[tuple[int, ...]]]:
    """A batch over a small alphabet, whose sequences often begin alike, and these sequences."""
    token = st.integers(0, 2)
    prompts = draw(st.lists(st.lists(token, min_size=1, max_size=5), min_size=1, max_size=3))
    examples, sequences = [], []
    for prompt in prompts:
        replies = draw(st.lists(st.lists(token, min_size=1, max_size=5), min_size=2, max_size=3))
        whole = tuple((*prompt, *reply) for reply in replies)
        examples.append(EncodedExample(whole, (len(prompt),) * len(whole), (Comparison(0, 1, 1.0),), None, ""))
        sequences += whole
    return collate(examples), sequences


@given(batches())
def test_padded_tokens_are_those_of_a_padded_matrix(drawn: tuple[PreferenceBatch, list[tuple[int, ...]]]) -> None:
    batch, sequences = drawn
    assert padded_tokens(batch) == len(sequences) * max(map(len, sequences))


@given(batches())
def test_attention_counts_what_the_mask_lets_through(drawn: tuple[PreferenceBatch, list[tuple[int, ...]]]) -> None:
    batch = drawn[0]
    key, query = torch.arange(batch.num_tokens), torch.arange(batch.num_tokens)[:, None]
    seen = ((key <= query) & (query < batch.subtree_end)).sum().item()
    # Two products of `attended` numbers a pair; forward once, backward twice.
    assert step_flops(MatrixSizes(0, 0, 0, attended=1), batch, reference=False) == 3 * 4 * seen


def test_a_reference_that_is_kept_is_no_work(tmp_path: Path) -> None:
    module = PreferenceModule("tiny", lora_rank=0)
    module.configure_model()
    batch = collate([EncodedExample(((1, 2, 3), (1, 2, 4, 5)), (1, 1), (Comparison(0, 1, 1.0),), None, "")])
    config = module.policy.config
    hidden, inner = config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    layer = 2 * hidden * queries + 2 * hidden * keys + 3 * hidden * inner
    # The row is 1 2 4 (the ends predict nothing): queries see 1 + 2 + 3 keys; edges predict 2, 3, 4 and 5.
    forward = 3 * 2 * config.num_hidden_layers * layer
    forward += config.num_hidden_layers * 4 * queries * (1 + 2 + 3) + 4 * 2 * hidden * config.vocab_size
    assert module.step_flops(batch) == forward * (1 + 2 + 1)

    assert module.reference is not None
    module.reference.cache = LogpCache(tmp_path, "weights", "float32", "")
    assert module.step_flops(batch) == forward * (1 + 2 + 1)
    module.reference.cache.add(batch.response_keys, [-1.0, -2.0])
    assert module.step_flops(batch) == forward * (1 + 2)


def test_rates_over_the_window(tmp_path: Path, clock: Clock) -> None:
    trainer = fit(tmp_path, ThroughputMonitor(), limit_val_batches=0)
    batch = trainer.datamodule.first_batch()  # type: ignore[attr-defined]
    module: Any = trainer.lightning_module
    found = {name: value.item() for name, value in trainer.callback_metrics.items()}
    # One second a batch by this clock, and every batch is the whole survey.
    assert found["train/tokens_per_second"] == batch.num_tokens
    assert found["train/padded_tokens_per_second"] == padded_tokens(batch) > batch.num_tokens
    assert found["train/peak_share"] == pytest.approx(module.step_flops(batch) / 1e9)


@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_train_batch_end"])
@pytest.mark.parametrize("first", [True, False])
def test_a_pause_for_samples_is_no_training_time(tmp_path: Path, clock: Clock, hook: str, first: bool) -> None:
    rates: list[float] = []

    class Sampler(Callback):
        def pause(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
            clock.now += 1000
            monitor.on_sampling_start(trainer, pl_module)

        def on_before_zero_grad(self, trainer: Trainer, *args: Any) -> None:
            rates.append(trainer.callback_metrics.get("train/tokens_per_second", torch.tensor(math.nan)).item())

    monitor, sampler = ThroughputMonitor(), Sampler()
    batches = 0

    def every_third(trainer: Trainer, pl_module: Any, *args: Any) -> None:
        nonlocal batches
        batches += 1
        if batches % 3 == 0:
            sampler.pause(trainer, pl_module)

    setattr(sampler, hook, every_third)
    order = [sampler, monitor] if first else [monitor, sampler]
    trainer = fit(tmp_path, *order, steps=8, limit_val_batches=0)
    known = {rate for rate in rates if not math.isnan(rate)}
    assert known == {trainer.datamodule.first_batch().num_tokens}  # type: ignore[attr-defined]


def test_validation_is_no_training_time(tmp_path: Path, clock: Clock) -> None:
    class Slow(Callback):
        def on_validation_end(self, *args: Any) -> None:
            clock.now += 1000

    trainer = fit(tmp_path, ThroughputMonitor(), Slow(), check_val_every_n_epoch=1)
    batch = trainer.datamodule.first_batch()  # type: ignore[attr-defined]
    assert trainer.callback_metrics["train/tokens_per_second"].item() == batch.num_tokens


def test_a_module_that_does_not_count_its_work_has_no_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("spl.modules.base.PolicyModule.step_flops")
    trainer = fit(tmp_path, ThroughputMonitor(), limit_val_batches=0)
    assert "train/peak_share" not in trainer.callback_metrics
    assert "train/memory_gib" in trainer.callback_metrics


def test_the_peak_is_looked_up_before_it_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def known(device: torch.device, dtype: torch.dtype) -> int:
        return {torch.bfloat16: 989_000_000_000_000}[dtype]

    monkeypatch.setattr(throughput, "get_available_flops", known)
    assert peak_flops(torch.device("cuda", 0), torch.bfloat16) == 989e12


def test_timing_the_peak_reads_the_clock_and_no_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    state = torch.get_rng_state()
    assert 0 < peak_flops(CPU, torch.float32) < math.inf
    monkeypatch.setattr(throughput.time, "perf_counter", Clock().read)
    assert peak_flops(CPU, torch.float32) == 2 * 768**3  # a product a second
    assert torch.equal(torch.get_rng_state(), state)


def test_memory_is_what_the_process_holds(tmp_path: Path) -> None:
    trainer = fit(tmp_path, ThroughputMonitor(), limit_val_batches=0)
    status = Path("/proc/self/status").read_text().splitlines()
    resident = int(next(line.split()[1] for line in status if line.startswith("VmRSS"))) * 1024
    assert trainer.callback_metrics["train/memory_gib"].item() * 2**30 == pytest.approx(resident, rel=0.2)


class Batches(Callback):
    """Keeps what is trained on."""

    def __init__(self) -> None:
        self.kept: list[PreferenceBatch] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: PreferenceBatch, batch_idx: int) -> None:
        self.kept.append(batch)


def test_the_norm_is_that_of_the_whole_gradient_before_clipping(tmp_path: Path) -> None:
    batches = Batches()
    options = {"gradient_clip_val": 1e-3, "accumulate_grad_batches": 2, "limit_val_batches": 0}
    trainer = fit(tmp_path, batches, steps=1, batch_size=4, **options)
    torch.manual_seed(0)
    module = PreferenceModule("tiny", alpha=1.0, beta=0.1, lora_rank=4)
    module.configure_model()
    weights = [p for p in module.policy.parameters() if p.requires_grad]
    losses = [module.loss_of(batch) for batch in batches.kept]
    gradients = torch.autograd.grad(sum(losses, torch.tensor(0.0)) / 2, weights)
    expected = math.sqrt(sum((g.double() ** 2).sum().item() for g in gradients))
    assert (len(losses), expected > 1e-3) == (2, True)
    assert trainer.callback_metrics["train/grad_norm"].item() == pytest.approx(expected, rel=1e-4)


def test_the_norm_is_logged_once_an_optimiser_step(tmp_path: Path) -> None:
    batches, options = Batches(), {"accumulate_grad_batches": 2, "limit_val_batches": 0}
    fit(tmp_path, batches, steps=3, batch_size=4, logger=MetricsLogger(tmp_path), **options)
    with (tmp_path / "metrics.csv").open() as file:
        steps = [row["step"] for row in csv.DictReader(file) if row["train/grad_norm"]]
    assert (len(batches.kept), len(steps), len(set(steps))) == (6, 3, 3)
