"""What a server does to us: one that answers as the test says, faults included."""

import threading
import time
from typing import Any

import pytest
from local_server import Answer, refusal, reply, serving

from spl.sampling.logits import Decoding
from spl.sampling.protocol import ChatRequest, Completion
from spl.sampling.server import ChatServer, ServerRefusalError
from spl.types import Message, UserError

ASK: list[Message] = [{"role": "user", "content": "Tea or coffee?"}]


def test_what_is_asked_and_what_comes() -> None:
    """Defaults of the server are switched off, and each reply's own tokens are counted."""
    with serving(lambda *_: reply("Tea.", "Tea!", tokens=4, logprobs=[-0.5, -0.25])) as (url, bodies):
        found = ChatServer(url, "m").complete(ASK, 2, Decoding(), 9, seed=3, logprobs=True)
    assert found == [Completion("Tea.", 2, "stop", -0.75), Completion("Tea!", 2, "stop", -0.75)]
    expected: dict[str, Any] = {"model": "m", "messages": ASK, "max_tokens": 9, "temperature": 1.0, "top_p": 1.0}
    expected |= {"top_k": -1, "min_p": 0.0, "n": 2, "logprobs": True, "seed": 3_000_009}
    assert [{name: body[name] for name in expected} for body in bodies] == [expected]


def test_a_logprob_is_of_the_models_law_or_not_given() -> None:
    with serving(lambda *_: reply("Tea.", tokens=2, logprobs=[-1.0, -2.0])) as (url, bodies):
        server, raw = ChatServer(url, "m"), ChatServer(url, "m", raw_logprobs=True)
        hot = Decoding(1.5, top_k=9, top_p=0.5, min_p=0.1)
        assert server.complete(ASK, decoding=hot, logprobs=True)[0].logp is None
        assert raw.complete(ASK, decoding=hot, logprobs=True)[0].logp == -3.0
        assert server.complete(ASK)[0].logp is None
    sent = {"temperature": 1.5, "top_k": 9, "top_p": 0.5, "min_p": 0.1}
    assert {name: bodies[0][name] for name in sent} == sent
    with serving(lambda *_: reply("Tea.", tokens=3, logprobs=[-1.0, -2.0])) as (url, _):  # EOS is not among them
        assert ChatServer(url, "m").complete(ASK, logprobs=True) == [Completion("Tea.", 3, "stop", None)]


def test_a_server_that_passes_over_n_is_asked_n_times(caplog: pytest.LogCaptureFixture) -> None:
    with serving(lambda body, _: reply(str(body["seed"]), finish="length", tokens=7)) as (url, bodies):
        server = ChatServer(url, "m")
        found = server.complete(ASK, 3, seed=1)
        assert {reply.text for reply in found} == {"1000003", "1000004", "1000005"}
        assert {(reply.num_tokens, reply.finish) for reply in found} == {(7, "length")}
        assert len(bodies) == 3
        assert len(server.complete(ASK, 3, seed=2)) == 3
    assert [body.get("n") for body in bodies] == [3, None, None, None, None, None]
    assert caplog.text.count("does not tell 3 replies apart") == 1


def test_replies_of_unknown_length_are_asked_for_one_by_one() -> None:
    """Two replies of 9 tokens together: nobody knows how many each has."""
    with serving(lambda body, _: reply(*["Tea."] * body.get("n", 1), tokens=9)) as (url, bodies):
        found = ChatServer(url, "m").complete(ASK, 2)
    assert found == [Completion("Tea.", 9, "stop", None)] * 2
    assert len(bodies) == 3


def strict(body: dict[str, Any], _: int) -> Answer:
    """Takes no field that it does not know, as `transformers serve`."""
    odd = body.keys() - {"model", "messages", "max_tokens", "temperature", "top_p", "seed"}
    return refusal(f"Unexpected fields in the request: {odd}", 422) if odd else reply("Tea.", tokens=2)


def test_what_a_server_refuses_is_left_out_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with serving(strict) as (url, bodies):
        server = ChatServer(url, "m")
        assert server.complete(ASK, logprobs=True) == [Completion("Tea.", 2, "stop", None)]
        assert server.complete(ASK, logprobs=True) == [Completion("Tea.", 2, "stop", None)]
        assert len(bodies) == 3
        assert caplog.text.count("does not take min_p and top_k") == 1
        with pytest.raises(UserError, match=r"refuses the request: .*top_k"):
            server.complete(ASK, decoding=Decoding(top_k=5))


def test_a_refusal_that_names_nothing() -> None:
    def answer(body: dict[str, Any], _: int) -> Answer:
        return refusal("no") if "logprobs" in body or "top_k" in body else reply("Tea.", tokens=2)

    with serving(answer) as (url, bodies):
        assert ChatServer(url, "m").complete(ASK, seed=1, logprobs=True)[0].text == "Tea."
        assert len(bodies) == 2


def test_what_one_conversation_is_refused_for_holds_for_no_other(caplog: pytest.LogCaptureFixture) -> None:
    def answer(body: dict[str, Any], _: int) -> Answer:
        long = len(body["messages"][0]["content"]) > 100
        return refusal("maximum context length is 100 tokens") if long else reply("Tea.", tokens=2)

    with serving(answer) as (url, bodies):
        server = ChatServer(url, "m")
        with pytest.raises(UserError, match=r"refuses the request: .*maximum context length"):
            server.complete([{"role": "user", "content": "Tea? " * 30}], seed=1)
        server.complete(ASK, seed=1)
    assert {"top_k", "min_p", "seed"} <= bodies[-1].keys() and not caplog.text


def test_a_refusal_takes_the_place_of_replies() -> None:
    def answer(body: dict[str, Any], _: int) -> Answer:
        return refusal("too long") if body["messages"][0]["content"] == "1" else reply("Tea.", tokens=2)

    with serving(answer) as (url, _):
        requests = [ChatRequest([{"role": "user", "content": str(k)}]) for k in range(4)]
        found = dict(ChatServer(url, "m", concurrency=2).each(requests))
    assert {k: isinstance(replies, list) for k, replies in found.items()} == {0: True, 1: False, 2: True, 3: True}
    error = found[1]
    assert isinstance(error, ServerRefusalError) and "too long" in error.said and url not in error.said
    assert f"{url} refuses the request: 400 " in str(error)


@pytest.mark.parametrize(("said", "finish"), [("stop", "stop"), ("length", "length"), ("content_filter", "length")])
def test_a_reply_that_a_filter_cut_has_not_ended(said: str, finish: str) -> None:
    with serving(lambda *_: reply("Tea", finish=said, tokens=1)) as (url, _):
        assert ChatServer(url, "m").complete(ASK)[0].finish == finish


def test_another_name_for_the_most_tokens() -> None:
    def answer(body: dict[str, Any], _: int) -> Answer:
        old = "max_tokens" in body
        said = "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
        return refusal(said) if old else reply("Tea.", tokens=2)

    with serving(answer) as (url, bodies):
        ChatServer(url, "m").complete(ASK, max_tokens=5)
    assert bodies[1]["max_completion_tokens"] == 5


FAULTS: list[Answer] = [
    (500, {"error": {"message": "overloaded"}}),
    (0, b""),
    (200, b'{"id": "x", "choi'),
    (503, b"<html>"),
]


def test_faults_pass() -> None:
    """An error of the server, a connection that breaks, an answer that is cut, a page of some proxy."""
    with serving(lambda _, k: FAULTS[k] if k < len(FAULTS) else reply("Tea.", tokens=2)) as (url, bodies):
        assert ChatServer(url, "m").complete(ASK)[0].text == "Tea."
        assert len(bodies) == 5


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (FAULTS[0], "answered with an error in 2 tries: .*overloaded"),
        (FAULTS[1], "cannot be reached .* in 2 tries: is the server running"),
        (FAULTS[2], "gave no usable answer in 2 tries"),
        (refusal("no such model", 404), "has no model 'm', or is no chat server's URL: .*no such model"),
        (refusal("bad key sk-secret", 401), "wants another key than .SPL_TEST_KEY holds"),
        (reply(), "answered without a reply"),
    ],
)
def test_faults_that_stay_end_in_a_sentence(answer: Answer, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPL_TEST_KEY", "sk-secret")
    with serving(lambda *_: answer) as (url, bodies), pytest.raises(UserError, match=said) as caught:
        ChatServer(url, "m", retries=1, api_key_env="SPL_TEST_KEY").complete(ASK)
    assert "sk-secret" not in str(caught.value) and "\n" not in str(caught.value)
    assert {body["authorization"] for body in bodies} == {"Bearer sk-secret"}


def test_nobody_there() -> None:
    with pytest.raises(UserError, match=r"127.0.0.1:9/v1 cannot be reached .*: is the server running"):
        ChatServer("http://127.0.0.1:9", "m", retries=0).complete(ASK)
    with pytest.raises(UserError, match="URL must be"):
        ChatServer("localhost:8000", "m")


def test_a_slow_server_is_not_waited_for() -> None:
    hold = threading.Event()

    def answer(*_: Any) -> Answer:
        hold.wait(20)
        return reply("late")

    with serving(answer) as (url, _), pytest.raises(UserError, match=r"gave no answer within 0.2 s in 1 tries"):
        try:
            ChatServer(url, "m", timeout=0.2, retries=0).complete(ASK)
        finally:
            hold.set()


def test_many_requests_run_beside_each_other_but_not_too_many() -> None:
    running, most, lock = 0, 0, threading.Lock()

    def answer(body: dict[str, Any], _: int) -> Answer:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.05)
        with lock:
            running -= 1
        return reply(body["messages"][0]["content"], tokens=1)

    with serving(answer) as (url, bodies):
        taken = 0

        def requests() -> Any:
            nonlocal taken
            for k in range(12):
                taken += 1
                yield ChatRequest([{"role": "user", "content": str(k)}])

        answers = ChatServer(url, "m", concurrency=4).each(requests())
        found = [next(answers)]
        assert taken == 4  # no more than there is room for
        found += answers
        assert sorted(found) == [(k, [Completion(str(k), 1, "stop", None)]) for k in range(12)]
        assert 2 <= most <= 4 and len(bodies) == 12


def test_leaving_early_breaks_the_others_off() -> None:
    hold = threading.Event()

    def answer(_: Any, k: int) -> Answer:
        if k:
            hold.wait(20)
        return reply("Tea.", tokens=1)

    with serving(answer) as (url, _):
        answers = ChatServer(url, "m", concurrency=2).each([ChatRequest(ASK)] * 2)
        began = time.monotonic()
        next(answers)
        answers.close()  # type: ignore[attr-defined]
        assert time.monotonic() - began < 15
        hold.set()


def test_equal_replies_are_remarked(caplog: pytest.LogCaptureFixture) -> None:
    with serving(lambda body, _: reply("One and the same. " * 10, tokens=40)) as (url, _):
        ChatServer(url, "m").complete(ASK, 4, Decoding(1.0))
        assert "gave 4 equal replies at temperature 1" in caplog.text
