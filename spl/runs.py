"""Commands of `spl` as processes: one after the other or several at a time, skipped where their result is there."""

import hashlib
import json
import logging
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from queue import SimpleQueue
from threading import Lock
from types import FrameType
from typing import Any, Literal

import yaml

from spl.disk import append
from spl.types import UserError

log = logging.getLogger(__name__)

FINISHED = "# finished\n"
_CONFIGS = (".yaml", ".yml")
_DATA = (".json", ".jsonl", ".csv", ".parquet", ".gz")
_WIDE = {"COLUMNS": "160"}  # for tables in a log, which has no terminal's width
_TEMPORARY = 75  # EX_TEMPFAIL of sysexits.h: the same again may succeed


def written(value: Any) -> str:
    """A value as it stands on a command line."""
    return value if isinstance(value, str) else json.dumps(value)


def arguments(settings: Mapping[str, Any]) -> list[str]:
    """Settings as options of a command line."""
    return [arg for name, value in settings.items() for arg in (f"--{name}", written(value))]


def file_name(*parts: str) -> str:
    """Labels as one name of a file, without the characters that shells and file systems care about."""
    return "_".join("".join(c if c.isalnum() or c in ".=+-" else "-" for c in part) for part in parts if part)


def _named(value: Any, seen: set[Path]) -> Iterator[Path]:
    """The files that a value of the command line or of a config names, and those that a config among them names."""
    if isinstance(value, Mapping | list):
        for one in (*value, *value.values()) if isinstance(value, Mapping) else value:
            yield from _named(one, seen)
    elif isinstance(value, str) and value[:1] in ("[", "{"):
        yield from _named(_parsed(value), seen)
    elif isinstance(value, str) and value.endswith((*_CONFIGS, *_DATA)):
        path = Path(value).expanduser()
        if path.is_file() and path not in seen:
            seen.add(path)
            yield path
            if path.name.endswith(_CONFIGS):
                yield from _named(_parsed(path.read_text(encoding="utf-8")), seen)


def _parsed(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:  # which the command itself will say
        return None


@cache
def _digest(path: Path, changed: int) -> str:
    """SHA-256 of a file as it is since it changed last."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class Run:
    """A command whose result can be looked for.

    Attributes:
        name: for messages.
        args: of `spl`.
        log: file for what it prints; it begins with the command and, once that has finished, ends with FINISHED.
        result: file that it makes.
        always: run it whatever is there.
    """

    name: str
    args: tuple[str, ...]
    log: Path
    result: Path
    always: bool = False

    @property
    def command(self) -> str:
        return f"spl {shlex.join(self.args)}"

    @property
    def first_line(self) -> str:
        """The command and a digest of the configs and data files that it and its configs name; folders are left out."""
        named = [path for path in _named(list(self.args), set()) if path != self.result]
        digests = [_digest(path, path.stat().st_mtime_ns) for path in named]
        return f"$ {self.command}  # files {hashlib.sha256(''.join(digests).encode()).hexdigest()[:12]}\n"

    def is_finished(self) -> bool:
        """Whether its result is there.

        Raises:
            UserError: it is of another command.
        """
        if self.always or not self.result.exists() or not self.log.exists():
            return False
        said = self.log.read_text(encoding="utf-8", errors="replace")
        if not said.startswith(self.first_line):
            raise UserError(
                f"{self.result} was made by another command, other configs or other data, as {self.log} begins: give "
                "another output folder, or remove that one."
            )
        return said.endswith(FINISHED)


@dataclass(frozen=True)
class Outcome:
    """What became of a run, in how many seconds; what it said last where it failed."""

    state: Literal["finished", "skipped", "failed"]
    seconds: float = 0.0
    said: str = ""


class _Pool:
    """Starts processes, each on a device of its own where there are any, and stops those that run."""

    def __init__(self, jobs: int) -> None:
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = Lock()
        self._stopped = False
        self._devices: SimpleQueue[dict[str, str]] = SimpleQueue()
        for environment in _environments(jobs):
            self._devices.put(environment)

    def run(self, run: Run) -> Outcome:
        if run.is_finished():
            log.info("%s: finished before.", run.name)
            return Outcome("skipped")
        log.info("%s: %s", run.name, run.command)
        environment, began = self._devices.get(), time.perf_counter()
        try:
            earlier = _begun_log(run)
            status = self._wait(run, _WIDE | os.environ | environment)
        finally:
            self._devices.put(environment)
        seconds = time.perf_counter() - began
        if status == 0:
            append(run.log, FINISHED)
            log.info("%s: finished in %.0f s.", run.name, seconds)
            return Outcome("finished", seconds)
        said = _last_said(run.log, earlier)
        log.error("%s: failed with exit status %d (%s): %s", run.name, status, run.log, said)
        return Outcome("failed", seconds, said)

    def _wait(self, run: Run, environment: dict[str, str]) -> int:
        with run.log.open("ab") as file, self._lock:
            if self._stopped:
                return _TEMPORARY
            # A session of its own: Ctrl-C then comes here alone, and is handed on once.
            command = [sys.executable, "-m", "spl.cli", *run.args]
            out: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": subprocess.STDOUT}
            process = subprocess.Popen(command, env=environment, start_new_session=True, **out)
            self._running.add(process)
        try:
            return process.wait()
        finally:
            self._running.discard(process)

    def stop(self) -> None:
        """Ask what runs to save and end; nothing is started any more."""
        with self._lock:
            self._stopped = True
            for process in list(self._running):
                process.terminate()


def check_jobs(jobs: int) -> None:
    """Raise a UserError where nothing could run."""
    if jobs < 1:
        raise UserError(f"jobs is the number of runs at a time and must be 1 or more, but is {jobs}.")


def execute(runs: Sequence[Run], jobs: int = 1) -> list[Outcome]:
    """Run commands, `jobs` at a time; one that fails does not keep the others from running.

    Raises:
        UserError: a result is there that another command made, or jobs is below 1.
        SystemExit: 75, when SIGTERM or SIGUSR1 came; as on Ctrl-C, what ran was asked to save and has ended.
    """
    check_jobs(jobs)
    for run in runs:
        run.is_finished()
    pool = _Pool(jobs)
    with _stoppable(), ThreadPoolExecutor(jobs) as threads:
        futures = [threads.submit(pool.run, run) for run in runs]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.stop()
            threads.shutdown(cancel_futures=True)
            raise


@contextmanager
def _stoppable() -> Iterator[None]:
    def stop(signum: int, frame: FrameType | None) -> None:
        raise SystemExit(_TEMPORARY)

    before = {signum: signal.signal(signum, stop) for signum in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _environments(jobs: int) -> Iterator[dict[str, str]]:
    """What each of the runs at a time has of its own: a GPU, or its share of the cores."""
    if jobs == 1:
        yield {}
        return
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = (
        [str(k) for k in range(torch.cuda.device_count())] if named is None else [d for d in named.split(",") if d]
    )
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // jobs))
    for job in range(jobs):
        device = {"CUDA_VISIBLE_DEVICES": devices[job % len(devices)]} if devices else {}
        yield {"OMP_NUM_THREADS": threads, **device}


def _begun_log(run: Run) -> int:
    """Begin its log with its command, one of another command is written over -> the bytes that stand there already."""
    run.log.parent.mkdir(parents=True, exist_ok=True)
    if run.always or not run.log.exists() or not run.log.read_text("utf-8", "replace").startswith(run.first_line):
        run.log.write_text(run.first_line, encoding="utf-8")
    return run.log.stat().st_size


def _last_said(path: Path, start: int) -> str:
    """The last error in a log from a byte on, or its last line."""
    written = path.read_bytes()[start:].decode(errors="replace")
    lines = [line.strip() for line in written.splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (errors or lines or ["it said nothing"])[-1]
