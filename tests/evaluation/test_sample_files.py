"""Files of samples are put together by policy and way of decoding, and refused where they do not fit together."""

from pathlib import Path
from typing import Any

import pytest

from spl.evaluation.sample_files import read_samples
from spl.results import header, read, write
from spl.types import UserError


def samples(path: Path, items: dict[str, list[int]], **more: Any) -> Path:
    """A file of samples with the given indices for each item."""
    first = header("sample", more.pop("settings", {}), **{"policy": "dpo", "setting": "t 1", "train_seed": None} | more)
    prompts = [
        {"kind": "prompt", "item": item, "messages": [{"role": "user", "content": f"Say {item}"}]} for item in items
    ]
    drawn = [
        {
            "kind": "sample",
            "item": item,
            "index": k,
            "text": f"{item} {k}",
            "num_tokens": 3,
            "finish": "stop",
            "logp": -k,
        }
        for item, indices in items.items()
        for k in indices
    ]
    write(path, first, [*prompts, *drawn])
    return path


def test_the_parts_of_a_policy_are_put_together(tmp_path: Path) -> None:
    samples(tmp_path / "a.jsonl", {"x": [1, 0]})
    samples(tmp_path / "b.jsonl", {"x": [2], "y": [0, 1]})
    samples(tmp_path / "c.jsonl", {"x": [0]}, policy="spl", train_seed=1)
    dpo, spl = read_samples([tmp_path])
    assert (dpo.policy, spl.policy, spl.train_seed) == ("dpo", "spl", 1)
    assert {item: len(replies) for item, replies in dpo.replies.items()} == {"x": 3, "y": 2}
    assert [reply.text for reply in dpo.replies["x"]] == ["x 0", "x 1", "x 2"]
    assert dpo.replies["x"][1] == ("x 1", 3, "stop", -1, None, None)
    assert list(dpo.prompts) == ["x", "y"]


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    a, b = samples(tmp_path / "a.jsonl", {"x": [0]}), samples(tmp_path / "b.jsonl", {"x": [0]})
    with pytest.raises(UserError, match="sample 0 of prompt 'x'"):
        read_samples([a, b])
    with pytest.raises(UserError, match="no sample of prompt 'y'"):
        read_samples([samples(tmp_path / "c.jsonl", {"x": [0], "y": []})])
    write(tmp_path / "d.jsonl", header("opinions", {}), ())
    with pytest.raises(UserError, match="results of opinions"):
        read_samples([tmp_path / "d.jsonl"])


def test_samples_of_two_models_are_not_taken_for_those_of_one(tmp_path: Path) -> None:
    samples(tmp_path / "a.jsonl", {"x": [0]}, fingerprint="1", settings={"max_new_tokens": 8, "shard": "1/2"})
    for name, settings, fingerprint in (
        ("model", {"max_new_tokens": 8}, "2"),
        ("max_new_tokens", {"max_new_tokens": 9}, "1"),
        ("system", {"max_new_tokens": 8, "system": "Be kind."}, None),
    ):
        samples(tmp_path / "b.jsonl", {"y": [0]}, fingerprint=fingerprint, settings=settings)
        with pytest.raises(UserError, match=rf"both of 'dpo, t 1', but {name} differs: draw with a --policy"):
            read_samples([tmp_path])
    samples(tmp_path / "b.jsonl", {"y": [0]}, fingerprint="1", settings={"max_new_tokens": 8, "shard": "2/2"})
    assert read_samples([tmp_path])[0].prompts.keys() == {"x", "y"}


def test_files_of_other_tools_that_lack_something_are_named(tmp_path: Path) -> None:
    found = read(samples(tmp_path / "a.jsonl", {"x": [0]}))
    for first, records, said in (
        ({**found.header, "program": None}, found.records, "names no program"),
        ({**found.header, "num_items": 1, "settings": {}}, found.records, "is no number"),
        (
            {**found.header, "num_items": 1, "settings": {"num_samples": 1}},
            [found.records[0], {k: v for k, v in found.records[1].items() if k != "item"}],
            "as 'item'|holds all replies to 0 of 1",
        ),
    ):
        write(tmp_path / "b.jsonl", first, records)
        with pytest.raises(UserError, match=rf"b\.jsonl.*({said})"):
            read_samples([tmp_path / "b.jsonl"])


def test_what_a_killed_run_has_left_is_not_measured(tmp_path: Path) -> None:
    path, more = tmp_path / "a.jsonl", {"settings": {"num_samples": 2}, "num_items": 2}
    for items in ({"x": [0, 1]}, {"x": [0, 1], "y": [0]}):
        found = read(samples(path, items))
        write(path, found.header | more, found.records)
        with pytest.raises(UserError, match=r"a\.jsonl holds all replies to 1 of 2 prompts"):
            read_samples([path])
    found = read(samples(path, {"x": [0, 1]}))
    write(path, found.header | more, [*found.records, {"kind": "note", "item": "y", "text": "y is left out"}])
    assert read_samples([path])[0].left_out == {"y"}


def test_results_of_other_programs_in_a_folder_are_passed_over(tmp_path: Path) -> None:
    path = samples(tmp_path / "a.jsonl", {"x": [0]})
    write(tmp_path / "found.jsonl", header("diversity-quality", {}), ())
    [file] = read_samples([tmp_path])
    assert file.paths == [path]
    path.unlink()
    with pytest.raises(UserError, match=r"no samples in .*: expected files that spl sample wrote"):
        read_samples([tmp_path])


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        ("header", "policy", None),
        ("prompt", "messages", "Say x"),
        ("prompt", "messages", [{"role": "user"}]),
        ("sample", "text", None),
        ("sample", "index", "first"),
        ("sample", "num_tokens", "3"),
        ("sample", "finish", None),
        ("sample", "entropy", "2"),
        ("sample", "token_ids", "1 2"),
        ("sample", "token_ids", [1, "2"]),
    ],
)
def test_a_record_of_another_form_is_named(tmp_path: Path, kind: str, name: str, value: Any) -> None:
    found = read(samples(tmp_path / "a.jsonl", {"x": [0]}))
    for record in (found.header, *found.records):
        if record["kind"] == kind:
            record[name] = value
    write(tmp_path / "b.jsonl", found.header, found.records)
    with pytest.raises(UserError, match=rf"b\.jsonl: a {kind} has .* as '{name}', which is not what spl sample"):
        read_samples([tmp_path / "b.jsonl"])
