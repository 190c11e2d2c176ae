"""Rows to tokenised examples, and a report of those that could not be used."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal, NamedTuple

from spl.data.collate import EncodedExample
from spl.data.demonstrations import encode_demonstrations, parse_demonstration
from spl.data.formats import parse_row
from spl.data.shards import RefusedRowError, Row
from spl.data.tokenization import Encoder, TooLongError
from spl.data.values import shortened
from spl.types import Demonstration, PreferenceExample, Task, UserError

BadRows = Literal["raise", "skip"]
NUM_SAMPLES = 100
"""Bad rows that are kept to look at."""
Example = PreferenceExample | Demonstration
TOGETHER = 32
"""Rows that are tokenised at a time."""


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

    example: Example
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
        task: what is learned from a row.
    """

    encoder: Encoder
    columns: Mapping[str, str] = field(default_factory=dict)
    bad_rows: BadRows = "raise"
    max_bad_share: float = 1.0
    task: Task = "preference"

    def examples(self, rows: Iterable[Row], report: Report) -> Iterator[tuple[Example, EncodedExample]]:
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
        tokens = self._tokens([p for p in parsed if not isinstance(p, UserError)])
        return [p if isinstance(p, UserError) else _encoded(p, next(tokens)) for p in parsed]

    def _parse(self, row: Row) -> Example | UserError:
        if isinstance(row.values, UserError):
            return row.values
        parse = parse_demonstration if self.task == "sft" else parse_row
        try:
            return parse(row.values, row.where, self.columns)
        except UserError as error:
            return error

    def _tokens(self, examples: list[Example]) -> Iterator[tuple[EncodedExample, int] | UserError]:
        compared = iter(self.encoder.encode_all([e for e in examples if isinstance(e, PreferenceExample)]))
        shown = iter(encode_demonstrations(self.encoder, [e for e in examples if isinstance(e, Demonstration)]))
        return (next(compared if isinstance(e, PreferenceExample) else shown) for e in examples)

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


def _encoded(example: Example, tokens: tuple[EncodedExample, int] | UserError) -> Encoded | UserError:
    return tokens if isinstance(tokens, UserError) else Encoded(example, *tokens)


def _text(row: Row) -> str:
    """A bad row for people to look at, its first 2,000 characters."""
    if isinstance(row.values, RefusedRowError):
        return row.values.text[:2000]
    try:
        return json.dumps(row.values, ensure_ascii=False, default=str)[:2000]
    except (ValueError, TypeError, RecursionError):
        return shortened(row.values)
