"""Reliability diagrams: accuracy over confidence, with the number of questions in every bin."""

from collections.abc import Mapping

import altair as alt

from spl.reporting.charts import WIDTH, Figure, Panel, Row, colour, layered, panel, rows_of, slug
from spl.reporting.evidence import policy_order
from spl.results import Record

_DRAWN = ("", "t 1", "t fitted")  # settings: as it is, and scaled
_UP = "accuracy; bars: share of questions"
_CAPTION = (
    "On the diagonal, answers are right as often as the policy is sure of them; below it the policy is too sure. The "
    "bars are the share of questions in each bin: points over short bars rest on few, as their intervals say. Dashed "
    "is the same policy with its logits divided by one temperature, fitted on other questions."
)


def reliability_figures(records: list[Record], colours: Mapping[str, str], prefix: str) -> list[Figure]:
    """A figure for every group of questions, in it a panel for every policy, as it is and scaled.

    Args:
        records: curves.
        colours: of policies.
        prefix: of the figures' names.
    """
    drawn = [record for record in records if record["setting"] in _DRAWN]
    figures = []
    for group in dict.fromkeys(record["group"] for record in drawn):
        inside = [record for record in drawn if record["group"] == group]
        policies = sorted({record["policy"] for record in inside}, key=policy_order)
        panels = [_diagram([r for r in inside if r["policy"] == policy], colours) for policy in policies]
        title = f"Reliability, {group}" if group else "Reliability"
        figures.append(Figure(f"{prefix}reliability_{slug(group or 'all')}", title, _CAPTION, panels))
    return figures


def _diagram(records: list[Record], colours: Mapping[str, str]) -> Panel:
    first = records[0]
    settings = list(dict.fromkeys(record["setting"] for record in records))
    rows = [row for record in records for row in _bins(record)]
    ink = colour(colours, [first["policy"]])
    unit = alt.Scale(domain=[0, 1])
    x = alt.X("x:Q", title="confidence", scale=unit, axis=alt.Axis(tickCount=5))
    y = alt.Y("y:Q", title=_UP, scale=unit, axis=alt.Axis(tickCount=5))
    legend = alt.Legend(title=None, symbolStrokeColor="gray") if len(settings) > 1 else None
    dash = alt.StrokeDash("setting:N", sort=settings, legend=legend)
    hover = [alt.Tooltip("policy:N"), alt.Tooltip("setting:N"), alt.Tooltip("x:Q", title="confidence", format=".3f")]
    hover += [alt.Tooltip("y:Q", title="accuracy", format=".3f"), alt.Tooltip("count:Q", title="questions")]
    diagonal = alt.Chart(rows_of([{"x": 0, "y": 0}, {"x": 1, "y": 1}])).mark_line(
        color="currentColor", opacity=0.35, strokeWidth=1
    )
    base = alt.Chart()
    bars = base.transform_filter(alt.datum.setting == first["setting"]).mark_bar(opacity=0.22, size=9)
    layers = [
        diagonal.encode(x=x, y=y),
        bars.encode(x=x, y=alt.Y("share:Q", title=_UP), color=ink),
        base.mark_rule(opacity=0.35, clip=True).encode(x=x, y=alt.Y("low:Q", title=_UP), y2="high:Q", color=ink),
        base.mark_line(strokeWidth=1.8).encode(x=x, y=y, color=ink, strokeDash=dash),
        base.mark_point(filled=True, size=40, opacity=1).encode(x=x, y=y, color=ink, tooltip=hover),
    ]
    return panel(layered(layers, rows, WIDTH), title=first["policy"])


def _bins(record: Record) -> list[Row]:
    """Bins that hold a question."""
    num = len(record["x"])
    counts, low, high = (record[name] or [None] * num for name in ("weight", "low", "high"))
    total = sum(count or 0 for count in counts) or 1
    return [
        {"policy": record["policy"], "setting": record["setting"], "x": x, "y": y}
        | {"count": count, "share": (count or 0) / total, "low": bottom, "high": top}
        for x, y, count, bottom, top in zip(record["x"], record["y"], counts, low, high, strict=True)
        if x is not None and y is not None
    ]
