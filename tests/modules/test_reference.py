"""The reference by itself: which model speaks for it, when one is loaded, and what it does with numbers kept."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from spl.data.collate import EncodedExample, collate
from spl.logprobs.cache import LogpCache
from spl.logprobs.sequence import sequence_logps
from spl.models import fingerprint, load_model, load_policy
from spl.modules.reference import Reference
from spl.types import Comparison, PreferenceBatch, UserError

HARD = (Comparison(0, 1, 1.0),)
BATCH = collate(
    [
        EncodedExample(
            ((256, 260, 65, 66, 257), (256, 260, 65, 67, 68, 257)), (3, 3), HARD, None, "pairs.jsonl, row 1"
        ),
        EncodedExample(((256, 260, 70, 71, 257), (256, 260, 70, 72, 257)), (3, 3), HARD, None, "pairs.jsonl, row 2"),
        EncodedExample(((256, 260, 80, 81, 257), (256, 260, 80, 82, 257)), (3, 3), HARD, None, "pairs.jsonl, row 3"),
    ]
)
RANKS = pytest.mark.parametrize("rank", [4, 0], ids=["lora", "full"])


def moved(model: nn.Module) -> nn.Module:
    """As if trained: every weight that trains off its start."""
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.05 * torch.randn(p.shape, generator=generator)
    return model


class Scorer:
    """The plain definition; notes how many responses it scored, and under which model."""

    def __init__(self) -> None:
        self.calls: list[int] = []
        self.models: list[nn.Module] = []

    def __call__(self, batch: PreferenceBatch, model: nn.Module) -> Tensor:
        self.calls.append(batch.num_responses)
        self.models.append(model)
        with torch.no_grad():
            return sequence_logps(model, batch).logps


def start(batch: PreferenceBatch = BATCH) -> Tensor:
    with torch.no_grad():
        return sequence_logps(load_model("tiny"), batch).logps


def filled(folder: Path, off: dict[int, float] | None = None, only: slice = slice(None)) -> LogpCache:
    """A cache of the right numbers of BATCH, but for what is to be off."""
    numbers = start()
    for response, gap in (off or {}).items():
        numbers[response] += gap
    cache = LogpCache(folder, fingerprint(load_model("tiny")), "float32")
    cache.add(BATCH.response_keys[only], numbers[only].tolist())
    cache.write()
    return LogpCache(folder, cache.weights, "float32")


def reference(rank: int, cache: LogpCache | None, reload: Callable[[], nn.Module] | None = None) -> Reference:
    return Reference(
        load_policy("tiny", lora_rank=rank), reload or (lambda: load_policy("tiny", lora_rank=rank)), cache
    )


def asked(of: Reference, score: Scorer, untrained: bool = True, batch: PreferenceBatch = BATCH) -> Tensor:
    return of.logps(batch, score, bool, untrained)


@RANKS
def test_without_a_cache_it_stays_the_start(rank: int) -> None:
    ours, score = reference(rank, None), Scorer()
    assert (ours.model is None) == (rank > 0)
    moved(ours.policy)
    for _ in range(2):
        torch.testing.assert_close(asked(ours, score, untrained=False), start(), atol=1e-5, rtol=0)
    assert score.calls == [6, 6]
    assert ours.needs_copy(BATCH) == (rank == 0)
    if ours.model is not None:
        assert not ours.model.training
        assert not any(p.requires_grad for p in ours.model.parameters())
    assert (sequence_logps(ours.policy, BATCH).logps - start()).abs().max() > 0.1


@RANKS
def test_a_missing_number_is_computed_once_by_the_start(tmp_path: Path, rank: int) -> None:
    loads: list[nn.Module] = []

    def reload() -> nn.Module:
        loads.append(load_policy("tiny", lora_rank=rank))
        return loads[-1]

    ours, score = reference(rank, filled(tmp_path, only=slice(0, 0)), reload), Scorer()
    assert ours.model is None
    assert ours.needs_copy(BATCH) == (rank == 0)
    moved(ours.policy)
    first = asked(ours, score, untrained=False)
    torch.testing.assert_close(first, start(), atol=1e-5, rtol=0)
    assert ours.needs_copy(BATCH) == (rank == 0)  # it was loaded
    ours.end_epoch()
    assert (ours.model is None) == (rank > 0)  # this epoch needed it
    ours.end_epoch()
    assert ours.model is None
    assert torch.equal(asked(ours, score, untrained=False), first)
    assert score.calls[0] == 6
    assert 6 not in score.calls[1:]
    assert len(loads) == (rank == 0)
    if ours.model is not None:
        assert not ours.model.training
        assert not any(p.requires_grad for p in ours.model.parameters())


@RANKS
def test_numbers_kept_are_checked_once_and_looked_up(tmp_path: Path, rank: int) -> None:
    ours, score = reference(rank, filled(tmp_path)), Scorer()
    for _ in range(3):
        found = asked(ours, score)
        assert torch.equal(found, start())
        assert found.dtype == torch.float32
    assert score.calls == [4]  # the responses of two examples
    assert score.models == [ours.policy]
    assert ours.model is None


def test_numbers_kept_hold_while_the_policy_moves(tmp_path: Path) -> None:
    adapters, score = reference(4, filled(tmp_path)), Scorer()
    moved(adapters.policy)
    assert torch.equal(asked(adapters, score, untrained=False), start())
    assert score.calls == [4]
    whole, score = reference(0, filled(tmp_path)), Scorer()
    moved(whole.policy)
    assert torch.equal(asked(whole, score, untrained=False), start())
    assert (score.calls, whole.model) == ([], None)  # no model of the start is at hand to check them by


@pytest.mark.parametrize("gap", [0.1, -3.0])
@pytest.mark.parametrize(
    ("rank", "untrained"), [(4, True), (4, False), (0, True)], ids=["lora", "lora, resumed", "full"]
)
def test_a_wrong_number_is_found(tmp_path: Path, rank: int, untrained: bool, gap: float) -> None:
    ours = reference(rank, cache := filled(tmp_path, off={2: gap}))
    if not untrained:
        moved(ours.policy)
    kept, right = start()[2] + gap, start()[2]
    with pytest.raises(UserError, match=r"pairs\.jsonl, row 2") as raised:
        asked(ours, Scorer(), untrained)
    said = str(raised.value)
    assert str(cache.folder) in said
    assert f"says {kept:.3f} nats" in said
    assert f"the model {right:.3f}" in said
    assert "--reference.cache none" in said
    assert "\n" not in said


def test_a_wrong_number_is_found_where_the_start_is_loaded_later(tmp_path: Path) -> None:
    ours = reference(0, filled(tmp_path, off={0: 0.5}))
    ours.model = load_model("tiny")
    moved(ours.policy)
    with pytest.raises(UserError, match="row 1"):
        asked(ours, Scorer(), untrained=False)


@RANKS
def test_a_wrong_number_beside_a_missing_one_is_found(tmp_path: Path, rank: int) -> None:
    ours = reference(rank, filled(tmp_path, off={0: 0.5}, only=slice(0, 4)))
    with pytest.raises(UserError, match="row 1"):
        for _ in range(2):
            asked(ours, Scorer())


def test_half_precision_is_allowed_its_rounding(tmp_path: Path) -> None:
    def ours(gap: float) -> Reference:
        policy = load_policy("tiny", lora_rank=4, dtype="bfloat16")
        cache = LogpCache(tmp_path, fingerprint(policy), "bfloat16")
        cache._known = dict(zip(BATCH.response_keys, (start() + gap).tolist(), strict=True))
        return Reference(policy, lambda: policy, cache)

    assert torch.equal(asked(ours(0.2), Scorer()), start() + 0.2)
    with pytest.raises(UserError, match="row"):
        asked(ours(1.0), Scorer())


@RANKS
def test_where_another_process_lacks_a_number_all_score_and_keep_their_own(tmp_path: Path, rank: int) -> None:
    ours, score = reference(rank, filled(tmp_path, off={5: 5e-4})), Scorer()
    said: list[bool] = []
    found = ours.logps(BATCH, score, lambda known: said.append(known) or False, untrained=True)
    assert said == [True]
    assert score.calls == [6]
    assert found[5] == start()[5] + 5e-4  # another number than was computed


def test_files_that_changed_since_the_start_are_no_reference(tmp_path: Path) -> None:
    ours = reference(0, filled(tmp_path, only=slice(0, 4)), lambda: moved(load_policy("tiny", lora_rank=0)))
    with pytest.raises(UserError, match="the model's files changed during the run"):
        asked(ours, Scorer())


@RANKS
def test_its_form_is_told(tmp_path: Path, rank: int) -> None:
    form = "the policy with its adapters off" if rank else "a frozen copy of the starting policy"
    assert reference(rank, None).describe() == form
    kept = reference(rank, filled(tmp_path)).describe()
    assert f"6 numbers kept in {tmp_path}" in kept
    assert ("adapters off" in kept) == (rank > 0)
    assert "a frozen copy" not in kept
