"""What `--resume` takes for the same run, and what it leaves alone."""

import fcntl
from pathlib import Path

import pytest
import yaml
from lightning import Trainer

from spl.callbacks.checkpoints import Checkpoints
from spl.callbacks.run_logs import rewind
from spl.checkpoints import write
from spl.cli import main
from spl.resume import changes
from spl.types import UserError

TINY = ["--config", str(Path(__file__).parents[1] / "configs/experiment/tiny.yaml")]
RUN = {"model": {"lr": 0.1, "betas": [0.9, 0.99]}, "data": {"mixture": {"a": 1.0, "b": 2.0}}, "trainer": {"devices": 1}}


def kept(folder: Path, settings: object = RUN) -> Path:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.mark.parametrize(
    ("group", "name", "value"),
    [
        ("data", "mixture", None),
        ("data", "mixture", {"a": 1.0}),
        ("data", "mixture", {"a": 1.0, "c": 2.0}),
        ("trainer", "devices", {"class_path": "x"}),
        ("model", "betas", [0.9, 0.9]),
    ],
)
def test_a_setting_that_holds_several_values_is_compared_in_whole(
    tmp_path: Path, group: str, name: str, value: object
) -> None:
    now = RUN | {group: {**RUN[group], name: value}}  # type: ignore[dict-item]
    assert changes(kept(tmp_path), RUN, allowed=False) == []
    with pytest.raises(UserError, match=f"{group}.{name}: .* -> "):
        changes(kept(tmp_path), now, allowed=False)
    with pytest.raises(UserError, match=f"{group}.{name}: .* -> "):
        changes(kept(tmp_path, now), RUN, allowed=False)


@pytest.mark.parametrize("content", [b"", b"- a", b"model: {", b"\xff\xfe", b"architecture: llama"])
def test_a_config_of_something_else_is_no_run(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(UserError, match=r"config\.yaml holds no settings of a run"):
        changes(tmp_path / "config.yaml", RUN, allowed=True)


def test_only_the_logs_of_a_run_are_cut(tmp_path: Path) -> None:
    for name in ("pairs.jsonl", "samples.jsonl", "quarantine.jsonl", "metrics.csv"):
        (tmp_path / name).write_text("one\ntwo\n")
    rewind(tmp_path, {"samples.jsonl": 4})
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "pairs.jsonl": "one\ntwo\n",
        "samples.jsonl": "one\n",
    }


def said(args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as raised:
        main(["fit", *TINY, *args])
    assert raised.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("name", ["metrics.csv", "samples.jsonl", "summary.json"])
def test_a_folder_of_something_else_is_left_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (tmp_path / name).write_text("mine")
    text = said(["--output", str(tmp_path), "--resume"], capsys)
    assert f"is not the folder of a run: it holds {name}, but no config.yaml" in text
    assert (tmp_path / name).read_text() == "mine"


def test_an_output_that_is_a_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").touch()
    text = said(["--output", str(tmp_path / "run")], capsys)
    assert text == f"error: {tmp_path}/run/log.txt cannot be written: File exists. Give another --output.\n"


def test_two_runs_do_not_share_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (tmp_path / "log.txt").open("w") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        text = said(["--output", str(tmp_path), "--resume"], capsys)
    assert f"another run is at work in {tmp_path}: wait for its end" in text


def test_pruning_leaves_what_a_user_has_put_beside(tmp_path: Path) -> None:
    trainer = Trainer(default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_checkpointing=False)
    names = ["step=2.ckpt", "step=10.ckpt", "step=9.ckpt", "step=10-best.ckpt", "step=.ckpt"]
    for name in names:
        write({}, tmp_path / "checkpoints" / name)
    Checkpoints(keep=2)._prune(trainer)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {*names} - {"step=2.ckpt"}
