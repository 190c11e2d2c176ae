"""What every measurement writes and every report reads: JSON lines, a header first, then records of one form.

Programs outside of training know each other by these files alone. A record is a plain dict with a `kind`:

- `prompt`: item, messages. An item is the id of a prompt, a problem or a question.
- `sample`: item, index, text, num_tokens, finish ("stop" or "length"), token_ids, and of the policy's own law at
  temperature 1 along them logp and entropy (the next-token entropies added up), nats; null where unknown.
- `item`: policy, setting, train_seed, item, group, values {name: number}. One an item: what intervals resample.
  A group may be a part of another: "gsm8k, hard" of "gsm8k".
- `estimate`: policy, setting, name, group, value, low, high, num. Over items and training seeds, a 95 % interval.
- `curve`: policy, setting, name, group, x, y, low, high, weight, x_name, y_name.
- `shares`: policy, item, question, options, people, model, mass.
- `example`: policy, setting, item, prompt, texts.
- `note`: text. A caveat that a report must show.

A policy is named by its label ("dpo", "spl 1.2"), a way of decoding by its own ("t 1", "top_p 0.9"), and a training run
of the policy by its seed. A number that is missing or not finite is null.
"""

import gzip
import hashlib
import json
import math
import os
import platform
import weakref
import zlib
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any, Self

from spl.disk import append, holding, is_held, replacing
from spl.types import UserError

Record = dict[str, Any]

FORM = 1
_PACKAGES = ("spl", "torch", "transformers", "numpy")
# What may differ when a program goes on with its file.
_MAY_DIFFER = ("created", "versions", "num_items")
_BEGINNING = b'{"kind": "header"'


class ResultsError(UserError):
    """A file is no results file, or another one than is asked for."""


def header(program: str, settings: Record, inputs: Sequence[Path] = (), seed: int | None = None, **more: Any) -> Record:
    """The first record of a file: what was run on what, by which versions.

    Args:
        program: "sample", "best-of-n" and so on.
        settings: as given to the program.
        inputs: files that were read; their SHA-256 is kept.
        seed: of the program's random numbers.
        more: of the program's own, such as `policy`, `setting` and `train_seed`.
    """
    return {
        "kind": "header",
        "form": FORM,
        "program": program,
        "settings": settings,
        "inputs": {str(path): digest(path) for path in inputs},
        "seed": seed,
        "versions": versions(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        **more,
    }


def versions() -> dict[str, str]:
    """Of Python and the packages that numbers depend on."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def digest(path: Path) -> str:
    """SHA-256 of a file, or of the names and contents of a folder's files."""
    if path.is_file():
        with path.open("rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest()
    files = sorted(file for file in path.rglob("*") if file.is_file())
    named = [f"{file.relative_to(path)} {digest(file)}" for file in files]
    return hashlib.sha256("\n".join(named).encode()).hexdigest()


@dataclass(frozen=True)
class Results:
    """A file that was read.

    Attributes:
        header: its first record.
        records: all others, in order.
        path: where it lies.
    """

    header: Record
    records: list[Record]
    path: Path

    def of(self, kind: str) -> list[Record]:
        """The records of a kind."""
        return [record for record in self.records if record["kind"] == kind]


def write(path: Path, first: Record, records: Iterable[Record]) -> None:
    """Write a whole file, which is there whole or not at all; gzipped where its name says so."""
    content = "".join(map(_line, (first, *records))).encode()
    with replacing(path) as file:
        file.write(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)


def read(path: Path) -> Results:
    """Read a file, perhaps gzipped.

    Raises:
        ResultsError: it is no results file; the text names file and line.
    """
    try:
        with _opened(path) as file:
            return _parsed(path, file.read())
    except (OSError, EOFError, zlib.error) as error:
        raise ResultsError(f"{path} cannot be read: {error}.") from error


def _opened(path: Path) -> IO[bytes] | gzip.GzipFile:
    """A file's content, unpacked where it is gzipped, whatever its name."""
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    return gzip.open(path, "rb") if packed else path.open("rb")


def _parsed(path: Path, content: bytes) -> Results:
    try:
        lines = content.decode().split("\n")
    except UnicodeDecodeError as error:
        raise ResultsError(f"{path} cannot be read: {error}.") from error
    records = [_record(path, number, line) for number, line in enumerate(lines, 1) if line]
    if not records or records[0]["kind"] != "header":
        raise ResultsError(f"{path} is no results file: its first line is no header, as spl sample and evaluate write.")
    if records[0].get("form") != FORM:
        raise ResultsError(f"{path} has form {records[0].get('form')}, but this version reads form {FORM}.")
    if not isinstance(records[0].get("program"), str):
        raise ResultsError(f"{path}: its header names no program, as that of spl sample or spl evaluate does.")
    return Results(records[0], records[1:], path)


def find(paths: Iterable[Path]) -> list[Path]:
    """Results files: those named, and all those under the folders named, in order of their names.

    Raises:
        ResultsError: there is no such file or folder, or none in a folder.
    """
    found: list[Path] = []
    for path in paths:
        inside = sorted(p for p in path.rglob("*.jsonl*") if is_results(p)) if path.is_dir() else [path]
        if not path.exists() or not inside:
            raise ResultsError(f"no results in {path}: expected files that spl sample or spl evaluate wrote.")
        found += inside
    return list(dict.fromkeys(found))


def is_results(path: Path) -> bool:
    """Whether a file begins with a header."""
    try:
        with _opened(path) as file:
            return bool(_record(path, 1, file.readline(1_000_000).decode())["kind"] == "header")
    except (OSError, EOFError, ValueError, zlib.error):
        return False


class Appender:
    """A file that grows while a program runs, and is gone on with after the program was killed; a context manager.

    Args:
        path: of the file; it is begun if there is none.
        first: its header. A file that is there must have been begun with the same settings and inputs.
        alone: hold the file until it is closed, against a second program that would write the same.

    Attributes:
        records: those found in the file.

    Raises:
        ResultsError: the file is something else, which is left as it is, or was begun otherwise, or is held.
    """

    def __init__(self, path: Path, first: Record, alone: bool = True) -> None:
        self.path = path
        self.records: list[Record] = []
        if path.suffix == ".gz":
            raise ResultsError(f"{path} grows as it is written, which a gzipped file cannot: name it without .gz.")
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        self.close = weakref.finalize(self, os.close, handle)
        try:
            if alone and is_held(handle):
                raise ResultsError(f"another program is writing {path}: wait for its end, or give another output.")
            with nullcontext() if alone else holding(handle):  # several that share a file begin it once
                self._begin(first)
        except BaseException:
            self.close()
            raise

    def _begin(self, first: Record) -> None:
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if whole:
            before = _parsed(self.path, whole)
            _compare(self.path, before.header, first)
            self.records = before.records
            if len(whole) < len(content):
                os.truncate(self.path, len(whole))  # a torn last line, of a program that was killed
        elif _BEGINNING.startswith(content[: len(_BEGINNING)]):
            os.truncate(self.path, 0)
            append(self.path, _line(first))
        else:
            raise ResultsError(f"{self.path} is another file: give another output.")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def add(self, records: Iterable[Record]) -> None:
        """Write records to the end, all in one go."""
        append(self.path, "".join(map(_line, records)))


def _compare(path: Path, before: Record, now: Record) -> None:
    before, now = json.loads(_line(before)), json.loads(_line(now))
    for name in sorted(before.keys() | now.keys()):
        if name not in _MAY_DIFFER and before.get(name) != now.get(name):
            said = _difference(name, before.get(name), now.get(name))
            raise ResultsError(f"{path} was begun with {said}: give another output, or the settings it was begun with.")


def _difference(name: str, before: Any, now: Any) -> str:
    if isinstance(before, dict) and isinstance(now, dict):
        key = next(key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key))
        return _difference(f"{name}.{key}", before.get(key), now.get(key))
    return f"{name} {before!r}, not {now!r}"


def _record(path: Path, number: int, line: str) -> Record:
    try:
        record = json.loads(line)
        if "\\ud" in line.lower():  # half of a pair may hide in an escape, as other tools write them
            record = json.loads(_whole_signs(json.dumps(record, ensure_ascii=False)))
    except (ValueError, RecursionError) as error:
        raise ResultsError(f"{path}, line {number}: no JSON ({error}).") from error
    if not isinstance(record, dict) or not isinstance(record.get("kind"), str):
        raise ResultsError(f"{path}, line {number}: expected an object with a kind.")
    return record


def _line(record: Record) -> str:
    return _whole_signs(json.dumps(_plain(record), ensure_ascii=False, allow_nan=False)) + "\n"


def _whole_signs(text: str) -> str:
    """Without half of a surrogate pair, as a server may send of a sign that was cut: it has no place in UTF-8."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _plain(value: Any) -> Any:
    """With null for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    number = value.item() if hasattr(value, "item") else value  # of numpy or torch
    return None if isinstance(number, float) and not math.isfinite(number) else number
