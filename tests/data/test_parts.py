"""Parts of preference data: nothing in two of them, and rows that are read back as they were."""

import json
from pathlib import Path

import pytest

from spl.data.formats import parse_row
from spl.data.parts import comparison_row, demonstration_row, keep_rows, parts, prompt_row, short_examples
from spl.data.source import Source
from spl.types import Comparison, PreferenceExample, UserError

SIZES = {"prompts": 4, "dev": 3, "train": 6}


def examples(num: int = 20) -> list[PreferenceExample]:
    """Two of each opening, with different last turns."""
    turns = [{"role": "user", "content": ""}, {"role": "assistant", "content": "Yes?"}]
    return [
        PreferenceExample(
            (turns[0] | {"content": f"Question {k // 2}"}, turns[1], {"role": "user", "content": f"Turn {k}"}),
            (f"Good {k}", f"Bad {k}"),
            (Comparison(0, 1, 1.0),),
        )
        for k in range(num)
    ]


def test_no_opening_is_in_two_parts_and_the_sizes_are_those_asked_for() -> None:
    found = parts(examples(), SIZES, seed=0)
    assert {name: len(part) for name, part in found.items()} == SIZES
    openings = {name: {example.prompt[0]["content"] for example in part} for name, part in found.items()}
    assert not (openings["prompts"] & openings["dev"] or openings["prompts"] & openings["train"])
    assert not openings["dev"] & openings["train"]
    chosen = [example.responses[0] for part in found.values() for example in part]
    assert len(set(chosen)) == len(chosen)


def test_parts_follow_the_seed() -> None:
    assert parts(examples(), SIZES, 0) == parts(examples(), SIZES, 0) != parts(examples(), SIZES, 1)


def test_too_few_examples_are_one_sentence() -> None:
    said = r"too few examples: 13 are asked for \(prompts 4, dev 3, train 6\), and 10 with 5 openings are there"
    with pytest.raises(UserError, match=said):
        parts(examples(10), SIZES, 0)


def test_long_and_unusable_rows_are_left_out(tmp_path: Path) -> None:
    """The limit is on prompt and longest response together; rows beyond num_rows are not looked at."""
    kept = {"prompt": "four", "chosen": "123456", "rejected": "12"}
    rows = [kept, kept | {"rejected": "1234567"}, kept | {"chosen": ""}, {"odd": 1}, kept, kept]
    keep_rows(tmp_path / "rows.jsonl", rows)
    found = short_examples(Source(str(tmp_path / "rows.jsonl")), 5, max_chars=10)
    assert [example.responses for example in found] == [("123456", "12")] * 2


def test_rows_that_something_was_made_from_are_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    keep_rows(path, [{"a": "ä"}])
    keep_rows(path, [{"a": "ä"}])
    with pytest.raises(UserError, match=r"rows\.jsonl holds other rows than these settings give"):
        keep_rows(path, [{"a": "ä"}, {"a": "b"}])
    assert path.read_text(encoding="utf-8") == '{"a": "ä"}\n'


def test_rows_are_read_back() -> None:
    (example, *_) = examples(1)
    many = PreferenceExample(
        example.prompt, ("a", "b", "c"), (Comparison(0, 1, 0.25), Comparison(1, 2, 0.75), Comparison(2, 0, 0.5))
    )
    for one in (example, many):
        read = parse_row(json.loads(json.dumps(comparison_row(one))))
        assert (read.prompt, read.responses, read.comparisons) == (one.prompt, one.responses, one.comparisons)
    assert demonstration_row(example) == {"prompt": list(example.prompt), "response": "Good 0"}
    # Shares for a: .25 + .5; for b: .75 + .75; for c: .25 + .5.
    assert demonstration_row(many)["response"] == "b"
    assert prompt_row(3, example) == {"id": "3", "messages": list(example.prompt)}
