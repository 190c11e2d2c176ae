"""Rows of a data set on the Hugging Face Hub, downloaded or streamed."""

from collections.abc import Iterator
from typing import Any

import datasets

from spl.data.files import Row
from spl.types import UserError


def load_hub(path: str, name: str | None, split: str, streaming: bool) -> Any:
    """A `datasets.Dataset`, or `IterableDataset` where streaming.

    Raises:
        UserError: there is no such data set, configuration or split, or the Hub cannot be reached.
    """
    try:
        return datasets.load_dataset(path, name=name, split=split, streaming=streaming)
    except Exception as error:  # foreign files may be wrong in any way
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"cannot load {path!r} ({name or 'default'}, split {split!r}): expected 'survey', a local file or a data "
            f"set's id on the Hub ({reason})."
        ) from error


def hub_rows(path: str, dataset: Any) -> Iterator[Row]:
    """Its rows in order."""
    for number, row in enumerate(dataset, 1):
        yield f"{path}, row {number}", row
