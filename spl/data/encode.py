"""Rows to tokenised examples: all of a data set at once, kept on disk for the next run, or one by one from a stream.

The kept copy's key is everything it depends on: the rows' content, the tokenizer, the settings and this code.
"""

import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import torch
from datasets.arrow_writer import ArrowWriter

from spl.data import comparisons, formats, tokenization, values
from spl.data.collate import EncodedExample
from spl.data.files import Row
from spl.data.formats import parse_row
from spl.data.source import Source
from spl.data.tokenization import Encoder, TooLongError
from spl.types import Comparison, PreferenceExample, UserError

BadRows = Literal["raise", "skip"]

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


@dataclass
class Report:
    """What became of the rows."""

    examples: int = 0
    skipped: int = 0  # could not be used
    too_long: int = 0  # dropped for their length
    cut: int = 0  # lost tokens to max_length
    cut_tokens: int = 0
    reasons: list[str] = field(default_factory=list)  # the first few skipped

    def describe(self) -> str:
        """One line for people."""
        parts = [f"{self.examples:,} examples"]
        if self.skipped:
            parts.append(f"{self.skipped:,} rows skipped as unusable (first: {self.reasons[0]})")
        if self.too_long:
            parts.append(f"{self.too_long:,} dropped as longer than max_length")
        if self.cut:
            parts.append(f"{self.cut:,} cut to max_length ({self.cut_tokens:,} tokens)")
        return "; ".join(parts)


@dataclass(frozen=True)
class RowEncoder:
    """Parses and tokenises rows, and counts what it could not use.

    Attributes:
        encoder: tokenises.
        columns: our column names to the data's.
        bad_rows: a row that cannot be used raises, or is skipped and counted.
    """

    encoder: Encoder
    columns: Mapping[str, str] = field(default_factory=dict)
    bad_rows: BadRows = "raise"

    def examples(self, rows: Iterable[Row], report: Report) -> Iterator[tuple[PreferenceExample, EncodedExample]]:
        """Usable rows in order; counts into the report.

        Raises:
            UserError: a row is unusable and bad_rows is "raise"; names it and what is wrong.
        """
        for where, row in rows:
            try:
                example = parse_row(row, where, self.columns)
                encoded, cut = self.encoder.encode(example)
            except TooLongError:
                if self.encoder.truncation == "raise":
                    raise
                report.too_long += 1
                continue
            except UserError as error:
                if self.bad_rows == "raise":
                    raise UserError(f"{error} Set data.bad_rows to skip to leave such rows out.") from None
                report.skipped += 1
                report.reasons = [*report.reasons, str(error)][:5]
                continue
            report.examples += 1
            report.cut += cut > 0
            report.cut_tokens += cut
            yield example, encoded

    def key(self, source: Source) -> str:
        """Of the kept copy of a source encoded so."""
        code = [Path(m.__file__ or "").read_bytes() for m in (formats, comparisons, values, tokenization)]
        tokenizer = self.encoder.tokenizer
        settings = {
            "columns": dict(self.columns),
            "bad_rows": self.bad_rows,
            "encoder": {k: v for k, v in vars(self.encoder).items() if isinstance(v, str | int)},
            "template": tokenizer.chat_template,
            "special": [tokenizer.bos_token_id, tokenizer.eos_token_id],
            "features": str(_FEATURES),
        }
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        # Truncation and padding come and go with calls of the tokenizer, and ours uses neither.
        backend = json.loads(tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}
        for part in (*code, json.dumps(backend).encode(), source.identity().encode()):
            digest.update(hashlib.sha256(part).digest())
        return digest.hexdigest()[:32]


class EncodedData(torch.utils.data.Dataset[EncodedExample]):
    """Tokenised examples, read from disk as they are needed."""

    def __init__(self, table: Any, report: Report) -> None:
        self.table = table
        self.report = report
        self.num_tokens = np.asarray(table["num_tokens"][:])  # [N] an upper bound of each example's distinct tokens

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> EncodedExample:
        row = self.table[int(index)]
        return EncodedExample(
            sequences=tuple(map(tuple, row["sequences"])),
            starts=tuple(row["starts"]),
            comparisons=tuple(Comparison(int(i), int(j), share) for i, j, share in row["comparisons"]),
            alpha=row["alpha"],
            row=row["row"],
        )

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


def encode_source(source: Source, encoder: RowEncoder) -> EncodedData:
    """The examples of a source, from the kept copy if there is one.

    Raises:
        UserError: nothing in it can be used.
    """
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "spl" / encoder.key(source)
    if not folder.is_dir():
        _write(source, encoder, folder)
    report = Report(**json.loads((folder / "report.json").read_text()))
    if report.skipped or report.too_long or report.cut:
        log.info("%s: %s.", source.path, report.describe())
    return EncodedData(datasets.Dataset.from_file(str(folder / "data.arrow")), report)


def _write(source: Source, encoder: RowEncoder, folder: Path) -> None:
    """Encode into a folder beside, then rename: a copy is whole or it is not there."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".building-"))
    try:
        report = Report()
        with ArrowWriter(path=str(building / "data.arrow"), features=_FEATURES) as writer:
            for example, encoded in encoder.examples(source.rows(), report):
                writer.write(_record(example, encoded))
            writer.finalize()
        if not report.examples:
            why = f" (first: {report.reasons[0]})" if report.reasons else ""
            raise UserError(f"{source.path}: no usable example among its rows{why}.")
        (building / "report.json").write_text(json.dumps(asdict(report)))
        try:
            building.rename(folder)
        except OSError:  # another process was first; its copy has the same content
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _record(example: PreferenceExample, encoded: EncodedExample) -> dict[str, Any]:
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
