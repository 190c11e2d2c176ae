"""What rows are read from: the parts of a source, each of which can be read from any row on, and read again."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt, wait_exponential

from spl.types import UserError

log = logging.getLogger(__name__)


class RefusedRowError(UserError):
    """A row that can be told apart from its neighbours but not read.

    Attributes:
        text: of the row, as far as it is one.
    """

    def __init__(self, sentence: str, text: str = "") -> None:
        super().__init__(sentence)
        self.text = text


class Row(NamedTuple):
    """A row of a source."""

    where: str  # as "file, row 12"
    values: dict[str, Any] | RefusedRowError


class Shard(Protocol):
    """A part of a source."""

    @property
    def name(self) -> str:
        """For people."""

    @property
    def size(self) -> int:
        """Its weight among the shards of its source, as bytes."""

    @property
    def faults(self) -> tuple[type[Exception], ...]:
        """What reading may raise."""

    def may_pass(self, error: Exception) -> bool:
        """Whether it is worth trying again."""

    def where(self, number: int) -> str:
        """A row's place for people, who count from 1."""

    def read(self, start: int = 0, step: int = 1) -> Iterator[tuple[int, Any]]:
        """Rows start, start + step, ... by their numbers from 0, as they lie there; numbers may be left out."""

    def row(self, number: int, raw: Any) -> Row:
        """A row that was read."""


@dataclass(frozen=True)
class Retries:
    """How often a fault that may pass is tried again, and how long after.

    Attributes:
        number: of tries after the first.
        wait: seconds before the second of them (the first comes at once); doubled each time, up to a minute.
    """

    number: int = 8
    wait: float = 1.0

    def calls(self, may_pass: Any, what: str) -> Retrying:
        """A caller that keeps to them and says what it waits for."""

        def say(state: RetryCallState) -> None:
            error = state.outcome.exception() if state.outcome else None
            log.warning("%s: %s; trying again in %.0f s.", what, error, state.upcoming_sleep)

        return Retrying(
            stop=stop_after_attempt(max(self.number, 1)),
            wait=wait_exponential(self.wait, max=60.0),
            retry=retry_if_exception(may_pass),
            before_sleep=say,
            reraise=True,
        )


def read(shard: Shard, start: int, step: int, retries: Retries) -> Iterator[tuple[int, Any]]:
    """Rows of a shard; after a fault that passes it goes on with the row that failed, so none comes twice.

    Raises:
        UserError: the fault does not pass; names the shard and the row.
    """
    rows = shard.read(start, step)
    while True:
        try:
            found = next(rows, None)
        except shard.faults as error:
            rows, found = _read_again(shard, start, step, retries, error)
        if found is None:
            return
        yield found
        start = found[0] + step


def _read_again(
    shard: Shard, start: int, step: int, retries: Retries, error: Exception
) -> tuple[Iterator[tuple[int, Any]], tuple[int, Any] | None]:
    """The rows from `start` on and the first of them."""

    def attempt() -> tuple[Iterator[tuple[int, Any]], tuple[int, Any] | None]:
        rows = shard.read(start, step)
        return rows, next(rows, None)

    tries = retries.number if shard.may_pass(error) else 0
    if tries:
        log.warning("%s: %s; trying again.", shard.where(start), error)
        try:
            return retries.calls(shard.may_pass, shard.where(start))(attempt)
        except shard.faults as last:
            error = last
    after = f", {tries} times tried again" if tries else ""
    what = str(error).strip().split("\n")[0] or type(error).__name__
    raise UserError(
        f"{shard.name} cannot be read from row {start + 1} on: {what.removesuffix('.')}{after}. Put a whole copy of it "
        "in its place."
    ) from error
