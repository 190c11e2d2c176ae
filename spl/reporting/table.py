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
from spl.reporting.opinions import whole_groups

COLUMNS = ("program", "measure", "group", "policy", "setting", "train_seed", "rival", "value", "low", "high", "num")
APART = ("difference", "difference_low", "difference_high", "difference_from")

Cells = list[str | float | None]


def rows(evidence: Evidence, apart: Differences) -> list[Cells]:
    """A row for each estimate in the order of files; its columns are COLUMNS and APART."""
    return [_row(record, apart) for record in evidence.of("estimate")]


def _row(record: dict[str, Any], apart: Differences) -> Cells:
    key = Key(record["program"], arm_of(record), record["name"], record["group"])
    rival, interval = apart.get(key, (None, (None, None, None)))
    cells: Cells = [record.get({"measure": "name"}.get(column, column)) for column in COLUMNS]
    return [*cells, *interval[:3], str(rival) if rival else None]


def terminal(evidence: Evidence, apart: Differences) -> Group:
    """A table for each program: under each measure and group of items a line for every arm."""
    programs = dict.fromkeys(record["program"] for record in evidence.of("estimate"))
    return Group(*(_of_program(evidence, program, apart) for program in programs))


def _of_program(evidence: Evidence, program: str, apart: Differences) -> Table:
    table = Table(title=program, title_justify="left", box=None, padding=(0, 2, 0, 0))
    table.add_column()
    table.add_column("[95 %]", justify="right", no_wrap=True)
    table.add_column("difference [95 %]", justify="right", no_wrap=True)
    found = evidence.estimates(program)
    whole = whole_groups(found) or {group for _, group in found}
    for (name, group), arms in found.items():
        if group not in whole:
            continue
        keys = [Key(program, arm, name, group) for arm in sorted(arms, key=arm_order)]
        rivals = dict.fromkeys(str(apart[key][0]) for key in keys if key in apart)
        title = measure(name).label if group is None else f"{measure(name).label}, {group}"
        table.add_row(Text(title, style="bold"), "", Text(", ".join(f"to {r}" for r in rivals), "dim"))
        for key in keys:
            record = arms[key.arm]
            value = interval_text(record["value"], record["low"], record["high"])
            difference = interval_text(*apart[key][1][:3], sign=True) if key in apart else ""
            table.add_row(Text(f"  {key.arm}"), Text(value), Text(difference))
    return table
