"""Files of results: read as they were written, gone on with after a kill, refused where they are something else."""

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pytest

from spl.results import Appender, ResultsError, find, header, read, write

SETTINGS = {"num_samples": 2, "models": {"dpo": "a"}}


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
