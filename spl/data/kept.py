"""All examples of a data set tokenised at once and kept on disk for the next run.

The kept copy's key is everything it depends on: the rows' content, the tokenizer, the settings and this code.
"""

import hashlib
import json
import logging
import shutil
import tempfile
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from datasets.arrow_writer import ArrowWriter

from spl.data import comparisons, demonstrations, formats, tokenization, values
from spl.data.collate import EncodedExample
from spl.data.encode import Example, Report, RowEncoder
from spl.data.shards import Retries
from spl.data.source import Source
from spl.disk import sync
from spl.types import Comparison, UserError

log = logging.getLogger(__name__)

_INT = datasets.Value("int32")
_FEATURES = datasets.Features(
    {
        "sequences": datasets.Sequence(datasets.Sequence(_INT)),
        "starts": datasets.Sequence(_INT),
        "comparisons": datasets.Sequence(datasets.Sequence(datasets.Value("float64"))),
        "alpha": datasets.Value("float64"),
        "row": datasets.Value("string"),
        "num_tokens": _INT,
        "prompt": datasets.Value("string"),  # a hash, to keep equal prompts on one side of a split
    }
)


class EncodedData(torch.utils.data.Dataset[EncodedExample]):
    """Tokenised examples, read from disk as they are needed."""

    def __init__(self, table: Any, report: Report) -> None:
        self.table = table
        self.report = report
        self.num_tokens = np.asarray(table["num_tokens"][:])  # [N] an upper bound of each example's distinct tokens

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> EncodedExample:
        return self.__getitems__([int(index)])[0]

    def __getitems__(self, indices: list[int]) -> list[EncodedExample]:
        """Several at once, as a DataLoader asks for a batch."""
        columns = self.table[indices]
        return [
            EncodedExample(
                sequences=tuple(map(tuple, sequences)),
                starts=tuple(starts),
                comparisons=tuple(Comparison(int(i), int(j), share) for i, j, share in comparisons),
                alpha=alpha,
                row=row,
            )
            for sequences, starts, comparisons, alpha, row in zip(
                *(columns[name] for name in ("sequences", "starts", "comparisons", "alpha", "row")), strict=True
            )
        ]

    def split(self, size: int, seed: int) -> tuple["EncodedData", "EncodedData"]:
        """(the others, at least `size` examples set apart): whole prompts, so that none stands on both sides."""
        prompts = np.asarray(self.table["prompt"][:])
        names, counts = np.unique(prompts, return_counts=True)
        order = np.random.default_rng(seed).permutation(len(names))
        taken = names[order][np.cumsum(counts[order]) - counts[order] < size]
        apart = np.isin(prompts, taken)
        return self._select(~apart), self._select(apart)

    def _select(self, mask: Any) -> "EncodedData":
        return EncodedData(self.table.select(np.flatnonzero(mask)), self.report)


def encode_source(source: Source, encoder: RowEncoder, retries: Retries | None = None) -> EncodedData:
    """The examples of a source, from the kept copy if there is one.

    Raises:
        UserError: nothing in it can be used, or too little.
    """
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "spl" / key_of(source, encoder)
    if not folder.is_dir():
        _write(source, encoder, folder, retries or Retries())
    report = Report(**json.loads((folder / "report.json").read_text()))
    report.check(encoder.max_bad_share)
    if report.skipped or report.too_long or report.cut:
        log.info("%s: %s.", source.path, report.describe())
    return EncodedData(datasets.Dataset.from_file(str(folder / "data.arrow")), report)


def _write(source: Source, encoder: RowEncoder, folder: Path, retries: Retries) -> None:
    """Encode into a folder beside, then rename: a copy is whole or it is not there."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".building-"))
    try:
        report = Report()
        with ArrowWriter(path=str(building / "data.arrow"), features=_FEATURES) as writer:
            for example, encoded in encoder.examples(source.rows(retries), report):
                writer.write(_record(example, encoded))
            writer.finalize()
        if not report.examples:
            why = f" (first: {report.samples[0]['reason']})" if report.samples else ""
            raise UserError(f"{source.path}: no usable example among its rows{why}.")
        (building / "report.json").write_text(json.dumps(asdict(report)))
        for file in building.iterdir():
            sync(file)  # before the rename, or a power failure could leave the name without the content
        try:
            building.rename(folder)
        except OSError:  # another process was first; its copy has the same content
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _record(example: Example, encoded: EncodedExample) -> dict[str, Any]:
    prompt = hashlib.sha256(json.dumps(example.prompt).encode()).hexdigest()[:16]
    return {
        "sequences": encoded.sequences,
        "starts": encoded.starts,
        "comparisons": [list(c) for c in encoded.comparisons],
        "alpha": encoded.alpha,
        "row": encoded.row,
        "num_tokens": encoded.num_tokens,
        "prompt": prompt,
    }


def key_of(source: Source, encoder: RowEncoder) -> str:
    """Of the kept copy of a source encoded so."""
    code = [Path(m.__file__ or "").read_bytes() for m in (formats, comparisons, values, tokenization, demonstrations)]
    tokenizer = encoder.encoder.tokenizer
    settings = {
        "columns": dict(encoder.columns),
        "bad_rows": encoder.bad_rows,
        "task": encoder.task,
        "encoder": {f.name: getattr(encoder.encoder, f.name) for f in fields(encoder.encoder) if f.name != "tokenizer"},
        "template": tokenizer.chat_template,
        "special": [tokenizer.bos_token_id, tokenizer.eos_token_id],
        "features": str(_FEATURES),
        "report": [f.name for f in fields(Report)],
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    # Truncation and padding come and go with calls of the tokenizer, and ours uses neither.
    backend = json.loads(tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}
    for part in (*code, json.dumps(backend).encode(), source.identity().encode()):
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()[:32]
