"""What all charts share: panels, figures, the look, the colour of a policy, and intervals as text.

A panel is one Vega-Lite specification, made by Altair. The same one is drawn in the page and printed for papers.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt

Spec = dict[str, Any]
Row = dict[str, Any]

WIDTH, HEIGHT = 250, 190  # pixels of a printed panel, 96 to the inch
# "currentColor" is the colour of the text around a chart: in the page light or dark, in print black.
THEME: Spec = {
    "font": "Helvetica Neue, Helvetica, Arial, Liberation Sans, sans-serif",
    "background": "white",
    "view": {"stroke": None},
    "axis": {
        "labelColor": "currentColor",
        "titleColor": "currentColor",
        "labelFontSize": 10,
        "titleFontSize": 11,
        "titleFontWeight": "normal",
        "domainColor": "currentColor",
        "domainOpacity": 0.4,
        "gridColor": "currentColor",
        "gridOpacity": 0.1,
        "ticks": False,
        "labelPadding": 5,
        "titlePadding": 8,
        "labelLimit": 200,
        "labelFlush": False,
        "labelOverlap": True,
        "titleLimit": 330,
    },
    "legend": {
        "labelColor": "currentColor",
        "titleColor": "currentColor",
        "labelFontSize": 10,
        "titleFontSize": 10,
        "titleFontWeight": "normal",
        "labelLimit": 240,
    },
    "title": {"color": "currentColor", "fontSize": 11, "fontWeight": 600, "anchor": "start", "offset": 8},
    "text": {"color": "currentColor"},
    "rule": {"color": "currentColor"},
}
IN_PAGE: Spec = THEME | {"background": "transparent", "legend": THEME["legend"] | {"orient": "bottom"}}
_SHOWN = "!isValid(datum.policy) || datum.policy === 'people' || indexof(shown, datum.policy) >= 0"


@dataclass(frozen=True)
class Panel:
    """One chart.

    Attributes:
        spec: Vega-Lite, with a title where it stands among others.
        keys: what it is chosen by, one for each chooser of its figure.
        lines: told below it.
        page_height: in the page, where there is more room than in print; pixels.
    """

    spec: Spec
    keys: tuple[str, ...] = ()
    lines: tuple[str, ...] = ()
    page_height: int | None = None


@dataclass(frozen=True)
class Figure:
    """Panels side by side, or, with choosers, one of them at a time.

    Attributes:
        name: of its files, without a suffix.
        title: above it.
        caption: below it: what is drawn and how to read it.
        panels: one at least.
        choosers: what the page lets one choose, such as ("Diversity", "Quality").
    """

    name: str
    title: str
    caption: str
    panels: list[Panel]
    choosers: tuple[str, ...] = ()


def colour(colours: Mapping[str, str], policies: list[str]) -> alt.Color:
    """Of a policy, which rows hold as `policy`."""
    present = [policy for policy in colours if policy in policies]
    scale = alt.Scale(domain=present, range=[colours[policy] for policy in present])
    return alt.Color("policy:N", scale=scale, legend=alt.Legend(title=None, symbolType="circle", symbolOpacity=1))


def rows_of(rows: list[Row]) -> alt.InlineData:
    """Rows as a chart's own data."""
    return alt.InlineData(values=rows)


def layered(layers: Sequence[alt.Chart], rows: list[Row], height: int, width: int | None = None) -> alt.LayerChart:
    """Layers over the same rows, those with rows of their own excepted; sizes in pixels."""
    chart = alt.layer(*layers, data=rows_of(rows)).properties(height=height, width=width or WIDTH)
    assert isinstance(chart, alt.LayerChart)
    return chart


def panel(
    chart: alt.Chart | alt.LayerChart,
    keys: tuple[str, ...] = (),
    title: str = "",
    lines: tuple[str, ...] = (),
    page_height: int | None = None,
) -> Panel:
    """A panel of a chart; see Panel."""
    with alt.data_transformers.enable(consolidate_datasets=False):
        spec = chart.to_dict(validate=False)  # every part of it was checked when it was made
    for name in ("$schema", "config"):
        spec.pop(name, None)
    return Panel(spec | ({"title": title} if title else {}), keys, lines, page_height)


def in_page(panel: Panel) -> Spec:
    """A panel as the page draws it: as wide as there is room, and only policies that the page's list `shown` holds."""
    spec = copy.deepcopy(panel.spec)
    for layer in (spec, *spec.get("layer", [])):
        if "color" in layer.get("encoding", {}):
            layer["encoding"]["color"]["legend"] = None  # the page has one for all charts
    height = {"height": panel.page_height} if panel.page_height else {}
    return spec | height | {"width": "container", "transform": [{"filter": _SHOWN}, *spec.get("transform", [])]}


def in_print(panels: list[Panel], columns: int = 3) -> Spec:
    """Panels as one figure for a paper."""
    sized = [copy.deepcopy({"width": WIDTH, "height": HEIGHT} | panel.spec) for panel in panels]
    _share_colours(sized)
    whole: Spec = sized[0] if len(sized) == 1 else {"concat": sized, "columns": columns, "spacing": 24}
    return whole | {"config": THEME}


def _share_colours(specs: list[Spec]) -> None:
    """Give all panels the policies of all: panels of one figure have one scale, of which Vega-Lite takes the first."""
    layers = [layer for spec in specs for layer in (spec, *spec.get("layer", []))]
    scales = [layer["encoding"]["color"]["scale"] for layer in layers if "color" in layer.get("encoding", {})]
    known = {name: ink for scale in scales for name, ink in zip(scale["domain"], scale["range"], strict=True)}
    for scale in scales:
        scale["domain"], scale["range"] = list(known), list(known.values())


def interval_text(value: float | None, low: float | None, high: float | None, sign: bool = False) -> str:
    """Such as "0.43 [0.41, 0.45]", all with a sign where asked for."""
    if value is None:
        return "not known"
    if low is None or high is None:
        return f"{'+' if sign and value > 0 else ''}{short(value)}"
    if high == low:
        return f"{short(value)} [{short(low)}, {short(high)}]"
    form = f"{'+' if sign else ''}z.{_digits(high - low)}f"
    return f"{value:{form}} [{low:{form}}, {high:{form}}]"


def short(value: float) -> str:
    """A number with three digits that tell."""
    return f"{value:z,.0f}" if abs(value) >= 1000 else f"{value:z.3g}"


def _digits(width: float) -> int:
    """Decimals that a number needs when it is known to within a width: two digits of it."""
    digits = 0
    while digits < 5 and width < 10 ** (1 - digits):
        digits += 1
    return digits


def thin(count: int, most: int, geometric: bool = False) -> list[int]:
    """Indices of at most `most` of `count` points, both ends kept; closer together at the start where geometric."""
    if count <= most or most < 2:
        return list(range(min(count, most)))
    if geometric:
        ratio = count ** (1 / (most - 1))
        return sorted({min(round(ratio**k), count) - 1 for k in range(most)})
    return sorted({round(k * (count - 1) / (most - 1)) for k in range(most)})


def slug(name: str) -> str:
    """A name as a part of a file's name."""
    return "".join(letter if letter.isalnum() else "_" for letter in name.lower())
