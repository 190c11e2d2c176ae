"""Configs as people and their editors write them: read, or refused in one sentence."""

from pathlib import Path

import pytest

from spl.cli import main
from spl.settings import MOST_VALUES, load_settings, setting_ahead

TINY = ["--config", str(Path(__file__).parents[1] / "configs/experiment/tiny.yaml")]
LAUGHS = "x0: &x0 [ha, ha, ha, ha, ha, ha, ha, ha, ha, ha]\n" + "".join(
    f"x{i}: &x{i} [{', '.join([f'*x{i - 1}'] * 10)}]\n" for i in range(1, 10)
)


def said(args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as raised:
        main(["fit", *TINY, *args])
    assert raised.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"model: {lr: \xff\xfe}", "case.yaml is no UTF-8 text: invalid start byte at byte 12."),
        ("model: {lr: 1}".encode("utf-16"), "case.yaml is no UTF-8 text"),
        (b"model: {lora_rank: " + b"9" * 5000 + b"}", "Exceeds the limit"),
        (LAUGHS.encode(), f"with its aliases written out it has more than {MOST_VALUES:,} values"),
        (b"model: &a {lr: *a}", f"more than {MOST_VALUES:,} values"),
        (b"model: {lora_targets: &a [*a]}", f"more than {MOST_VALUES:,} values"),
        (b"model: 5", "model must be a group of settings, but is 5."),
        (b"data: [1]", "data must be a group of settings, but is [1]."),
        (b"model: null", "model must be a group of settings, but is None."),
        (b"trainer: true", "trainer must be a group of settings, but is True."),
        (b"model: {lr: }", "model.lr is null, but needs a value: leave it out for its default."),
        (b"trainer: {accumulate_grad_batches: 0}", "trainer.accumulate_grad_batches must be 1 or more, but is 0."),
        (b"data: {batch_size: null}", "data.batch_size is null, but needs a value"),
        (b"samples: {max_new_tokens: null}", "samples.max_new_tokens is null, but needs a value"),
        (b"model: {trust_remote_code: true}", "model.trust_remote_code must be str or null, but is True"),
        (b"model: {lr: .inf}", "model.lr must be a number above 0, but is inf."),
        (b"model: {weight_decay: .nan}", "model.weight_decay must be a number, 0 or more, but is nan."),
        (b"model: !!python/object/apply:os.mkdir [was-here]", "could not determine a constructor"),
        (b"trainer: {logger: {class_path: os.mkdir, init_args: {path: was-here}}}", "trainer.logger"),
        (b"[" * 3000, "nesting depth"),
        (b"", "Unexpected config"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_config_that_cannot_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], content: bytes, sentence: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("case.yaml").write_bytes(content)
    assert sentence in said(["--config", "case.yaml"], capsys)
    assert not Path("was-here").exists()


def test_a_file_that_is_no_config_is_not_told_in_full(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "secret.txt").write_text("a line of something else\n" * 1000)
    assert len(said(["--config", str(tmp_path / "secret.txt")], capsys)) < 700


@pytest.mark.parametrize(
    ("option", "value", "sentence"),
    [
        ("strategy", "nonsense", "nonsense"),
        ("val_check_interval", "2.5", "val_check_interval"),
        ("profiler", "nonsense", "`profiler`"),
        ("devices", "-7", "should be an int > 0"),
        ("logger", "{class_path: WandbLogger, init_args: {project: p}}", "wandb"),
    ],
)
def test_a_trainer_that_cannot_be_built(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, value: str, sentence: str
) -> None:
    assert sentence in said([f"--trainer.{option}", value, "--output", str(tmp_path)], capsys)


def test_aliases_are_read_and_numbers_stay_numbers() -> None:
    text = "a: &a {lr: 1e-3, name: x}\nb: {<<: *a, name: y}\nc: *a\n"
    expected = {"a": {"lr": 1e-3, "name": "x"}, "b": {"lr": 1e-3, "name": "y"}, "c": {"lr": 1e-3, "name": "x"}}
    assert load_settings(text) == expected
    assert len(load_settings(f"prompts: [{'why,' * 9_000}]")["prompts"]) == 9_000


def test_a_setting_that_the_parser_depends_on_is_read_ahead_of_it(tmp_path: Path) -> None:
    """The last of the command line and the files it names; what cannot be read is left to the parser."""
    (tmp_path / "a.yaml").write_text("task: sft\nmodel: {lr: 1}\n")
    (tmp_path / "b.yaml").write_text("model: {task: other}\n")
    (tmp_path / "bad.yaml").write_text("task: [")
    configs = [f"--config={tmp_path / 'a.yaml'}", "--config", str(tmp_path / "b.yaml")]
    assert setting_ahead(["fit", *configs], "task") == "sft"
    assert setting_ahead(["fit", *configs, "--task", "reward"], "task") == "reward"
    assert setting_ahead(["fit", "--task=reward", *configs], "task") == "sft"
    assert setting_ahead(["fit", "--config", str(tmp_path / "bad.yaml"), "--config", "nowhere"], "task") is None
    assert setting_ahead(["fit", "--task"], "task") == ""
