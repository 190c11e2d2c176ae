"""Files of results: read as they were written, gone on with after a kill, refused where they are something else."""

import gzip
import hashlib
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from spl.results import Appender, ResultsError, find, header, is_results, read, write

SETTINGS = {"num_samples": 2, "models": {"dpo": "a"}}
APPEND = """
import json, sys, pathlib
from spl.results import Appender, header
file = Appender(pathlib.Path(sys.argv[1]), header("sample", json.loads(sys.argv[2])))
file.add([{"kind": "note", "text": "second"}])
"""


def test_what_is_written_is_read(tmp_path: Path) -> None:
    data = tmp_path / "data.txt"
    data.write_text("abc")
    first = header("calibration", SETTINGS, [data], seed=3, policy="dpo")
    records = [
        {"kind": "item", "values": {"a": np.float64(0.5), "b": math.nan, "c": math.inf, "d": None}},
        {"kind": "note", "text": "naïve\n\u2028two lines"},
    ]
    write(tmp_path / "results.jsonl", first, records)
    found = read(tmp_path / "results.jsonl")
    assert found.header["inputs"] == {str(data): hashlib.sha256(b"abc").hexdigest()}
    assert (found.header["program"], found.header["seed"], found.header["policy"]) == ("calibration", 3, "dpo")
    assert found.of("item") == [{"kind": "item", "values": {"a": 0.5, "b": None, "c": None, "d": None}}]
    assert found.of("note")[0]["text"] == "naïve\n\u2028two lines"
    assert len((tmp_path / "results.jsonl").read_bytes().split(b"\n")) == 4  # three records, each on its line


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "no results file"),
        ('{"kind": "item"}\n', "no header"),
        ('{"kind": "header", "form": 99}\n', "form 99"),
        ('{"kind": "header", "form": 1}\n{"kind": 3}\n', "line 2"),
        ('{"kind": "header", "form": 1}\nnot json\n', "line 2"),
    ],
)
def test_another_file_is_refused(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text(content)
    with pytest.raises(ResultsError, match=said):
        read(path)


def test_results_are_found_in_folders(tmp_path: Path) -> None:
    write(tmp_path / "a" / "one.jsonl", header("sample", {}), ())
    (tmp_path / "a" / "rows.jsonl").write_text('{"prompt": "x"}\n')
    assert find([tmp_path]) == [tmp_path / "a" / "one.jsonl"]
    for missing in (tmp_path / "b", tmp_path / "a" / "rows.jsonl" / "c"):
        with pytest.raises(ResultsError, match="no results in"):
            find([missing])


@pytest.mark.parametrize("torn", range(1, 40, 6))
def test_a_torn_line_is_dropped_and_the_rest_gone_on_with(tmp_path: Path, torn: int) -> None:
    path, records = tmp_path / "samples.jsonl", [{"kind": "sample", "item": str(k), "text": "é"} for k in range(3)]
    Appender(path, header("sample", SETTINGS)).add(records)
    whole = path.read_bytes()
    path.write_bytes(whole[:-torn])
    again = Appender(path, header("sample", SETTINGS))
    assert again.records == records[: len(again.records)]
    assert len(again.records) < 3
    again.add(records[len(again.records) :])
    assert path.read_bytes() == whole


def test_a_file_of_other_settings_is_not_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    Appender(path, header("sample", SETTINGS)).add([{"kind": "note", "text": "x"}])
    before = path.read_bytes()
    with pytest.raises(ResultsError, match=r"settings.models.dpo 'a', not 'b'"):
        Appender(path, header("sample", SETTINGS | {"models": {"dpo": "b"}}))
    assert path.read_bytes() == before


def test_a_header_that_was_torn_is_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    path.write_text(json.dumps(header("sample", SETTINGS))[:20])
    assert Appender(path, header("sample", SETTINGS)).records == []
    assert read(path).header["settings"] == SETTINGS


def test_two_programs_do_not_write_to_one_file(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    first = Appender(path, header("sample", SETTINGS))
    again = [sys.executable, "-c", APPEND, str(path), json.dumps(SETTINGS)]
    refused = subprocess.run(again, capture_output=True, text=True, check=False)
    assert "another program is writing" in refused.stderr
    first.add([{"kind": "note", "text": "first"}])
    first.close()
    subprocess.run(again, check=True)
    assert [record["text"] for record in read(path).of("note")] == ["first", "second"]
    shared = [Appender(tmp_path / "cache.jsonl", header("judge", {}), alone=False) for _ in range(2)]
    for one in shared:
        one.add([{"kind": "note", "text": "x"}])
    assert len(read(tmp_path / "cache.jsonl").records) == 2


@pytest.mark.parametrize("content", [b"[1, 2, 3]", b"my notes\nof the day", gzip.compress(b"{}\n")])
def test_a_file_of_something_else_is_left_as_it_is(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "notes.json"
    path.write_bytes(content)
    with pytest.raises(ResultsError, match=r"notes\.json"):
        Appender(path, header("sample", SETTINGS))
    assert path.read_bytes() == content


def test_gzipped_by_name_and_by_content(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    write(path, header("sample", SETTINGS), [{"kind": "note", "text": "x"}])
    assert gzip.decompress(path.read_bytes()).startswith(b'{"kind": "header"')
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.decompress(path.read_bytes()))  # unpacked, and not renamed
    assert [read(file).of("note")[0]["text"] for file in find([tmp_path])] == ["x", "x"]
    with pytest.raises(ResultsError, match=r"name it without \.gz"):
        Appender(path, header("sample", SETTINGS))
    packed = path.read_bytes()
    path.write_bytes(packed[:20] + bytes(len(packed) - 20))
    assert not is_results(path)
    with pytest.raises(ResultsError, match="cannot be read"):
        read(path)


def test_half_of_a_surrogate_pair_loses_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    appender = Appender(path, header("sample", SETTINGS))
    appender.add([{"kind": "note", "text": "a\ud83d b \ud83d\ude00 \U0001f600 é"}])
    expected = "a\ufffd b \U0001f600 \U0001f600 é"
    assert read(path).of("note")[0]["text"] == expected
    # Other tools escape what is not ASCII.
    note = {"kind": "note", "text": "a\ud83d b \U0001f600 \U0001f600 é"}
    path.write_text(f"{json.dumps(header('sample', SETTINGS))}\n{json.dumps(note)}\n")
    assert read(path).of("note")[0]["text"] == expected
