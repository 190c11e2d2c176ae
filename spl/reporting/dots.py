"""Estimates with their intervals, a row for every policy as it was decoded: what stands beside every claim."""

from collections.abc import Iterable, Mapping

import altair as alt

from spl.reporting.charts import Figure, Panel, Row, colour, interval_text, layered, panel
from spl.reporting.evidence import Arm, Estimates, arm_order
from spl.reporting.measures import YARDSTICKS, measure
from spl.results import Record

_STEP = 16  # pixels of a row
_MOST_GROUPS = 80


def dots_figure(
    found: Estimates, names: Iterable[str], colours: Mapping[str, str], name: str, title: str, caption: str = ""
) -> Figure | None:
    """A panel for each of the measures and groups of items that there are estimates of; None where there is none."""
    keys = [(each, group) for each in names for of, group in found if of == each]
    panels = [_dots(found[key], found.get((YARDSTICKS.get(key[0], ""), key[1]), {}), *key, colours) for key in keys]
    return Figure(name, title, caption, panels) if panels else None


def _dots(
    arms: Mapping[Arm, Record],
    yardstick: Mapping[Arm, Record],
    name: str,
    group: str | None,
    colours: Mapping[str, str],
) -> Panel:
    how = measure(name)
    rows = [_row(arm, arms[arm]) for arm in sorted(arms, key=arm_order)]
    for row, arm in zip(rows, sorted(arms, key=arm_order), strict=True):
        row["yardstick"] = yardstick[arm]["value"] if arm in yardstick else None
    y = alt.Y("arm:N", title=None, sort=[row["arm"] for row in rows], axis=alt.Axis(grid=True))
    layers = _spans(rows, y, how.scale, colours, how.label)
    if yardstick:
        tick = alt.Chart().mark_tick(color="currentColor", thickness=2, size=9, opacity=0.8)
        layers.append(tick.encode(x=alt.X("yardstick:Q", title=how.scale), y=y))
    title = f"{how.title}, {group}" if group else how.title
    return panel(layered(layers, rows, _STEP * len(rows)), title=title)


def groups_figure(
    groups: Mapping[str, Mapping[Arm, Record]], name: str, title: str, measured: str, colours: Mapping[str, str]
) -> Figure | None:
    """A row for every group of items, those that differ most first, a dot for every arm; None of one group."""
    if len(groups) < 2:
        return None
    spread = {
        g: max(r["value"] for r in arms.values()) - min(r["value"] for r in arms.values()) for g, arms in groups.items()
    }
    kept = sorted(groups, key=lambda group: -spread[group])[:_MOST_GROUPS]
    rows = [_row(arm, groups[g][arm]) | {"group": g} for g in kept for arm in sorted(groups[g], key=arm_order)]
    how = measure(measured)
    y = alt.Y("group:N", title=None, sort=kept, axis=alt.Axis(grid=True))
    layers = _spans(rows, y, how.scale, colours, how.label)
    caption = "A row for every group of people, those first in which policies differ most."
    return Figure(name, title, caption, [panel(layered(layers, rows, _STEP * len(kept)))])


def _row(arm: Arm, record: Record) -> Row:
    value, low, high = record["value"], record["low"], record["high"]
    ends = {"low": value if low is None else low, "high": value if high is None else high}
    told = {"text": interval_text(value, low, high), "num": record["num"]}
    return {"policy": arm.policy, "setting": arm.setting, "arm": str(arm), "value": value} | ends | told


def _spans(rows: list[Row], y: alt.Y, title: str, colours: Mapping[str, str], label: str) -> list[alt.Chart]:
    ink = colour(colours, [row["policy"] for row in rows])
    axis = alt.Axis(tickCount=4, format=".6~g")
    hover = [alt.Tooltip("group:N")] if "group" in rows[0] else []
    hover += [alt.Tooltip("policy:N"), alt.Tooltip("setting:N"), alt.Tooltip("text:N", title=label)]
    hover.append(alt.Tooltip("num:Q", title="items"))
    base = alt.Chart()
    span = base.mark_rule(strokeWidth=2, opacity=0.5).encode(
        x=alt.X("low:Q", title=title, scale=alt.Scale(zero=False), axis=axis), x2="high:Q", y=y, color=ink
    )
    dot = base.mark_point(filled=True, size=50, opacity=1).encode(
        x=alt.X("value:Q", title=title, axis=axis), y=y, color=ink, tooltip=hover
    )
    return [span, dot]
