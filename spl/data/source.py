"""Where rows come from: the embedded survey, local files or the Hub, under one roof."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

from spl.data.files import is_local, local_files
from spl.data.hub import hub_shards, load_hub
from spl.data.shards import Retries, Row, Shard, read
from spl.data.survey import survey_rows

SURVEY = "survey"


@dataclass(frozen=True)
class Source:
    """A data set by name.

    Attributes:
        path: "survey", a local file or folder, or a data set's id on the Hub.
        name: its configuration on the Hub.
        split: its split on the Hub.
    """

    path: str
    name: str | None = None
    split: str = "train"

    def rows(self, retries: Retries | None = None) -> Iterator[Row]:
        """Every row in order.

        Raises:
            UserError: there is no such source, or a part of it cannot be read.
        """
        retries = retries or Retries()
        if self.path == SURVEY or is_local(self.path):
            for shard in self.shards(retries):
                yield from (shard.row(number, raw) for number, raw in read(shard, 0, 1, retries))
            return
        dataset = load_hub(self.path, self.name, self.split, streaming=False, retries=retries)
        yield from (Row(f"{self.path}, row {number}", row) for number, row in enumerate(dataset, 1))

    def shards(self, retries: Retries | None = None) -> Sequence[Shard]:
        """The parts of it that can be read apart, without a download of the whole."""
        if self.path == SURVEY:
            return [Survey()]
        if is_local(self.path):
            return local_files(self.path)
        dataset = load_hub(self.path, self.name, self.split, streaming=True, retries=retries)
        return hub_shards(self.path, dataset)

    def identity(self) -> str:
        """Changes when a row may have."""
        if self.path == SURVEY:
            return json.dumps(list(survey_rows()))
        if is_local(self.path):
            return json.dumps([(file.name, _digest(file.path, *_stamp(file.path))) for file in local_files(self.path)])
        return f"{self.path} {load_hub(self.path, self.name, self.split, streaming=False)._fingerprint}"


def named_source(name: str, split: str) -> Source:
    """The source that a setting names: a local path, or a Hub data set as ID, ID:CONFIG or ID:CONFIG:SPLIT.

    Args:
        name: as given.
        split: of a Hub data set where none is named.
    """
    if name == SURVEY or is_local(name):
        return Source(name)
    path, configuration, given = [*name.split(":", 2), "", ""][:3]
    return Source(path, configuration or None, given or split)


@dataclass(frozen=True)
class Survey:
    """The embedded survey as a shard."""

    name: ClassVar[str] = SURVEY
    size: ClassVar[int] = 1
    faults: ClassVar[tuple[type[Exception], ...]] = ()

    def may_pass(self, error: Exception) -> bool:
        return False

    def where(self, number: int) -> str:
        return f"survey, row {number + 1}"

    def read(self, start: int = 0, step: int = 1) -> Iterator[tuple[int, Any]]:
        yield from list(enumerate(survey_rows()))[start::step]

    def row(self, number: int, raw: dict[str, Any]) -> Row:
        return Row(self.where(number), raw)


@lru_cache
def _digest(path: Path, size: int, changed: int) -> str:
    """SHA-256 of a file, which is read once as long as it stays what it is."""
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _stamp(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns
