"""Every estimate as a row: in the page, as CSV from there, and on the terminal."""

from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from spl.reporting.charts import interval_text
from spl.reporting.differences import Key
from spl.reporting.evidence import Evidence, arm_of, arm_order
from spl.reporting.headline import Differences
from spl.reporting.measures import measure

COLUMNS = ("program", "measure", "group", "policy", "setting", "train_seed", "value", "low", "high", "num")
APART = ("difference", "difference_low", "difference_high", "difference_from")

Cells = list[str | float | None]


def rows(evidence: Evidence, apart: Differences) -> list[Cells]:
    """A row for each estimate in the order of files; its columns are COLUMNS and APART."""
    return [_row(record, apart) for record in evidence.of("estimate")]


def _row(record: dict[str, Any], apart: Differences) -> Cells:
    key = Key(record["program"], arm_of(record), record["name"], record["group"])
    rival, interval = apart.get(key, (None, (None, None, None)))
    cells: Cells = [record[{"measure": "name"}.get(column, column)] for column in COLUMNS]
    return [*cells, *interval[:3], str(rival) if rival else None]


def terminal(evidence: Evidence, apart: Differences) -> Group:
    """A table for each program: measures and groups of items down, arms across where there is room, else down too."""
    programs = dict.fromkeys(record["program"] for record in evidence.of("estimate"))
    return Group(*(_of_program(evidence, program, apart) for program in programs))


def _of_program(evidence: Evidence, program: str, apart: Differences) -> Table:
    table = Table(title=program, title_justify="left", box=None, padding=(0, 2, 0, 0))
    table.add_column("measure")
    table.add_column("policy")
    table.add_column("estimate [95 %]", justify="right", no_wrap=True)
    table.add_column("difference [95 %]", justify="right", no_wrap=True)
    for (name, group), arms in evidence.estimates(program).items():
        title = measure(name).label if group is None else f"{measure(name).label}, {group}"
        for place, arm in enumerate(sorted(arms, key=arm_order)):
            record = arms[arm]
            value = interval_text(record["value"], record["low"], record["high"])
            cells = ("" if place else title, str(arm), value, _apart(Key(program, arm, name, group), apart))
            table.add_row(*map(Text, cells))
    return table


def _apart(key: Key, apart: Differences) -> str:
    if key not in apart:
        return ""
    rival, interval = apart[key]
    return f"{interval_text(*interval[:3], sign=True)} to {rival}"
