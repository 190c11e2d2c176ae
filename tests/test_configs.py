"""Every YAML under configs/ opens with the command that runs it, is short, and parses."""

import re
from pathlib import Path

import pytest
import yaml

from spl.cli import main

ROOT = Path(__file__).parents[1] / "configs"
CONFIGS = sorted(ROOT.rglob("*.yaml"))
EXPERIMENTS = [path for path in CONFIGS if path.parent.name == "experiment"]
PAPERS = [path for path in CONFIGS if path.parent.name == "paper"]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_there_are_experiments() -> None:
    assert {path.stem for path in EXPERIMENTS} >= {"tiny", "smollm2_hh"}


@pytest.mark.parametrize("path", CONFIGS, ids=name)
def test_a_config_opens_with_its_command(path: Path) -> None:
    first = path.read_text().splitlines()[0]
    group = path.parent.name
    expected = {
        "experiment": "# spl fit --config",
        "paper": "# spl paper --config",
        "callbacks": "# spl fit --config configs/experiment/tiny.yaml --config",
    }.get(group, f"# --{group}")
    assert first.startswith(f"{expected} configs/{name(path)}")


@pytest.mark.parametrize("path", PAPERS, ids=name)
def test_a_config_of_the_paper_parses(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main(["paper", "--config", str(path), "--output", "runs", "--print_config"])
    assert raised.value.code == 0
    parsed = yaml.safe_load(capsys.readouterr().out)
    for key, value in yaml.safe_load(path.read_text()).items():
        assert {k: parsed[key][k] for k in value} == value if isinstance(value, dict) else parsed[key] == value


@pytest.mark.parametrize("path", [path for path in CONFIGS if path not in PAPERS], ids=name)
def test_a_config_parses(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["fit", "--config", str(path if path in EXPERIMENTS else ROOT / "experiment/tiny.yaml")]
    if path.stem in ("sft", "reward"):  # a model of another task than the experiment's
        args = ["fit", "--task", path.stem]
    overlay = path.parent.name == "callbacks"
    if path not in EXPERIMENTS:
        args += ["--config" if overlay else f"--{path.parent.name}", str(path)]
    with pytest.raises(SystemExit) as raised:
        main([*args, "--print_config"])
    assert raised.value.code == 0
    parsed = yaml.safe_load(capsys.readouterr().out)
    chosen = yaml.safe_load(path.read_text())
    if overlay:
        names = [entry if isinstance(entry, str) else entry["class_path"] for entry in chosen["trainer"]["callbacks+"]]
        assert [entry["class_path"] for entry in parsed["trainer"]["callbacks"]] == names
        return
    if path in EXPERIMENTS:
        assert parsed["task"] == chosen.pop("task", "preference")
    for group, values in chosen.items() if path in EXPERIMENTS else [(path.parent.name, chosen)]:
        for key, value in values.items():
            assert parsed[group][key] == value


SIZES = [
    (path, size, options)
    for path in EXPERIMENTS
    for size, options in re.findall(r"^# (1B|135M): (.*)$", path.read_text(), re.M)
]


def test_the_papers_recipes_have_their_sizes() -> None:
    recipes = {"hh_chat", "hh_reward", "zephyr_sft", "zephyr"}
    assert {(path.stem, size) for path, size, _ in SIZES} == {(r, size) for r in recipes for size in ("1B", "135M")}


@pytest.mark.parametrize(("path", "options"), [(path, options) for path, _, options in SIZES], ids=str)
def test_a_size_parses(
    path: Path, options: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With all else of the recipe as it was."""
    monkeypatch.chdir(ROOT.parent)
    with pytest.raises(SystemExit) as raised:
        main(["fit", "--config", str(path), *options.split(), "--print_config"])
    assert raised.value.code == 0
    parsed, chosen = yaml.safe_load(capsys.readouterr().out), yaml.safe_load(path.read_text())
    assert parsed["model"]["model"] == options.split()[1] != chosen["model"]["model"]
    steps = {"max_steps", "max_epochs", "accumulate_grad_batches"} & chosen["trainer"].keys()
    assert {name: parsed["trainer"][name] for name in steps} == {name: chosen["trainer"][name] for name in steps}
    assert parsed["data"]["path"] == chosen["data"]["path"]
