"""Rows of every shape against hand-written examples, and junk against the promise that only UserError comes out."""

import contextlib
import copy
import gzip
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spl.data.formats import parse_row
from spl.types import Comparison, UserError


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


HELLO = [user("Hello"), assistant("Hi."), user("Tea?")]
HELLO_TEXT = "\n\nHuman: Hello\n\nAssistant: Hi.\n\nHuman: Tea?\n\nAssistant:"

PAIRS: dict[str, tuple[dict[str, Any], list[dict[str, str]]]] = {
    "texts": ({"prompt": "Tea?", "chosen": "Yes", "rejected": "No"}, [user("Tea?")]),
    "newlines kept": ({"prompt": "\nTea\n?", "chosen": "Yes", "rejected": "No"}, [user("\nTea\n?")]),
    "messages and texts": ({"prompt": HELLO, "chosen": "Yes", "rejected": "No"}, HELLO),
    "prompt named messages": ({"messages": HELLO, "chosen": "Yes", "rejected": "No"}, HELLO),
    "lists of one message": (
        {"prompt": HELLO, "chosen": [assistant("Yes")], "rejected": [assistant("No")]},
        HELLO,
    ),
    "single messages": ({"prompt": "Tea?", "chosen": assistant("Yes"), "rejected": assistant("No")}, [user("Tea?")]),
    "implicit prompt": ({"chosen": [*HELLO, assistant("Yes")], "rejected": [*HELLO, assistant("No")]}, HELLO),
    "repeated prompt": (
        {"prompt": HELLO, "chosen": [*HELLO, assistant("Yes")], "rejected": [*HELLO, assistant("No")]},
        HELLO,
    ),
    "repeated text prompt": (
        {
            "prompt": "Tea?",
            "chosen": [user("Tea?"), assistant("Yes")],
            "rejected": [user("Tea?"), assistant("No")],
        },
        [user("Tea?")],
    ),
    "prompt column holds the conversation's beginning": (
        {"prompt": "Hello", "chosen": [*HELLO, assistant("Yes")], "rejected": [*HELLO, assistant("No")]},
        HELLO,
    ),
    "prompt column holds the last turn, below a system message": (
        {
            "prompt": "Tea?",
            "chosen": [system("Be brief."), user("Tea?"), assistant("Yes")],
            "rejected": [system("Be brief."), user("Tea?"), assistant("No")],
        },
        [system("Be brief."), user("Tea?")],
    ),
    "replies repeat the last turn only": (
        {"prompt": HELLO, "chosen": [user("Tea?"), assistant("Yes")], "rejected": [user("Tea?"), assistant("No")]},
        HELLO,
    ),
    "transcripts": ({"chosen": HELLO_TEXT + " Yes", "rejected": HELLO_TEXT + " No"}, HELLO),
    "stripped transcripts": ({"chosen": HELLO_TEXT[2:] + " Yes", "rejected": HELLO_TEXT[2:] + " No"}, HELLO),
    "transcript prompt with the cue": ({"prompt": HELLO_TEXT, "chosen": " Yes", "rejected": " No"}, HELLO),
    "transcript prompt without the cue": (
        {"prompt": HELLO_TEXT.removesuffix("\n\nAssistant:"), "chosen": "Yes", "rejected": "No"},
        HELLO,
    ),
    "transcript repeated in transcripts": (
        {"prompt": HELLO_TEXT, "chosen": HELLO_TEXT + " Yes", "rejected": HELLO_TEXT + " No"},
        HELLO,
    ),
    "system column": (
        {"system": "Be brief.", "prompt": "Tea?", "chosen": "Yes", "rejected": "No"},
        [system("Be brief."), user("Tea?")],
    ),
    "empty system column": ({"system": " ", "prompt": "Tea?", "chosen": "Yes", "rejected": "No"}, [user("Tea?")]),
    "system in the messages": (
        {"prompt": [system("Be brief."), user("Tea?")], "chosen": "Yes", "rejected": "No"},
        [system("Be brief."), user("Tea?")],
    ),
    "other columns": (
        {"prompt": "Tea?", "chosen": "Yes", "rejected": "No", "source": {"a": [1]}, "score_chosen": 8},
        [user("Tea?")],
    ),
    "extra keys in messages": (
        {"prompt": [user("Tea?") | {"id": 3, "tool_calls": None}], "chosen": "Yes", "rejected": "No"},
        [user("Tea?")],
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_every_shape_of_a_pair_reads_alike(name: str) -> None:
    row, prompt = PAIRS[name]
    parsed = parse_row(row, "f, row 3")
    assert list(parsed.prompt) == prompt
    assert [reply.strip() for reply in parsed.responses] == ["Yes", "No"]
    assert parsed.comparisons == (Comparison(0, 1, 1.0),)
    assert parsed.alpha is None
    assert parsed.row == "f, row 3"


def test_a_reply_given_as_text_is_kept_as_it_is() -> None:
    parsed = parse_row({"prompt": "Tea?", "chosen": "\n- yes\n- no\n", "rejected": "User: no"})
    assert parsed.responses == ("\n- yes\n- no\n", "User: no")


def test_turns_of_one_role_in_a_row_stay_apart() -> None:
    text = "\n\nHuman: a\n\nHuman: b\n\nAssistant: c"
    parsed = parse_row({"chosen": text, "rejected": text + "d"})
    assert parsed.prompt == (user("a"), user("b"))


def test_share_and_alpha_of_a_pair() -> None:
    parsed = parse_row({"prompt": "Tea?", "chosen": "Yes", "rejected": "No", "share": 0.75, "alpha": 2})
    assert parsed.comparisons == (Comparison(0, 1, 0.75),)
    assert parsed.alpha == 2.0


@pytest.mark.parametrize(
    ("columns", "comparisons"),
    [
        ({"shares": [0.5, 0.3, 0.0]}, [(0, 1, 0.625), (0, 2, 1.0), (1, 2, 1.0)]),
        ({"shares": [1, 0, 0]}, [(0, 1, 1.0), (0, 2, 1.0)]),
        ({"scores": [-1, 4, 4]}, [(0, 1, 0.0), (0, 2, 0.0), (1, 2, 0.5)]),
        ({"ranking": [2, 0, 1]}, [(2, 0, 1.0), (2, 1, 1.0), (0, 1, 1.0)]),
        ({"ranking": [2.0, 0.0, 1.0]}, [(2, 0, 1.0), (2, 1, 1.0), (0, 1, 1.0)]),
        ({"comparisons": [[2, 0, 0.25], [0, 1, 1]]}, [(2, 0, 0.25), (0, 1, 1.0)]),
        ({"comparisons": [[2.0, 0.0, 0.25]]}, [(2, 0, 0.25)]),
    ],
)
def test_many_responses(columns: dict[str, Any], comparisons: list[tuple[int, int, float]]) -> None:
    parsed = parse_row({"prompt": "Drink?", "responses": ["Tea", [assistant("Milk")], "Rum"], **columns})
    assert parsed.responses == ("Tea", "Milk", "Rum")
    assert parsed.comparisons == tuple(Comparison(*c) for c in comparisons)
    assert all(type(c.first) is int and type(c.second) is int for c in parsed.comparisons)


def test_many_responses_as_whole_conversations() -> None:
    row = {"responses": [[*HELLO, assistant("Yes")], [*HELLO, assistant("No")]], "ranking": [1, 0]}
    parsed = parse_row(row)
    assert list(parsed.prompt) == HELLO
    assert parsed.responses == ("Yes", "No")


@pytest.mark.parametrize(
    ("votes", "share"), [((3, 1, None), 0.75), ((0, 2, 2), 0.25), ((0, 0, 1), 0.5), ((5, 0, 0), 1.0)]
)
def test_votes(votes: tuple[int, int, int | None], share: float) -> None:
    row = dict(zip(("votes_a", "votes_b", "votes_tie"), votes, strict=True))
    parsed = parse_row({"prompt": "Tea?", "response_a": "Yes", "response_b": "No", **row})
    assert parsed.comparisons == (Comparison(0, 1, share),)


def test_columns_under_other_names() -> None:
    row = {"question": "Tea?", "better": "Yes", "worse": "No", "chosen": 3, "rejected": 4}
    parsed = parse_row(row, columns={"prompt": "question", "chosen": "better", "rejected": "worse"})
    assert parsed.responses == ("Yes", "No")
    parsed = parse_row({"system": "Tea?", "chosen": "Yes", "rejected": "No"}, columns={"prompt": "system"})
    assert parsed.prompt == (user("Tea?"),)


PAIR = {"prompt": "Tea?", "chosen": "Yes", "rejected": "No"}
MANY = {"prompt": "Drink?", "responses": ["Tea", "Milk"]}
VOTE = {"prompt": "Tea?", "response_a": "Yes", "response_b": "No"}

MISTAKES: list[tuple[Any, str]] = [
    ({"text": "a"}, "expected the columns chosen and rejected"),
    ({"text": "a"}, "the columns with a value are 'text'"),
    ({}, "the columns with a value are none"),
    (json.loads('{"prompt": ' + "[" * 900 + "]" * 900 + ', "chosen": "Yes", "rejected": "No"}'), "prompt[0] must be"),
    ([1, 2], "a row must be an object"),
    (PAIR | {"rejected": None}, "the columns with a value are 'prompt', 'chosen'"),
    (PAIR | {"prompt": " \n"}, "prompt is empty"),
    (PAIR | {"prompt": 3}, "prompt must be text or a list of messages, but is 3"),
    (PAIR | {"prompt": []}, "prompt is an empty list of messages"),
    (PAIR | {"prompt": ["Tea?"]}, "prompt[0] must be a message with role and content, but is 'Tea?'"),
    (PAIR | {"prompt": [user("a"), {"role": "bot", "content": "b"}]}, "prompt[1] has the role 'bot'; expected one of"),
    (PAIR | {"prompt": [{"role": "user", "content": ["a"]}]}, "prompt[0].content must be text, but is ['a']"),
    (PAIR | {"prompt": [user("a"), assistant("b")]}, "prompt must end with a turn that a reply can follow"),
    (PAIR | {"chosen": " "}, "chosen is empty: expected a reply to score"),
    (PAIR | {"rejected": "Yes\n"}, "rejected is identical to chosen ('Yes')"),
    (PAIR | {"chosen": [user("Yes")]}, "chosen must end with the assistant's reply, but ends with a turn of user"),
    (PAIR | {"chosen": [user("Coffee?"), assistant("Yes")]}, "must repeat the prompt, but begins 'Coffee?'"),
    (
        PAIR | {"prompt": HELLO, "chosen": [user("Hello"), assistant("Yes")]},
        "must repeat the prompt, but begins 'Hello'",
    ),
    (PAIR | {"chosen": "\ud800"}, "chosen is not valid Unicode: character 0"),
    (PAIR | {"share": 1.5}, "share is a share of raters and must lie in [0, 1], but is 1.5"),
    (PAIR | {"share": True}, "share must be a finite number, but is True"),
    (PAIR | {"alpha": 0}, "alpha must be above 0, but is 0"),
    (PAIR | {"alpha": "1"}, "alpha must be a finite number, but is '1'"),
    (PAIR | {"alpha": 10**400}, "alpha must be a finite number"),
    (PAIR | {"system": 1}, "system must be text, but is 1"),
    (PAIR | {"system": "a", "prompt": [system("b"), user("c")]}, "the conversation's own system message differ"),
    ({"chosen": "Yes", "rejected": "No"}, "chosen must be a whole conversation that ends with a reply"),
    (
        {"chosen": [user("a"), assistant("b")], "rejected": [user("c"), assistant("d")]},
        "rejected must differ from chosen in the last reply alone",
    ),
    ({"chosen": HELLO_TEXT, "rejected": HELLO_TEXT + " No"}, "chosen is empty: expected a reply to score"),
    (MANY | {"responses": ["Tea"], "shares": [1]}, "responses must be a list of two or more replies, but is ['Tea']"),
    (MANY | {"responses": "Tea", "shares": [1]}, "responses must be a list of two or more replies, but is 'Tea'"),
    (MANY, "expected one of shares, scores, ranking, comparisons, but found none"),
    (MANY | {"shares": [1, 0], "scores": [1, 0]}, "but found shares and scores"),
    (MANY | {"shares": 1}, "shares must be a list, but is 1"),
    (MANY | {"shares": [0, 0]}, "shares are all zero"),
    (MANY | {"shares": [0.5, -0.5]}, "shares[1] is a share of raters and must lie in [0, 1], but is -0.5"),
    (MANY | {"shares": [0.5]}, "shares must have an entry for each of the 2 responses, but has 1"),
    (MANY | {"scores": [1, math.nan]}, "scores[1] must be a finite number, but is nan"),
    (MANY | {"scores": [1, math.inf]}, "scores[1] must be a finite number, but is inf"),
    (MANY | {"ranking": [0, 0]}, "ranking must hold each index 0 to 1 of the responses once"),
    (MANY | {"ranking": [1, 2]}, "ranking must hold each index 0 to 1 of the responses once"),
    (MANY | {"ranking": [True, False]}, "ranking must hold each index 0 to 1 of the responses once"),
    (MANY | {"comparisons": []}, "comparisons is empty: expected at least one [i, j, share]"),
    (MANY | {"comparisons": [[0, 1]]}, "comparisons[0] must be [i, j, share], but is [0, 1]"),
    (MANY | {"comparisons": [[0, 1, 1], [0, 2, 1]]}, "comparisons[1] must name two different responses of 0 to 1"),
    (MANY | {"comparisons": [[-1, 0, 1]]}, "comparisons[0] must name two different responses of 0 to 1"),
    (MANY | {"comparisons": [[0.5, 1, 1]]}, "comparisons[0] must name two different responses of 0 to 1"),
    (MANY | {"comparisons": [[1, 1, 1]]}, "comparisons[0] must name two different responses of 0 to 1"),
    (MANY | {"comparisons": [[0, 1, 2]]}, "comparisons[0][2] is a share of raters and must lie in [0, 1], but is 2"),
    ({"responses": ["Tea", "Milk"], "shares": [1, 0]}, "responses[0] must be a whole conversation"),
    (VOTE, "expected a column votes_a"),
    (VOTE | {"votes_a": 3}, "expected a column votes_b"),
    (VOTE | {"votes_a": 0, "votes_b": 0}, "with at least one cast, but are 0, 0 and 0 for a tie"),
    (VOTE | {"votes_a": 2, "votes_b": -1}, "votes must be 0 or more"),
    (VOTE | {"votes_a": 1e308, "votes_b": 1e308}, "votes must be 0 or more"),
]


@pytest.mark.parametrize(("row", "complaint"), MISTAKES, ids=range(len(MISTAKES)))
def test_mistakes_are_named_with_file_and_row(row: Any, complaint: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_row(row, "pairs.jsonl, row 12")
    text = str(caught.value)
    assert text.startswith("pairs.jsonl, row 12: ")
    assert complaint in text
    assert text.endswith(".")
    assert "\n" not in text


@pytest.mark.parametrize("long", [{"prompt": [3] * 9999}, {"prompt": [{"role": "x" * 9999, "content": ""}]}])
def test_a_long_value_is_shortened_in_the_complaint(long: dict[str, Any]) -> None:
    with pytest.raises(UserError) as caught:
        parse_row(PAIR | long)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("columns", "complaint"),
    [
        ({"chosen": "better"}, "no column 'better' (set as columns.chosen); the columns found are 'prompt', 'chosen'"),
        ({"chosn": "chosen"}, "columns.chosn is not a column that is read; expected one of prompt, messages"),
    ],
)
def test_mistakes_in_the_names_of_columns(columns: dict[str, str], complaint: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_row(PAIR, columns=columns)
    assert complaint in str(caught.value)


@pytest.mark.parametrize("absent", [None, math.nan, np.float32("nan"), pd.NA, pd.NaT])
def test_values_that_say_nothing_are_an_absent_column(absent: Any) -> None:
    parsed = parse_row(PAIR | {"alpha": absent, "system": absent, "share": absent, "messages": absent})
    assert parsed == parse_row(PAIR)


@pytest.mark.parametrize("convert", [np.asarray, torch.tensor, pd.Series, tuple])
def test_numbers_of_other_libraries(convert: Any) -> None:
    plain = {"prompt": "Drink?", "responses": ["Tea", "Milk", "Rum"]}
    for name, values in {"shares": [0.5, 0.25, 0.25], "scores": [3, 1, 2], "ranking": [2, 0, 1]}.items():
        parsed = parse_row(plain | {name: convert(values), "alpha": np.float32(0.5)})
        assert parsed == parse_row(plain | {name: values, "alpha": 0.5})
        assert {type(v) for c in parsed.comparisons for v in c} == {int, float}
    votes = {"response_a": np.str_("Yes"), "response_b": "No", "votes_a": np.int64(3), "votes_b": np.uint8(1)}
    assert parse_row({"prompt": "Tea?"} | votes).comparisons == (Comparison(0, 1, 0.75),)
    with pytest.raises(UserError, match="share must be a finite number, but is True"):
        parse_row(PAIR | {"share": np.bool_(True)})


def test_rows_of_a_parquet_file_read_by_pandas(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"chosen": [*HELLO, assistant("Yes")], "rejected": [*HELLO, assistant("No")], "share": 0.75},
        {"prompt": "Drink?", "responses": ["Tea", "Milk"], "comparisons": [[0.0, 1.0, 0.25]], "alpha": 2.0},
        {"prompt": "Drink?", "responses": ["Tea", "Milk"], "ranking": [1, 0]},
        {"prompt": "Tea?", "response_a": "Yes", "response_b": "No", "votes_a": 3, "votes_b": 1},
    ]
    pd.DataFrame(rows).to_parquet(tmp_path / "rows.parquet")
    back = pd.read_parquet(tmp_path / "rows.parquet")
    assert isinstance(back["chosen"][0], np.ndarray)
    assert [parse_row(row) for row in back.to_dict("records")] == [parse_row(row) for row in rows]


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.just(10**400) | st.floats() | st.text(max_size=5)
    | st.sampled_from(["\ud800", "\n\nHuman: a\n\nAssistant: b", "\n\nHuman:", "Human:\n\nAssistant:"]),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(st.sampled_from(["role", "content"]) | st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip
MARKS = st.sampled_from([True, -1, 0, 1, 2, 0.5, 1.0, "user", "assistant", "a", "Yes", user("a"), [assistant("Yes")]])
GOOD = [
    *(row for row, _ in PAIRS.values()),
    MANY | {"shares": [0.5, 0.25], "alpha": 0.5},
    MANY | {"scores": [2, 1]},
    MANY | {"ranking": [1, 0]},
    MANY | {"comparisons": [[0, 1, 0.75], [1, 0, 1.0]]},
    {"responses": [HELLO_TEXT + " Yes", [*HELLO, assistant("No")]], "scores": [1, 1]},
    VOTE | {"votes_a": 1, "votes_b": 2, "votes_tie": 3},
]
COLUMNS = sorted({"alpha", "share", "system"}.union(*GOOD))


@st.composite
def spoiled_rows(draw: st.DrawFn) -> Any:
    """A good row with junk in up to three places, at any depth."""
    row: Any = copy.deepcopy(draw(st.sampled_from(GOOD)))
    for _ in range(draw(st.integers(0, 3))):
        if draw(st.booleans()):
            row[draw(st.sampled_from(COLUMNS))] = copy.deepcopy(draw(MARKS | JUNK))
            continue
        place = row
        while True:
            key = draw(st.sampled_from(list(place) if isinstance(place, dict) else range(len(place))))
            if not isinstance(place[key], dict | list) or not place[key] or draw(st.booleans()):
                break
            place = place[key]
        place[key] = copy.deepcopy(draw(MARKS | JUNK))
    return row


def test_a_reply_after_a_reply_is_refused() -> None:
    row = {"chosen": [*HELLO, assistant("Tea?"), assistant("Yes")]}
    row |= {"rejected": [*HELLO, assistant("Tea?"), assistant("No")]}
    with pytest.raises(UserError, match="chosen must answer a turn that a reply can follow"):
        parse_row(row)


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(COLUMNS), JUNK) | JUNK)
def test_junk_raises_nothing_but_user_errors(row: Any) -> None:
    with contextlib.suppress(UserError):
        parse_row(row)


@settings(max_examples=1000, deadline=None)
@given(spoiled_rows())
def test_spoiled_rows_raise_nothing_but_user_errors_and_what_parses_is_sound(row: Any) -> None:
    try:
        parsed = parse_row(row, "f, row 0")
    except UserError as error:
        assert str(error).startswith("f, row 0: ")
        return
    assert parsed.prompt[-1]["role"] != "assistant"
    assert len(parsed.responses) == len({reply.strip() for reply in parsed.responses} - {""}) >= 2
    assert parsed.comparisons
    for first, second, share in parsed.comparisons:
        assert {first, second} <= set(range(len(parsed.responses)))
        assert first != second
        assert 0 <= share <= 1
    assert parsed.alpha is None or 0 < parsed.alpha < math.inf
    json.dumps([parsed.prompt, parsed.responses], ensure_ascii=False).encode()


PART = st.sampled_from(["Yes", "no\n\nyes", "a: b"])


@given(st.lists(st.tuples(PART, PART), max_size=2), PART, st.booleans())
def test_messages_and_transcript_say_the_same(rounds: list[tuple[str, str]], last: str, opens: bool) -> None:
    turns = [turn for question, answer in rounds for turn in (user(question), assistant(answer))] + [user(last)]
    text = "".join(f"\n\n{'Human' if t['role'] == 'user' else 'Assistant'}: {t['content']}" for t in turns)
    row = {"chosen": f"{text}\n\nAssistant: good", "rejected": f"{text}\n\nAssistant: bad"}
    if opens:
        row = {name: value.removeprefix("\n\n") for name, value in row.items()}
    messages = {"chosen": [*turns, assistant("good")], "rejected": [*turns, assistant("bad")]}
    assert parse_row(row) == parse_row(messages)


def rows_of(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def test_every_usable_row_of_hh_parses_and_loses_nothing(shared_data: Path) -> None:
    names = {"user": "Human", "assistant": "Assistant"}
    unusable = []
    for number, row in enumerate(rows_of(shared_data / "hh_harmless.jsonl.gz")):
        try:
            parsed = parse_row(row)
        except UserError as error:
            assert str(error) == "chosen is empty: expected a reply to score."
            assert row["chosen"].endswith("\n\nAssistant: ")
            unusable.append(number)
            continue
        before = "".join(f" {names[turn['role']]}: {turn['content']}" for turn in parsed.prompt)
        for reply, text in zip(parsed.responses, (row["chosen"], row["rejected"]), strict=True):
            assert f"{before} Assistant: {reply}".split() == text.split()
    assert len(unusable) == 4


@pytest.mark.parametrize(("name", "count"), [("chat_pairs_multiturn", 228), ("llmfao_crowd_pairs", 1302)])
def test_every_row_of_other_real_data_parses(shared_data: Path, name: str, count: int) -> None:
    rows = rows_of(shared_data / f"{name}.jsonl.gz")
    assert len([parse_row(row) for row in rows]) == count
