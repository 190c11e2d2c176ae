"""Diversity against quality: every arm a point with its intervals, the front of every family a line with its band."""

from collections.abc import Mapping

import altair as alt

from spl.reporting.charts import Figure, Panel, Row, colour, interval_text, layered, panel, rows_of
from spl.reporting.evidence import Arm, Estimates, Evidence, arm_order, family
from spl.reporting.labels import PLACES, place_labels
from spl.reporting.measures import DIVERSITY, QUALITY, Measure
from spl.results import Record

SHAPES = {"t": "circle", "top_p": "square", "top_k": "triangle-up", "min_p": "diamond", "global": "cross"}
_DASHES = [[1, 0], [6, 3], [2, 2], [9, 3, 2, 3], [4, 4], [1, 3]]
_WIDTH, _HEIGHT, _PAGE_HEIGHT = 320, 250, 430


def front_figure(evidence: Evidence, colours: Mapping[str, str]) -> Figure | None:
    """One panel for every pair of a measure of diversity and one of quality; None where there is no such pair."""
    found = evidence.estimates("diversity-quality")
    pairs = [
        (x, y) for y in QUALITY for x in DIVERSITY if _tell_apart(found.get((x, None), {}), found.get((y, None), {}))
    ]
    caption = (
        "Each point is a policy as it was decoded, with 95 % intervals over prompts (and training seeds, where there "
        "are several); arrows point to the better end of an axis. A line is the front of a family: the best quality at "
        "each level of diversity or better, with its 95 % band. Longer replies tend to score as more diverse: read "
        "entropy and length, which stand with it, before any claim."
    )
    panels = [_front(found, evidence.of_families(f"{x} / {y}"), x, y, colours) for x, y in pairs]
    return Figure("front", "Fronts", caption, panels, ("Diversity", "Quality")) if panels else None


def _tell_apart(*measured: Mapping[Arm, Record]) -> bool:
    """Whether the arms that have both measures differ in each."""
    both = set.intersection(*(set(arms) for arms in measured))
    return all(len({arms[arm]["value"] for arm in both}) > 1 for arms in measured)


def _front(found: Estimates, front: list[Record], x: str, y: str, colours: Mapping[str, str]) -> Panel:
    across, up = DIVERSITY[x], QUALITY[y]
    on_x, on_y = found[x, None], found[y, None]
    rows = [_row(arm, on_x[arm], on_y[arm]) for arm in sorted(on_x.keys() & on_y.keys(), key=arm_order)]
    curves = [row for record in front if record["kind"] == "curve" for row in _curve(record)]
    domains = _domain(rows, "x"), _domain(rows, "y")
    points = [(row["x"], row["y"], row["short"]) for row in rows]
    for row, place in zip(rows, place_labels(points, domains, (_WIDTH, _HEIGHT)), strict=True):
        row["place"] = place
    axes = _axes(domains, across, up)
    layers = [*_lines(curves, axes, colours), *_points(rows, axes, colours, across, up)]
    chart = layered(layers, rows, _HEIGHT, _WIDTH)
    keys = (across.label, up.label)
    return panel(chart, keys, lines=comparisons(front, up), page_height=_PAGE_HEIGHT)


def _row(arm: Arm, x: Record, y: Record) -> Row:
    kind = arm.setting.split(" ")[0]
    row: Row = {"policy": arm.policy, "setting": arm.setting, "decoding": kind if kind in SHAPES else "t"}
    row["short"] = arm.policy if arm.setting in ("", "t 1") else arm.setting
    for axis, record in (("x", x), ("y", y)):
        value, low, high = record["value"], record["low"], record["high"]
        row[axis], row[f"{axis}_text"] = value, interval_text(value, low, high)
        row[f"{axis}_low"], row[f"{axis}_high"] = (value if end is None else end for end in (low, high))
    return row


def _curve(record: Record) -> list[Row]:
    """A family's front from the first to the last level that an arm of it reaches."""
    columns = zip(record["x"], record["y"], record["low"] or record["y"], record["high"] or record["y"], strict=True)
    return [
        {"front": record["policy"], "x": x, "y": y, "low": low, "high": high}
        for x, y, low, high in columns
        if y is not None
    ]


def _domain(rows: list[Row], axis: str) -> tuple[float, float]:
    low, high = min(row[f"{axis}_low"] for row in rows), max(row[f"{axis}_high"] for row in rows)
    room = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
    return low - room, high + room


def _axes(domains: tuple[tuple[float, float], ...], across: Measure, up: Measure) -> dict[str, Row]:
    scales = [alt.Scale(domain=list(domain), nice=False, zero=False) for domain in domains]
    return {
        "x": {"title": across.axis, "scale": scales[0], "axis": alt.Axis(tickCount=6)},
        "y": {"title": up.axis, "scale": scales[1], "axis": alt.Axis(tickCount=6)},
    }


def _lines(curves: list[Row], axes: Mapping[str, Row], colours: Mapping[str, str]) -> list[alt.Chart]:
    """Fronts and their bands in the colour of the family's middle policy, their dashes told in a legend."""
    names = list(dict.fromkeys(row["front"] for row in curves))
    scale = alt.Scale(domain=names, range=[_DASHES[k % len(_DASHES)] for k in range(len(names))])
    dash = alt.StrokeDash("front:N", scale=scale, legend=alt.Legend(title="front", symbolStrokeColor="gray"))
    x, y = alt.X("x:Q", **axes["x"]), alt.Y("y:Q", **axes["y"])
    layers = []
    for name in names:
        base = alt.Chart(rows_of([row for row in curves if row["front"] == name]))
        ink = _family_colour(name, colours)
        band = base.mark_area(opacity=0.12, clip=True, color=ink)
        layers.append(band.encode(x=x, y=alt.Y("low:Q", **axes["y"]), y2="high:Q"))
        line = base.mark_line(strokeWidth=1.6, opacity=0.8, clip=True, color=ink)
        layers.append(line.encode(x=x, y=y, strokeDash=dash))
    return layers


def _family_colour(name: str, colours: Mapping[str, str]) -> str:
    members = [policy for policy in colours if policy == name] or [p for p in colours if family(p) == family(name)]
    return colours[members[len(members) // 2]] if members else "gray"


def _points(
    rows: list[Row], axes: Mapping[str, Row], colours: Mapping[str, str], across: Measure, up: Measure
) -> list[alt.Chart]:
    x, y = alt.X("x:Q", **axes["x"]), alt.Y("y:Q", **axes["y"])
    ink = colour(colours, [row["policy"] for row in rows])
    kinds = [kind for kind in SHAPES if kind in {row["decoding"] for row in rows}]
    legend = (
        alt.Legend(title="decoding", symbolFillColor="currentColor", symbolStrokeWidth=0) if len(kinds) > 1 else None
    )
    shape = alt.Shape("decoding:N", legend=legend, scale=alt.Scale(domain=kinds, range=[SHAPES[k] for k in kinds]))
    hover = [alt.Tooltip("policy:N"), alt.Tooltip("setting:N"), alt.Tooltip("x_text:N", title=across.label)]
    hover.append(alt.Tooltip("y_text:N", title=up.label))
    base = alt.Chart()
    texts = [
        base.transform_filter(f"datum.place == '{place}'")
        .mark_text(fontSize=10, align=how.align, dx=how.dx, dy=how.dy)
        .encode(x=x, y=y, text="short:N")
        for place, how in PLACES.items()
        if any(row["place"] == place for row in rows)
    ]
    return [
        base.mark_rule(opacity=0.4).encode(x=alt.X("x_low:Q", **axes["x"]), x2="x_high:Q", y=y, color=ink),
        base.mark_rule(opacity=0.4).encode(x=x, y=alt.Y("y_low:Q", **axes["y"]), y2="y_high:Q", color=ink),
        base.mark_point(filled=True, size=70, opacity=1).encode(x=x, y=y, color=ink, shape=shape, tooltip=hover),
        *texts,
    ]


def comparisons(front: list[Record], up: Measure) -> tuple[str, ...]:
    """How families' fronts compare, a sentence a pair; SPL against others where it is among them."""
    records = [_spl_first(record) for record in front if record.get("rival") and record["value"] is not None]
    areas = [record for record in records if record["name"] == "hypervolume_difference"]
    gaps = {(r["policy"], r["rival"]): r for r in records if r["name"] == "front_gap"}
    of_spl = [record for record in areas if family(record["policy"]) == "spl"]
    return tuple(_comparison(area, gaps.get((area["policy"], area["rival"])), up) for area in of_spl or areas)


def _spl_first(record: Record) -> Record:
    """A comparison of another family with SPL, turned round."""
    if family(record["rival"]) != "spl" or family(record["policy"]) == "spl":
        return record
    turned = {name: None if record[name] is None else -record[name] for name in ("value", "low", "high")}
    turned["low"], turned["high"] = turned["high"], turned["low"]
    greater = None if record.get("greater") is None else 1 - record["greater"]
    return record | turned | {"policy": record["rival"], "rival": record["policy"], "greater": greater}


def _comparison(area: Record, gap: Record | None, up: Measure) -> str:
    text = interval_text(area["value"], area["low"], area["high"], sign=True)
    parts = [f"{area['policy']} against {area['rival']}: area under the front {text} of the box"]
    if area.get("greater") is not None:
        parts.append(f"larger in {area['greater']:.0%} of the draws")
    if gap:
        better = interval_text(gap["value"], gap["low"], gap["high"], sign=True)
        parts.append(f"{up.title.lower()} better by {better} at equal diversity")
    return f"{', '.join(parts)}."
