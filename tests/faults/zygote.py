"""Starts runs of `spl` by the dozen: a process that has imported everything forks a real one for each.

It reads lines of JSON from its standard input and answers each with one: {"run": arguments, "env": ..., "log": file,
"hook": ...} with the process's id, {"wait": id} with its exit status, negative for the signal that killed it.
"""

import json
import os
import resource
import sys
import time
from typing import Any

from lightning.pytorch.utilities import rank_zero_only

import spl.callbacks.checkpoints
import spl.commands
import spl.evaluation.sample  # noqa: F401  everything that a run imports
from spl import cli, disk


def main() -> None:
    for line in sys.stdin:
        request = json.loads(line)
        if "run" in request:
            answer = os.fork() or child(request)
        else:
            answer = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        sys.stdout.write(json.dumps([answer, usage.ru_utime + usage.ru_stime]) + "\n")
        sys.stdout.flush()


def child(request: dict[str, Any]) -> int:
    """Run a command in a process group of its own, and never come back."""
    status = 1
    try:
        os.setpgid(0, 0)
        os.environ |= request["env"]
        rank_zero_only.rank = int(os.environ.get("RANK", 0))  # found when it was imported
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(log, stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        if delay := request.get("slow_writes"):
            slow_writes(delay)
        cli.main(request["run"])
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def slow_writes(seconds: float) -> None:
    """Let every fsync take long, so that a kill hits files that are half there."""
    fsync = os.fsync

    def slow(handle: int) -> None:
        time.sleep(seconds)
        fsync(handle)

    disk.os.fsync = slow  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()
