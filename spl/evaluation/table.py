"""Estimates as a table on the terminal."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Column, Table


def print_estimates(records: Iterable[Mapping[str, Any]], names: Sequence[str], console: Console | None = None) -> None:
    """A table for each group: a line a policy and setting, a column a measure, with its 95 % interval below it.

    Args:
        records: of results; all but estimates are passed over.
        names: measures to show; one that no estimate of a group has is left out.
        console: to print to; standard output if not given.
    """
    groups: dict[Any, dict[tuple[str, str], dict[str, Mapping[str, Any]]]] = {}
    for record in records:
        if record["kind"] == "estimate" and record["name"] in names:
            lines = groups.setdefault(record["group"], {})
            lines.setdefault((record["policy"], record["setting"]), {})[record["name"]] = record
    for group, lines in groups.items():
        shown = [name for name in names if any(name in line for line in lines.values())]
        # Headers break between words, and no number is cut.
        columns = [Column(name.replace("_", " "), overflow="fold") for name in ("policy", "setting", *shown)]
        table = Table(*columns, title=str(group or "") or None)
        for (policy, setting), line in lines.items():
            table.add_row(policy, setting, *(_cell(line[name]) if name in line else "" for name in shown))
        (console or Console()).print(table, markup=False)


def _cell(record: Mapping[str, Any]) -> str:
    value, low, high = (_number(record[name], digits) for name, digits in (("value", 3), ("low", 2), ("high", 2)))
    return f"{value}\n[{low} {high}]" if low else value


def _number(value: float | None, digits: int) -> str:
    if value is None or value != value:
        return ""
    return f"{value:.{digits}f}" if abs(value) >= 10**-digits or not value else f"{value:.0e}"
