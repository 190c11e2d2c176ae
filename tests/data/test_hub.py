"""Hub data sets, by data sets of the same kinds made here: nothing is downloaded."""

from typing import Any

import datasets
import pytest

from spl.data.formats import parse_row
from spl.data.source import Source
from spl.types import UserError

ROWS = [
    {
        "prompt": f"Which tea, {k}?",
        "prompt_id": str(k),
        "chosen": [{"role": "user", "content": f"Which tea, {k}?"}, {"role": "assistant", "content": "Green."}],
        "rejected": [{"role": "user", "content": f"Which tea, {k}?"}, {"role": "assistant", "content": "None."}],
        "messages": [{"role": "user", "content": f"Which tea, {k}?"}, {"role": "assistant", "content": "Green."}],
        "score_chosen": 8.0,
    }
    for k in range(6)
]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """`datasets.load_dataset` that knows one data set; the calls it got."""
    calls: list[dict[str, Any]] = []

    def load(path: str, **options: Any) -> Any:
        calls.append({"path": path, **options})
        if path != "owner/tea":
            raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{path}' doesn't exist on the Hub")
        dataset = datasets.Dataset.from_list(ROWS)
        return dataset.to_iterable_dataset(num_shards=2) if options["streaming"] else dataset

    monkeypatch.setattr(datasets, "load_dataset", load)
    return calls


def test_rows_come_with_their_place(hub: list[dict[str, Any]]) -> None:
    rows = list(Source("owner/tea", "green", "train_prefs").rows())
    assert [where for where, _ in rows] == [f"owner/tea, row {k}" for k in range(1, 7)]
    assert [row for _, row in rows] == ROWS
    assert hub == [{"path": "owner/tea", "name": "green", "split": "train_prefs", "streaming": False}]
    example = parse_row(rows[0][1])
    assert example.prompt == ({"role": "user", "content": "Which tea, 0?"},)
    assert example.responses == ("Green.", "None.")


def test_a_stream_has_the_same_rows(hub: list[dict[str, Any]]) -> None:
    shards = Source("owner/tea").shards()
    found = [shard.row(number, raw) for shard in shards for number, raw in shard.read()]
    assert [row.values for row in found] == ROWS
    assert [row.where for row in found] == [f"owner/tea, shard {s}, row {n}" for s in (1, 2) for n in (1, 2, 3)]
    assert [raw for _, raw in shards[1].read(1)] == ROWS[4:]
    assert hub[0]["streaming"] is True


def test_the_identity_is_of_the_content(hub: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    before = Source("owner/tea").identity()
    assert before == Source("owner/tea").identity()
    monkeypatch.setitem(ROWS[0], "score_chosen", 1.0)
    assert Source("owner/tea").identity() != before


def test_a_data_set_that_is_not_there(hub: list[dict[str, Any]]) -> None:
    with pytest.raises(UserError, match=r"cannot load 'owner/coffee' \(default, split 'train'\).*doesn't exist"):
        list(Source("owner/coffee").rows())
