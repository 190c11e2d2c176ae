"""Curves with bands: pass@k by difficulty, risk against coverage, and what was logged while a policy was trained."""

from collections.abc import Mapping

import altair as alt

from spl.reporting.charts import HEIGHT, Figure, Panel, Row, colour, interval_text, layered, panel, short, thin
from spl.reporting.evidence import Evidence, setting_order
from spl.reporting.measures import TRAINING
from spl.results import Record

_MOST = 48  # points of a curve


def curve_figure(
    records: list[Record], colours: Mapping[str, str], name: str, title: str, caption: str, log: bool = False
) -> Figure | None:
    """A panel for every group of the curves; None where there are no curves."""
    groups = list(dict.fromkeys(record["group"] for record in records))
    panels = []
    for group in groups:
        inside = [record for record in records if record["group"] == group]
        rows = [row for record in inside for row in _rows(record, log)]
        titles = inside[0].get("x_name") or "x", inside[0].get("y_name") or "y"
        panels.append(line_panel(rows, colours, titles, group or ("all items" if len(groups) > 1 else ""), log))
    return Figure(name, title, caption, panels) if panels else None


def _rows(record: Record, log: bool) -> list[Row]:
    rows = []
    for k in thin(len(record["x"]), _MOST, geometric=log):
        low, high = ((record[end] or [None] * len(record["x"]))[k] for end in ("low", "high"))
        if record["x"][k] is not None and record["y"][k] is not None:
            row: Row = {"policy": record["policy"], "setting": record["setting"], "x": record["x"][k]}
            row |= {"y": record["y"][k], "low": low, "high": high}
            rows.append(row | {"text": interval_text(row["y"], low, high)})
    return rows


def line_panel(
    rows: list[Row], colours: Mapping[str, str], titles: tuple[str, str], title: str = "", log: bool = False
) -> Panel:
    """Lines of rows {policy, setting, x, y, low, high, text}."""
    scale = alt.Scale(type="log", base=2, nice=False) if log else alt.Scale(zero=False, nice=False)
    x = alt.X("x:Q", title=titles[0], scale=scale, axis=alt.Axis(tickCount=6, format="~s" if log else ".6~g"))
    y = alt.Y("y:Q", title=titles[1], scale=alt.Scale(zero=False))
    ink = colour(colours, [row["policy"] for row in rows])
    settings = sorted({row["setting"] for row in rows}, key=setting_order)
    dash = alt.StrokeDash(
        "setting:N",
        sort=settings,
        legend=alt.Legend(title=None, symbolStrokeColor="gray") if len(settings) > 1 else None,
    )
    hover = [alt.Tooltip("policy:N"), alt.Tooltip("setting:N"), alt.Tooltip("x:Q", title=titles[0])]
    hover.append(alt.Tooltip("text:N", title=titles[1]))
    base = alt.Chart()
    layers = [base.mark_line(strokeWidth=1.8).encode(x=x, y=y, color=ink, strokeDash=dash)]
    layers.append(base.mark_point(size=60, opacity=0, filled=True).encode(x=x, y=y, color=ink, tooltip=hover))
    if any(row["low"] is not None for row in rows):
        band = base.mark_area(opacity=0.13).encode(
            x=x, y=alt.Y("low:Q", title=titles[1]), y2="high:Q", color=ink, detail="setting:N"
        )
        layers.insert(0, band)
    return panel(layered(layers, rows, HEIGHT), title=title, page_height=230)


def training_figure(evidence: Evidence, colours: Mapping[str, str]) -> Figure | None:
    """What runs logged, a panel for each of the figures that matter; None without runs."""
    panels = []
    for name, how in TRAINING.items():
        rows: list[Row] = [
            {"policy": run.policy, "setting": run.setting, "x": run.curves[name][k][0], "y": run.curves[name][k][1]}
            for run in evidence.runs
            for k in thin(len(run.curves.get(name, ())), 4 * _MOST)
        ]
        rows = [row | {"low": None, "high": None, "text": short(row["y"])} for row in rows]
        if rows:
            panels.append(line_panel(rows, colours, ("step", how.scale), how.title))
    caption = (
        "What the runs logged as they trained. Entropy falls where replies grow short: the two stand side by side."
    )
    return Figure("training", "Training", caption, panels) if panels else None
