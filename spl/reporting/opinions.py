"""Shares of answers, question by question: what people answered, and what policies would."""

from collections.abc import Iterable, Mapping

import altair as alt

from spl.reporting.charts import Figure, Panel, Row, Spec, colour, panel, rows_of, short, thin
from spl.reporting.evidence import Arm, Estimates, arm_of, arm_order
from spl.results import Record

_MOST = 200  # questions in a page
_PEOPLE = "people"


def whole_groups(found: Estimates) -> set[str | None]:
    """Groups of estimates over all people; others are of one group of people, which has its agreement alone."""
    return {group for name, group in found if name == "total_variation"}


def shares_figure(
    records: list[Record], colours: Mapping[str, str], name: str, title: str, caption: str, chooser: str = "Question"
) -> Figure | None:
    """A panel for every question; None where no shares are given.

    Records of several training seeds are averaged.
    """
    questions: dict[tuple[str, ...], list[Record]] = {}
    for record in records:
        questions.setdefault((record["item"], record["question"], *record["options"]), []).append(record)
    if not questions:
        return None
    kept = [list(questions.values())[k] for k in thin(len(questions), _MOST)]
    policies = [policy for policy in colours if any(record["policy"] == policy for record in records)]
    template = _template(policies, colours)
    panels = [_question(asked, template) for asked in kept]
    some = f" {len(kept)} of {len(questions)} questions are drawn, evenly spread." if len(kept) < len(questions) else ""
    return Figure(name, title, caption + some, panels, (chooser,))


def _template(policies: list[str], colours: Mapping[str, str]) -> Spec:
    """The chart of a question without its rows, the same for all of them: Altair takes its time for each."""
    x = alt.X("share:Q", title="share of the answers", axis=alt.Axis(format="%", tickCount=5))
    y = alt.Y("option:N", title=None, sort=alt.EncodingSortField("order", op="min"), scale=alt.Scale(paddingInner=0.25))
    # People have the colour of the text, and are drawn first.
    ink = colour({_PEOPLE: "currentColor", **colours}, [_PEOPLE, *policies])
    hover = [alt.Tooltip("who:N"), alt.Tooltip("option:N"), alt.Tooltip("share:Q", format=".1%")]
    hover.append(alt.Tooltip("mass:N", title="mass on the options"))
    offset = alt.YOffset("who:N", sort=alt.EncodingSortField("place", op="min"))
    bars = alt.Chart(rows_of([])).mark_bar(cornerRadiusEnd=2)
    return panel(bars.encode(x=x, y=y, yOffset=offset, color=ink, tooltip=hover)).spec


def _question(records: list[Record], template: Spec) -> Panel:
    first = records[0]
    arms: dict[Arm, list[Record]] = {}
    for record in records:
        arms.setdefault(arm_of(record), []).append(record)
    rows: list[Row] = []
    if first["people"]:
        rows += _bars(first["options"], first["people"], {"policy": _PEOPLE, "who": _PEOPLE, "place": 0, "mass": ""})
    masses = []
    for place, arm in enumerate(sorted(arms, key=arm_order), 1):
        mass = _mean([record["mass"] for record in arms[arm]])
        told = "not known" if mass is None else short(mass)
        masses.append(f"{arm}: {told}")
        means = [_mean(shares) for shares in zip(*(record["model"] for record in arms[arm]), strict=True)]
        row = {"policy": arm.policy, "setting": arm.setting, "who": str(arm), "place": place, "mass": told}
        rows += _bars(first["options"], means, row)
    height = len(first["options"]) * (9 * (len(arms) + 1) + 8)
    spec = template | {"data": {"values": rows}, "height": height, "title": first["question"]}
    lines = (f"Mass on the options: {'; '.join(masses)}.",)
    return Panel(spec, (f"{first['item']}: {first['question']}",), lines)


def _mean(values: Iterable[float | None]) -> float | None:
    """Over the training seeds that have a value; None of none."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _bars(options: list[str], shares: list[float | None], told: Row) -> list[Row]:
    return [
        told | {"option": option, "order": order, "share": share}
        for order, (option, share) in enumerate(zip(options, shares, strict=True))
        if share is not None
    ]
