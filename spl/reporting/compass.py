"""Where policies stand on two axes of opinion, with what the position hides."""

from collections.abc import Mapping

import altair as alt

from spl.reporting.charts import Figure, Row, colour, interval_text, layered, panel
from spl.reporting.evidence import Estimates, arm_order


def compass_figure(found: Estimates, colours: Mapping[str, str]) -> Figure | None:
    """A point for each arm on the first two axes, with intervals over propositions; None where there are not two."""
    axes = [group for name, group in found if name == "position" and group]
    if len(axes) < 2:
        return None
    first, second = (found["position", axis] for axis in axes[:2])
    rows: list[Row] = []
    for arm in sorted(first.keys() & second.keys(), key=arm_order):
        row: Row = {"policy": arm.policy, "setting": arm.setting}
        for axis, record in (("x", first[arm]), ("y", second[arm])):
            value, low, high = record["value"], record["low"], record["high"]
            row |= {axis: value, f"{axis}_text": interval_text(value, low, high)}
            row[f"{axis}_low"], row[f"{axis}_high"] = (value if end is None else end for end in (low, high))
        rows.append(row)
    scale = alt.Scale(domain=[-1, 1])
    x, y = alt.X("x:Q", title=axes[0], scale=scale), alt.Y("y:Q", title=axes[1], scale=scale)
    ink = colour(colours, [row["policy"] for row in rows])
    hover = [alt.Tooltip("policy:N"), alt.Tooltip("x_text:N", title=axes[0]), alt.Tooltip("y_text:N", title=axes[1])]
    base = alt.Chart()
    layers = [
        base.mark_rule(opacity=0.4).encode(x=alt.X("x_low:Q", title=axes[0]), x2="x_high:Q", y=y, color=ink),
        base.mark_rule(opacity=0.4).encode(x=x, y=alt.Y("y_low:Q", title=axes[1]), y2="y_high:Q", color=ink),
        base.mark_point(filled=True, size=70, opacity=1).encode(x=x, y=y, color=ink, tooltip=hover),
    ]
    caption = (
        "The mean agreement with propositions, by their weights, from -1 to 1 on each axis; intervals are over the "
        "propositions. Two policies may stand at one place, one sure and the other split: the spread tells them apart."
    )
    return Figure("compass", "Positions", caption, [panel(layered(layers, rows, 260, 260))])
