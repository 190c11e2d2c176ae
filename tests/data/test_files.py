"""Local files of every kind hold the same rows; broken ones are named."""

import csv
import gzip
import io
import json
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet as parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spl.data.files import is_local, list_items, local_files
from spl.data.formats import parse_row
from spl.data.shards import RefusedRowError, Retries, Row
from spl.data.source import Source
from spl.types import UserError

ROWS: list[dict[str, Any]] = [
    {"prompt": "Hi, you?\nWell?", "chosen": 'Fine, "thanks".', "rejected": "No.", "share": 0.75},
    {"prompt": "Ünïcode", "chosen": "yes", "rejected": "no", "share": 1.0},
]
LISTS: list[dict[str, Any]] = [
    {"prompt": "Which?", "responses": ["a", "b", "c"], "shares": [0.5, 0.3, 0.2]},
    {"prompt": [{"role": "user", "content": "Which?"}], "responses": ["x", "y"], "shares": [0.5, 0.5]},
]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """A file of rows, of the kind its name says, by libraries other than the reader's where there is one."""
    opener = gzip.open if path.name.endswith(".gz") else open
    name = path.name.removesuffix(".gz")
    if name.endswith(".parquet"):
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return path
    with opener(path, "wt", encoding="utf-8", newline="") as file:
        if name.endswith(".jsonl"):
            file.writelines(json.dumps(row) + "\n" for row in rows)
        elif name.endswith(".json"):
            json.dump(rows, file, indent=1)
        else:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows({k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()} for row in rows)
    return path


def rows_of(path: Path) -> list[Row]:
    return list(Source(str(path)).rows())


KINDS = ["a.jsonl", "a.jsonl.gz", "a.json", "a.json.gz", "a.csv", "a.csv.gz", "a.parquet"]


@pytest.mark.parametrize("name", KINDS)
def test_a_kind_of_file_holds_its_rows(tmp_path: Path, name: str) -> None:
    found = rows_of(write(tmp_path / name, ROWS))
    assert [row for _, row in found] == ROWS
    assert [where for where, _ in found] == [f"{tmp_path / name}, row 1", f"{tmp_path / name}, row 2"]


@pytest.mark.parametrize("name", [k for k in KINDS if "parquet" not in k])
def test_lists_survive(tmp_path: Path, name: str) -> None:
    found = [parse_row(row) for _, row in rows_of(write(tmp_path / name, LISTS))]
    assert found == [parse_row(row) for row in LISTS]


def test_a_folder_is_read_in_order_of_name(tmp_path: Path) -> None:
    write(tmp_path / "2.jsonl", ROWS[1:])
    write(tmp_path / "1.parquet", ROWS[:1])
    (tmp_path / "README.md").write_text("not data")
    assert [row["chosen"] for _, row in rows_of(tmp_path)] == ['Fine, "thanks".', "yes"]


def test_blank_lines_are_passed_over_but_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n\n{"a": 2}\n')
    assert rows_of(path) == [(f"{path}, row 1", {"a": 1}), (f"{path}, row 3", {"a": 2})]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": \n{"a": 3}\n', "row 2: expected one JSON object a line"),
        ("a.jsonl", b'{"a": 1}\n[1, 2]\n{"a": 3}\n', r"row 2: expected a JSON object, but got \[1, 2\]"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xff"}\n{"a": 3}', "row 2: expected UTF-8, but .*utf-8"),
        ("a.jsonl", b'{"a": 1}\n' + b"[" * 100_000 + b'\n{"a": 3}', "row 2: .*recursion"),
        ("a.jsonl", b'{"a": 1}\n{"a": ' + b"1" * 5000 + b'}\n{"a": 3}', "row 2: .*digits"),
        ("a.json", b'[{"a": 1}, 5, {"a": 3}]', "row 2: expected a JSON object, but got 5"),
        ("a.csv", b"a\n1\n1,2\n3\n", "row 2: more values than the header has columns"),
        ("a.csv", b"a\n1\n\xff\n3\n", "row 2: expected UTF-8"),
    ],
)
def test_a_broken_row_is_refused_and_the_next_are_read(
    tmp_path: Path, name: str, content: bytes, sentence: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    first, bad, last = rows_of(path)
    assert [str(first.values["a"]), str(last.values["a"])] == ["1", "3"]  # type: ignore[index]
    with pytest.raises(RefusedRowError, match=sentence) as raised:
        raise bad.values  # type: ignore[misc]
    assert str(raised.value).startswith(f"{path}, row 2")
    assert raised.value.text


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.json", b'[{"a": 1}', "from row 1 on: .*list is not closed"),
        ("a.json", b'[{"a": 1} {"a": 2}]', "from row 2 on: .*followed by a comma"),
        ("a.json", b'[{"a": 1}, {"a"}]', "from row 2 on: .*delimiter"),
        ("a.jsonl.gz", b"not gzip", "from row 1 on: Not a gzipped file"),
        ("a.parquet", b"not parquet at all", "from row 1 on: .*[Pp]arquet"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, name: str, content: bytes, sentence: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=sentence) as raised:
        rows_of(path)
    assert str(path) in str(raised.value)
    assert "Put a whole copy of it in its place" in str(raised.value)


@pytest.mark.parametrize("broken", [lambda b: b[:-20], lambda b: b[:200] + b"??" + b[202:]], ids=["cut", "changed"])
def test_a_broken_gzip_is_named_with_its_row(tmp_path: Path, broken: Callable[[bytes], bytes]) -> None:
    path = write(tmp_path / "a.jsonl.gz", [{"n": random.Random(k).random()} for k in range(5000)])
    path.write_bytes(broken(path.read_bytes()))
    seen = []
    with pytest.raises(UserError, match=r"cannot be read from row (\d+) on: ") as raised:
        for row in Source(str(path)).rows(Retries(number=2, wait=0.0)):
            seen.append(row)
    assert f"from row {len(seen) + 1} on" in str(raised.value)


def test_a_gzip_that_is_still_being_copied_is_waited_for(tmp_path: Path) -> None:
    rows = [{"n": k} for k in range(5000)]
    path = write(tmp_path / "a.jsonl.gz", rows)
    whole = path.rename(tmp_path / "whole")
    path.write_bytes(whole.read_bytes()[:-200])
    found = [row.values for row in copying(path, whole, Source(str(path)).rows(Retries(number=8, wait=0.1)))]
    assert found == rows


def copying(path: Path, whole: Path, rows: Iterator[Row]) -> Iterator[Row]:
    """The whole file arrives some time after its rows began to be read."""
    timer = threading.Timer(0.3, whole.replace, [path])
    timer.start()
    yield from rows
    timer.join()


@given(
    st.lists(
        st.recursive(st.none() | st.integers() | st.text(), lambda s: st.lists(s) | st.dictionaries(st.text(), s))
    ),
    st.integers(1, 9),
    st.sampled_from([None, 1]),
)
@settings(max_examples=40, deadline=None)
def test_a_list_is_read_in_pieces(values: list[Any], piece: int, indent: int | None) -> None:
    assert list(list_items(io.StringIO(json.dumps(values, indent=indent)), piece)) == values


@pytest.mark.parametrize("name", KINDS)
@given(start=st.integers(0, 30), step=st.integers(1, 7))
@settings(max_examples=25)
def test_rows_are_read_from_any_on(shard_files: dict[str, Path], name: str, start: int, step: int) -> None:
    shard = local_files(str(shard_files[name]))[0]
    everything = list(shard.read())
    assert len(everything) == 25
    assert list(shard.read(start, step)) == everything[start::step]


@pytest.fixture(scope="module")
def shard_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("shards")
    files = {name: write(folder / name, [{"n": f"{k}"} for k in range(25)]) for name in KINDS}
    parquet.write_table(parquet.read_table(files["a.parquet"]), files["a.parquet"], row_group_size=7)
    return files


def test_a_mark_at_the_beginning_is_no_part_of_the_first_column(tmp_path: Path) -> None:
    path = tmp_path / "excel.csv"
    path.write_bytes(b"\xef\xbb\xbfprompt,chosen,rejected\np,a,b\n")
    assert rows_of(path)[0].values == {"prompt": "p", "chosen": "a", "rejected": "b"}


def test_nothing_there(tmp_path: Path) -> None:
    # Other settings than data.path name files too, so the sentence names none.
    with pytest.raises(UserError, match=r"^no file or folder 'nowhere\.jsonl': (?!.*data\.).*id on the Hub\.$"):
        local_files("nowhere.jsonl")
    with pytest.raises(UserError, match="holds no data file"):
        local_files(str(tmp_path))


@pytest.mark.parametrize(
    ("path", "local"),
    [("a/b.jsonl", True), ("./data", True), ("../x", True), ("/abs", True), ("owner/name", False), ("~/x.csv", True)],
)
def test_names_of_files_and_of_hub_data_sets(path: str, local: bool) -> None:
    assert is_local(path) == local
