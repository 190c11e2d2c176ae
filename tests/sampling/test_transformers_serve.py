"""A real OpenAI-compatible server, `transformers serve`, with a real model; started once, on a free port."""

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from real_model import smollm2

from spl.data.prompts import text_prompts
from spl.evaluation.policies import EvaluatedPolicy
from spl.evaluation.sample import sample
from spl.evaluation.sample_files import read_samples
from spl.sampling.generate import draw
from spl.sampling.logits import Decoding
from spl.sampling.server import ChatServer
from spl.types import Message, UserError

TEXT = "Name one fruit that is red, and say nothing else."
ASK: list[Message] = [{"role": "user", "content": TEXT}]


class Served(NamedTuple):
    url: str
    folder: str
    policy: EvaluatedPolicy


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    policy = EvaluatedPolicy.load(smollm2(), device="cpu")
    folder = tmp_path_factory.mktemp("served")
    model: Any = policy.model
    model.generation_config.do_sample = True  # or the server passes over temperature
    model.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--device", "cpu", "--dtype", "float32"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with (folder / "log.txt").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        try:
            wait_for(f"http://127.0.0.1:{port}/health", process, folder / "log.txt")
            yield Served(f"http://127.0.0.1:{port}/v1", str(folder), policy)
        finally:
            process.kill()
            process.wait()


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, TimeoutError):
            time.sleep(0.3)
    pytest.fail(f"the server did not start: {log.read_text(errors='replace')[-2000:]}")


def test_greedy_text_is_that_of_our_own_decoding(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    policy = served.policy
    (prompt,) = text_prompts([TEXT], policy.encoder())
    [[own]] = draw(
        policy.model,
        [prompt.input_ids],
        1,
        eos_token_ids=policy.eos_token_ids,
        max_new_tokens=12,
        decoding=Decoding(0),
    )
    [found] = ChatServer(served.url, served.folder).complete(ASK, decoding=Decoding(0), max_tokens=12, logprobs=True)
    assert found.text == policy.tokenizer.decode(own.token_ids, skip_special_tokens=True)
    assert (found.num_tokens, found.finish) == (len(own.token_ids), "stop" if own.ended else "length")
    assert found.logp is None  # it gives none
    assert "does not take min_p and top_k" in caplog.text


def test_replies_are_as_many_and_as_long_as_asked(served: Served, tmp_path: Path) -> None:
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "samples.jsonl"
    prompts.write_text('{"id": "a", "prompt": "Tell me a story."}\n{"id": "b", "prompt": "Write a poem."}\n')
    sample(
        server=served.url,
        server_model=served.folder,
        prompts=str(prompts),
        output=output,
        num_samples=3,
        max_new_tokens=8,
    )
    (file,) = read_samples([output])
    assert {item: len(replies) for item, replies in file.replies.items()} == {"a": 3, "b": 3}
    for replies in file.replies.values():
        assert {(reply.num_tokens, reply.finish) for reply in replies} == {(8, "length")}
        assert len({reply.text for reply in replies}) > 1


def test_what_it_does_not_take(served: Served) -> None:
    with pytest.raises(UserError, match=r"refuses the request: .*top_k"):
        ChatServer(served.url, served.folder).complete(ASK, decoding=Decoding(top_k=5))
    with pytest.raises(UserError, match=r"127\.0\.0\.1:\d+/v1 "):
        ChatServer(served.url, "no-such-model", retries=0).complete(ASK)
