"""A loss or gradient that is infinite or not a number: seen once a step, alike in all processes, and saved."""

import json
import logging
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torchmetrics import SumMetric

from spl.modules.batch_file import readable, write_batches
from spl.secrets import without_secrets
from spl.types import PreferenceBatch

OnNonFinite = Literal["stop", "skip"]

MOST_IN_A_ROW = 10  # skipped steps; a run that skips more is broken, not unlucky
MOST_SAVED = 10  # steps a process, so that no disk fills

log = logging.getLogger(__name__)


class NonFiniteLossError(RuntimeError):
    """The loss, its gradient, or a weight that a step made, is infinite or not a number."""


class StepGuard:
    """Notes the micro-batches of an optimiser step, and settles what becomes of a step that is not finite.

    A micro-batch's loss that is not finite is made to have no finite gradient either. A NaN outlives every sum, so the
    norm of the reduced gradient, which is computed in any case, tells all processes alike: no message passes between
    them for it, and the device is waited for once a step.

    Args:
        on_non_finite: "stop" raises; "skip" drops the gradient, so that AdamW leaves weights, moments and its count of
            steps as they are (the learning rate's schedule goes on), up to MOST_IN_A_ROW times in a row.
    """

    def __init__(self, on_non_finite: OnNonFinite) -> None:
        self.on_non_finite = on_non_finite
        self.skipped = 0
        self.in_a_row = 0
        self._noted: list[tuple[PreferenceBatch, Tensor]] = []

    def begin(self) -> None:
        """Forget the micro-batches of a step that was never taken."""
        self._noted = []

    def note(self, batch: PreferenceBatch, losses: Tensor, loss: Tensor) -> Tensor:
        """Keep a micro-batch and its losses [B] until the step is settled; gives the loss [] to differentiate."""
        self._noted.append((batch, losses.detach()))
        return loss * torch.where(loss.detach().isfinite(), 1.0, math.nan)

    def settle(self, norm: Tensor, optimizer: torch.optim.Optimizer, module: Any) -> None:
        """Take the step, or leave it out.

        Args:
            norm: of the step's whole gradient, the same in all processes.
            optimizer: about to step.
            module: the LightningModule that trains, with its tokenizer.

        Raises:
            NonFiniteLossError: the norm is not finite, and no step may be left out (any more).
        """
        noted, self._noted = self._noted, []
        if norm.isfinite():
            self.in_a_row = 0
            return
        optimizer.zero_grad(set_to_none=True)
        self.skipped += 1
        self.in_a_row += 1
        sentence = f"{_what(noted, module.global_step)} {_save(noted, module)}"
        if self.on_non_finite == "stop":
            raise NonFiniteLossError(
                f"{sentence} Checkpoints saved before are kept. Lower model.lr, or set trainer.gradient_clip_val, or "
                "look at these rows; model.on_non_finite skip leaves such steps out."
            )
        if not all_agree(finite_weights(module)):
            raise NonFiniteLossError(f"{sentence} The weights are not finite either: no later step can be.")
        if self.in_a_row > MOST_IN_A_ROW:
            raise NonFiniteLossError(f"{sentence} It is the {self.in_a_row}th in a row, and no more are skipped.")
        level = logging.WARNING if self.skipped == 1 else logging.INFO
        log.log(level, "%s The step is skipped (%d so far).", sentence[0].upper() + sentence[1:], self.skipped)

    def state_dict(self) -> dict[str, int]:
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]


class HeldOutGuard(nn.Module):
    """Counts and names the held-out examples without a finite loss, whose batches have no part in the means."""

    def __init__(self) -> None:
        super().__init__()
        self.count = SumMetric()
        self._rows: list[str] = []
        self._found = False  # a finite batch

    def is_finite(self, batch: PreferenceBatch, losses: Tensor) -> bool:
        """Whether all losses [B] of a batch are."""
        bad = bad_rows(batch.rows, losses)
        self._rows += bad
        self.count.update(len(bad))
        self._found |= not bad
        return not bad

    def end(self) -> float:
        """How many examples were left out in all processes; begins anew.

        Raises:
            NonFiniteLossError: no batch of any process was finite.
        """
        count, rows, found = int(self.count.compute()), self._rows, self._found
        self.count.reset()
        self._rows, self._found = [], False
        if count:
            named = few(rows)
            if all_agree(not found):
                raise NonFiniteLossError(f"the loss is finite on none of the held-out batches: not on {named}.")
            log.warning("The loss of %d held-out examples is not finite: %s. Their batches are left out.", count, named)
        return float(count)


def check_start(module: Any, finite: bool, batch: PreferenceBatch, name: str) -> None:
    """What was found of a batch before step 1; every process must ask.

    Raises:
        NonFiniteLossError: it is not finite and no weights can be either, or such a step is not to be skipped.
    """
    if all_agree(finite):
        return
    rows = few([] if finite else list(batch.rows))
    if not all_agree(finite_weights(module)):
        raise NonFiniteLossError(
            f"the loss is not finite before step 1, since the weights of {module.hparams['model']} are not: expected "
            "a model whose weights are numbers; load another, or its files anew."
        )
    sentence = f"the loss of the {name} batch is not finite before step 1, on one or more of {rows}"
    if module.guard.on_non_finite == "stop":
        raise NonFiniteLossError(f"{sentence}: look at these rows; model.on_non_finite skip leaves them out.")
    log.warning("%s; steps on them will be skipped.", sentence[0].upper() + sentence[1:])


def bad_rows(rows: tuple[str, ...], losses: Tensor) -> list[str]:
    """The rows whose losses [B] are not finite."""
    return [row for row, sound in zip(rows, losses.isfinite().tolist(), strict=True) if not sound]


def few(rows: list[str]) -> str:
    """Rows of all processes in a sentence, the first few by name; every process must ask."""
    if dist.is_initialized():
        parts: list[list[str]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(parts, rows)
        rows = [row for part in parts for row in part]
    more = f" and {len(rows) - 5:,} more" if len(rows) > 5 else ""
    return "; ".join(rows[:5]) + more


def all_agree(holds: bool) -> bool:
    """Whether it holds in every process; every process must ask."""
    if not dist.is_initialized():
        return holds
    answers = [False] * dist.get_world_size()
    dist.all_gather_object(answers, holds)
    return all(answers)


def finite_weights(module: nn.Module) -> bool:
    """Of what this process holds."""
    return all_finite(module.parameters())


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Of what this process holds."""
    return all(bool((t.to_local() if isinstance(t, DTensor) else t).isfinite().all()) for t in tensors)


def _what(noted: list[tuple[PreferenceBatch, Tensor]], step: int) -> str:
    named = few([row for batch, losses in noted for row in bad_rows(batch.rows, losses)])
    if named:
        return f"the loss is not finite at step {step} on {named}."
    everything = few([row for batch, _ in noted for row in batch.rows])
    return f"the gradient is not finite at step {step} of {everything}, though every loss is."


def _save(noted: list[tuple[PreferenceBatch, Tensor]], module: Any) -> str:
    """Keep a step's micro-batches in the run folder; says where."""
    folder = Path(module.trainer.default_root_dir) / "non_finite"
    rank, step = module.global_rank, module.global_step
    path = folder / f"step={step}-rank={rank}.safetensors"
    if len({*folder.glob(f"step=*-rank={rank}.safetensors")} - {path}) >= MOST_SAVED:
        return f"{MOST_SAVED} such steps are saved in {folder}, so this one is not."
    facts = {
        "step": step,
        "rank": rank,
        "micro_batches": without_secrets([readable(batch, losses, module.tokenizer) for batch, losses in noted]),
    }
    try:
        write_batches(path, [batch for batch, _ in noted])
        path.with_suffix(".json").write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        return f"Its batch could not be saved in {folder}: {error}."
    return f"Its batch is saved in {folder} as step={step}-*."
