"""What the raters said: the comparisons of a row."""

import math
from collections.abc import Callable
from itertools import combinations
from typing import Any

from spl.data.values import column_names, index_of, number_of, share_of, shortened
from spl.types import Comparison, UserError


def compared(row: dict[str, Any], count: int) -> list[Comparison]:
    """The comparisons of a row with `responses`, from the one column that holds them."""
    given = [name for name in _COMPARE if name in row]
    if len(given) != 1:
        raise UserError(
            f"beside responses, expected one of {', '.join(_COMPARE)}, but found {' and '.join(given) or 'none'}."
        )
    name, values = given[0], row[given[0]]
    if not isinstance(values, list):
        raise UserError(f"{name} must be a list, but is {shortened(values)}.")
    if name != "comparisons" and len(values) != count:
        raise UserError(f"{name} must have an entry for each of the {count} responses, but has {len(values)}.")
    return _COMPARE[name](values, count)


def _from_shares(values: list[Any], _: int) -> list[Comparison]:
    shares = [share_of(v, f"shares[{k}]") for k, v in enumerate(values)]
    pairs = [(i, j) for i, j in combinations(range(len(shares)), 2) if shares[i] + shares[j] > 0]
    if not pairs:
        raise UserError("shares are all zero, so nothing is preferred to anything.")
    return [Comparison(i, j, shares[i] / (shares[i] + shares[j])) for i, j in pairs]


def _from_scores(values: list[Any], _: int) -> list[Comparison]:
    scores = [number_of(v, f"scores[{k}]") for k, v in enumerate(values)]
    pairs = combinations(range(len(scores)), 2)
    return [Comparison(i, j, 0.5 + 0.5 * ((scores[i] > scores[j]) - (scores[i] < scores[j]))) for i, j in pairs]


def _from_ranking(values: list[Any], count: int) -> list[Comparison]:
    ranking = [index_of(v, count) for v in values]
    if set(ranking) != set(range(count)):
        raise UserError(
            f"ranking must hold each index 0 to {count - 1} of the responses once, best first, "
            f"but is {shortened(values)}."
        )
    return [Comparison(i, j, 1.0) for i, j in combinations(ranking, 2)]


def _from_comparisons(values: list[Any], count: int) -> list[Comparison]:
    comparisons = []
    for k, value in enumerate(values):
        name = f"comparisons[{k}]"
        if not isinstance(value, list) or len(value) != 3:
            raise UserError(f"{name} must be [i, j, share], but is {shortened(value)}.")
        i, j = (index_of(v, count) for v in value[:2])
        if min(i, j) < 0 or i == j:
            raise UserError(f"{name} must name two different responses of 0 to {count - 1}, but is {shortened(value)}.")
        comparisons.append(Comparison(i, j, share_of(value[2], f"{name}[2]")))
    if not comparisons:
        raise UserError("comparisons is empty: expected at least one [i, j, share].")
    return comparisons


_COMPARE: dict[str, Callable[[list[Any], int], list[Comparison]]] = {
    "shares": _from_shares,
    "scores": _from_scores,
    "ranking": _from_ranking,
    "comparisons": _from_comparisons,
}


def vote_share(row: dict[str, Any]) -> float:
    for name in ("votes_a", "votes_b"):
        if name not in row:
            raise UserError(f"expected a column {name}; the columns with a value are {column_names(row)}.")
    a, b, tie = (number_of(row.get(name, 0), name) for name in ("votes_a", "votes_b", "votes_tie"))
    if min(a, b, tie) < 0 or not 0 < a + b + tie < math.inf:
        raise UserError(f"votes must be 0 or more with at least one cast, but are {a:g}, {b:g} and {tie:g} for a tie.")
    return (a + tie / 2) / (a + b + tie)
