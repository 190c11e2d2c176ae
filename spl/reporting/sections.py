"""What stands in a report, in order: each evaluation's figures with what must be read beside them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from spl.reporting.charts import Figure, slug
from spl.reporting.compass import compass_figure
from spl.reporting.dots import dots_figure, groups_figure
from spl.reporting.evidence import Estimates, Evidence
from spl.reporting.fronts import front_figure
from spl.reporting.lines import curve_figure, training_figure
from spl.reporting.measures import BESIDE, CALIBRATION, DIVERSITY, OPINIONS, QUALITY, SAME, at_most_samples, measure
from spl.reporting.opinions import shares_figure, whole_groups
from spl.reporting.reliability import reliability_figures
from spl.results import Record

Colours = Mapping[str, str]

_OWN_LAW = ("", "t 1")
_BESIDE = "More diversity that comes with longer replies, or with replies that were cut, may be no more than that."
_SHARES = (
    "Bars in the colour of the text are what people answered, the others a policy's probability of an option, "
    "normalised over the options. Where their mass, before that, is small, the shares tell little of what the policy "
    "would say by itself."
)
_STORIES = "How often it is told in the stories that tell it at all, whose share is the mass."
_RISK = (
    "The share of wrong answers among the questions that a policy is most sure of. Scaling by one temperature changes "
    "little here: it hardly moves the order of the questions."
)


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        program: whose results it shows; also its anchor.
        title: above it.
        lead: what the evaluation asks.
        figures: those that there are records for; empty where there are none.
        beside: figures that stand at the side of the first one.
    """

    program: str
    title: str
    lead: str
    figures: list[Figure]
    beside: list[Figure] = field(default_factory=list)


def sections(evidence: Evidence, colours: Colours) -> list[Section]:
    """All sections that results or runs were given for."""
    given = {file.header["program"] for file in evidence.files}
    makers = {
        "diversity-quality": _diversity,
        "best-of-n": _best_of_n,
        "calibration": _calibration,
        "lm-eval": _lm_eval,
        "opinions": _opinions,
    }
    found = [make(evidence, colours) for program, make in makers.items() if program in given]
    if evidence.runs:
        figures = _present([training_figure(evidence, colours)])
        found.append(Section("training", "Training", "How the policies came to be.", figures))
    return found


def _present(figures: Iterable[Figure | None]) -> list[Figure]:
    return [figure for figure in figures if figure]


def _rest(found: Estimates, *drawn: Iterable[str]) -> list[str]:
    """Measures that are in no other figure."""
    return [name for name in dict.fromkeys(name for name, _ in found) if not any(name in names for names in drawn)]


def _beside(found: Estimates, colours: Colours, name: str) -> Figure | None:
    """Entropy, length and how replies ended, over all items; of measures that tell the same the first."""
    kept = [next((each for each in same if (each, None) in found), "") for same in SAME]
    overall = {key: arms for key, arms in found.items() if key[1] is None}
    return dots_figure(overall, kept, colours, name, "Entropy and length", _BESIDE)


def _diversity(evidence: Evidence, colours: Colours) -> Section:
    program = "diversity-quality"
    found = evidence.estimates(program)
    rest = _rest(found, DIVERSITY, QUALITY, BESIDE)
    figures = [
        front_figure(evidence, colours),
        dots_figure(found, DIVERSITY, colours, "diversity", "Diversity, measure by measure"),
        dots_figure(found, QUALITY, colours, "quality", "Quality, measure by measure"),
        shares_figure(evidence.of("shares", program), colours, "stories", "Stories", _STORIES, "Told"),
        dots_figure(found, rest, colours, "diversity_more", "More"),
    ]
    beside = _beside(found, colours, "beside")
    lead = "Does a policy say more different things, and are they as good?"
    return Section(program, "Diversity and quality", lead, _present(figures), _present([beside]))


def _best_of_n(evidence: Evidence, colours: Colours) -> Section:
    program = "best-of-n"
    found = evidence.estimates(program)
    curves: dict[str, list[Record]] = {}
    for record in evidence.of("curve", program):
        curves.setdefault(record["name"], []).append(record)
    caption = "Bands are 95 % intervals over problems (and training seeds)."
    figures = [
        curve_figure(records, colours, f"best_of_n_{slug(name)}", measure(name).title, caption, log=True)
        for name, records in curves.items()
    ]
    at_n = at_most_samples(name for name, _ in found if name.endswith("_difference") or "@" not in name)
    names = [name for name in at_n if name not in BESIDE]
    figures.append(dots_figure(found, names, colours, "best_of_n", "In numbers"))
    beside = _beside(found, colours, "best_of_n_beside")
    lead = "Given more tries, does a policy find more right answers, or the same ones again?"
    return Section(program, "Best of N", lead, _present(figures), _present([beside]))


def _calibration(evidence: Evidence, colours: Colours) -> Section:
    lead = "Is a policy right as often as it is sure?"
    return Section("calibration", "Calibration", lead, _calibrated(evidence, colours, "calibration", ""))


def _lm_eval(evidence: Evidence, colours: Colours) -> Section:
    lead = "The same measures on the tasks of lm-evaluation-harness."
    return Section("lm-eval", "lm-evaluation-harness", lead, _calibrated(evidence, colours, "lm-eval", "lm_eval_"))


def _calibrated(evidence: Evidence, colours: Colours, program: str, prefix: str) -> list[Figure]:
    curves, found = evidence.of("curve", program), evidence.estimates(program)
    risks = [r for r in curves if r["name"] == "risk_coverage" and r["setting"] in _OWN_LAW]
    figures = [
        *reliability_figures([r for r in curves if r["name"] == "reliability"], colours, prefix),
        curve_figure(risks, colours, f"{prefix}risk_coverage", "Risk and coverage", _RISK),
        dots_figure(
            found,
            CALIBRATION,
            colours,
            f"{prefix}calibration",
            "In numbers",
            "The upright tick is what a policy that is calibrated perfectly would show with as many questions.",
        ),
    ]
    return _present(figures)


def _opinions(evidence: Evidence, colours: Colours) -> Section:
    program = "opinions"
    found = evidence.estimates(program)
    whole = whole_groups(found)
    groups = {g: arms for (name, g), arms in found.items() if name == "one_minus_jsd" and g not in whole and g}
    overall = {
        key: arms for key, arms in found.items() if key[0] != "one_minus_jsd" or key[1] in whole or len(groups) < 2
    }
    figures = [
        shares_figure(evidence.of("shares", program), colours, "opinions", "Answers", _SHARES),
        dots_figure(overall, OPINIONS, colours, "agreement", "In numbers"),
        groups_figure(groups, "groups", "Agreement, group by group", "one_minus_jsd", colours),
        compass_figure(found, colours),
    ]
    return Section(program, "Opinions", "Does a policy answer as people do, in all their variety?", _present(figures))
