"""Before step 1: what is about to be trained, on what, at what cost; the longest batch as a check; held-out figures."""

import logging
import math
import resource
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from spl.secrets import redact
from spl.types import PreferenceBatch, UserError

log = logging.getLogger(__name__)


class StartReport(Callback):
    """Prints the start-up report after running the longest batch forward and backward, which is where memory peaks.

    Args:
        check_longest: run the longest batch before step 1, so that it does not end the run after hours.
    """

    def __init__(self, check_longest: bool = True) -> None:
        self.check_longest = check_longest

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module: Any = pl_module
        data: Any = getattr(trainer, "datamodule", None)
        if data is None or not hasattr(module, "start_check"):
            return
        longest = _to(data.longest_batch(), module)
        rows = module.describe() | data.describe() | _schedule(trainer, module)
        rows["longest batch"] = f"{longest.num_tokens:,} distinct tokens"
        memory = module.peak_memory(longest)
        rows["peak memory"] = (
            f"about {_size(memory.total)} by estimate, {_size(memory.working)} of it for the longest batch"
        )
        rows["outputs"] = trainer.default_root_dir
        if trainer.is_global_zero:
            _show(rows, data.decoded_example())
        if trainer.global_step == 0:
            with trainer.precision_plugin.forward_context():
                _check_first(module, _to(data.first_batch(), module))
            if self.check_longest:
                _run(module, longest)
                log.info("The longest batch ran forward and backward; %s at most so far.", _size(_peak()))


def _check_first(module: Any, batch: PreferenceBatch) -> None:
    """Say what the first loss will be, and whether the policy starts as its reference."""
    expected, gap, note = module.start_check(batch)
    module.check_start(math.isfinite(expected), batch, "first")
    agree = "" if gap is None else f"; policy and reference agree to {gap:.1g} nats a token"
    log.info("Expected first loss: %.4f (%s)%s.", expected, note, agree)
    if gap is not None and gap > 1e-3:
        log.warning("Policy and reference differ by %.2g nats a token before step 1: they should be one.", gap)


def _schedule(trainer: Trainer, module: Any) -> dict[str, str]:
    hp = module.hparams
    device = f"{trainer.world_size} x {trainer.strategy.root_device.type}"
    return {
        "training": f"{trainer.estimated_stepping_batches:,} steps on {device}, "
        f"{trainer.accumulate_grad_batches} batches accumulated, precision {trainer.precision}",
        "learning rate": f"{hp['lr']:g}, {hp['schedule']}, warm-up {hp['warmup']:g}",
    }


def _to(batch: PreferenceBatch, module: LightningModule) -> PreferenceBatch:
    moved: PreferenceBatch = module.transfer_batch_to_device(batch, module.device, 0)
    return moved


def _run(module: Any, batch: PreferenceBatch) -> None:
    """Forward and backward of one batch with room taken for gradients and AdamW's moments; leaves nothing behind.

    Raises:
        UserError: it does not fit.
    """
    trained = [p for p in module.parameters() if p.requires_grad]
    try:
        room = [torch.empty_like(p) for p in trained for _ in range(3)]
        with module.trainer.precision_plugin.forward_context(), torch.enable_grad():
            loss = module.loss_of(batch)
            loss.backward()
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"the longest batch ({batch.num_tokens:,} distinct tokens) does not fit in memory: set data.max_tokens "
            "below that, or model.gradient_checkpointing to true, or lower data.max_length."
        ) from error
    del room
    module.check_start(bool(loss.isfinite()), batch, "longest")
    module.zero_grad(set_to_none=True)


def _peak() -> float:
    """Most bytes held so far: of the CUDA device, or of this process."""
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def _size(count: float) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def _show(rows: dict[str, str], example: str) -> None:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column()
    for name, value in rows.items():
        table.add_row(name, redact(value))
    console = Console()
    console.print(Panel(table, title="Soft Preference Learning", title_align="left"))
    console.print(Panel(Text(example), title="One example; «the scored span»", title_align="left"))


class StartEndValidation(Callback):
    """Validates before the first step and after the last, so that every curve starts at 0 and ends at the end.

    A run that goes on from a step which a validation was to follow begins with it.
    """

    def __init__(self) -> None:
        self.last_step = -1
        self._due = False  # a validation, after the step that ends with this batch or did before
        self._epoch = 0  # of that step

    def state_dict(self) -> dict[str, Any]:
        return {"due": self._due, "epoch": self._epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._due, self._epoch = state_dict["due"], state_dict["epoch"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step == 0:
            self._validate(trainer)
        elif self._due:
            progress = trainer.fit_loop.epoch_progress.current
            present, progress.completed = progress.completed, self._epoch  # Lightning may have closed the epoch
            self._validate(trainer)
            progress.completed = present

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        loop = trainer.fit_loop  # it knows by now; a checkpoint may be taken as soon as the batch ends
        if not loop.epoch_loop._should_accumulate():
            assert loop._data_fetcher is not None
            self._due = loop.epoch_loop._should_check_val_fx(loop._data_fetcher)
            self._epoch = trainer.current_epoch

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.last_step, self._due = trainer.global_step, False

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.last_step != trainer.global_step:
            self._validate(trainer)

    def _validate(self, trainer: Trainer) -> None:
        if trainer.enable_validation:
            first = trainer._logger_connector._first_loop_iter
            trainer.validating = True
            trainer.fit_loop.epoch_loop.val_loop.restarting = False  # it begins at its first batch
            trainer.fit_loop.epoch_loop.val_loop.run()
            trainer.training = True
            trainer._logger_connector._first_loop_iter = first
