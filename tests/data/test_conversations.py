"""Prompts from rows of every shape."""

from pathlib import Path
from typing import Any

import pytest

from spl.data.conversations import Conversation, opened_with, parse_conversation, read_conversations
from spl.types import UserError

TEA = {"role": "user", "content": "Tea?"}
TRANSCRIPT = "\n\nHuman: Tea?\n\nAssistant: Yes.\n\nHuman: Why?\n\nAssistant:"
SO_FAR = [TEA, {"role": "assistant", "content": "Yes."}, {"role": "user", "content": "Why?"}]


@pytest.mark.parametrize(
    ("row", "item", "messages"),
    [
        ({"id": "curated-0", "prompt": "Tea?", "prompt_paraphrases": ["x"]}, "curated-0", [TEA]),
        ({"uid": "abc", "prompt": "Tea?", "cluster": "hot"}, "abc", [TEA]),
        ({"question_id": 81, "turns": ["Tea?", "Why?"]}, "81", [TEA]),
        ({"question": "Tea?", "answer": "#### 1"}, "7", [TEA]),
        ({"unique_id": "a/b.json", "problem": "Tea?"}, "a/b.json", [TEA]),
        ({"instruction": "Tea?", "id": None}, "7", [TEA]),
        ({"messages": SO_FAR}, "7", SO_FAR),
        ({"uid": "x", "messages": [TEA, {"role": "assistant", "content": "No."}]}, "x", [TEA]),
        ({"prompt": TRANSCRIPT}, "7", SO_FAR),
        ({"chosen": TRANSCRIPT + " It warms.", "rejected": TRANSCRIPT + " No idea."}, "7", SO_FAR),
        ({"prompt": "Tea?", "response_a": "A", "response_b": "B", "votes_a": 1, "votes_b": 0}, "7", [TEA]),
        ({"prompt": "Tea?", "chosen": "A", "rejected": "B"}, "7", [TEA]),
    ],
)
def test_shapes(row: dict[str, Any], item: str, messages: Any) -> None:
    assert parse_conversation(row, "", "7") == Conversation(item, tuple(messages))


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "Tea?"}, "f, row 3: expected a column prompt, .* columns with a value are 'text'"),
        ({"turns": []}, r"f, row 3: turns must be a list of texts, but is \[\]"),
        ({"prompt": " "}, "f, row 3: prompt is empty"),
        ({"messages": [{"role": "assistant", "content": "Yes."}]}, "f, row 3: messages must hold a turn"),
    ],
)
def test_what_is_no_prompt(row: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse_conversation(row, "f, row 3")


def test_a_file(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "Tea?"}\n{"prompt": "Tea?", "id": 5}\n{"prompt": "Tea?", "id": "5"}\n')
    assert [one.item for one in read_conversations(str(path), 2)] == ["1", "5"]
    with pytest.raises(UserError, match=r"prompts.jsonl, row 3: the id '5' is that of an earlier row too"):
        read_conversations(str(path))
    with pytest.raises(UserError, match="num_prompts must be at least 1"):
        read_conversations(str(path), 0)


def test_a_system_message_opens_what_has_none() -> None:
    terse = {"role": "system", "content": "Be terse."}
    asked = [parse_conversation({"prompt": "Tea?"}), parse_conversation({"messages": [terse, TEA]})]
    assert opened_with(None, asked) == asked
    given, kept = opened_with("Be kind.", asked)
    assert given.messages == ({"role": "system", "content": "Be kind."}, TEA) and kept == asked[1]


@pytest.mark.parametrize(
    ("name", "num"),
    [
        ("hh_harmless", 1156),
        ("chat_pairs_multiturn", 228),
        ("arena_hard_v0.1_first250", 250),
        ("noveltybench_curated_first50", 50),
        ("mt_bench_questions", 80),
        ("gsm8k_test_first659", 659),
        ("math500_first250", 250),
    ],
)
def test_real_files(shared_data: Path, name: str, num: int) -> None:
    found = read_conversations(str(shared_data / f"{name}.jsonl.gz"))
    assert len(found) == num
    assert all(one.messages[-1]["role"] == "user" for one in found)
