"""What `--resume` goes on from, and whether it is still the same run."""

import logging
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from lightning import Trainer
from lightning.pytorch.loops.fit_loop import _FitLoop

from spl.checkpoints import CheckpointError, peek, verify
from spl.types import UserError

log = logging.getLogger(__name__)

_FREE = ("trainer.logger", "trainer.enable_progress_bar", "data.num_workers", "checkpoint.")
"""Settings that change no number of a run."""


class RunFinishedError(Exception):
    """A run that is to go on has come to its end before."""


def newest_good(folder: Path) -> Path | None:
    """The newest checkpoint that is whole and intact; None in a folder without any. Others are set aside and told of.

    Raises:
        UserError: there are some, but none is good.
    """
    found: list[tuple[int, Path]] = []
    refused: list[tuple[Path, str]] = []
    for path in sorted(path for path in folder.glob("*.ckpt") if not path.is_symlink()):
        try:
            found.append((_step(path), path))
        except CheckpointError as error:
            refused.append((path, str(error)))
    for _, path in sorted(found, reverse=True):
        try:
            verify(path)
        except CheckpointError as error:
            refused.append((path, str(error)))
            continue
        _set_aside(refused)
        return path
    if refused:
        raise UserError(f"no checkpoint to go on from: {refused[0][1]} To begin anew, give another --output.")
    return None


def _step(path: Path) -> int:
    try:
        return int(peek(path)["global_step"])
    except CheckpointError:
        raise
    except (LookupError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is of no run.") from error


def _set_aside(refused: list[tuple[Path, str]]) -> None:
    """Out of the way of checkpoints to come, which would count them in."""
    for path, reason in refused:
        log.warning("%s It is set aside as %s.damaged, and an older one is taken.", reason, path.name)
        with suppress(FileNotFoundError):  # another process of the run was faster
            path.replace(path.with_name(f"{path.name}.damaged"))


def changes(config: Path, settings: Mapping[str, Any], allowed: bool) -> list[str]:
    """How settings differ from those that a run was begun with.

    Raises:
        UserError: one is another, which is not allowed; names each. Or the file is of no run.
    """
    try:
        before = yaml.safe_load(config.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    except (yaml.YAMLError, ValueError, OSError):
        before = None
    if not (isinstance(before, dict) and before.keys() >= {"model", "data", "trainer"}):
        raise UserError(
            f"{config} holds no settings of a run, so {config.parent} is not the folder of one to go on with."
        )
    was, now = _flat(before), _flat(settings)
    names = [name for name in was if name in now and was[name] != now[name] and not name.startswith(_FREE)]
    found = [f"{name}: {was[name]} -> {now[name]}" for name in names]
    if found and not allowed:
        raise UserError(
            f"the run in {config.parent} was begun with other settings ({'; '.join(found)}): give the old ones, or "
            "--allow_changes to go on with the new."
        )
    for change in found:
        log.warning("Going on with another setting: %s.", change)
    return found


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as GROUP.NAME. One that is a dict itself is one value: of such any part may come or go."""
    flat: dict[str, Any] = {}
    for group, value in settings.items():
        flat |= {f"{group}.{name}": v for name, v in value.items()} if isinstance(value, dict) else {group: value}
    return flat


class _WholeFit(_FitLoop):
    """Ends a run that was stopped after its last step as any other; Lightning's own would leave the end out."""

    @property
    def skip(self) -> bool:
        return bool(self.trainer.limit_train_batches == 0)

    def on_run_start(self) -> None:
        super().on_run_start()
        if self.trainer.global_step and self.done:
            self.epoch_loop._batches_that_stepped += 1  # the last step's own; what follows is logged after it


def end_whole(trainer: Trainer) -> None:
    """Let a trainer that goes on from its last step still do what follows it: validation, samples, export."""
    loop = _WholeFit(trainer, trainer.fit_loop.min_epochs, trainer.fit_loop.max_epochs)
    loop.epoch_loop = trainer.fit_loop.epoch_loop
    trainer.fit_loop = loop
