"""Commands as processes: what is said of one that fails, what is skipped, and what each has of its own."""

import os
from pathlib import Path

import pytest

from spl import runs
from spl.runs import FINISHED, Run, _environments, arguments, execute, file_name
from spl.types import UserError


def run(folder: Path, *args: str, result: str = "result", always: bool = False) -> Run:
    return Run(args[0], args, folder / f"{args[0]}.txt", folder / result, always)


def test_one_that_fails_says_why_and_stops_no_other(tmp_path: Path) -> None:
    outcomes = execute([run(tmp_path, "evaluate"), run(tmp_path, "--version")], jobs=2)
    assert [outcome.state for outcome in outcomes] == ["failed", "finished"]
    assert outcomes[0].said.startswith("spl evaluate: expected one of diversity-quality")
    said = (tmp_path / "--version.txt").read_text()
    assert said.startswith("$ spl --version  # files ") and "\nspl " in said and said.endswith(FINISHED)


def test_what_an_earlier_try_said_is_not_this_ones_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = run(tmp_path, "evaluate")
    assert execute([command])[0].said.startswith("spl evaluate: expected one of")
    monkeypatch.setattr(runs.sys, "executable", "/bin/false")
    assert execute([command])[0].said == "it said nothing"
    assert "expected one of" in command.log.read_text()


def test_what_has_finished_is_skipped_unless_it_is_to_run_always(tmp_path: Path) -> None:
    command = run(tmp_path, "--version")
    (tmp_path / "result").write_text("left by one that was killed")
    assert [outcome.state for outcome in execute([command])] == ["finished"]
    assert [outcome.state for outcome in execute([command])] == ["skipped"]
    assert not run(tmp_path, "--version", always=True).is_finished()
    (tmp_path / "result").unlink()
    assert not command.is_finished()


def test_a_result_of_another_command_is_refused_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "result").touch()
    execute([run(tmp_path, "--version")])
    other = Run("--version", ("--help",), tmp_path / "--version.txt", tmp_path / "result")
    with pytest.raises(UserError, match="was made by another command, other configs or other data"):
        execute([run(tmp_path, "--help", result="new"), other])
    assert not (tmp_path / "--help.txt").exists()


@pytest.mark.parametrize("place", ["an argument", "a list", "a config", "a config in a config"])
def test_a_files_content_is_part_of_the_command_and_a_results_is_not(tmp_path: Path, place: str) -> None:
    given, result, config = tmp_path / "rows.jsonl.gz", tmp_path / "result.jsonl", tmp_path / "config.yaml"
    given.write_text("a: 1")
    config.write_text(f"data: {{path: [{given}, 3]}}\nresult: {result}\nconfig: {config}\n")
    (tmp_path / "outer.yml").write_text(f"config: {config}")
    value = {"a list": f'["{given}"]', "a config": str(config), "a config in a config": str(tmp_path / "outer.yml")}
    args = ("fit", "--data", value.get(place, str(given)), "--output", str(result))
    command = Run("fit", args, tmp_path / "log.txt", result)
    before = command.first_line
    result.write_text("made")
    assert command.first_line == before
    given.write_text("a: 2")
    os.utime(given, ns=(0, 0))  # some file systems keep no time this fine
    assert command.first_line != before and command.first_line.split("#")[0] == before.split("#")[0]


def test_each_run_at_a_time_has_a_gpu_or_its_share_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 9)
    found = list(_environments(3))
    assert [environment["CUDA_VISIBLE_DEVICES"] for environment in found] == ["2", "5", "2"]
    assert {environment["OMP_NUM_THREADS"] for environment in found} == {"3"}
    assert list(_environments(1)) == [{}]


def test_settings_as_options_and_labels_as_names() -> None:
    settings = {"a.b": None, "c": True, "d": 1e-4, "e": "text", "f": [1, "x"], "g": {"h": 2}}
    expected = '--a.b null --c true --d 0.0001 --e text --f [1, "x"] --g {"h": 2}'
    assert " ".join(arguments(settings)) == expected
    assert file_name("spl 1.2", "", "model.lr=1e-4/x", "seed=0") == "spl-1.2_model.lr=1e-4-x_seed=0"
