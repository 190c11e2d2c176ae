"""Single values of a row: read, or refused in one sentence that names the column and what came."""

from collections.abc import Mapping, Sequence
from itertools import islice
from reprlib import Repr
from typing import Any

from spl.types import UserError


def plain_value(value: Any, levels: int = 5) -> Any:
    """Python's own value for numpy's, pandas' or torch's, as deep as the columns of a known shape go."""
    if isinstance(value, str | int) or value is None or not levels:
        return value
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {k: plain_value(v, levels - 1) for k, v in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [plain_value(v, levels - 1) for v in value]
    # pandas' NA refuses to be compared, and pandas need not be installed.
    return None if type(value).__name__ in ("NAType", "NaTType") else value


def column_names(row: Mapping[str, Any]) -> str:
    names = ", ".join(shortened(name) for name in islice(row, 20))
    return f"{names} and {len(row) - 20} more" if len(row) > 20 else names or "none"


def share_of(value: Any, name: str) -> float:
    share = number_of(value, name)
    if not 0 <= share <= 1:
        raise UserError(f"{name} is a share of raters and must lie in [0, 1], but is {share:g}.")
    return share


def number_of(value: Any, name: str) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 1e308:
        return float(value)
    raise UserError(f"{name} must be a finite number, but is {shortened(value)}.")


def index_of(value: Any, count: int) -> int:
    """A response's index, -1 where the value is none. pandas turns whole numbers beside an absent one to floats."""
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < count and value == int(value):
        return int(value)
    return -1


def text_of(value: Any, name: str, expected: str = "text", empty: bool = False) -> str:
    if not isinstance(value, str):
        raise UserError(f"{name} must be {expected}, but is {shortened(value)}.")
    if not empty and not value.strip():
        raise UserError(f"{name} is empty.")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{name} is not valid Unicode: character {error.start} is half of a pair.") from None
    return value


_REPR = Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 60


def shortened(value: Any) -> str:
    """The value as Python writes it, long ones shortened."""
    text = _REPR.repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."  # lists in lists are short only each by itself
