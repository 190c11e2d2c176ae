"""The rows of an evaluation's data set, parsed: a seeded choice of them, the same for every model."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from spl.data.source import Source
from spl.types import UserError

log = logging.getLogger(__name__)
T = TypeVar("T")


def parsed_rows(
    source: Source,
    parse: Callable[[Mapping[str, Any], str, Sequence[int]], T],
    num: int | None = None,
    seed: int = 0,
    skip_bad: bool = False,
) -> list[T]:
    """The first `num` usable rows of a seeded shuffle (many data sets are sorted by subject), or all of it.

    Args:
        source: of the rows.
        parse: takes a row's values, its place as "file, row 12", and a seed of its own.
        num: how many; None for all.
        seed: of the shuffle.
        skip_bad: leave out rows that cannot be used.

    Raises:
        UserError: the source cannot be read, nothing in it can be used, or a row cannot be and `skip_bad` is off.
    """
    rows = list(source.rows())
    found: list[T] = []
    bad: list[UserError] = []
    for k in np.random.default_rng(seed).permutation(len(rows)).tolist():
        if len(found) == num:
            break
        where, values = rows[k]
        try:
            if isinstance(values, UserError):
                raise values
            found.append(parse(values, where, (seed, k)))
        except UserError as error:
            if not skip_bad:
                raise UserError(f"{error} Set skip_bad to true to leave such rows out.") from None
            bad.append(error)
    if not found:
        raise UserError(f"{source.path} has no row that can be used{f' (one of them: {bad[0]})' if bad else ''}.")
    if bad:
        log.warning("%s: %d rows were left out (one of them: %s)", source.path, len(bad), bad[0])
    return found


def item_of(row: str) -> str:
    """A row's name in results: where it came from, less the folders or the owner."""
    return row.rsplit("/", 1)[-1]
