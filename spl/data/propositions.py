"""Propositions to agree or disagree with, each of which tells of a position on an axis of opinion.

A row has `proposition`, `axis` (any name, such as x or y) and perhaps `weight`: -1 where agreement lies towards the low
end of the axis, 2 where it tells twice as much as others; 1 where it is not given. None are shipped: which propositions
span an axis is a question for those who ask.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from spl.data.opinions import Opinion
from spl.data.values import column_names, number_of, plain_value, text_of
from spl.types import UserError


@dataclass(frozen=True)
class Proposition:
    """A sentence to agree or disagree with, and which way along an axis agreement lies."""

    text: str
    axis: str
    weight: float
    row: str = ""

    def opinion(self, scale: Sequence[str]) -> Opinion:
        """As a question with a scale of agreement."""
        question = f"{self.text}\n\nHow far do you agree or disagree?"
        return Opinion(question, tuple(scale), {}, ordered=True, row=self.row)


def parse_proposition(row: Mapping[str, Any], where: str = "", seed: Sequence[int] = ()) -> Proposition:
    """Read one row.

    Raises:
        UserError: a column is missing or cannot be used.
    """
    values = {name: plain_value(value) for name, value in row.items() if value is not None}
    try:
        if not values.keys() >= {"proposition", "axis"}:
            raise UserError(f"expected the columns proposition and axis; those found are {column_names(values)}.")
        weight = number_of(values.get("weight", 1), "weight")
        if weight == 0:
            raise UserError("weight is 0, so the proposition tells nothing: expected 1, -1 or another number.")
        text = text_of(values["proposition"], "proposition").strip()
        return Proposition(text, text_of(values["axis"], "axis"), weight, where)
    except UserError as error:
        raise UserError(f"{where}: {error}" if where else str(error)) from None
