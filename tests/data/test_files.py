"""Local files of every kind hold the same rows; broken ones are named."""

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet as parquet
import pytest

from spl.data.files import is_local, local_files, read_rows
from spl.data.formats import parse_row
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


KINDS = ["a.jsonl", "a.jsonl.gz", "a.json", "a.json.gz", "a.csv", "a.csv.gz", "a.parquet"]


@pytest.mark.parametrize("name", KINDS)
def test_a_kind_of_file_holds_its_rows(tmp_path: Path, name: str) -> None:
    found = list(read_rows([write(tmp_path / name, ROWS)]))
    assert [row for _, row in found] == ROWS
    assert [where for where, _ in found] == [f"{tmp_path / name}, row 1", f"{tmp_path / name}, row 2"]


@pytest.mark.parametrize("name", [k for k in KINDS if "parquet" not in k])
def test_lists_survive(tmp_path: Path, name: str) -> None:
    found = [parse_row(row) for _, row in read_rows([write(tmp_path / name, LISTS)])]
    assert found == [parse_row(row) for row in LISTS]


def test_a_folder_is_read_in_order_of_name(tmp_path: Path) -> None:
    write(tmp_path / "2.jsonl", ROWS[1:])
    write(tmp_path / "1.parquet", ROWS[:1])
    (tmp_path / "README.md").write_text("not data")
    assert [row["chosen"] for _, row in read_rows(local_files(str(tmp_path)))] == ['Fine, "thanks".', "yes"]


def test_blank_lines_are_passed_over_but_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n\n{"a": 2}\n')
    assert list(read_rows([path])) == [(f"{path}, row 1", {"a": 1}), (f"{path}, row 3", {"a": 2})]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": \n', "row 2: expected one JSON object a line"),
        ("a.jsonl", b'{"a": 1}\n[1, 2]\n', r"row 2: expected a JSON object, but got \[1, 2\]"),
        ("a.json", b'[{"a": 1}, 5]', "row 2: expected a JSON object, but got 5"),
        ("a.json", b'[{"a": 1}', "expected JSON lines or one list of objects"),
        ("a.csv", b"a,b\n1,2,3\n", "row 1: more values than the header has columns"),
        ("a.jsonl.gz", b"not gzip", "cannot be read: Not a gzipped file"),
        ("a.jsonl", b'{"a": "\xff"}', "cannot be read: .*utf-8"),
        ("a.parquet", b"not parquet at all", "cannot be read: .*[Pp]arquet"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, name: str, content: bytes, sentence: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=sentence) as raised:
        list(read_rows([path]))
    assert str(path) in str(raised.value)


def test_a_truncated_gzip_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl.gz", ROWS * 50)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match="cannot be read: Compressed file ended"):
        list(read_rows([path]))


def test_a_mark_at_the_beginning_is_no_part_of_the_first_column(tmp_path: Path) -> None:
    path = tmp_path / "excel.csv"
    path.write_bytes(b"\xef\xbb\xbfprompt,chosen,rejected\np,a,b\n")
    assert next(read_rows([path]))[1] == {"prompt": "p", "chosen": "a", "rejected": "b"}


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
