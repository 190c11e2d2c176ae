"""The data module as a Trainer uses it."""

import json
import os
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

import spl.data.encode
from spl.data.base import PreferenceDataModule
from spl.data.encode import Report, RowEncoder
from spl.data.kept import encode_source
from spl.data.source import Source
from spl.data.survey import SURVEY
from spl.data.tokenization import Encoder
from spl.types import PreferenceBatch, UserError


class FakeTrainer:
    """What the data module asks of a Trainer."""

    def __init__(self, tokenizer: Any, rank: int = 0, world: int = 1, folder: Path | str = ".") -> None:
        self.lightning_module = type("Module", (), {"tokenizer": tokenizer})()
        self.global_rank, self.world_size = rank, world
        self.current_epoch, self.max_steps, self.accumulate_grad_batches = 0, 99, 1
        self.check_val_every_n_epoch, self.limit_train_batches = 1, 1.0
        self.state = type("State", (), {"fn": "fit"})()
        self.default_root_dir = str(folder)
        progress = type("Progress", (), {"ready": 0})()
        self.processed = count()  # a batch is done whenever it is asked
        total = type("Total", (), {"processed": property(lambda _: next(self.processed))})()
        batches = type("Batches", (), {"current": progress, "total": total, "is_last_batch": False})()
        epoch = type("Epoch", (), {"batch_progress": batches})()
        self.fit_loop = type("Fit", (), {"epoch_loop": epoch, "restarting": False})()


def data(path: Path | str, tokenizer: Any, rank: int = 0, world: int = 1, **options: Any) -> PreferenceDataModule:
    module = PreferenceDataModule(str(path), **options)
    module.trainer = FakeTrainer(tokenizer, rank, world, Path(path).parent)  # type: ignore[assignment]
    return module


def pairs(path: Path, count: int, prompts: int | None = None) -> Path:
    rows = ({"prompt": f"p{k % (prompts or count)}", "chosen": f"yes {k}", "rejected": "no"} for k in range(count))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows_of(batches: Any) -> list[str]:
    return [row for batch in batches for row in batch.rows]


def test_the_survey_is_the_default(tiny_tokenizer: Any) -> None:
    module = data("survey", tiny_tokenizer, val_path="survey")
    module.setup("fit")
    batch = next(iter(module.train_dataloader()))
    assert isinstance(batch, PreferenceBatch)
    assert batch.num_examples == len(SURVEY)
    assert batch.num_responses == sum(len(q.shares) for q in SURVEY)
    # One pair by hand: 80 of 100 prefer coffee.
    example = batch.rows.index("survey, row 1")
    responses = (batch.response_example == example).nonzero()[:, 0]
    compared = (batch.comparisons[:, 0] == responses[0]).nonzero()[:, 0]
    assert batch.shares[compared].tolist() == pytest.approx([0.8])


def test_a_bad_row_stops_the_run_or_is_counted(tmp_path: Path, tiny_tokenizer: Any) -> None:
    path = pairs(tmp_path / "a.jsonl", 3)
    with path.open("a") as file:
        file.write(json.dumps({"prompt": "p", "chosen": "same", "rejected": "same"}) + "\n")
        file.write(json.dumps({"prompt": "p", "chosen": 5, "rejected": "b"}) + "\n")
    with pytest.raises(UserError, match=r"a\.jsonl, row 4: .*identical.*data\.bad_rows to skip"):
        data(path, tiny_tokenizer, batch_size=2).setup("fit")
    module = data(path, tiny_tokenizer, batch_size=2, bad_rows="skip")
    module.setup("fit")
    assert module.train is not None
    assert (len(module.train), module.train.report.skipped) == (3, 2)
    assert "2 rows skipped as unusable (first: " in module.describe()["training data"]
    assert "row 4" in module.describe()["training data"]


def test_no_usable_row(tmp_path: Path, tiny_tokenizer: Any) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"question": "p", "answer": "a"}) + "\n")
    with pytest.raises(UserError, match=r"no usable example.*columns with a value are 'question', 'answer'"):
        data(path, tiny_tokenizer, bad_rows="skip").setup("fit")


def test_columns_by_other_names(tmp_path: Path, tiny_tokenizer: Any) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"q": "p", "better": "a", "worse": "b"}) + "\n")
    module = data(path, tiny_tokenizer, batch_size=1, columns={"prompt": "q", "chosen": "better", "rejected": "worse"})
    module.setup("fit")
    assert module.decoded_example() == "<|bos|><|user|>p<|end|><|assistant|>«a<|end|>»"


def test_what_is_set_apart_shares_no_prompt(tmp_path: Path, tiny_tokenizer: Any) -> None:
    module = data(pairs(tmp_path / "a.jsonl", 60, prompts=20), tiny_tokenizer, val_size=0.2, batch_size=4)
    module.setup("fit")
    assert module.train is not None
    assert module.val is not None
    assert len(module.train) + len(module.val) == 60
    assert len(module.val) == 12
    assert not set(module.train.table["prompt"]) & set(module.val.table["prompt"])
    again = data(tmp_path / "a.jsonl", tiny_tokenizer, val_size=12, batch_size=4)
    again.setup("fit")
    assert list(again.val.table["row"]) == list(module.val.table["row"])  # type: ignore[union-attr]


def test_tokenised_rows_are_kept_until_anything_changes(
    tmp_path: Path, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = pairs(tmp_path / "a.jsonl", 5)
    parsed = []
    parse = spl.data.encode.parse_row
    monkeypatch.setattr(spl.data.encode, "parse_row", lambda *a: (parsed.append(a[1]), parse(*a))[1])
    first = encode_source(Source(str(path)), RowEncoder(Encoder(tiny_tokenizer)))
    assert len(parsed) == 5
    second = encode_source(Source(str(path)), RowEncoder(Encoder(tiny_tokenizer)))
    assert len(parsed) == 5
    assert [first[k] for k in range(5)] == [second[k] for k in range(5)]
    encode_source(Source(str(path)), RowEncoder(Encoder(tiny_tokenizer, max_length=64)))
    assert len(parsed) == 10
    pairs(path, 6)
    encode_source(Source(str(path)), RowEncoder(Encoder(tiny_tokenizer)))
    assert len(parsed) == 16


def test_a_failed_run_leaves_no_half_copy(tmp_path: Path, tiny_tokenizer: Any) -> None:
    path = pairs(tmp_path / "a.jsonl", 3)
    with path.open("a") as file:
        file.write("{broken\n")
    before = set((Path(os.environ["HF_DATASETS_CACHE"]) / "spl").glob("*"))
    with pytest.raises(UserError, match="row 4"):
        encode_source(Source(str(path)), RowEncoder(Encoder(tiny_tokenizer)))
    assert set((Path(os.environ["HF_DATASETS_CACHE"]) / "spl").glob("*")) == before


def test_workers_change_no_batch(tmp_path: Path, tiny_tokenizer: Any) -> None:
    path = pairs(tmp_path / "a.jsonl", 12)
    found = []
    for workers in (0, 2):
        module = data(path, tiny_tokenizer, batch_size=4, num_workers=workers)
        module.setup("fit")
        found.append(list(module.train_dataloader()))
    for one, two in zip(*found, strict=True):
        assert one.rows == two.rows
        assert torch.equal(one.input_ids, two.input_ids)


def test_the_longest_batch_holds_the_longest(tmp_path: Path, tiny_tokenizer: Any) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"prompt": "p" * n, "chosen": "a", "rejected": "b"} for n in (5, 90, 7, 40, 6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    module = data(path, tiny_tokenizer, batch_size=2)
    module.setup("fit")
    assert sorted(rows_of([module.longest_batch()])) == [f"{path}, row 2", f"{path}, row 4"]
    assert rows_of([module.first_batch()]) == rows_of(module.train_dataloader())[:2]


def test_too_long_rows_are_cut_or_dropped_and_counted(tmp_path: Path, tiny_tokenizer: Any) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"prompt": "p" * n, "chosen": "a", "rejected": "b"} for n in (5, 90)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    cut = data(path, tiny_tokenizer, batch_size=1, max_length=32)
    cut.setup("fit")
    assert "1 cut to max_length" in cut.describe()["training data"]
    dropped = data(path, tiny_tokenizer, batch_size=1, max_length=32, truncation="drop")
    dropped.setup("fit")
    assert "1 dropped as longer than max_length" in dropped.describe()["training data"]
    with pytest.raises(UserError, match=r"row 2: .*max_length 32"):
        data(path, tiny_tokenizer, batch_size=1, max_length=32, truncation="raise").setup("fit")


def test_too_many_bad_rows_stop_the_run_and_are_shown(tmp_path: Path, tiny_tokenizer: Any) -> None:
    path = tmp_path / "a.jsonl"
    good, bad = '{"prompt": "p", "chosen": "a", "rejected": "b"}\n', '{"prompt": "p", "chosen": "a"}\n'
    path.write_text((good * 18 + "{broken\n" + bad) * 150)
    module = data(path, tiny_tokenizer, bad_rows="skip", max_bad_share=0.1)
    module.setup("fit")
    assert module.train is not None
    assert (len(module.train), module.train.report.skipped) == (2_700, 300)
    lines = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert [line["where"] for line in lines] == [
        f"{path}, row {20 * k + n}" for k in range(50) for n in (19, 20)
    ]  # the first 100
    assert lines[0]["row"] == "{broken\n"
    assert "expected one JSON object a line" in lines[0]["reason"]
    assert json.loads(lines[1]["row"]) == json.loads(bad)
    # The tokenised rows were kept, and are held to the share that is set now.
    again = data(path, tiny_tokenizer, bad_rows="skip", max_bad_share=0.09)
    with pytest.raises(UserError, match=r"300 of the 3,000 rows .* more than data.max_bad_share 0.09 allows"):
        again.setup("fit")
    path.write_text((good * 18 + bad * 2) * 149)
    with pytest.raises(UserError, match=r"10 of the 100 rows .* data.max_bad_share 0.09 .*one of them: .*row 100"):
        data(path, tiny_tokenizer, bad_rows="skip", max_bad_share=0.09).setup("fit")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"batch_size": 0}, "data.batch_size must be 1 or more, but is 0"),
        ({"val_size": -1}, "data.val_size"),
        ({"batch_size": 9}, "8 examples to train on, fewer than the 9 that"),
        ({"val_size": 8}, "leaves none"),
        ({"streaming": True, "val_size": 2}, "a stream has no length"),
        ({"streaming": True, "lanes": 3, "num_workers": 2}, "3 lanes of the stream cannot be shared out to 2 readers"),
        ({"mixture": {"survey": 1.0}}, "set data.streaming to true"),
        ({"streaming": True, "mixture": {"survey": 0.0}}, "each source a weight above 0"),
        ({"max_bad_share": 2}, "data.max_bad_share must be from 0 to 1, but is 2"),
        ({"val_split": "test"}, "data.val_split names a split of a Hub data set"),
        ({"val_path": "survey", "val_size": 2}, "data.val_size sets a part apart"),
    ],
)
def test_settings_that_cannot_be(tiny_tokenizer: Any, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        data("survey", tiny_tokenizer, **options).setup("fit")


def test_validation_without_held_out_data(tiny_tokenizer: Any) -> None:
    with pytest.raises(UserError, match="no held-out data"):
        data("survey", tiny_tokenizer).setup("validate")


def test_rows_are_encoded_alike_one_by_one(tiny_tokenizer: Any) -> None:
    encoder = RowEncoder(Encoder(tiny_tokenizer))
    report = Report()
    stream = [encoded for _, encoded in encoder.examples(Source("survey").rows(), report)]
    kept = encode_source(Source("survey"), encoder)
    assert stream == [kept[k] for k in range(len(kept))]
    assert report == kept.report
