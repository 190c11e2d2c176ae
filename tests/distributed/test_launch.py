"""How a run of several processes is started: by Lightning itself, by torchrun, by srun."""

from pathlib import Path

import pytest

from spl.cli import main

TINY = str(Path(__file__).parents[2] / "configs" / "experiment" / "tiny.yaml")


@pytest.mark.parametrize(
    "given",
    [
        {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"},
        {"SLURM_NTASKS": "2", "SLURM_JOB_NAME": "train", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
    ],
    ids=["torchrun", "srun"],
)
def test_processes_from_outside_need_a_folder_that_all_know(
    given: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as raised:
        main(["fit", "--config", TINY])
    assert raised.value.code == 2
    assert capsys.readouterr().err.endswith("share one folder, so it needs a name: give --output DIR.\n")


def test_another_kind_of_sharding_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main(["fit", "--config", TINY, "--output", str(tmp_path / "run"), "--trainer.strategy", "fsdp"])
    assert raised.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
