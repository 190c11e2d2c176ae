"""The processes of one run when one of them fails: nobody is left waiting for it, and what it said stays the last word.

An error of one process alone, such as a broken file that no other reads, finds the others in a collective.
"""

import subprocess
import time
from contextlib import suppress
from typing import Any

from lightning import Trainer

_GRACE = 5.0  # seconds for processes that end by themselves, as all do after a signal
_GONE = ("closed by peer", "reset by peer", "Broken pipe", "remote process exited")  # of gloo and NCCL


def end_children(trainer: Trainer) -> None:
    """End the processes that this one has launched, now that it has failed; they may be waiting for it for ever."""
    launcher: Any = trainer.strategy.launcher
    launched: list[subprocess.Popen[bytes]] = getattr(launcher, "procs", [])
    children, deadline = launched.copy(), time.monotonic() + _GRACE
    launched.clear()  # Lightning's observer, whose list it is, would kill this process as soon as one of them ends
    try:
        with suppress(subprocess.TimeoutExpired):
            for child in children:
                child.wait(max(deadline - time.monotonic(), 0))
    finally:
        for child in children:
            child.kill()


def lost_process(error: BaseException) -> str:
    """What to say of an error that tells of another process's end; nothing of another."""
    if not any(said in str(error) for said in _GONE):
        return ""
    return "another process of the run has ended, and this one cannot go on alone: that one's message says why."
