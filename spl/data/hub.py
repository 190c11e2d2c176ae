"""Rows of a data set on the Hugging Face Hub, downloaded or streamed."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import datasets
from huggingface_hub.constants import HF_HUB_OFFLINE

from spl.data.shards import Retries, Row
from spl.types import UserError


def load_hub(path: str, name: str | None, split: str, streaming: bool, retries: Retries | None = None) -> Any:
    """A `datasets.Dataset`, or `IterableDataset` where streaming.

    Raises:
        UserError: there is no such data set, configuration or split, or the Hub cannot be reached.
    """
    calls = (retries or Retries()).calls(_may_pass, path)
    try:
        return calls(datasets.load_dataset, path, name=name, split=split, streaming=streaming)
    except Exception as error:  # foreign files may be wrong in any way
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"cannot load {path!r} ({name or 'default'}, split {split!r}): expected 'survey', a local file or a data "
            f"set's id on the Hub ({reason})."
        ) from error


def _may_pass(error: BaseException) -> bool:
    """A connection may come back; a name that the Hub does not know stays unknown (FileNotFoundError)."""
    of_network = isinstance(error, OSError) or any(kind.__module__.startswith("http") for kind in type(error).__mro__)
    return of_network and not isinstance(error, FileNotFoundError) and not HF_HUB_OFFLINE


@dataclass(frozen=True)
class HubShard:
    """One of the files of a data set on the Hub, streamed.

    Attributes:
        path: the data set's id.
        dataset: a `datasets.IterableDataset`, which travels to worker processes.
        index: of the shard.
    """

    path: str
    dataset: Any
    index: int
    size: ClassVar[int] = 1  # not known before it is read
    faults: ClassVar[tuple[type[Exception], ...]] = (Exception,)  # of any library between here and the Hub

    @property
    def name(self) -> str:
        return f"{self.path}, shard {self.index + 1}" if self.dataset.num_shards > 1 else self.path

    def may_pass(self, error: BaseException) -> bool:
        """Whatever comes over a network may come whole the next time."""
        return isinstance(error, Exception)

    def where(self, number: int) -> str:
        return f"{self.name}, row {number + 1}"

    def read(self, start: int = 0, step: int = 1) -> Iterator[tuple[int, Any]]:
        shard = self.dataset.shard(self.dataset.num_shards, self.index).skip(start)
        for number, row in enumerate(shard, start):
            if not (number - start) % step:
                yield number, row

    def row(self, number: int, raw: dict[str, Any]) -> Row:
        return Row(self.where(number), raw)


def hub_shards(path: str, dataset: Any) -> list[HubShard]:
    """Of a streamed data set."""
    return [HubShard(path, dataset, index) for index in range(dataset.num_shards)]
