"""Inputs that fuzzing found to end in anything but a sentence, each by the name of what was wrong."""

import gzip
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet as parquet
import pytest

from spl.data.formats import parse_row
from spl.data.multiple_choice import parse_choices
from spl.data.source import Source
from spl.types import UserError

ROW = {"prompt": "Tea?", "chosen": "Yes.", "rejected": "No."}


def refused(path: Path, content: bytes) -> str:
    """The sentence that a file's first broken row, or the file, ends in."""
    path.write_bytes(content)
    with pytest.raises(UserError) as raised:
        for _, row in Source(str(path)).rows():
            if not isinstance(row, dict):
                raise row
    assert "\n" not in str(raised.value) and str(path) in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
@pytest.mark.parametrize("content", ['{"a": ' + "9" * 5000 + "}", '{"a": ' + "[" * 5000], ids=["digits", "depth"])
def test_json_that_python_will_not_decode(tmp_path: Path, name: str, content: str) -> None:
    """ValueError of int(), and RecursionError: neither is a JSONDecodeError."""
    refused(tmp_path / name, (f"[{content}" if name == "a.json" else content).encode())


@pytest.mark.parametrize("text", ["9" * 5000, "[" * 5000], ids=["digits", "depth"])
def test_a_csv_value_that_python_will_not_decode(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.csv").write_text(f"prompt,responses,shares\np,{text},1\n")
    ((_, row),) = Source(str(tmp_path / "a.csv")).rows()
    assert row["responses"] == text
    with pytest.raises(UserError, match="responses must be a list of two or more replies"):
        parse_row(row)


def test_a_gzip_whose_content_changed(tmp_path: Path) -> None:
    """zlib.error is no OSError."""
    content = bytearray(gzip.compress(b'{"prompt": "p", "chosen": "a", "rejected": "b"}\n' * 9))
    content[12:20] = b"\xff" * 8
    refused(tmp_path / "a.jsonl.gz", bytes(content))


def test_a_parquet_file_that_is_broken_is_not_tried_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Arrow says so by an OSError, as a file server does of a fault that passes."""
    whole = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist([ROW]), whole)
    content = bytearray(whole.getvalue())
    length = int.from_bytes(content[-8:-4], "little")
    content[-8 - length : -8] = b"\xff" * length
    refused(tmp_path / "a.parquet", bytes(content))
    assert "trying again" not in caplog.text


@pytest.mark.parametrize("alpha", [1e308, 1e39, 5e-324, 1e-39])
def test_an_alpha_that_float32_makes_infinite_or_nothing(alpha: float) -> None:
    with pytest.raises(UserError, match=r"alpha must be a number that float32 can hold, 1\.2e-38 to 3\.4e38, but is"):
        parse_row(ROW | {"alpha": alpha})


def nested(depth: int) -> Any:
    return "x" * 60 if not depth else [nested(depth - 1)] * 6


@pytest.mark.parametrize(
    "row",
    [ROW | {"chosen": nested(5)}, {f"column {k}": 1 for k in range(5000)}, {("x" * 60, k): 1 for k in range(99)}],
    ids=["lists in lists", "columns", "long columns"],
)
def test_a_complaint_stays_a_sentence(row: Mapping[str, Any]) -> None:
    with pytest.raises(UserError) as raised:
        parse_row(row)
    assert len(str(raised.value)) < 2000


@pytest.mark.parametrize(
    ("change", "complaint"),
    [({"answer": "9" * 5000}, "answer must be the index"), ({"choices": "[" * 5000}, "choices must be a list")],
    ids=["digits", "depth"],
)
def test_a_question_that_python_will_not_decode(change: dict[str, str], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint) as raised:
        parse_choices({"question": "2 + 2?", "choices": ["3", "4"], "answer": "B"} | change)
    assert len(str(raised.value)) < 500
