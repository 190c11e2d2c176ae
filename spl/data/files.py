"""Local files, read from any row on: JSON lines, CSV (either perhaps gzipped) and Parquet.

A row is read in two steps: its bytes, which is all that a run that goes on needs to pass it over, and then its values.
Where rows can still be told apart, one that cannot be read is refused by itself and the next are read.
"""

import csv
import gzip
import io
import json
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import IO, Any, ClassVar

import pyarrow
import pyarrow.parquet as parquet

from spl.data.shards import RefusedRowError, Row
from spl.types import UserError

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".csv.gz", ".parquet")
LONGEST = 2**26
"""Bytes of a row past which it cannot be meant: a missing line break or quote takes no whole file into memory."""

_MARK = b"\xef\xbb\xbf"  # with which Excel begins a file


def is_local(path: str) -> bool:
    """A file or folder here, or a name that could only be a file's."""
    return Path(path).exists() or path.endswith(SUFFIXES) or path.startswith(("/", "./", "../", "~"))


def local_files(path: str) -> list["File"]:
    """The data files at a path: itself, or a folder's, in order of name.

    Raises:
        UserError: there is none, or its kind is not known.
    """
    place = Path(path).expanduser()
    if not place.exists():
        raise UserError(f"no file or folder {path!r}: give the path of one that exists, or a data set's id on the Hub.")
    files = sorted(f for f in place.iterdir() if f.name.endswith(SUFFIXES)) if place.is_dir() else [place]
    if not files or not files[0].name.endswith(SUFFIXES):
        raise UserError(f"{path!r} holds no data file: expected one that ends in {', '.join(SUFFIXES)}.")
    return [open_file(file) for file in files]


def open_file(path: Path) -> "File":
    """A file of the kind that its name says."""
    name = path.name.removesuffix(".gz")
    kind = ParquetFile if name.endswith(".parquet") else CSVFile if name.endswith(".csv") else JSONFile
    return kind(path)


@dataclass(frozen=True)
class File(ABC):
    """A local file as a shard."""

    path: Path
    faults: ClassVar[tuple[type[Exception], ...]] = (
        *(OSError, EOFError, zlib.error, ValueError, RecursionError, csv.Error, pyarrow.ArrowException),
    )

    @property
    def name(self) -> str:
        return str(self.path)

    @cached_property
    def size(self) -> int:
        """As the run found it, on which the order of a stream rests."""
        return self.path.stat().st_size if self.path.exists() else 0  # that it is not there is said when it is read

    def may_pass(self, error: Exception) -> bool:
        """A file server may come back, a file that was moved, and the end of a gzip that is still being copied.

        What else is broken on disk stays broken. The system's own errors have a number; what gzip and Parquet make of a
        broken file has none.
        """
        of_system = isinstance(error, OSError) and error.errno is not None and not isinstance(error, PermissionError)
        return of_system or isinstance(error, EOFError)

    def where(self, number: int) -> str:
        return f"{self.path}, row {number + 1}"

    @abstractmethod
    def read(self, start: int = 0, step: int = 1) -> Iterator[tuple[int, Any]]:
        """See `Shard`."""

    @abstractmethod
    def row(self, number: int, raw: Any) -> Row:
        """See `Shard`."""

    @contextmanager
    def _open(self) -> Iterator[io.BufferedReader]:
        """The bytes past a mark, buffered."""
        kind: Any = gzip.open if self.path.suffix == ".gz" else open
        with kind(self.path, "rb") as file, io.BufferedReader(file, 2**17) as buffered:
            if buffered.peek(3)[:3] == _MARK:
                buffered.read(3)
            yield buffered

    def _text(self, file: io.BufferedReader) -> IO[str]:
        """Bytes that are no UTF-8 come as lone surrogates, which `utf8` refuses."""
        return io.TextIOWrapper(file, "utf-8", "surrogateescape", newline="")

    def _object(self, number: int, value: Any) -> Row:
        where = self.where(number)
        if isinstance(value, dict):
            return Row(where, value)
        return Row(where, RefusedRowError(f"{where}: expected a JSON object, but got {str(value)[:60]}.", str(value)))


class JSONFile(File):
    """One object a line, or one list of objects in the whole file. A row's number counts lines, blank ones too."""

    def read(self, start: int = 0, step: int = 1) -> Iterator[tuple[int, Any]]:
        with self._open() as file:
            is_list = file.peek(1)[:4096].lstrip().startswith(b"[")
            with self._text(file) if is_list else nullcontext() as text:
                rows: Iterator[Any] = list_items(text) if text else _lines(file)
                yield from ((k, row) for k, row in islice(enumerate(rows), start, None, step) if row is not None)

    def row(self, number: int, raw: Any) -> Row:
        if not isinstance(raw, bytes):
            return self._object(number, raw)
        try:
            return self._object(number, json.loads(raw.decode()))
        except UnicodeDecodeError as error:
            problem = f"expected UTF-8, but {error}"
        except (ValueError, RecursionError) as error:
            problem = f"expected one JSON object a line, but {error}"
        where = self.where(number)
        return Row(where, RefusedRowError(f"{where}: {problem}.", raw.decode(errors="replace")))


class CSVFile(File):
    """Every value is text, but for numbers in the columns that hold numbers and JSON in those that hold lists."""

    def read(self, start: int = 0, step: int = 1) -> Iterator[tuple[int, Any]]:
        csv.field_size_limit(LONGEST)
        with self._open() as file, self._text(file) as text:
            rows = (row for row in csv.reader(text) if row)
            header = next(rows, [])
            yield from ((k, (header, row)) for k, row in islice(enumerate(rows), start, None, step))

    def row(self, number: int, raw: tuple[list[str], list[str]]) -> Row:
        where, (header, values) = self.where(number), raw
        if len(values) > len(header):
            problem = "more values than the header has columns"
        elif not utf8("".join(values)):
            problem = "expected UTF-8, but it has other bytes"
        else:
            pairs = zip(header, values, strict=False)
            return Row(where, {name: _csv_value(name, value) for name, value in pairs if value})
        return Row(where, RefusedRowError(f"{where}: {problem}.", str(values)))


class ParquetFile(File):
    """Rows of values; row groups before the first one wanted are not read."""

    def read(self, start: int = 0, step: int = 1) -> Iterator[tuple[int, Any]]:
        with parquet.ParquetFile(self.path) as file:
            number, wanted = 0, start
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if number + rows <= wanted:
                    number += rows
                    continue
                for batch in file.iter_batches(batch_size=256, row_groups=[group]):
                    stop = number + batch.num_rows
                    taken = range(wanted, stop, step)
                    if taken:
                        yield from zip(taken, batch.take([k - number for k in taken]).to_pylist(), strict=True)
                        wanted = taken[-1] + step
                    number = stop

    def row(self, number: int, raw: dict[str, Any]) -> Row:
        return Row(self.where(number), raw)


def _lines(file: io.BufferedReader) -> Iterator[bytes | None]:
    """Lines, None for blank ones; of one that is too long its beginning."""
    while line := file.readline(LONGEST):
        yield line if line.strip() else None
        while len(line) == LONGEST and not line.endswith(b"\n"):
            line = file.readline(LONGEST)


def list_items(file: IO[str], piece: int = 2**16) -> Iterator[Any]:
    """Values of one JSON list, a piece of the file in memory at a time.

    Raises:
        ValueError: the file is no JSON list, or a value in it is broken, so that the next cannot be found.
    """
    text, at, first = file.read(piece).lstrip()[1:], 0, True
    while True:
        try:
            found = _item(text, at, first)
        except ValueError:
            new = file.read(max(piece, len(text) - at))  # twice as much, if this is not enough either
            if not new or len(text) - at > LONGEST:
                raise
            text, at = text[at:] + new, 0
            continue
        if not found:
            return
        value, at = found
        yield value
        first = False


def _item(text: str, at: int, first: bool) -> tuple[Any, int] | None:
    """The list's next value and where it ends, None at the list's end.

    Raises:
        ValueError: there is none, or the text ends before it can be told.
    """
    skip = json.decoder.WHITESPACE.match  # type: ignore[attr-defined]
    at = skip(text, at).end()
    if text.startswith("]", at):
        return None
    if not first:
        if not text.startswith(",", at):
            raise ValueError("expected JSON lines or one list of objects, each but the last followed by a comma")
        at = skip(text, at + 1).end()
    value, end = _DECODER.raw_decode(text, at)
    if end == len(text):
        raise ValueError("expected JSON lines or one list of objects, but the list is not closed")
    return value, end


_DECODER = json.JSONDecoder()


def utf8(text: str) -> bool:
    """Whether it came from bytes that were UTF-8."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


_CSV_JSON = frozenset(
    ("share", "alpha", "votes_a", "votes_b", "votes_tie", "responses", "shares", "scores", "ranking", "comparisons")
)


def _csv_value(column: str, text: str) -> Any:
    if column not in _CSV_JSON and not text.startswith('[{"'):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
