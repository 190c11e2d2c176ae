"""The samples themselves: every one in the run folder, in the order of the prompts, a few on the screen."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning import Trainer
from rich.console import Console
from torch import multiprocessing

from spl.callbacks.diversity import DiversityMonitor
from spl.callbacks.sampler import PolicySampler, PromptSamples, SampleRound
from spl.callbacks.samples import SampleTable, sample_table
from spl.types import ResponseLaws, UserError

LAWS = ResponseLaws(*[torch.zeros(0)] * len(ResponseLaws._fields))
MODULE: Any = SimpleNamespace(device=torch.device("cpu"))


def replies(prompt: str, *texts: str, ended: bool = True) -> PromptSamples:
    """Replies of one token a word, and an EOS token."""
    ids = tuple(tuple(range(len(text.split()) + ended)) for text in texts)
    return PromptSamples(prompt, texts, ids, (ended,) * len(texts))


def draw(step: int, num_prompts: int = 2, start: int = 0, world: int = 1, reference: bool = True) -> SampleRound:
    """What process `start` of `world` draws: reply k of prompt i says so."""
    numbers = range(start, num_prompts, world)
    policy = tuple(replies(f"prompt {i}", f"policy {i} 0 at {step}", f"policy {i} 1", ended=False) for i in numbers)
    kept = tuple(replies(f"prompt {i}", f"reference {i}", f"reference {i} 1") for i in numbers)
    return SampleRound(step, policy, kept if reference else (), LAWS, LAWS if reference else None)


def trainer_of(folder: Path, rank: int = 0, fn: str = "fit") -> Any:
    """As much of a trainer as a monitor looks at, with a logger that keeps what it is given."""
    logged: list[dict[str, float]] = []
    texts: list[dict[str, Any]] = []
    logger = SimpleNamespace(
        log_metrics=lambda values, step: logged.append(values), save=lambda: None, logged=logged,
        log_text=lambda **table: texts.append(table), texts=texts,
    )  # fmt: skip
    return SimpleNamespace(
        default_root_dir=str(folder), is_global_zero=rank == 0, global_rank=rank, global_step=0, loggers=[logger],
        callback_metrics={}, callbacks=[], state=SimpleNamespace(fn=fn),
    )  # fmt: skip


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def begun(table: SampleTable, trainer: Any, stage: str = "fit") -> SampleTable:
    table.setup(trainer, MODULE, stage)
    return table


def test_every_sample_is_kept(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path / "run")
    table = begun(SampleTable(num_shown=0), trainer)
    for step in (0, 10):
        table.on_samples(trainer, MODULE, draw(step))
    kept = lines(tmp_path / "run")
    assert [(line["step"], line["prompt"]) for line in kept] == [
        (0, "prompt 0"), (0, "prompt 1"), (10, "prompt 0"), (10, "prompt 1"),
    ]  # fmt: skip
    assert kept[3] == {
        "step": 10,
        "prompt": "prompt 1",
        "policy": ["policy 1 0 at 10", "policy 1 1"],
        "reference": ["reference 1", "reference 1 1"],
        "policy_lengths": [5, 3],
        "policy_ended": [False, False],
        "reference_lengths": [3, 4],
        "reference_ended": [True, True],
    }


def test_without_a_reference_its_side_is_empty(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = trainer_of(tmp_path)
    begun(SampleTable(), trainer).on_samples(trainer, MODULE, draw(0, reference=False))
    assert [line["reference"] for line in lines(tmp_path)] == [[], []]
    assert [line["reference_lengths"] for line in lines(tmp_path)] == [[], []]
    assert "policy 1 0" in capsys.readouterr().out


def test_a_resumed_run_writes_later_steps_anew(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    table = begun(SampleTable(num_shown=0), trainer)
    for step in (0, 10, 20):
        table.on_samples(trainer, MODULE, draw(step))
    with (tmp_path / "samples.jsonl").open("a") as file:
        file.write('{"step": 30, "prompt": "cut as the pro')
    resumed = begun(SampleTable(num_shown=0), trainer)
    for step in (10, 20):
        resumed.on_samples(trainer, MODULE, draw(step, num_prompts=1))
    assert [(line["step"], line["prompt"]) for line in lines(tmp_path)] == [
        (0, "prompt 0"), (0, "prompt 1"), (10, "prompt 0"), (20, "prompt 0"),
    ]  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["samples.jsonl"]


def test_validation_leaves_the_file_of_a_run_alone(tmp_path: Path) -> None:
    trainer, later = trainer_of(tmp_path), trainer_of(tmp_path, fn="validate")
    begun(SampleTable(num_shown=0), trainer).on_samples(trainer, MODULE, draw(10))
    begun(SampleTable(num_shown=0), later, "validate").on_samples(later, MODULE, draw(0))
    assert [line["step"] for line in lines(tmp_path)] == [10, 10]
    assert later.loggers[0].texts  # loggers are told


def test_loggers_get_the_first_reply_to_every_prompt(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    begun(SampleTable(num_shown=1), trainer).on_samples(trainer, MODULE, draw(7, num_prompts=3))
    (table,) = trainer.loggers[0].texts
    assert table["columns"] == ["prompt", "policy", "reference"]
    assert table["data"] == [[f"prompt {i}", f"policy {i} 0 at 7", f"reference {i}"] for i in range(3)]


def test_a_few_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = trainer_of(tmp_path)
    begun(SampleTable(num_shown=2), trainer).on_samples(trainer, MODULE, draw(1200, num_prompts=4))
    shown = capsys.readouterr().out
    for expected in ("step 1,200", "prompt 0", "prompt 1", "reference 1", "5 tokens, cut", "3 tokens"):
        assert expected in shown
    assert "prompt 2" not in shown


def printed(width: int, *asked: tuple[PromptSamples, PromptSamples | None], most: int = 240) -> str:
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(sample_table(0, list(asked), most))
    return capture.get()


@pytest.mark.parametrize("width", [80, 140])
def test_the_table_fits_the_terminal(width: int) -> None:
    long = replies("x" * 500, "z" * 500)
    shown = printed(width, (long, long))
    assert {len(line) for line in shown.splitlines()} == {width}
    assert shown.count("z") == 2 * 239
    assert shown.count("x") == 119
    assert shown.count("…") == 3


@pytest.mark.parametrize(("most", "expected"), [(1, "…"), (2, "a…"), (5, "abcd…"), (6, "abcdef"), (7, "abcdef")])
def test_a_reply_is_cut_at_its_end(most: int, expected: str) -> None:
    assert f"│ {expected} " in printed(60, (replies("", "abcdef"), None), most=most)


@pytest.mark.parametrize(("most", "expected"), [(1, "…"), (4, "…f"), (10, "…cdef"), (12, "abcdef")])
def test_a_prompt_is_cut_at_its_start(most: int, expected: str) -> None:
    assert f"│ {expected} " in printed(60, (replies("abcdef", ""), None), most=most)


def test_what_a_model_says_is_no_markup_and_moves_no_cursor() -> None:
    shown = printed(100, (replies("[bold]p[/bold]", "[red]a[/red] [/b]\n\n\x1b[2J\tb\r\x07"), None))
    assert "[bold]p[/bold]" in shown
    assert "[red]a[/red] [/b] [2J b " in shown
    assert not {"\x1b", "\t", "\r", "\x07"} & set(shown)


def test_an_empty_reply_says_so() -> None:
    assert "no text, 1 token " in printed(80, (replies("p", ""), None))


@pytest.mark.parametrize("wrong", [{"num_shown": -1}, {"width": 0}])
def test_mistakes_are_named(wrong: dict[str, int]) -> None:
    with pytest.raises(UserError, match=r"num_shown must be .* width 1 or more"):
        SampleTable(**wrong)


def test_a_sampler_is_there(tmp_path: Path) -> None:
    table = SampleTable()
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[table])
    table.setup(trainer, MODULE, "fit")
    assert any(isinstance(callback, PolicySampler) for callback in trainer.callbacks)  # type: ignore[attr-defined]


def one_of_two(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    trainer = trainer_of(folder / "two", rank)
    monitor = DiversityMonitor()
    table = begun(SampleTable(num_shown=0), trainer)
    for step in (0, 5):
        samples = draw(step, num_prompts=5, start=rank, world=2)
        table.on_samples(trainer, MODULE, samples)
        monitor.on_samples(trainer, MODULE, samples)
    (folder / f"logged-{rank}.json").write_text(json.dumps(trainer.loggers[0].logged))
    torch.distributed.destroy_process_group()


def test_two_processes_give_what_one_does(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path / "one")
    table, monitor = begun(SampleTable(num_shown=0), trainer), DiversityMonitor()
    for step in (0, 5):
        samples = draw(step, num_prompts=5)
        table.on_samples(trainer, MODULE, samples)
        monitor.on_samples(trainer, MODULE, samples)
    multiprocessing.spawn(one_of_two, (tmp_path,), nprocs=2)
    assert (tmp_path / "two" / "samples.jsonl").read_text() == (tmp_path / "one" / "samples.jsonl").read_text()
    for rank in (0, 1):
        logged = json.loads((tmp_path / f"logged-{rank}.json").read_text())
        assert len(logged) == 2
        for two, one in zip(logged, trainer.loggers[0].logged, strict=True):
            assert two == pytest.approx(one)
