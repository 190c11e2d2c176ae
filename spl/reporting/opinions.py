"""Shares of answers, question by question: what people answered, and what policies would."""

from collections.abc import Mapping

import altair as alt

from spl.reporting.charts import Figure, Panel, Row, Spec, colour, panel, rows_of, short, thin
from spl.reporting.evidence import Arm, Estimates, arm_order, seed_label
from spl.results import Record

_MOST = 200  # questions in a page
_PEOPLE = "people"


def whole_groups(found: Estimates) -> set[str | None]:
    """Groups of estimates over all people; others are of one group of people, which has its agreement alone."""
    return {group for name, group in found if name == "total_variation"}


def shares_figure(
    records: list[Record], colours: Mapping[str, str], name: str, title: str, caption: str
) -> Figure | None:
    """A panel for every question; None where no shares are given."""
    questions: dict[str, list[Record]] = {}
    for record in records:
        questions.setdefault(record["item"], []).append(record)
    if not questions:
        return None
    kept = [list(questions)[k] for k in thin(len(questions), _MOST)]
    policies = [policy for policy in colours if any(record["policy"] == policy for record in records)]
    template = _template(policies, colours)
    panels = [_question(item, questions[item], template) for item in kept]
    some = f" {len(kept)} of {len(questions)} questions are drawn, evenly spread." if len(kept) < len(questions) else ""
    return Figure(name, title, caption + some, panels, ("Question",))


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


def _question(item: str, records: list[Record], template: Spec) -> Panel:
    first = records[0]
    rows: list[Row] = []
    if first["people"]:
        rows += _bars(first["options"], first["people"], {"policy": _PEOPLE, "who": _PEOPLE, "place": 0, "mass": ""})
    ordered = sorted(records, key=lambda r: (arm_order(Arm(r["policy"], r["setting"])), str(r["train_seed"])))
    for place, record in enumerate(ordered, 1):
        who = seed_label(Arm(record["policy"], record["setting"]), record["train_seed"])
        mass = "not known" if record["mass"] is None else short(record["mass"])
        told = {"policy": record["policy"], "setting": record["setting"], "who": who, "place": place, "mass": mass}
        rows += _bars(record["options"], record["model"], told)
    height = len(first["options"]) * (9 * (len(records) + 1) + 8)
    spec = template | {"data": {"values": rows}, "height": height, "title": first["question"]}
    masses = ", ".join(
        f"{row['who']} {row['mass']}" for row in rows if row["option"] == first["options"][0] and row["mass"]
    )
    lines = (f"Mass on the options: {masses}.",) if masses else ()
    return Panel(spec, (f"{item}: {first['question']}",), lines)


def _bars(options: list[str], shares: list[float | None], told: Row) -> list[Row]:
    return [
        told | {"option": option, "order": order, "share": share}
        for order, (option, share) in enumerate(zip(options, shares, strict=True))
        if share is not None
    ]
