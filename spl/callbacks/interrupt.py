"""Signals that ask a run to stop."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Ctrl-C; what spot instances and schedulers send; what SLURM sends ahead where it is asked to."""
_TEMPORARY = 75  # EX_TEMPFAIL of sysexits.h: the same again may succeed


class InterruptedTrainingError(BaseException):
    """A run was asked to stop. No Exception, or code that expects such of a model could take it for one.

    Args:
        signum: the signal.
        step: the optimiser step that was finished last; None before training.
    """

    def __init__(self, signum: int, step: int | None = None) -> None:
        super().__init__()
        self.signum = signum
        self.step = step
        self.folder: Path | None = None  # of the run
        self.checkpoint: Path | None = None  # of that step
        self.unsaved = ""  # why there is no checkpoint of the step

    def __str__(self) -> str:
        when = "before training" if self.step is None else f"after step {self.step:,}"
        kept = f"; saved {self.checkpoint}" if self.checkpoint else f"; {self.unsaved}" if self.unsaved else ""
        return f"stopped by {signal.Signals(self.signum).name} {when}{kept}"

    @property
    def exit_code(self) -> int:
        """130 after Ctrl-C, else 75, which tells a job script to run the command again with --resume."""
        return 128 + signal.SIGINT if self.signum == signal.SIGINT else _TEMPORARY


def stop_at_once(signum: int, frame: FrameType | None) -> None:
    """A handler for while nothing is to be saved.

    Raises:
        InterruptedTrainingError: always.
    """
    raise InterruptedTrainingError(signum)


@contextmanager
def stoppable() -> Iterator[None]:
    """Have the signals that would kill the process raise InterruptedTrainingError in a block."""
    before = {signum: signal.signal(signum, stop_at_once) for signum in (signal.SIGTERM, signal.SIGUSR1)}
    hook, sys.unraisablehook = sys.unraisablehook, _try_again
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _try_again(unraisable: Any) -> None:
    """A signal that came in a destructor, where nothing can be raised, comes again."""
    if isinstance(stop := unraisable.exc_value, InterruptedTrainingError):
        threading.Timer(0.02, os.kill, (os.getpid(), stop.signum)).start()
    else:
        sys.__unraisablehook__(unraisable)


class Signals:
    """Notes a signal for the step to finish, or raises while nothing would be lost; the next one is not held back.

    Attributes:
        received: the signal, once there was one.
        interruptible: raise InterruptedTrainingError at once.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.interruptible = False
        self._before: dict[int, Any] = {}

    def listen(self) -> None:
        """Take the signals over."""
        self.received, self.interruptible = None, False
        self._before = self._before or {signum: signal.signal(signum, self._note) for signum in STOPPING}

    def restore(self) -> None:
        """Give them back."""
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        self._before = {}

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.received = signum
        self.restore()
        if self.interruptible:
            stop_at_once(signum, frame)
        # No logging, which may be at work where the signal came.
        os.write(
            2, f"{signal.Signals(signum).name}: finishing the step, then saving. Again to stop at once.\n".encode()
        )
