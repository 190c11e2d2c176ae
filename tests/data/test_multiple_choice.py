"""Multiple-choice rows by hand, and the letters' probabilities against a plain forward pass of the whole prompt."""

import copy
import gzip
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import normalizers

from spl.data.base import PreferenceDataModule
from spl.data.encode import RowEncoder
from spl.data.multiple_choice import MultipleChoice, encode_choice, encode_choices, parse_choices
from spl.data.source import Source, named_source
from spl.data.tokenization import Encoder, TooLongError
from spl.logprobs.score import prepare, score
from spl.models import load_policy
from spl.types import UserError

BOS, END, USER, ASSISTANT = 256, 257, 260, 261
SUM = {"question": "2 + 2?", "choices": ["3", "4", "5"], "answer": 1}
PLANET = {"question": "Which is a planet?", "mc1_choices": ["Mars", "Sun", "Moon", "Io"], "mc1_labels": [1, 0, 0, 0]}


def letters(text: str) -> list[int]:
    """The tiny tokenizer's ids: visible ASCII comes first, from 0."""
    return [{" ": 220, "\n": 198}.get(letter, ord(letter) - 33) for letter in text]


def rows_of(path: Path, limit: int | None = None) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines][:limit]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def sums(path: Path, count: int) -> Path:
    return write(path, [{"question": f"{k} + 0?", "choices": [str(k), "no"], "answer": k % 2} for k in range(count)])


def data(
    tokenizer: Any, path: Path | str | None, rank: int = 0, world: int = 1, stage: str = "fit", **options: Any
) -> PreferenceDataModule:
    module = PreferenceDataModule(
        **{"batch_size": 1, "val_path": "survey"} | options, multiple_choice=str(path) if path else None
    )
    trainer = SimpleNamespace(lightning_module=SimpleNamespace(tokenizer=tokenizer), global_rank=rank, world_size=world)
    module.trainer = trainer  # type: ignore[assignment]
    module.setup(stage)
    return module


def questions(module: PreferenceDataModule) -> list[str]:
    return [row for batch, _ in module.choice_batches() for row in batch.rows]


@pytest.mark.parametrize("answer", [1, "1", "B", "b", " B ", 1.0])
def test_an_answer_is_an_index_or_a_letter(answer: Any) -> None:
    choice = parse_choices(SUM | {"answer": answer}, "f, row 1")
    assert choice == MultipleChoice("2 + 2?", ("3", "4", "5"), 1, "f, row 1")


def test_a_question_as_it_is_put_to_the_model() -> None:
    text = "2 + 2?\n\nA. 3\nB. 4\nC. 5\n\nAnswer with the letter of the right choice."
    assert parse_choices(SUM).render() == text


@given(st.integers(2, 26), st.data())
def test_the_right_choice_stays_right(count: int, drawn: Any) -> None:
    texts = [f"choice {k}" for k in range(count)]
    right = drawn.draw(st.integers(0, count - 1))
    seed = drawn.draw(st.tuples(st.integers(0, 2**32), st.integers(0, 2**32)))
    listed = parse_choices({"question": "q", "choices": texts, "answer": right}, seed=seed)
    assert (listed.choices, listed.answer) == (tuple(texts), right)
    labels = [int(k == right) for k in range(count)]
    mixed = parse_choices({"question": "q", "mc1_choices": texts, "mc1_labels": labels}, seed=seed)
    assert sorted(mixed.choices) == sorted(texts)
    assert mixed.choices[mixed.answer] == texts[right]
    hub = {"question": "q", "mc1_targets": {"choices": texts, "labels": labels}, "mc2_targets": {"choices": []}}
    assert parse_choices(hub, seed=seed) == mixed


def test_a_choice_that_always_comes_first_is_put_anywhere() -> None:
    answers = [parse_choices(PLANET, seed=(0, row)).answer for row in range(400)]
    # 100 of each are expected; 60 is 4.6 standard deviations (sqrt(400 * 1/4 * 3/4) = 8.7) below.
    assert min(Counter(answers).values()) > 60
    assert set(answers) == {0, 1, 2, 3}
    assert answers == [parse_choices(PLANET, seed=(0, row)).answer for row in range(400)]
    assert answers != [parse_choices(PLANET, seed=(1, row)).answer for row in range(400)]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"answer": 3}, r"answer must be the index of a choice, 0 to 2, or its letter, A to C, but is 3"),
        ({"answer": -1}, "answer must be .* but is -1"),
        ({"answer": "D"}, "answer must be .* but is 'D'"),
        ({"answer": ""}, "answer must be .* but is ''"),
        ({"answer": "BC"}, "answer must be .* but is 'BC'"),
        ({"answer": True}, "answer must be .* but is True"),
        ({"answer": float("nan")}, "answer must be .* but is nan"),
        ({"answer": None}, "expected the columns question, choices and answer, or .* are 'question', 'choices'"),
        ({"choices": "3, 4"}, "choices must be a list, but is '3, 4'"),
        ({"choices": ["3"]}, "choices must be 2 to 26 answers, but are 1"),
        ({"choices": ["3"] * 27}, "choices must be 2 to 26 answers, but are 27"),
        ({"choices": ["3", 4]}, r"choices\[1\] must be text, but is 4"),
        ({"choices": ["3", " "]}, r"choices\[1\] is empty"),
        ({"question": " "}, "question is empty"),
    ],
)
def test_a_row_that_cannot_be_used(change: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=f"^f, row 3: {complaint}"):
        parse_choices(SUM | change, "f, row 3")


@pytest.mark.parametrize("labels", [[1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [1, 0.5, 0, 0], ["1", "0", "0", "0"]])
def test_one_label_must_be_right(labels: list[Any]) -> None:
    with pytest.raises(UserError, match="mc1_labels must be 4 numbers, one of them 1"):
        parse_choices(PLANET | {"mc1_labels": labels})


def test_letters_by_hand(tiny_tokenizer: Any) -> None:
    choice = parse_choices(SUM, "f, row 1")
    encoded = encode_choice(choice, Encoder(tiny_tokenizer))
    prompt = [BOS, USER, *letters(choice.render()), END, ASSISTANT]
    assert encoded.answer == 1
    assert encoded.example.sequences == tuple((*prompt, *letters(letter)) for letter in "ABC")
    assert encoded.example.starts == (len(prompt),) * 3
    assert (encoded.example.comparisons, encoded.example.row) == ((), "f, row 1")


def test_what_stands_before_every_letter_is_prompt(tiny_tokenizer: Any) -> None:
    choice = parse_choices(SUM)
    encoded = encode_choice(choice, Encoder(tiny_tokenizer, template="plain")).example
    prompt = letters(f"User: {choice.render()}\n\nAssistant: ")
    assert encoded.sequences == tuple((*prompt, *letters(letter)) for letter in "ABC")
    assert encoded.starts == (len(prompt),) * 3


def test_letters_that_begin_with_one_token_are_refused(tiny_tokenizer: Any) -> None:
    twice = copy.deepcopy(tiny_tokenizer)
    twice.backend_tokenizer.normalizer = normalizers.Replace("C", "BB")
    assert twice("C")["input_ids"] == letters("BB")
    with pytest.raises(UserError, match="f, row 1: the tokenizer gives two of the letters A, B, C the same"):
        encode_choice(parse_choices(SUM, "f, row 1"), Encoder(twice))
    two = parse_choices(SUM | {"choices": ["3", "4"]})
    assert len(encode_choice(two, Encoder(twice)).example.sequences) == 2


@pytest.mark.parametrize("name", ["mmlu_val", "truthfulqa_mc"])
def test_real_rows_have_the_tokens_of_the_models_template(shared_data: Path, smollm2_tokenizer: Any, name: str) -> None:
    for number, row in enumerate(rows_of(shared_data / f"{name}.jsonl.gz")[::40]):
        choice = parse_choices(row, seed=(0, number))
        texts = row.get("choices") or row["mc1_choices"]
        assert choice.choices[choice.answer] == texts[row.get("answer", 0)].strip()
        turns = [{"role": "user", "content": choice.render()}]
        prompt = smollm2_tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        ids = smollm2_tokenizer.convert_tokens_to_ids(list("ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: len(texts)]))
        encoded = encode_choice(choice, Encoder(smollm2_tokenizer, max_length=4096)).example
        assert encoded.sequences == tuple((*prompt, letter) for letter in ids)
        assert encoded.starts == (len(prompt),) * len(texts)


@pytest.mark.parametrize("template", ["model", "plain"])
def test_all_letters_are_told_apart(smollm2_tokenizer: Any, template: Any) -> None:
    many = MultipleChoice("q", ("x",) * 26, 0)
    encoded = encode_choice(many, Encoder(smollm2_tokenizer, template=template)).example
    written = [smollm2_tokenizer.decode(sequence[encoded.starts[0] :]) for sequence in encoded.sequences]
    assert [text.strip() for text in written] == list("ABCDEFGHIJKLMNOPQRSTUVWXYZ")


def test_the_first_of_a_seeded_shuffle_are_asked(tmp_path: Path, tiny_tokenizer: Any) -> None:
    path = sums(tmp_path / "q.jsonl", 60)
    few = data(tiny_tokenizer, path, num_choice_questions=10)
    every = data(tiny_tokenizer, path)
    assert questions(few) == questions(every)[:10]
    assert sorted(questions(every)) == sorted(f"{path}, row {k}" for k in range(1, 61))
    assert questions(data(tiny_tokenizer, path, num_choice_questions=10)) == questions(few)
    assert questions(data(tiny_tokenizer, path, num_choice_questions=10, seed=1)) != questions(few)
    # Ten of the first ten of sixty by chance: 1 in 75 billion.
    assert set(questions(few)) != {f"{path}, row {k}" for k in range(1, 11)}
    for batch, answers in every.choice_batches():
        assert answers == [(int(row.split()[-1]) - 1) % 2 for row in batch.rows]


def test_each_row_has_an_order_of_its_own(tmp_path: Path, tiny_tokenizer: Any) -> None:
    path = write(tmp_path / "q.jsonl", [PLANET] * 40)
    answers = [answer for _, right in data(tiny_tokenizer, path).choice_batches() for answer in right]
    assert set(answers) == {0, 1, 2, 3}
    few = [
        answer for _, right in data(tiny_tokenizer, path, num_choice_questions=9).choice_batches() for answer in right
    ]
    assert few == answers[:9]


def test_processes_share_the_questions(tmp_path: Path, tiny_tokenizer: Any) -> None:
    path = sums(tmp_path / "q.jsonl", 17)
    alone = questions(data(tiny_tokenizer, path))
    parts = [data(tiny_tokenizer, path, rank, world=3) for rank in range(3)]
    batches = [list(part.choice_batches()) for part in parts]
    assert len({len(own) for own in batches}) == 1
    assert max(batch.num_examples for own in batches for batch, _ in own) <= 4
    assert sorted(row for part in parts for row in questions(part)) == sorted(alone)
    with pytest.raises(UserError, match="17 questions cannot be shared by 18 processes"):
        list(data(tiny_tokenizer, path, world=18, stage="validate").choice_batches())


def test_nothing_is_asked_where_no_questions_are_given(tiny_tokenizer: Any) -> None:
    assert list(data(tiny_tokenizer, None).choice_batches()) == []


@pytest.mark.parametrize("stage", ["fit", "validate", "test"])
def test_every_stage_that_validates_has_the_questions(tmp_path: Path, tiny_tokenizer: Any, stage: str) -> None:
    assert len(questions(data(tiny_tokenizer, sums(tmp_path / "q.jsonl", 3), stage=stage))) == 3


def test_csv_and_parquet(tmp_path: Path, tiny_tokenizer: Any) -> None:
    table = tmp_path / "q.csv"
    table.write_text('question,choices,answer\n2 + 2?,"[""3"", ""4"", ""5""]",B\n')
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([SUM]), tmp_path / "q.parquet")
    expected = encode_choice(parse_choices(SUM), Encoder(tiny_tokenizer))
    for path in (table, tmp_path / "q.parquet"):
        (found,) = encode_choices(Source(str(path)), RowEncoder(Encoder(tiny_tokenizer)), 5, 0)
        assert (found.example.sequences, found.answer) == (expected.example.sequences, 1)


def test_a_bad_row_stops_the_run_or_is_skipped(tmp_path: Path, tiny_tokenizer: Any) -> None:
    path = write(tmp_path / "q.jsonl", [SUM, SUM | {"answer": "Z"}, PLANET])
    with pytest.raises(UserError, match=r"q\.jsonl, row 2: answer must be .* Set data\.bad_rows to skip"):
        data(tiny_tokenizer, path)
    kept = questions(data(tiny_tokenizer, path, bad_rows="skip"))
    assert sorted(kept) == [f"{path}, row 1", f"{path}, row 3"]


def test_a_long_question_is_left_out_whole(tmp_path: Path, tiny_tokenizer: Any) -> None:
    long = SUM | {"question": "why " * 100}
    path = write(tmp_path / "q.jsonl", [long, SUM])
    options = {"max_length": 128, "template": "plain"}
    for truncation in ("cut", "drop"):
        assert questions(data(tiny_tokenizer, path, truncation=truncation, **options)) == [f"{path}, row 2"]
    with pytest.raises(TooLongError, match=r"q\.jsonl, row 1: .* more than max_length 128"):
        data(tiny_tokenizer, path, truncation="raise", **options)
    alone = write(tmp_path / "long.jsonl", [long])
    with pytest.raises(UserError, match=r"no usable question among the 1 rows .*1 dropped as longer than max_length"):
        data(tiny_tokenizer, alone, **options)


def test_mistakes_in_the_settings(tmp_path: Path, tiny_tokenizer: Any) -> None:
    with pytest.raises(UserError, match=r"data\.multiple_choice: no file or folder 'none\.jsonl'"):
        data(tiny_tokenizer, "none.jsonl")
    with pytest.raises(UserError, match="num_choice_questions must be 1 or more, but is 0"):
        PreferenceDataModule(num_choice_questions=0)


def test_a_hub_data_set_by_name() -> None:
    assert named_source("cais/mmlu", "validation") == Source("cais/mmlu", None, "validation")
    assert named_source("cais/mmlu:all", "validation") == Source("cais/mmlu", "all", "validation")
    assert named_source("cais/mmlu:all:test", "validation") == Source("cais/mmlu", "all", "test")
    assert named_source("a:b.jsonl", "validation") == Source("a:b.jsonl")


def letter_laws(module: PreferenceDataModule, model: Any) -> dict[str, list[float]]:
    """Probabilities of each question's letters among themselves, from the batches as a monitor takes them."""
    found = {}
    for batch, answers in module.choice_batches():
        scored = score(model, batch)
        assert scored.num_tokens.tolist() == [1] * batch.num_responses
        assert len(answers) == batch.num_examples
        for number, row in enumerate(batch.rows):
            found[row] = scored.logps[batch.response_example == number].softmax(0).tolist()
    return found


@pytest.mark.parametrize("template", ["model", "plain"])
def test_letter_probabilities_are_those_of_a_plain_forward_pass(
    tmp_path: Path, tiny_tokenizer: Any, template: Any
) -> None:
    model = load_policy("tiny", lora_rank=0).eval()
    rows = [SUM | {"question": f"{k} + 4?", "choices": [str(k), "4"] * (1 + k)} for k in range(6)]
    path = write(tmp_path / "q.jsonl", rows)
    cue = ("<|bos|><|user|>{}<|end|><|assistant|>", "User: {}\n\nAssistant: ")[template == "plain"]
    with torch.no_grad():
        expected = {}
        for k, row in enumerate(rows, 1):
            choice = parse_choices(row)
            ids = tiny_tokenizer(cue.format(choice.render()), add_special_tokens=False)["input_ids"]
            logits = model(torch.tensor([ids])).logits[0, -1]
            names = letters("ABCDEFGHIJKL"[: len(row["choices"])])
            expected[f"{path}, row {k}"] = logits[names].softmax(0).tolist()
        prepare(model, "forest")
        found = letter_laws(data(tiny_tokenizer, path, template=template), model)
    assert found.keys() == expected.keys()
    for row, law in expected.items():
        assert found[row] == pytest.approx(law, abs=1e-5)
        assert max(law) - min(law) > 1e-3  # a law that is not flat, so that a wrong order of letters shows


def test_letter_probabilities_of_real_rows(shared_data: Path, tiny_tokenizer: Any) -> None:
    model = load_policy("tiny", lora_rank=0).eval()
    path = shared_data / "mmlu_val.jsonl.gz"
    module = data(tiny_tokenizer, path, num_choice_questions=12)
    rows = rows_of(path)
    with torch.no_grad():
        prepare(model, "forest")
        found = letter_laws(module, model)
        prepare(model, "plain")
        for where, law in found.items():
            row = rows[int(where.split()[-1]) - 1]
            turns = [{"role": "user", "content": parse_choices(row).render()}]
            ids = tiny_tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
            logits = model(torch.tensor([ids])).logits[0, -1]
            assert law == pytest.approx(logits[letters("ABCD")].softmax(0).tolist(), abs=1e-5)
    assert len(found) == 12


def test_worked_examples_are_turns_before_the_question(tiny_tokenizer: Any) -> None:
    shot = parse_choices({"question": "1 + 1?", "choices": ["2", "1"], "answer": 0, "subject": "sums"})
    encoder = Encoder(tiny_tokenizer)
    encoded = encode_choice(parse_choices(SUM), encoder, [shot])
    turns = [shot.render(), "A", parse_choices(SUM).render()]
    prompt = f"<|bos|><|user|>{turns[0]}<|end|><|assistant|>{turns[1]}<|end|><|user|>{turns[2]}<|end|><|assistant|>"
    assert encoder.decode_marked(encoded.example, 1) == f"{prompt}«B»"
    assert (shot.subject, parse_choices(SUM).subject) == ("sums", "")


def test_choices_in_another_order() -> None:
    mixed = parse_choices(SUM).reordered((2, 0, 1))
    assert (mixed.choices, mixed.answer) == (("5", "3", "4"), 2)
