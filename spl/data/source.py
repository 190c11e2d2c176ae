"""Where rows come from: the embedded survey, local files or the Hub, under one roof."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from spl.data.files import Row, is_local, local_files, read_rows
from spl.data.hub import hub_rows, load_hub
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

    def rows(self) -> Iterator[Row]:
        """Every row in order, with where it stands."""
        if self.path == SURVEY:
            return ((f"survey, row {k}", row) for k, row in enumerate(survey_rows(), 1))
        if is_local(self.path):
            return read_rows(local_files(self.path))
        return hub_rows(self.path, load_hub(self.path, self.name, self.split, streaming=False))

    def stream(self) -> Any:
        """A `datasets.IterableDataset` of {"where", "row"}, in shards where there are several files."""
        if self.path != SURVEY and not is_local(self.path):
            dataset = load_hub(self.path, self.name, self.split, streaming=True)
            return dataset.map(
                _placed, with_indices=True, remove_columns=dataset.column_names, fn_kwargs={"path": self.path}
            )
        shards = [self] if self.path == SURVEY else [Source(str(file)) for file in local_files(self.path)]
        return datasets.IterableDataset.from_generator(_stream, gen_kwargs={"shards": shards})

    def identity(self) -> str:
        """Changes when a row may have."""
        if self.path == SURVEY:
            return json.dumps(list(survey_rows()))
        if is_local(self.path):
            return json.dumps([(str(file), _digest(file)) for file in local_files(self.path)])
        return f"{self.path} {load_hub(self.path, self.name, self.split, streaming=False)._fingerprint}"


def _digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _stream(shards: list[Source]) -> Iterator[dict[str, Any]]:
    for shard in shards:
        for where, row in shard.rows():
            yield {"where": where, "row": row}


def _placed(row: dict[str, Any], index: int, path: str) -> dict[str, Any]:
    return {"where": f"{path}, row {index + 1} of a shard", "row": row}
