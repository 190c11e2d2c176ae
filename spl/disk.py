"""Files that are whole or not there, whenever a process is killed or the power fails."""

import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

_WRITING = ".writing-"  # prefix of names that are not whole yet


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write to, which takes the place of `path` when the block ends and leaves no trace when it fails.

    Whatever happens, power loss included, `path` is what it was before or the new file in whole.

    Raises:
        OSError: it cannot be written; `path` is what it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(_WRITING + secrets.token_hex(8))  # no suffix, or it could be taken for what it becomes
    try:
        with part.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    sync(path.parent)


def append(path: Path, text: str) -> None:
    """Add lines to a file, all of them or none.

    Raises:
        OSError: it cannot be written; it is what it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        size = file.tell()
        try:
            file.write(text.encode())
            file.flush()
        except OSError:
            os.truncate(path, size)
            raise


def is_held(file: IO[Any] | int) -> bool:
    """Whether another process holds a file; if not, this one does, for as long as it lives and keeps it open."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False  # a file system without locks
    return False


@contextmanager
def holding(file: IO[Any] | int) -> Iterator[None]:
    """Hold a file during a block, as soon as no other process does."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:  # a file system without locks
        yield
        return
    try:
        yield
    finally:
        fcntl.flock(file, fcntl.LOCK_UN)


def sync(path: Path) -> None:
    """Bring a file's content to the disk, or a folder's renamed, new and removed names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sweep(folder: Path) -> None:
    """Remove what writers that were killed have left in a folder in which nobody writes now."""
    for left in folder.glob(f"{_WRITING}*"):
        shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
