"""Every YAML under configs/ opens with the command that runs it, is short, and parses."""

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
    for group, values in chosen.items() if path in EXPERIMENTS else [(path.parent.name, chosen)]:
        for key, value in values.items():
            assert parsed[group][key] == value
