"""Secrets in the environment, in settings and in addresses, and every byte that a run prints or writes."""

import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.loggers import CSVLogger

from spl.cli import main
from spl.data.survey import survey_rows
from spl.secrets import SecretFilter, is_secret, redact, without_secrets

TINY = ["--config", str(Path(__file__).parents[1] / "configs/experiment/tiny.yaml")]
# Made up, of the forms that real ones have.
HUB, WANDB, OPENAI = "hf_" + "Ab3" * 11, "0123456789abcdef" * 2 + "deadbeef", "sk-proj-" + "Zz9_" * 10
PASSWORD, LOGGER = "hunter2-hunter2", "logger-key-51"


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        *(("api_key", True), ("WANDB_API_KEY", True), ("apiKey", True), ("hub_token", True), ("HF_TOKEN", True)),
        *(("token", True), ("smtp-password", True), ("client_secret", True), ("AWS_SECRET_ACCESS_KEY", True)),
        *(("eos_token", False), ("pad_token", False), ("max_tokens", False), ("token_entropy", False)),
        *(("secretary", False), ("logps/chosen_per_token", False), ("tokenizer", False), ("head_chunk", False)),
        *(("key", False), ("keys", False), ("monkey", False), ("mask_token", False), ("tokens", False)),
    ],
)
def test_names(name: str, secret: bool) -> None:
    assert is_secret(name, "x1") is secret
    assert not is_secret(name, None)
    assert without_secrets({name: "x1"}) == ({} if secret else {name: "x1"})


def test_a_number_of_tokens_is_no_secret() -> None:
    assert not is_secret("loss_a_token", 3)
    assert is_secret("password", 12345678)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"no access with {HUB}.", "no access with ***."),
        (f"key {OPENAI} refused", "key *** refused"),
        (f"Authorization: Bearer {LOGGER}", "Authorization: Bearer ***"),
        (f"{{'Authorization': 'Basic {LOGGER}'}}", "{'Authorization': 'Basic ***'}"),
        (f"sent Bearer {OPENAI[8:]}", "sent Bearer ***"),
        (f"at https://me:{PASSWORD}@host/a.jsonl, row 3", "at https://***@host/a.jsonl, row 3"),
        (f"at s3://{LOGGER}@host", "at s3://***@host"),
        (f"unknown --trainer.logger.api_key {LOGGER}", "unknown --trainer.logger.api_key ***"),
        (f"unknown --trainer.logger.api_key={LOGGER}", "unknown --trainer.logger.api_key=***"),
        (f"got {{'api_key': '{LOGGER}', 'project': 'p'}}", "got {'api_key': '***', 'project': 'p'}"),
        (f"https://host/a?token={LOGGER}99&split=a", "https://host/a?token=***&split=a"),
        (f"password: {PASSWORD}", "password: ***"),
    ],
)
def test_a_secret_is_hidden_in_a_text(text: str, expected: str) -> None:
    assert redact(text) == expected
    assert redact(expected) == expected


@pytest.mark.parametrize(
    "text",
    [
        "eos_token: <|end|>1234567, pad_token=<|pad|>7654321",
        "model.trust_remote_code must be str or null, but is True",
        "the tokenizer gives two of the letters A, B the same first token: 'Yes, of course'",
        "val/token_entropy 3.25, logps/chosen_per_token: 12345678.5",
        "owner/name at https://huggingface.co/owner/name@main, row 3, me@example.org",
        "the bearer of this task-oriented letter risk-averse-as-he-was-said-to-be-once went home",
        "cannot load 'hf_internal/tiny'",
    ],
)
def test_other_texts_stay_as_they_are(text: str) -> None:
    assert redact(text) == text


def test_the_environments_secrets_are_known_by_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", WANDB)
    monkeypatch.setenv("EOS_TOKEN", "ordinary-words")
    assert redact(f"wandb said: {WANDB} ordinary-words") == "wandb said: *** ordinary-words"


def test_settings_lose_their_secrets() -> None:
    settings = {
        "trainer": {"logger": [{"init_args": {"api_key": LOGGER, "project": "p"}}]},
        "data": {"path": f"https://me:{PASSWORD}@host/x", "mixture": {f"s3://{LOGGER}@bucket": 0.5}},
        "lora": ("a", HUB),
        "head_chunk": 3,
    }
    assert without_secrets(settings) == {
        "trainer": {"logger": [{"init_args": {"project": "p"}}]},
        "data": {"path": "https://***@host/x", "mixture": {"s3://***@bucket": 0.5}},
        "lora": ("a", "***"),
        "head_chunk": 3,
    }


@given(st.text(), st.sampled_from([HUB, f"api_key={LOGGER}", f"https://me:{PASSWORD}@h"]), st.text())
def test_whatever_stands_around_it_a_secret_is_hidden(before: str, secret: str, after: str) -> None:
    found = redact(f"{before} {secret} {after}")
    assert not any(word in found for word in (HUB, LOGGER, PASSWORD))
    assert redact(found) == found


@pytest.mark.parametrize("piece", ["a", "token", "://", "--", "hf_", "api_key", "Bearer ", "authorization:", "@", "a."])
def test_a_long_text_is_read_in_linear_time(piece: str) -> None:
    """Twenty times the text may not take four hundred times as long, by the processor's time, the least of three."""

    def seconds(text: str) -> float:
        took = []
        for _ in range(3):
            start = time.process_time()
            redact(text)
            took.append(time.process_time() - start)
        return min(took)

    short = seconds(piece * (5_000 // len(piece)))
    assert seconds(piece * (100_000 // len(piece))) < 100 * short + 0.05


def test_a_logs_messages_pass_through(caplog: pytest.LogCaptureFixture) -> None:
    caplog.handler.addFilter(SecretFilter())
    try:
        with caplog.at_level(logging.INFO, logger="spl"):
            logging.getLogger("spl.modules.policy").info("with %s and %d", HUB, 3)
    finally:
        caplog.handler.filters.clear()
    assert caplog.messages == ["with *** and 3"]


class KeyedLogger(CSVLogger):
    """A logger that takes a key, as those of services do."""

    def __init__(self, save_dir: str, api_key: str) -> None:
        super().__init__(save_dir, name="keyed", version="")
        assert api_key == LOGGER


def test_a_run_tells_and_writes_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in {"HF_TOKEN": HUB, "WANDB_API_KEY": WANDB, "OPENAI_API_KEY": OPENAI}.items():
        monkeypatch.setenv(name, value)
    address = f"https://me:{PASSWORD}@host/rows.jsonl"  # which pathlib reads as folders
    rows = [dict(row) for row in survey_rows()]
    rows[3]["alpha"] = 1e38  # so large that a step's batch is kept
    rows += [{"prompt": f"I use {HUB}"}, rows[3] | {"prompt": f"I say {OPENAI}"}]
    Path(address).parent.mkdir(parents=True)
    Path(address).write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    keyed = [
        {"class_path": "test_secrets.KeyedLogger", "init_args": {"save_dir": "run", "api_key": LOGGER}},
        {"class_path": "TensorBoardLogger", "init_args": {"save_dir": "run"}},
    ]
    settings = ["--data.path", address, "--data.val_path", address, "--data.bad_rows", "skip"]
    settings += ["--trainer.logger", json.dumps(keyed), "--model.on_non_finite", "skip", "--data.batch_size", "2"]
    main(["fit", *TINY, *settings, "--output", "run"])
    main(["predict", *TINY, *settings[:6], "--output", "run/predicted", "--trainer.logger", "false"])
    with pytest.raises(SystemExit):
        main(["fit", *TINY, "--data.path", f"s3://me:{PASSWORD}@bucket/none.jsonl", "--output", "run/other"])
    with pytest.raises(SystemExit):
        main(["fit", *TINY, "--trainer.logger.api_key", LOGGER, f"--model.hub_token={LOGGER}", "--output", "run/other"])
    said = capfd.readouterr()
    places: dict[str, bytes] = {"stdout": said.out.encode(), "stderr": said.err.encode()}
    places |= {str(path): path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    assert len(places) > 12
    assert "***@host" in said.out and "***@bucket" in said.err
    assert any("non_finite" in place for place in places)
    for place, content in places.items():
        for secret in (HUB, WANDB, OPENAI, PASSWORD, LOGGER):
            assert secret.encode() not in content, f"{secret} in {place}"
        assert b"rows.jsonl" not in content or b"***@host/rows.jsonl" in content


def test_an_unexpected_error_tells_no_secret() -> None:
    program = f"import sys; from spl.secrets import *; sys.excepthook = print_redacted; raise KeyError('{HUB}')"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=os.environ)
    assert ended.returncode == 1
    assert "KeyError: '***'" in ended.stderr and HUB not in ended.stderr
