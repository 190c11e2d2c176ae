"""Files of NoveltyBench's own evaluation (arXiv 2504.05228): generations with their classes and utilities.

Each line has `id`, `prompt`, `model`, `generations`, and may have `partition` (the class of each generation) and
`generation_scores` (the utility of each that is the first of its class, else 0). The field `distinct` is not read: in
upstream's files it is the number of classes less 1, so `distinct_k` of the partition is 1 more.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spl.data.source import Source
from spl.data.values import number_of, text_of
from spl.evaluation.sample_files import Reply, SampleFile
from spl.types import UserError


@dataclass
class ScoredFile(SampleFile):
    """Generations that others have put into classes and scored.

    Attributes:
        partitions: item to the class of each generation.
        utilities: item to the utility of each.
    """

    partitions: dict[str, list[int]] = field(default_factory=dict)
    utilities: dict[str, list[float]] = field(default_factory=dict)


def read_scored(path: Path) -> list[ScoredFile]:
    """A file of such lines, each model in it a policy.

    Raises:
        UserError: a line is another; the text names file and row.
    """
    files: dict[str, ScoredFile] = {}
    for where, row in Source(str(path)).rows():
        if isinstance(row, UserError):
            raise row
        try:
            model = text_of(row.get("model"), "model")
            _add(files.setdefault(model, ScoredFile(model, "", None, headers=[], paths=[path])), row)
        except UserError as error:
            raise UserError(
                f"{where}: {error} Expected samples as spl sample writes them, or lines of NoveltyBench's evaluation."
            ) from None
    return list(files.values())


def _add(file: ScoredFile, row: Mapping[str, Any]) -> None:
    item = text_of(row.get("id"), "id")
    if item in file.prompts:
        raise UserError(f"the id {item!r} is there twice for {file.policy!r}.")
    file.prompts[item] = [{"role": "user", "content": text_of(row.get("prompt"), "prompt")}]
    texts = [text_of(text, "a generation", empty=True) for text in _list(row, "generations", None)]
    file.replies[item] = [Reply(text, None, "", None) for text in texts]
    if row.get("partition") is not None:
        file.partitions[item] = [int(number_of(k, "a class")) for k in _list(row, "partition", len(texts))]
    if row.get("generation_scores") is not None:
        scores = _list(row, "generation_scores", len(texts))
        file.utilities[item] = [number_of(score, "a score") for score in scores]


def _list(row: Mapping[str, Any], name: str, length: int | None) -> list[Any]:
    values = row.get(name)
    if not isinstance(values, list) or not values or length not in (None, len(values)):
        raise UserError(f"{name} must be a list with a value for each generation.")
    return values
