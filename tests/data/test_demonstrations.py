"""Rows to imitate: every common shape, and the tokens and spans that the chat template by itself gives."""

from typing import Any

import pytest

from spl.data.collate import EncodedExample, collate
from spl.data.demonstrations import encode_demonstrations, parse_demonstration
from spl.data.encode import Report, RowEncoder
from spl.data.shards import Row
from spl.data.tokenization import Encoder, TooLongError
from spl.models import load_tokenizer
from spl.types import Demonstration, PreferenceExample, UserError

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Tea?"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "Milk?"},
    {"role": "assistant", "content": "No."},
    {"role": "user", "content": "Bye"},
]
ASK = ({"role": "user", "content": "Tea?"},)


def turns_of(row: Any, **options: Any) -> Any:
    found = parse_demonstration(row, **options)
    assert isinstance(found, Demonstration)
    return found.turns


def encoded(demonstration: Demonstration, encoder: Encoder) -> tuple[EncodedExample, int]:
    (found,) = encode_demonstrations(encoder, [demonstration])
    if isinstance(found, UserError):
        raise found
    return found


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Tea?", "response": "Yes."},
        {"prompt": "Tea?", "completion": [{"role": "assistant", "content": "Yes."}]},
        {"question": "Tea?", "answer": "Yes."},
        {"prompt": "Tea?", "chosen": "Yes.", "rejected": "No."},
        {"chosen": "\n\nHuman: Tea?\n\nAssistant: Yes.", "rejected": "\n\nHuman: Tea?\n\nAssistant: No."},
        {"prompt": "Tea?", "messages": [*ASK, {"role": "assistant", "content": "Yes."}]},
    ],
    ids=lambda row: " ".join(row),
)
def test_shapes_of_one_reply(row: dict[str, Any]) -> None:
    assert turns_of(row) == ((ASK, "Yes."),)


def test_every_turn_of_the_assistants_is_learned() -> None:
    assert turns_of({"messages": TALK, "prompt_id": 7}) == ((tuple(TALK[:2]), "Yes."), (tuple(TALK[:4]), "No."))
    greeted = [{"role": "assistant", "content": "Hello!"}, *TALK[1:3]]
    assert turns_of({"messages": greeted}) == ((tuple(greeted[:2]), "Yes."),)
    assert turns_of({"messages": TALK[1:3], "system": "Be brief."}) == ((tuple(TALK[:2]), "Yes."),)


def test_listed_responses_are_the_preferences_they_come_with() -> None:
    row = {"prompt": "Tea?", "responses": ["Yes", "No"], "shares": [0.8, 0.2]}
    found = parse_demonstration(row)
    assert isinstance(found, PreferenceExample) and found.responses == ("Yes", "No")


def test_columns_of_other_names() -> None:
    row = {"problem": "Tea?", "solution": "Yes."}
    assert turns_of(row, columns={"prompt": "problem", "response": "solution"}) == ((ASK, "Yes."),)


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"text": "Tea"}, "expected the columns messages, or prompt .*; the columns with a value are 'text'"),
        ({"messages": TALK[:2]}, "no turn of the assistant's that answers another"),
        ({"messages": [*TALK[:2], {"role": "assistant", "content": " "}]}, r"messages\[2\] is empty"),
        ({"prompt": "Tea?", "response": " "}, "response is empty"),
        ({"prompt": "Tea?", "response": "Yes", "answer": "No"}, "one reply to learn, but found .* response and answer"),
        ({"question": "Which?", "choices": ["a", "b"], "answer": 1}, "answer must be text"),
        ([1], "must be an object with the columns messages"),
    ],
    ids=str,
)
def test_what_cannot_be_used_is_named(row: Any, sentence: str) -> None:
    with pytest.raises(UserError, match=f"talk.jsonl, row 3: .*{sentence}"):
        parse_demonstration(row, "talk.jsonl, row 3")


def test_tokens_and_spans_by_the_template(tiny_tokenizer: Any) -> None:
    found, cut = encoded(parse_demonstration({"messages": TALK}), Encoder(tiny_tokenizer))
    text = "<|bos|><|system|>Be brief.<|end|><|user|>Tea?<|end|><|assistant|>Yes.<|end|>"
    more = "<|user|>Milk?<|end|><|assistant|>No.<|end|>"
    assert (*map(list, found.sequences), cut) == (
        tiny_tokenizer(text)["input_ids"], tiny_tokenizer(text + more)["input_ids"], 0
    )  # fmt: skip
    starts = [len(tiny_tokenizer(t)["input_ids"]) for t in (text.split("Yes")[0], (text + more).split("No.")[0])]
    assert list(found.starts) == starts
    # One path: its last token predicts nothing, and none stands twice.
    batch = collate([found])
    assert batch.num_tokens == len(found.sequences[1]) - 1 < found.num_tokens == len(found.sequences[1])
    assert len(batch.nodes) == 1
    assert batch.edge_target.tolist() == [t for s, b in zip(found.sequences, found.starts, strict=True) for t in s[b:]]
    assert Encoder(tiny_tokenizer).decode_marked(found, None) == (
        "<|bos|><|system|>Be brief.<|end|><|user|>Tea?<|end|><|assistant|>«Yes.<|end|>»"
        "<|user|>Milk?<|end|><|assistant|>«No.<|end|>»"
    )


def test_a_template_that_rewrites_earlier_turns_repeats_tokens() -> None:
    """Thoughts of earlier turns are left out, as in Qwen3's template."""
    tokenizer = load_tokenizer("tiny")
    tokenizer.chat_template = (
        "<|bos|>{% for m in messages %}<|{{ m['role'] }}|>"
        "{{ m['content'] if loop.last else m['content'].split('</t>')[-1] }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    talk = [*TALK[1:2], {"role": "assistant", "content": "<t>hm</t>Yes."}, *TALK[3:5]]
    found, _ = encoded(parse_demonstration({"messages": talk}), Encoder(tokenizer))
    texts = [
        "<|bos|><|user|>Tea?<|end|><|assistant|><t>hm</t>Yes.<|end|>",
        "<|bos|><|user|>Tea?<|end|><|assistant|>Yes.<|end|><|user|>Milk?<|end|><|assistant|>No.<|end|>",
    ]
    assert [list(s) for s in found.sequences] == [tokenizer(text)["input_ids"] for text in texts]
    shared = len(tokenizer("<|bos|><|user|>Tea?<|end|><|assistant|>")["input_ids"])
    assert collate([found]).num_tokens == sum(len(s) - 1 for s in found.sequences) - shared <= found.num_tokens


def test_long_conversations_end_where_they_are_full(tiny_tokenizer: Any) -> None:
    whole, _ = encoded(parse_demonstration({"messages": TALK}), Encoder(tiny_tokenizer))
    first, second = whole.sequences
    for most in range(whole.starts[1] + 1, len(second)):
        found, cut = encoded(parse_demonstration({"messages": TALK}), Encoder(tiny_tokenizer, most))
        assert (found.sequences, found.starts, cut) == ((first, second[:most]), whole.starts, len(second) - most)
    found, cut = encoded(parse_demonstration({"messages": TALK}), Encoder(tiny_tokenizer, whole.starts[1]))
    assert (found.sequences, found.starts, cut) == ((first,), whole.starts[:1], len(second) - len(first))


def test_a_long_first_prompt_loses_its_oldest_tokens(tiny_tokenizer: Any) -> None:
    talk = [{"role": "user", "content": "abcdefghij" * 10}, *TALK[2:5]]
    whole, _ = encoded(parse_demonstration({"messages": talk}), Encoder(tiny_tokenizer))
    found, cut = encoded(parse_demonstration({"messages": talk}), Encoder(tiny_tokenizer, 40))
    drop = len(whole.sequences[0]) - 40
    assert found.sequences == ((*whole.sequences[0][:1], *whole.sequences[0][1 + drop :]),)
    assert (found.starts, cut) == ((whole.starts[0] - drop,), len(whole.sequences[1]) - 40)
    for truncation in ("drop", "raise"):
        with pytest.raises(TooLongError, match=r"talk, row 1: \d+ tokens are more than max_length 40"):
            encoded(Demonstration(turns_of({"messages": talk}), "talk, row 1"), Encoder(
                tiny_tokenizer, 40, truncation=truncation
            ))  # fmt: skip


def test_rows_of_both_kinds_keep_their_order(tiny_tokenizer: Any) -> None:
    rows: list[Any] = [
        {"messages": TALK},
        {"prompt": "Tea?", "responses": ["Yes", "No"], "shares": [0.8, 0.2]},
        {"prompt": "Tea?"},
        {"prompt": "Tea?", "response": "Yes"},
    ]
    encoder, report = RowEncoder(Encoder(tiny_tokenizer), bad_rows="skip", task="sft"), Report()
    found = list(encoder.examples((Row(f"row {k}", row) for k, row in enumerate(rows)), report))
    assert [tokens.row for _, tokens in found] == ["row 0", "row 1", "row 3"]
    assert [len(tokens.comparisons) for _, tokens in found] == [0, 1, 0]
    assert (report.examples, report.skipped) == (3, 1)


def test_what_is_read_at_its_end_has_one_token_more(tiny_tokenizer: Any) -> None:
    example = PreferenceExample(ASK, ("Yes", "No"), ())
    plain, _ = Encoder(tiny_tokenizer).encode(example)
    read, _ = Encoder(tiny_tokenizer, reads_end=True).encode(example)
    assert read.starts == plain.starts
    assert [s[:-1] for s in read.sequences] == list(plain.sequences)
    batch = collate([read])
    ends = [int(batch.edge_source[batch.member_edge[batch.member_response == r][-1]]) for r in range(2)]
    assert [int(batch.input_ids[end]) for end in ends] == [s[-1] for s in plain.sequences]
    assert Encoder(tiny_tokenizer, reads_end=True).decode_marked(read).endswith("«Yes<|end|>»")
    tokenizer = load_tokenizer("tiny")
    tokenizer.pad_token = tokenizer.eos_token  # transformers then reads at the token before it
    read, _ = Encoder(tokenizer, reads_end=True).encode(example)
    assert [list(s[:-1]) for s in read.sequences] == [list(s[:-1]) for s in plain.sequences]
