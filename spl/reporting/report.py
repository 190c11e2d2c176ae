"""`spl report`: results files and run folders in, one page out, with figures for papers and a table on the terminal."""

import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import vl_convert
from rich.console import Console

from spl.disk import replacing
from spl.reporting.browser import browsable
from spl.reporting.charts import IN_PAGE, Figure, in_page, in_print
from spl.reporting.colours import colours
from spl.reporting.differences import differences
from spl.reporting.evidence import Evidence, gather
from spl.reporting.headline import Differences, cards, caveats, compared, fronts
from spl.reporting.page import page, vega_lite
from spl.reporting.sections import Section, sections
from spl.reporting.table import APART, COLUMNS, rows, terminal
from spl.types import UserError

log = logging.getLogger(__name__)

_PPI = 300
_MOST_PRINTED = 24  # panels of a figure that is one panel at a time


def report(
    results: list[Path],
    output: Path = Path("report.html"),
    figures: Path | None = None,
    title: str = "Soft Preference Learning: report",
    baseline: str | None = None,
    browse_prompts: int = 100,
    browse_replies: int = 16,
) -> None:
    """One page of figures, samples and tables of all that was measured, which opens anywhere without a network.

    Example: spl report results samples runs -o report.html

    Args:
        results: files that `spl sample` and `spl evaluate` wrote, folders of them, and run folders of `spl fit`, whose
            curves are drawn.
        output: the page, one HTML file.
        figures: folder for every figure as PNG and SVG; beside the page and named after it where not given.
        title: of the page.
        baseline: policy that the others are held against, as "dpo" or with its way of decoding "dpo, t 1"; DPO at
            temperature 1 where not given, else the first policy.
        browse_prompts: most prompts in the browser of samples.
        browse_replies: most replies of a policy to a prompt in it.

    Raises:
        UserError: a file is no results file or holds a broken record, or the baseline is no policy.
    """
    for name, most in (("browse_prompts", browse_prompts), ("browse_replies", browse_replies)):
        if most < 0:
            raise UserError(f"{name} must be 0 or more, but is {most}.")
    evidence = gather(results)
    apart = differences(evidence, baseline)
    palette = colours(evidence.policies())
    found = sections(evidence, palette)
    drawn = [figure for section in found for figure in (*section.figures, *section.beside)]
    browser = browsable(evidence, browse_prompts, browse_replies)
    data = {
        "colours": palette,
        "config": IN_PAGE,
        "figures": {figure.name: _packed(figure) for figure in drawn},
        "browser": browser,
        "table": {"columns": [*COLUMNS, *APART], "rows": rows(evidence, apart)},
    }
    said = _said(evidence, apart, found) | {"browser": _about_samples(browser)}
    with replacing(output) as file:
        file.write(page(title, said, data).encode())
    folder = figures or output.with_name(f"{output.stem}_figures")
    _print_figures(drawn, folder)
    Console().print(terminal(evidence, apart))
    log.info("Wrote %s, and %d figures as PNG and SVG to %s.", output, len(drawn), folder)


def _said(evidence: Evidence, apart: Differences, found: list[Section]) -> dict[str, Any]:
    """What the page says in words."""
    return {
        "compared": compared(evidence),
        "fronts": fronts(evidence),
        "cards": cards(evidence, apart),
        "caveats": caveats(evidence),
        "sections": found,
        "others": _others(evidence, found),
        "estimates": bool(evidence.of("estimate")),
        "sources": list(_sources(evidence)),
    }


def _packed(figure: Figure) -> dict[str, Any]:
    panels = [{"keys": panel.keys, "spec": in_page(panel), "lines": panel.lines} for panel in figure.panels]
    return {"choosers": figure.choosers, "panels": panels}


def _print_figures(figures: Iterable[Figure], folder: Path) -> None:
    for figure in figures:
        if not figure.choosers:
            _print_figure(in_print(figure.panels), folder / figure.name)
            continue
        for number, panel in enumerate(figure.panels[:_MOST_PRINTED], 1):
            _print_figure(in_print([panel]), folder / f"{figure.name}_{number}")


def _print_figure(spec: dict[str, Any], path: Path) -> None:
    svg = vl_convert.vegalite_to_svg(spec, vl_version=vega_lite())
    for suffix, content in ((".svg", svg.encode()), (".png", vl_convert.svg_to_png(svg, ppi=_PPI))):
        with replacing(path.with_suffix(suffix)) as file:
            file.write(content)


def _others(evidence: Evidence, found: Iterable[Section]) -> str:
    """Of results that have no section of their own, in one sentence; "" where there are none."""
    known = {section.program for section in found} | {"sample"}
    names = dict.fromkeys(file.header["program"] for file in evidence.files)
    others = [name for name in names if name not in known]
    if not others:
        return ""
    return f"Results of {', '.join(others)} have no figures of their own; their estimates are in the table."


def _about_samples(browser: dict[str, Any]) -> str:
    """How much of what was given the browser shows, in one sentence; "" where there are no samples."""
    given, prompts = browser["given"], len(browser["prompts"])
    if not prompts:
        return ""
    kept = sum(len(replies) for column in browser["replies"] for replies in column)
    some = "" if kept == given["replies"] else f", of {given['replies']:,} replies to {given['prompts']:,} prompts"
    return f"{kept:,} replies to {prompts:,} prompts{some}."


def _sources(evidence: Evidence) -> Iterable[dict[str, str]]:
    for file in evidence.files:
        about = f"{file.header['program']}, {file.header.get('created', 'no date')}, {len(file.records):,} records"
        yield {"name": str(file.path), "about": about, "facts": json.dumps(file.header, indent=2, ensure_ascii=False)}
    for run in evidence.runs:
        about = ", ".join(f"{value:,.0f} {name}" for name, value in run.facts.items()) or "not finished"
        yield {"name": str(run.folder), "about": f"training run, {about}", "facts": "\n".join(sorted(run.curves))}
