"""Rows of local files: JSON lines, CSV (either perhaps gzipped) and Parquet, each with its file and row number."""

import csv
import gzip
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pyarrow
import pyarrow.parquet as parquet

from spl.types import UserError

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".csv.gz", ".parquet")

Row = tuple[str, dict[str, Any]]
"""Where a row came from, as "file, row 12", and its values."""


def is_local(path: str) -> bool:
    """A file or folder here, or a name that could only be a file's."""
    return Path(path).exists() or path.endswith(SUFFIXES) or path.startswith(("/", "./", "../", "~"))


def local_files(path: str) -> list[Path]:
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
    return files


def read_rows(files: list[Path]) -> Iterator[Row]:
    """Rows of files, one after another, never a whole file in memory.

    Raises:
        UserError: a row is no JSON object, or the file cannot be read.
    """
    for file in files:
        name = file.name.removesuffix(".gz")
        read = _parquet if name.endswith(".parquet") else _csv if name.endswith(".csv") else _json
        try:
            yield from read(file)
        except (OSError, EOFError, UnicodeDecodeError, csv.Error, pyarrow.ArrowException) as error:
            raise UserError(f"{file} cannot be read: {error}.") from error


def _open(file: Path) -> IO[str]:
    if file.suffix == ".gz":
        return gzip.open(file, "rt", encoding="utf-8-sig", newline="")
    return file.open(encoding="utf-8-sig", newline="")  # Excel begins a file with a mark


def _json(file: Path) -> Iterator[Row]:
    """One object a line, or one list of objects in the whole file."""
    with _open(file) as lines:
        for number, line in enumerate(lines, 1):
            if number == 1 and line.lstrip().startswith("["):
                yield from _json_list(file, line + lines.read())
                return
            if line.strip():
                yield _object(file, number, line)


def _object(file: Path, number: int, line: str) -> Row:
    where = f"{file}, row {number}"
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: expected one JSON object a line, but {error}.") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected a JSON object, but got {line.strip()[:60]}.")
    return where, row


def _json_list(file: Path, text: str) -> Iterator[Row]:
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: expected JSON lines or one list of objects, but {error}.") from None
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise UserError(f"{file}, row {number}: expected a JSON object, but got {str(row)[:60]}.")
        yield f"{file}, row {number}", row


def _csv(file: Path) -> Iterator[Row]:
    """Every value is text, but for numbers in the columns that hold numbers and JSON in those that hold lists."""
    csv.field_size_limit(sys.maxsize)  # a long conversation is longer than the default
    with _open(file) as lines:
        for number, row in enumerate(csv.DictReader(lines), 1):
            if None in row:
                raise UserError(f"{file}, row {number}: more values than the header has columns.")
            yield f"{file}, row {number}", {k: _csv_value(k, v) for k, v in row.items() if v not in ("", None)}


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


def _parquet(file: Path) -> Iterator[Row]:
    number = 0
    for batch in parquet.ParquetFile(file).iter_batches(batch_size=256):
        for row in batch.to_pylist():
            number += 1
            yield f"{file}, row {number}", row
