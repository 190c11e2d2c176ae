"""The paper's steps in a row with the random model: that they fit together, are skipped when done, and end in a report.

Steps are commands that run in processes of their own; here the same commands run in this one, which has the libraries
loaded. `tests/test_sweep.py` has the processes.
"""

import contextlib
import gzip
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from spl.cli import main
from spl.disk import append
from spl.paper.evidence import Evidence
from spl.paper.policies import Arm, Trainer, prepare
from spl.paper.settings import Measuring, Sizes, Training
from spl.paper.steps import Steps
from spl.results import header, read
from spl.results import write as write_results
from spl.runs import FINISHED, Outcome, Run
from spl.types import UserError

TINY = str(Path(__file__).parents[1] / "configs/paper/tiny.yaml")
ran: list[str] = []


def in_this_process(runs: Sequence[Run], jobs: int = 1) -> list[Outcome]:
    """As `spl.runs.execute` does."""
    outcomes = []
    for run in runs:
        if run.is_finished():
            outcomes.append(Outcome("skipped"))
            continue
        ran.append(run.name)
        run.log.parent.mkdir(parents=True, exist_ok=True)
        with run.log.open("w") as file, contextlib.redirect_stdout(file):
            file.write(run.first_line)
            try:
                main(list(run.args))
                outcomes.append(Outcome("finished"))
            except SystemExit as end:
                outcomes.append(Outcome("failed", said=str(end.code)))
        append(run.log, FINISHED)
    return outcomes


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the steps that ran, in order."""
    use(monkeypatch, in_this_process)
    ran.clear()
    return ran


def use(monkeypatch: pytest.MonkeyPatch, execute: Callable[..., list[Outcome]]) -> None:
    for module in ("spl.paper.steps", "spl.paper.policies", "spl.sweep"):
        monkeypatch.setattr(f"{module}.execute", execute)


def write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made-up rows in the shapes of the real files."""
    folder = tmp_path_factory.mktemp("data")
    dice = random.Random(0)
    turn = "\n\nHuman: Is {} good?\n\nAssistant: {}"
    pairs = [{"chosen": turn.format(k, "Yes."), "rejected": turn.format(k, "No idea.")} for k in range(20)]
    write(folder / "hh_harmless.jsonl.gz", pairs)
    mmlu = [
        {"subject": "sums", "question": f"{k} + 1?", "choices": [str(k + j) for j in range(4)], "answer": 1}
        for k in range(8)
    ]
    write(folder / "mmlu_val.jsonl.gz", mmlu)
    truth = [
        {"id": k, "question": f"Is {k} odd?", "mc1_choices": ["Perhaps", "Yes", "No"], "mc1_labels": [1, 0, 0]}
        for k in range(8)
    ]
    write(folder / "truthfulqa_mc.jsonl.gz", truth)
    opinions = []
    for k in range(6):
        share = dice.random()
        row = {"id": k, "question": f"Do you like {k}?", "options": ["Yes", "No"], "distribution": [share, 1 - share]}
        opinions += [row | {"country": country} for country in ("Here", "There")]
    write(folder / "global_opinions.jsonl.gz", opinions)
    return folder


def test_everything_in_a_row(
    tmp_path: Path,
    data: Path,
    commands: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    args = ["paper", "--config", TINY, "--data", str(data), "--output", str(tmp_path / "paper")]
    main(args)
    folder = tmp_path / "paper"
    assert (folder / "report.html").stat().st_size > 10_000
    programs = {read(path).header["program"] for path in (folder / "results").glob("*.jsonl")}
    assert programs == {"diversity-quality", "best-of-n", "calibration", "opinions"}
    estimates = read(folder / "results" / "diversity-quality.jsonl").of("estimate")
    arms = {(record["policy"], record["setting"]) for record in estimates}
    assert {("sft", "t 1"), ("dpo", "t 1"), ("dpo", "t 1.2"), ("spl 2", "t 1"), ("gem dpo", "t 1")} <= arms
    openings = [
        {
            json.loads(line)["messages"][0]["content"]
            for line in (folder / f"data/{name}_prompts.jsonl").read_text().splitlines()
        }
        for name in ("prompts", "dev", "reward_dev", "reward", "train")
    ]
    assert sum(map(len, openings)) == len(set().union(*openings))

    assert commands[:3] == ["sft", "reward", "gem"] and commands[-1] == "report"

    def left(runs: Sequence[Run], jobs: int = 1) -> list[Outcome]:
        if [run.name for run in runs] == ["policies"]:
            return in_this_process(runs)
        commands.extend(run.name for run in runs if not run.is_finished())
        return [Outcome("skipped")] * len(runs)

    commands.clear()
    use(monkeypatch, left)
    main(args)
    assert commands == ["policies", "report"]  # the sweep looks for runs that failed; the report is drawn anew
    with pytest.raises(SystemExit):  # else all that is skipped would be of the rows before
        main([*args, "--sizes.train", "5"])
    assert "train.jsonl holds other rows than these settings give" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["--jobs", "0"], "jobs is the number of runs at a time"),
        (["--policies", "{dpo: {}, sft: {}}"], "policies have 'sft'"),
        (["--policies", "{dpo: {}, base: {}}", "--training", "{sft_steps: 0, gem: false}"], "policies have 'base'"),
        (
            ["--policies", "{dpo: {}, divpo: {}}", "--divpo_samples", "4"],
            "policies have 'divpo', the name of one that is made here",
        ),
        (["--policies", "{spl: {}}"], "policies must have 'dpo'"),
        (["--training.sft_steps", "0"], "training.gem is SFT, but training.sft_steps is 0"),
    ],
)
def test_what_is_no_paper_is_refused_before_anything_runs(
    tmp_path: Path, args: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["paper", "--config", TINY, "--output", str(tmp_path / "paper"), *args])
    assert named in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_way_of_decoding_that_gives_up_prompts_does_not_take_them_from_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of ten prompts one given up is passed over; with two the comparison goes on without; so if none is answered.

    One that breaks has given nothing up.
    """
    given_up = {"dpo_seed=0": 0, "dpo_one_seed=0": 1, "dpo_two_seed=0": 2, "dpo_none_seed=0": 10}

    def draw(runs: Sequence[Run], jobs: int) -> list[Outcome]:
        outcomes = []
        for run in runs:
            if run.result.stem not in given_up:
                outcomes.append(Outcome("failed", said="out of memory"))
                continue
            records: list[dict[str, Any]] = []
            for k in range(10):
                if k < given_up[run.result.stem]:
                    records.append({"kind": "note", "item": str(k), "text": "too few particles"})
                    continue
                records.append({"kind": "prompt", "item": str(k), "messages": [{"role": "user", "content": "?"}]})
                records.append({"kind": "sample", "item": str(k), "index": 0, "text": "!", "finish": "stop"})
            first = header("sample", {"num_samples": 1}, policy="dpo", setting=run.result.stem, num_items=10)
            write_results(run.result, first, records)
            outcomes.append(Outcome("failed" if run.result.stem == "dpo_none_seed=0" else "finished"))
        return outcomes

    use(monkeypatch, draw)
    tempered: dict[str, dict[str, Any]] = {name: {"global_temperature": 1.1} for name in ("one", "two", "none")}
    plan = Measuring(decodings=tempered)
    evidence = Evidence(Steps(tmp_path), [Arm("sft", None, "m"), Arm("dpo", 0, "m")], "reward", plan)
    dpo = [arm for arm in evidence.decoded() if arm.policy == "dpo"]
    found = evidence.sample(dpo, "chat")
    assert [Path(path).stem for path in found] == ["dpo_seed=0", "dpo_one_seed=0"]
    with pytest.raises(SystemExit):  # what has to be there
        evidence.sample(evidence.arms, "chat")
    broken = Arm("dpo", 0, "m", setting="broken", options={"global_temperature": 1.1})
    with pytest.raises(SystemExit):
        evidence.sample([*dpo, broken], "chat")


def test_a_sweep_that_fails_does_not_go_on_with_an_older_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    use(monkeypatch, lambda runs, jobs=1: [Outcome("failed", said="made by another command") for _ in runs])
    trainer = Trainer(Steps(tmp_path), "tiny", Training(sft_steps=0))
    old = {"kind": "run", "policy": "dpo", "train_seed": 0, "chosen": True, "state": "finished", "folder": "old"}
    write_results(tmp_path / "policies" / "sweep.jsonl", header("sweep", {}), [old])
    with pytest.raises(SystemExit):
        trainer.policies({"dpo": {"model.alpha": None}})
    assert "The sweep failed" in caplog.text


def test_settings_of_the_user_s_come_first_and_count(tmp_path: Path) -> None:
    """First, since a config among them would undo what stands before it."""
    given = {"trainer": "configs/trainer/gpu.yaml", "trainer.gradient_clip_val": 0.5}
    found = Trainer(Steps(tmp_path), "tiny", Training(settings=given)).common(7)
    assert next(iter(found)) == "trainer"
    assert (found["trainer.gradient_clip_val"], found["trainer.max_steps"]) == (0.5, 7)


@pytest.mark.parametrize("config", ["small", "full"])
def test_local_data_are_enough_for_every_config(tmp_path: Path, shared_data: Path, config: str) -> None:
    """A thousand pairs, and a file for each source of questions and problems that the config names."""
    settings = yaml.safe_load((Path(TINY).parent / f"{config}.yaml").read_text())
    sizes, steps = Sizes(**settings["sizes"]), Steps(tmp_path, shared_data)
    prepare(steps, sizes)
    for part in ("prompts", "dev", "reward_dev", "reward", "train"):
        assert len(Path(steps.part(part)).read_text().splitlines()) == getattr(sizes, part)
    assert Path(steps.source("pairs")) == shared_data / "hh_harmless.jsonl.gz"
    for source in ("mmlu", "truthfulqa", "opinions", *settings["measuring"].get("problems", ())):
        assert source == "arithmetic" or Path(steps.source(source)).is_file()


def test_which_of_the_local_files_is_meant(tmp_path: Path) -> None:
    steps = Steps(tmp_path / "paper", tmp_path)
    for name, said in (("gsm8k_test_a.jsonl", None), ("gsm8k_test_b.jsonl.gz", "both"), ("gsm8k_test.jsonl", None)):
        (tmp_path / name).touch()
        if said:
            with pytest.raises(UserError, match=r"has both gsm8k_test_a\.jsonl and gsm8k_test_b\.jsonl\.gz"):
                steps.source("gsm8k")
        else:
            assert steps.source("gsm8k") == str(tmp_path / name)
    with pytest.raises(UserError, match=r"has no math500\*\.jsonl or"):
        steps.source("math")
