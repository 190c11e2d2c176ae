"""Questions with people's answers in every shape, by hand and on the real files."""

import json
from pathlib import Path
from typing import Any

import pytest

from spl.data.opinions import Opinion, parse_opinion, read_opinions, without_non_answers
from spl.data.propositions import parse_proposition
from spl.data.source import Source
from spl.data.survey import SURVEY
from spl.data.tokenization import Encoder
from spl.types import UserError

TEA = {"question": "Tea?", "options": ["Yes", "No"], "votes": [3, 1]}


def write(path: Path, rows: list[dict[str, Any]]) -> Source:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Source(str(path))


@pytest.mark.parametrize(
    ("row", "people"),
    [
        (TEA, {"": (0.75, 0.25)}),
        ({"question": "Tea?", "options": ["Yes", "No"], "shares": [30, 10], "group": "cooks"}, {"cooks": (0.75, 0.25)}),
        (
            {"question": "Tea?", "options": "['Yes', \"No\"]", "distribution": [0.5, 0.5], "country": "Chad"},
            {"Chad": (0.5, 0.5)},
        ),
        (
            {
                "question": "Tea?",
                "options": '["Yes", "No"]',
                "selections": "defaultdict(<class 'list'>, {'Chad': [0.2, 0.8], 'Peru': [1.0, 0.0]})",
            },
            {"Chad": (0.2, 0.8), "Peru": (1.0, 0.0)},
        ),
    ],
)
def test_shapes_of_rows(row: dict[str, Any], people: dict[str, tuple[float, ...]]) -> None:
    found = parse_opinion(row)
    assert (found.question, found.options, found.ordered) == ("Tea?", ("Yes", "No"), False)
    assert found.people == {group: pytest.approx(shares) for group, shares in people.items()}


def test_votes_of_chaosnli() -> None:
    story = parse_opinion({"obs1": "Rain.", "obs2": "Sun.", "hyp1": "Wind.", "hyp2": "Snow.", "votes": [97, 3]})
    assert story.options == ("Wind.", "Snow.")
    assert "Rain." in story.question
    assert "Sun." in story.question
    three = parse_opinion({"premise": "Boys play.", "hypothesis": "They sleep.", "votes": [0, 20, 80]})
    assert (three.options, three.people[""], three.ordered) == (("Yes", "Maybe", "No"), (0, 0.2, 0.8), True)


def test_scales_are_declared_or_numbered() -> None:
    assert parse_opinion(TEA | {"ordered": True}).ordered
    scale = {"question": "q", "options": ["Never", "2", "3", "4", "Always", "Don't know"], "votes": [1] * 6}
    assert parse_opinion(scale).ordered
    assert not parse_opinion(scale | {"options": ["Never", "3", "2", "4", "Always", "Don't know"]}).ordered


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"votes": [1]}, r"votes must be 2 numbers of 0 or more, one an option, and not all 0, but are \[1\]"),
        ({"votes": [0, 0]}, "not all 0"),
        ({"votes": [1, -1]}, "0 or more"),
        ({"votes": [1, "x"]}, "a share must be a finite number, but is 'x'"),
        ({"votes": None}, "expected the columns question, options and shares.*those? .*with a value are"),
        ({"options": ["Yes", "Yes"]}, "options must be two or more different answers"),
        ({"options": ["Yes"]}, "options must be two or more different answers"),
        ({"votes": [1e308, 1e308]}, "must be 2 numbers of 0 or more"),
        ({"group": "\ud800"}, "a group is not valid Unicode"),
        ({"options": "{[]: 1}"}, "options must be a list"),
        ({"options": "Yes"}, "options must be a list, but is 'Yes'"),
        ({"options": ["Yes", None]}, "an option must be text"),
        ({"question": " "}, "question is empty"),
    ],
)
def test_a_bad_row_is_told(change: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=f"f, row 1: .*{complaint}"):
        parse_opinion(TEA | change, "f, row 1")
    with pytest.raises(UserError, match="selections must name countries"):
        parse_opinion({"question": "q", "options": ["a", "b"], "selections": "Chad"})


def test_non_answers_are_left_out_and_shares_normalised() -> None:
    options = ("Good", "Bad", "Don't know", "DK/Refused", "No answer", "Missing; Unknown")
    asked = Opinion("q", options, {"a": (0.3, 0.1, 0.2, 0.2, 0.1, 0.1), "b": (0, 0, 1, 0, 0, 0)})
    found = without_non_answers(asked)
    assert found is not None
    assert found.options == ("Good", "Bad")
    assert found.people == {"a": pytest.approx((0.75, 0.25))}  # all of b gave none of the two
    assert without_non_answers(Opinion("q", ("Good", "No answer"), {"": (0.5, 0.5)})) is None
    assert without_non_answers(Opinion("q", ("No", "Nothing", "None of these"), {"": (1, 0, 0)})) is not None


def test_a_question_that_keeps_a_non_answer_is_no_scale(tmp_path: Path) -> None:
    scale = {"question": "q", "options": ["Never", "2", "3", "4", "Always", "Don't know"], "votes": [1] * 6}
    without = {"question": "r", "options": ["Low", "High"], "votes": [1, 1], "ordered": True}
    source = write(tmp_path / "f.jsonl", [scale, without])
    found = {keep: {o.question: o for o in read_opinions(source, 0, not keep)} for keep in (False, True)}
    assert found[False]["q"].ordered and len(found[False]["q"].options) == 5
    assert not found[True]["q"].ordered and len(found[True]["q"].options) == 6
    assert found[False]["r"].ordered and found[True]["r"].ordered


def test_a_question_s_groups_are_put_together(tmp_path: Path) -> None:
    rows = [TEA | {"group": g, "votes": v} for g, v in (("a", [1, 1]), ("b", [3, 1]), ("a", [0, 1]))]
    found = read_opinions(write(tmp_path / "f.jsonl", rows))
    # The second answer of group a is another asking of the same words.
    assert sorted(len(opinion.people) for opinion in found) == [1, 2]
    bad = write(tmp_path / "g.jsonl", [TEA, {"question": "?"}])
    with pytest.raises(UserError, match=r"row 2: expected the columns.* Set skip_bad to true"):
        read_opinions(bad)
    assert len(read_opinions(bad, skip_bad=True)) == 1


def test_how_a_question_is_put(tiny_tokenizer: Any) -> None:
    asked = Opinion("Tea?", ("Yes", "No", "Later"), {})
    lettered = "Tea?\n\nA. Later\nB. Yes\nC. No\n\nAnswer with the letter of your answer."
    assert asked.render("letters", (2, 0, 1)) == lettered
    assert asked.render("text", (1, 0, 2)) == "Tea?\n\n- No\n- Yes\n- Later\n\nAnswer with one of these, word for word."
    assert asked.render("unlisted", (0, 1, 2)) == "Tea?"
    encoder = Encoder(tiny_tokenizer, turn_end="eos")
    said = {
        kind: [encoder.decode_marked(asked.encode(encoder, kind, (2, 0, 1)), k).split("«")[1] for k in range(3)]
        for kind in ("letters", "text")
    }
    # Responses stand in the options' own order, and their end is scored.
    assert said["letters"] == ["B<|end|>»", "C<|end|>»", "A<|end|>»"]
    assert said["text"] == ["Yes<|end|>»", "No<|end|>»", "Later<|end|>»"]
    many = Opinion("q", tuple(map(str, range(27))), {})
    with pytest.raises(UserError, match="27 options are more than letters"):
        many.encode(encoder, "letters", range(27))


def test_the_survey_is_asked_as_in_training() -> None:
    found = read_opinions(Source("survey"))
    assert [opinion.render("unlisted", ()) for opinion in found] == [f"{q.text} Answer with one word." for q in SURVEY]
    assert found[0].people == {"": (0.8, 0.2)}


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"proposition": "Obey."}, "expected the columns proposition and axis; those found are 'proposition'"),
        ({"proposition": "Obey.", "axis": "y", "weight": 0}, "weight is 0"),
        ({"proposition": "Obey.", "axis": "y", "weight": "up"}, "weight must be a finite number"),
        ({"proposition": "", "axis": "y"}, "proposition is empty"),
    ],
)
def test_a_bad_proposition_is_told(row: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=f"f, row 3: {complaint}"):
        parse_proposition(row, "f, row 3")


@pytest.mark.parametrize(
    ("name", "questions", "groups"), [("global_opinions", 1180, 6782), ("chaosnli_snli", 1056, 1056)]
)
def test_real_files(shared_data: Path, name: str, questions: int, groups: int) -> None:
    found = read_opinions(Source(str(shared_data / f"{name}.jsonl.gz")))
    assert (len(found), sum(len(opinion.people) for opinion in found)) == (questions, groups)
    assert all(sum(s) == pytest.approx(1) for opinion in found for s in opinion.people.values())
