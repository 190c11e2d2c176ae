"""`spl plan` by the door users come through."""

import json
from pathlib import Path
from typing import Any

import pytest
from real_model import smollm2

from spl.cli import main
from spl.models import load_model, load_tokenizer
from spl.modules.preference import PreferenceModule
from spl.planning.gpus import GPUS

CONFIGS = Path(__file__).parents[2] / "configs"
TINY = ["plan", "--config", str(CONFIGS / "experiment/tiny.yaml")]


def planned(args: list[str], capsys: pytest.CaptureFixture[str]) -> Any:
    main([*args, "--json"])
    return json.loads(capsys.readouterr().out)


def fails(args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as raised:
        main(args)
    assert raised.value.code == 2
    return capsys.readouterr().err


@pytest.fixture(autouse=True)
def nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    yield
    assert not list(tmp_path.glob("runs"))


def test_a_large_model_under_the_sharded_config(capsys: pytest.CaptureFixture[str]) -> None:
    sharded = ["--trainer", str(CONFIGS / "trainer/fsdp.yaml"), "--model.model", "llama-3.1-8b"]
    plan = planned([*TINY, *sharded, "--model.lora_rank", "0", "--model.dtype", "bfloat16"], capsys)
    assert plan["model"]["parameters"] == plan["model"]["trained"] == 8_030_261_248
    one, shards = plan["memory"]["one"], plan["memory"]["fsdp"]
    # Half-sized weights, their gradients, both moments, and a frozen copy; and an eighth of each.
    assert one["weights"] == one["gradients"] == one["moments"] / 2 == one["reference"] == 2 * 8_030_261_248
    assert [shards[part] * 8 for part in ("weights", "gradients", "moments", "reference")] == [
        one[part] for part in ("weights", "gradients", "moments", "reference")
    ]
    # Six operations a number and token; embeddings are looked up, the head runs on the half that predict a response,
    # and attention adds a little.
    matrices = 8_030_261_248 - 1.5 * 128_256 * 4096
    assert plan["step"]["policy_flops"] == pytest.approx(6 * matrices * plan["step"]["tokens"], rel=0.02)
    assert plan["step"]["policy_flops"] == pytest.approx(3 * plan["step"]["reference_flops"])

    fits = {row["gpu"]: row for row in plan["fits"]}
    assert all(row["lora"]["memory"] <= GPUS[name].memory for name, row in fits.items())
    assert fits["h100-80gb"]["lora"]["gpus"] == 1
    assert fits["h100-80gb"]["full"]["gpus"] > 1  # weights, copy, gradients and moments are 80 GB
    by_memory = [fits[name]["full"]["gpus"] for name in sorted(fits, key=lambda name: GPUS[name].memory)]
    assert by_memory == sorted(by_memory, reverse=True)

    growth = {row["model"]: row["cells"] for row in plan["growth"]}
    assert growth["llama-3.1-70b"][0] is None  # on one GPU
    rates = [cells[-1]["tokens_per_second"] for cells in growth.values()]
    assert rates == sorted(rates, reverse=True)  # of ever larger models on 1,024
    assert [row["gpus"] for row in plan["time"]] == [1, 8, 8, 64, 64, 256, 256, 1024, 1024]


def test_a_plan_of_the_tiny_run(capsys: pytest.CaptureFixture[str]) -> None:
    plan = planned([*TINY, "--gpus", "2", "--model.lora_rank", "0"], capsys)
    module = PreferenceModule("tiny", lora_rank=0)
    module.configure_model()
    assert plan["model"]["parameters"] == sum(p.numel() for p in module.policy.parameters())
    assert "the first 8 examples of survey" in plan["step"]["lengths"]
    assert plan["step"]["padded_flops"] > plan["step"]["policy_flops"] + plan["step"]["reference_flops"]
    assert plan["memory"]["fsdp"]["weights"] == plan["memory"]["one"]["weights"] / 2


def test_devices_by_their_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    assert planned([*TINY, "--trainer.devices", "0,1"], capsys)["assumed"]["gpus"] == 2


def test_tables_are_readable_and_say_that_they_are_on_paper(capsys: pytest.CaptureFixture[str]) -> None:
    args = ["--model.model", smollm2(), "--data.path", "survey", "--tokens", "1024"]
    main([*TINY, *args])
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 100
    assert "On paper" in text
    assert "--tokens 1,024" in text
    assert "134,515,008" not in text  # with its adapters
    assert all(name in text for name in (*GPUS, "llama-3.1-70b", "FSDP2", "AdamW's moments"))


def test_a_folder_is_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "model"
    load_model("tiny").save_pretrained(folder)
    load_tokenizer("tiny").save_pretrained(folder)
    without = ["--model.beta", "0", "--model.lora_rank", "0"]
    plan = planned([*TINY, "--model.model", str(folder), *without], capsys)
    assert plan["model"]["parameters"] == 90_880
    assert plan["memory"]["one"]["reference"] == 0
    assert plan["step"]["reference_flops"] == 0  # beta is 0


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["--gpux", "3"], "unrecognized arguments: --gpux"),
        (["--data.batch_sze", "3"], "unrecognized arguments: --data.batch_sze"),
        (["--model.model", "no-such/model"], "sizes known without files: smollm2-135m, "),
        (["--model.lora_rank", "-1"], "model.lora_rank must be 0 or more"),
        (["--data.batch_size", "0"], "data.batch_size must be 1 or more"),
        (["--gpu", "h1000"], "--gpu must be one of l4-24gb, "),
        (["--mfu", "3"], "--mfu must be a share"),
        (["--tokens", "0"], "--tokens must be above 0"),
        (["--trainer.accumulate_grad_batches", "0"], "trainer.accumulate_grad_batches must be 1 or more, but is 0."),
    ],
)
def test_mistakes_end_in_a_sentence(args: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    error = fails([*TINY, *args], capsys)
    assert sentence in error
    assert error.count("\n") == 1
