"""`spl report` as users run it: the page in a real browser, the figures for papers, the table on the terminal."""

import csv
import io
import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from chromium import Browser, chromium
from made_results import ARMS, HOSTILE, QUESTION, make_all, make_run

from spl.cli import main
from spl.reporting.colours import colours
from spl.results import header, read, write


class Made(NamedTuple):
    """A report and what it was made from."""

    page: Path
    results: Path
    said: str


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("report")
    make_all(folder / "results")
    make_run(folder / "runs", "dpo")
    said, before = io.StringIO(), sys.stdout
    sys.stdout = said
    try:
        main(["report", str(folder / "results"), str(folder / "runs"), "-o", str(folder / "page.html")])
    finally:
        sys.stdout = before
    return Made(folder / "page.html", folder / "results", said.getvalue())


@pytest.fixture(scope="module")
def browser(made: Made) -> Iterator[Browser]:
    with chromium() as opened:
        opened.call("Emulation.setDeviceMetricsOverride", width=1280, height=900, deviceScaleFactor=1, mobile=False)
        opened.open(made.page.as_uri())
        yield opened


def text(browser: Browser, selector: str) -> str:
    return str(browser.run(f"document.querySelector({json.dumps(selector)}).textContent"))


def click(browser: Browser, selector: str) -> None:
    browser.run(f"document.querySelector({json.dumps(selector)}).click()")


def choose(browser: Browser, selector: str, value: str) -> None:
    """Choose in a list as a user does, and wait for what is drawn then."""
    place = f"document.querySelector({json.dumps(selector)})"
    browser.run(f"{place}.value = {json.dumps(value)}; {place}.onchange({{target: {place}}})")


def test_the_page_opens_without_an_error_or_a_network(browser: Browser, made: Made) -> None:
    assert browser.problems == []
    page = made.page.read_text()
    assert "default-src 'none'" in page
    assert page.count("<script") == page.count("</script>") == 3


def test_every_panel_is_drawn(browser: Browser) -> None:
    wanted = sum(browser.run("Object.values(data.figures).map(f => f.choosers.length ? 1 : f.panels.length)"))
    assert browser.run("document.querySelectorAll('figure svg.marks').length") == wanted > 20
    points = "[...document.querySelectorAll('[data-figure=front] svg .mark-symbol path')].length"
    assert browser.run(points) >= len(ARMS)
    heights = browser.run(
        "[...document.querySelectorAll('figure svg.marks')].map(svg => svg.getBoundingClientRect().height)"
    )
    assert min(heights) > 40


def test_fronts_of_other_measures_are_chosen(browser: Browser) -> None:
    assert "Cosine distance" in text(browser, "[data-figure=front] svg.marks")
    assert "+0.21 [+0.12, +0.30]" in text(browser, "[data-figure=front] .line")
    choose(browser, "[data-figure=front] label:first-child select", "Self-BLEU")
    shown = text(browser, "[data-figure=front] svg.marks")
    assert "← better, Self-BLEU" in shown and "Cosine" not in shown
    assert browser.run("document.querySelectorAll('[data-figure=front] svg.marks').length") == 1


def test_choices_in_quick_succession_leave_other_figures_alone(browser: Browser) -> None:
    select = "const select = document.querySelector('[data-figure=front] label:first-child select')"
    twice = "for (const k of [0, 1]) { select.selectedIndex = k; drawn.push(select.onchange()); }"
    others = "views.filter(view => before.has(view)).length - before.size"
    run = f"{select}, before = new Set(views), drawn = []; {twice} await Promise.all(drawn); return {others};"
    assert browser.run(f"(async () => {{ {run} }})()") == -1
    assert "Self-BLEU" in text(browser, "[data-figure=front] svg.marks")
    assert browser.run("document.querySelectorAll('[data-figure=front] svg.marks').length") == 1


def test_entropy_and_length_stand_beside_the_fronts(browser: Browser) -> None:
    place = "document.querySelector('[data-figure={}]').getBoundingClientRect()"
    front, beside = (browser.run(f"{place.format(name)}.toJSON()") for name in ("front", "beside"))
    assert beside["left"] >= front["right"] and abs(beside["top"] - front["top"]) < 2
    panels = browser.run("[...document.querySelectorAll('[data-figure=beside] h4')].map(h => h.textContent)")
    assert panels == ["Sequence entropy", "Length", "Replies that ended"]


def test_a_policy_is_put_out_and_on_again(browser: Browser) -> None:
    dots = "document.querySelectorAll('[data-figure=beside] svg .mark-symbol path').length"
    before = browser.run(dots)
    chip = "#policies [value='dpo']"
    click(browser, chip)
    browser.run("new Promise(done => setTimeout(done, 200))")
    put_out = sum(policy == "dpo" for policy, _ in ARMS)
    assert before - browser.run(dots) == 3 * put_out  # in each of the three panels
    click(browser, chip)
    browser.run("new Promise(done => setTimeout(done, 200))")
    assert browser.run(dots) == before


def test_hovering_tells_numbers_and_replies(browser: Browser) -> None:
    dot = "document.querySelector('[data-figure=beside] svg .mark-symbol path[aria-label*=\"dpo, t 1.5\"]')"
    browser.run(f"{dot}.scrollIntoView({{block: 'center', behavior: 'instant'}})")
    where = browser.run(f"{dot}.getBoundingClientRect().toJSON()")
    x, y = where["x"] + where["width"] / 2, where["y"] + where["height"] / 2
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    browser.run("new Promise(done => setTimeout(done, 200))")
    shown = text(browser, "#tip")
    assert "dpo" in shown and "Sequence entropy" in shown and "[" in shown
    assert "dpo at t 1.5 tells story 0 of prompt 0" in shown


def test_samples_side_by_side(browser: Browser) -> None:
    heads = "[...document.querySelectorAll('#replies h3')].map(h => h.childNodes[1].textContent)"
    assert browser.run(heads) == ["base, t 1", "dpo, t 1", "spl 4, t 1"]
    assert text(browser, "#page") == "replies 1 to 3 of 4"
    browser.call("Input.dispatchKeyEvent", type="keyDown", key="ArrowRight")
    assert text(browser, "#page") == "replies 4 to 4 of 4"
    assert "cut" in text(browser, "#replies .reply")
    browser.call("Input.dispatchKeyEvent", type="keyDown", key="ArrowRight")  # there is no further page
    assert "tells story 3 of prompt 0" in text(browser, "#replies .column:last-child .reply p")
    for _ in range(2):
        browser.call("Input.dispatchKeyEvent", type="keyDown", key="j")
    assert text(browser, "#conversation p") == "Write a short story about a doctor, number 2."
    click(browser, "#columns button:nth-child(3)")
    assert browser.run(heads) == ["base, t 1", "dpo, t 1", "dpo, t 1.1", "spl 4, t 1"]
    assert "dpo at t 1.1 tells story 0 of prompt 2" in text(browser, "#replies .column:nth-child(3) .reply p")


def test_texts_of_models_stay_texts(browser: Browser) -> None:
    choose(browser, "#prompt", "1")
    assert text(browser, "#conversation p") == HOSTILE
    assert text(browser, "#replies .reply p") == HOSTILE
    assert browser.run("document.title") != "hurt"
    assert browser.run("document.querySelectorAll('img').length") == 0
    # Even a script that came to be in the page would not run: its hash is not in the policy.
    browser.run(
        "document.body.append(Object.assign(document.createElement('script'), {text: 'document.title = \"hurt\"'}))"
    )
    assert browser.run("document.title") != "hurt"
    assert any("Content Security Policy" in problem for problem in browser.problems)
    browser.problems.clear()


def test_the_csv_is_the_records(browser: Browser, made: Made) -> None:
    rows = list(csv.DictReader(io.StringIO(browser.run("csv()"))))
    names = ("program", "group", "policy", "setting", "value", "low", "high", "num")
    expected = []
    for path in sorted(made.results.glob("*.jsonl")):
        found = read(path)
        for record in found.of("estimate"):
            whole = {"program": found.header["program"], **record}
            expected.append((record["name"], *(whole[name] for name in names)))
    told = [(row["measure"], *(row[name] for name in names)) for row in rows]
    assert [_plain(row) for row in told] == [_plain(row) for row in expected]


def _plain(row: tuple[Any, ...]) -> tuple[Any, ...]:
    """Texts as they are and numbers as numbers, whatever digits they were written with."""
    return tuple("" if cell is None else _number(cell) for cell in row)


def _number(cell: Any) -> Any:
    try:
        return float(cell)
    except ValueError:
        return cell


def test_the_table_is_sorted_and_filtered(browser: Browser) -> None:
    column = "[...document.querySelectorAll('#estimates tbody tr')].map(row => Number(row.cells[7].textContent))"
    browser.run("document.querySelector('#filter').value = 'HARD best'; document.querySelector('#filter').oninput()")
    groups = browser.run("[...document.querySelectorAll('#estimates tbody tr')].map(row => row.cells[2].textContent)")
    assert set(groups) == {"hard"}
    for sort in (sorted, lambda values: sorted(values, reverse=True)):
        click(browser, "#estimates th:nth-child(8)")
        values = browser.run(column)
        assert values == sort(values) and len(set(values)) > 3


def test_a_narrow_screen_is_not_wider_than_it_is(browser: Browser, made: Made) -> None:
    for scheme in ("dark", "light"):
        browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        browser.call("Emulation.setDeviceMetricsOverride", width=390, height=800, deviceScaleFactor=1, mobile=True)
        paper, ink = (browser.run(f"getComputedStyle(document.body).{of}") for of in ("backgroundColor", "color"))
        assert (sum(map(int, paper[4:-1].split(","))) < sum(map(int, ink[4:-1].split(",")))) == (scheme == "dark")
    browser.open(made.page.as_uri())
    assert browser.run("document.documentElement.scrollWidth") == 390
    assert browser.problems == []


def test_figures_for_papers(made: Made) -> None:
    folder = made.page.with_name("page_figures")
    names = {path.stem for path in folder.glob("*.svg")}
    assert names == {path.stem for path in folder.glob("*.png")}
    assert {"front_1", "beside", "best_of_n_pass_k", "reliability_mmlu", "risk_coverage", "opinions_1"} <= names
    assert {"training", "compass", "groups", "agreement"} <= names
    for path in folder.glob("*.png"):
        content = path.read_bytes()
        assert content[:8] == b"\x89PNG\r\n\x1a\n"
        width, height = struct.unpack(">II", content[16:24])
        assert width > 600 and height > 150
    front = (folder / "front_1.svg").read_text()
    assert "Cosine distance of replies (U), better →" in front and "dpo + temperature" in front
    assert front.count('aria-roledescription="point"') == len(ARMS)
    assert QUESTION in (folder / "opinions_1.svg").read_text()
    # Each panel is of one policy, in its colour: points, lines and bars, and the legend.
    inks = colours(["base", "dpo", "spl 1.2", "spl 2", "spl 4"])
    reliability = (folder / "reliability_mmlu.svg").read_text()
    assert all(reliability.count(inks[policy]) > 20 for policy in ("base", "dpo", "spl 1.2", "spl 4"))


def test_the_terminal_says_the_same(made: Made) -> None:
    squeezed = " ".join(made.said.split())
    assert "diversity-quality" in squeezed and "calibration" in squeezed
    (reward,) = (
        record
        for record in read(made.results / "diversity-quality.jsonl").of("estimate")
        if (record["name"], record["policy"]) == ("reward", "spl 4")
    )
    assert f"{reward['value']:.2f} [{reward['low']:.2f}, {reward['high']:.2f}]" in squeezed


def test_programs_without_figures_and_empty_ones_are_said(tmp_path: Path) -> None:
    estimate = {"kind": "estimate", "policy": "dpo", "setting": "", "name": "val/loss", "value": 0.5}
    write(tmp_path / "a.jsonl", header("sweep", {}), [estimate])
    write(tmp_path / "b.jsonl", header("opinions", {}), [{"kind": "note", "text": "No <b>question</b> fitted."}])
    main(["report", str(tmp_path), "-o", str(tmp_path / "page.html"), "--title", "A & B"])
    page = tmp_path.joinpath("page.html").read_text()
    assert "Results of sweep have no figures of their own; their estimates are in the table." in page
    assert "These results hold nothing that could be drawn." in page
    assert "No &lt;b&gt;question&lt;/b&gt; fitted." in page
    assert "<title>A &amp; B</title>" in page
    assert 'id="samples"' not in page


def test_a_package_that_is_missing_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.startswith("spl.reporting")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "altair", None)
    with pytest.raises(SystemExit):
        main(["report", "results"])
    assert capsys.readouterr().err == "error: spl report needs the package altair: pip install 'spl[evaluation]'.\n"
