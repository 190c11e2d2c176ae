"""Rows to tokenised examples: all of a data set at once, kept on disk for the next run, or one by one from a stream.

The kept copy's key is everything it depends on: the rows' content, the tokenizer, the settings and this code.
"""

import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import datasets
import numpy as np
import torch
from datasets.arrow_writer import ArrowWriter

from spl.data import comparisons, formats, tokenization, values
from spl.data.collate import EncodedExample
from spl.data.formats import parse_row
from spl.data.shards import RefusedRowError, Retries, Row
from spl.data.source import Source
from spl.data.tokenization import Encoder, TooLongError
from spl.data.values import shortened
from spl.types import Comparison, PreferenceExample, UserError

BadRows = Literal["raise", "skip"]
NUM_SAMPLES = 100
"""Bad rows that are kept to look at."""
TOGETHER = 32
"""Rows that are tokenised at a time."""

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
    samples: list[dict[str, str]] = field(default_factory=list)  # the first skipped: where, reason, row

    @property
    def rows(self) -> int:
        return self.examples + self.skipped + self.too_long

    def describe(self) -> str:
        """One line for people."""
        parts = [f"{self.examples:,} examples"]
        if self.skipped:
            first = f" (first: {self.samples[0]['reason']})" if self.samples else ""
            parts.append(f"{self.skipped:,} rows skipped as unusable{first}")
        if self.too_long:
            parts.append(f"{self.too_long:,} dropped as longer than max_length")
        if self.cut:
            parts.append(f"{self.cut:,} cut to max_length ({self.cut_tokens:,} tokens)")
        return "; ".join(parts)

    def check(self, max_bad_share: float) -> None:
        """Stop where too many rows are of no use.

        Raises:
            UserError: more than the share of 100 rows or more.
        """
        if self.rows >= 100 and self.skipped > max_bad_share * self.rows:
            last = self.samples[-1]["reason"] if self.samples else ""
            raise UserError(
                f"{self.skipped:,} of the {self.rows:,} rows read so far cannot be used, more than data.max_bad_share "
                f"{max_bad_share:g} allows; one of them: {last}"
            )


class Encoded(NamedTuple):
    """A usable row."""

    example: PreferenceExample
    tokens: EncodedExample
    cut: int  # tokens it lost to max_length


@dataclass(frozen=True)
class RowEncoder:
    """Parses and tokenises rows, and counts what it could not use.

    Attributes:
        encoder: tokenises.
        columns: our column names to the data's.
        bad_rows: a row that cannot be used raises, or is skipped and counted.
        max_bad_share: of rows skipped, past which the run stops.
    """

    encoder: Encoder
    columns: Mapping[str, str] = field(default_factory=dict)
    bad_rows: BadRows = "raise"
    max_bad_share: float = 1.0

    def examples(self, rows: Iterable[Row], report: Report) -> Iterator[tuple[PreferenceExample, EncodedExample]]:
        """Usable rows in order; counts into the report.

        Raises:
            UserError: as `count`.
        """
        remaining = iter(rows)
        while together := list(islice(remaining, TOGETHER)):
            for row, outcome in zip(together, self.encode(together), strict=True):
                if found := self.count(row, outcome, report):
                    yield found.example, found.tokens

    def encode(self, rows: Sequence[Row]) -> list[Encoded | UserError]:
        """Rows tokenised together, each by itself or why it cannot be used."""
        parsed = [self._parse(row) for row in rows]
        examples = [p for p in parsed if isinstance(p, PreferenceExample)]
        tokens = iter(self.encoder.encode_all(examples))
        return [p if isinstance(p, UserError) else _encoded(p, next(tokens)) for p in parsed]

    def _parse(self, row: Row) -> PreferenceExample | UserError:
        if isinstance(row.values, UserError):
            return row.values
        try:
            return parse_row(row.values, row.where, self.columns)
        except UserError as error:
            return error

    def count(self, row: Row, outcome: Encoded | UserError, report: Report) -> Encoded | None:
        """The outcome of a row, where it can be used.

        Raises:
            UserError: it cannot and bad_rows is "raise", or too many cannot; names the row and what is wrong.
        """
        if isinstance(outcome, TooLongError) and self.encoder.truncation != "raise":
            report.too_long += 1
        elif isinstance(outcome, UserError):
            if isinstance(outcome, TooLongError):
                raise outcome
            if self.bad_rows == "raise":
                raise UserError(f"{outcome} Set data.bad_rows to skip to leave such rows out.")
            report.skipped += 1
            if len(report.samples) < NUM_SAMPLES:
                report.samples.append({"where": row.where, "reason": str(outcome), "row": _text(row)})
            report.check(self.max_bad_share)
        else:
            report.examples += 1
            report.cut += outcome.cut > 0
            report.cut_tokens += outcome.cut
            return outcome
        return None

    def key(self, source: Source) -> str:
        """Of the kept copy of a source encoded so."""
        code = [Path(m.__file__ or "").read_bytes() for m in (formats, comparisons, values, tokenization)]
        tokenizer = self.encoder.tokenizer
        settings = {
            "columns": dict(self.columns),
            "bad_rows": self.bad_rows,
            "encoder": {f.name: getattr(self.encoder, f.name) for f in fields(self.encoder) if f.name != "tokenizer"},
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


def _encoded(example: PreferenceExample, tokens: tuple[EncodedExample, int] | UserError) -> Encoded | UserError:
    return tokens if isinstance(tokens, UserError) else Encoded(example, *tokens)


def _text(row: Row) -> str:
    """A bad row for people to look at, its first 2,000 characters."""
    if isinstance(row.values, RefusedRowError):
        return row.values.text[:2000]
    try:
        return json.dumps(row.values, ensure_ascii=False, default=str)[:2000]
    except (ValueError, TypeError, RecursionError):
        return shortened(row.values)


def encode_source(source: Source, encoder: RowEncoder, retries: Retries | None = None) -> EncodedData:
    """The examples of a source, from the kept copy if there is one.

    Raises:
        UserError: nothing in it can be used, or too little.
    """
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "spl" / encoder.key(source)
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
