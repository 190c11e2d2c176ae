"""`spl sample` as its users run it: what is in the file, and that it comes out the same however it came about."""

import functools
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from local_server import Answer, refusal, reply, serving

from spl.cli import main
from spl.evaluation import drawing_particles
from spl.evaluation.policies import EvaluatedPolicy
from spl.evaluation.sample import sample
from spl.evaluation.sample_files import read_samples
from spl.results import Record, ResultsError, read
from spl.types import UserError

QUESTIONS = ["Tea?", "Name a colour, any colour, and say why it is the one you named.", "Why?", "Write.", "A story!"]


@pytest.fixture(scope="module", autouse=True)
def loaded_once() -> Iterator[None]:
    """One tiny model for all runs."""
    policy = EvaluatedPolicy.load("tiny", device="cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EvaluatedPolicy, "load", lambda *args, **kwargs: policy)
        yield


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"id": f"q{k}", "prompt": text}) + "\n" for k, text in enumerate(QUESTIONS)))
    return str(path)


def run(prompts: str, output: Path, **options: Any) -> list[Record]:
    """All records but the header."""
    settings = {"model": "tiny", "num_samples": 3, "max_new_tokens": 8, "batch_size": 6} | options
    sample(prompts=prompts, output=output, **settings)
    return read(output).records


def test_the_file(prompts: str, tmp_path: Path) -> None:
    args = ["sample", "tiny", "--prompts", prompts, "--output", str(tmp_path / "a.jsonl"), "--num_samples", "3"]
    main([*args, "--max_new_tokens", "8", "--temperature", "1.2", "--policy", "dpo", "--train_seed", "4"])
    results = read(tmp_path / "a.jsonl")
    assert results.header["program"] == "sample" and results.header["settings"]["temperature"] == 1.2
    assert results.header["inputs"].keys() == {prompts} and results.header["fingerprint"]
    (file,) = read_samples([tmp_path / "a.jsonl"])
    assert (file.policy, file.setting, file.train_seed) == ("dpo", "t 1.2", 4)
    assert [*map(len, file.replies.values())] == [3] * len(file.prompts)
    assert file.prompts["q1"] == [{"role": "user", "content": QUESTIONS[1]}]
    replies = [reply for drawn in file.replies.values() for reply in drawn]
    assert len(file.replies) == 5 and len(replies) == 15
    for one in replies:
        assert one.num_tokens == 8 if one.finish == "length" else 1 <= one.num_tokens <= 8
        assert one.logp is not None and -8 * 12 < one.logp < 0
    assert {one.finish for one in replies} <= {"stop", "length"}


def test_a_file_that_was_cut_anywhere_is_gone_on_with(prompts: str, tmp_path: Path) -> None:
    """As a killed program leaves it: whole lines or half a one, in the middle of what was written together."""
    whole = tmp_path / "whole.jsonl"
    run(prompts, whole)
    content, rng = whole.read_bytes(), random.Random(0)
    for cut in sorted(rng.sample(range(1, len(content)), 8)):
        path = tmp_path / f"{cut}.jsonl"
        path.write_bytes(content[:cut])
        run(prompts, path)
        assert path.read_bytes().splitlines()[1:] == content.splitlines()[1:]


def test_other_settings_do_not_go_on(prompts: str, tmp_path: Path) -> None:
    run(prompts, tmp_path / "a.jsonl")
    with pytest.raises(ResultsError, match=r"was begun with settings\.max_new_tokens 8, not 9"):
        run(prompts, tmp_path / "a.jsonl", max_new_tokens=9)


def keyed(records: list[Record]) -> dict[Any, Any]:
    samples = [r for r in records if r["kind"] == "sample"]
    return {(r["item"], r["index"]): (r["text"], r["num_tokens"], r["finish"]) for r in samples}


def test_batches_and_shards_change_nothing(prompts: str, tmp_path: Path) -> None:
    whole = keyed(run(prompts, tmp_path / "a.jsonl"))
    assert len(whole) == 15
    assert keyed(run(prompts, tmp_path / "b.jsonl", batch_size=2)) == whole  # a prompt's replies in two batches
    parts = [keyed(run(prompts, tmp_path / f"{k}.jsonl", shard=f"{k}/2", batch_size=100)) for k in (1, 2)]
    assert not parts[0].keys() & parts[1].keys() and parts[0] | parts[1] == whole
    (file,) = read_samples([tmp_path / "1.jsonl", tmp_path / "2.jsonl"])
    assert len(file.replies) == 5
    more = keyed(run(prompts, tmp_path / "c.jsonl", num_samples=4))
    assert {key: one for key, one in more.items() if key[1] < 3} == whole
    assert keyed(run(prompts, tmp_path / "d.jsonl", seed=1)) != whole


def test_a_global_temperature(prompts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options: dict[str, Any] = {"global_temperature": 1.5, "num_particles": 16, "num_runs": 2}
    records = run(prompts, tmp_path / "a.jsonl", **options)
    (file,) = read_samples([tmp_path / "a.jsonl"])
    assert file.setting == "global 1.5" and {*map(len, file.replies.values())} == {3}
    values = [r["values"] for r in records if r["kind"] == "item"]
    assert len(values) == 5 and all(0.1 <= v["surviving_ancestors"] <= 1 for v in values)
    assert "log z spread" in capsys.readouterr().out
    content = (tmp_path / "a.jsonl").read_bytes()
    (tmp_path / "b.jsonl").write_bytes(content[: len(content) // 2])
    assert run(prompts, tmp_path / "b.jsonl", **options) == records


@pytest.mark.parametrize(("below", "few"), [(0.5, "surviving_ancestors"), (0.0, "effective_sample_size")])
def test_a_prompt_of_few_ancestors_is_left_out(
    prompts: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    below: float,
    few: str,
) -> None:
    """At a low temperature a few short replies take over: by their weights where nothing is resampled."""
    options: dict[str, Any] = {"global_temperature": 0.2, "num_particles": 64, "num_runs": 2, "max_new_tokens": 24}
    options["resample_below"] = below
    with pytest.raises(UserError, match="no prompt has replies"):
        run(prompts, tmp_path / "a.jsonl", **options)
    records = read(tmp_path / "a.jsonl").records
    assert [r["kind"] for r in records] == ["note", "item"] * 5
    assert all(r["values"][few] < 0.1 for r in records if r["kind"] == "item")
    assert caplog.text.count("is left out: ") == 5

    def nothing(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("drawn again")

    monkeypatch.setattr(drawing_particles, "draw_tempered", nothing)
    with pytest.raises(UserError, match="no prompt has replies"):
        run(prompts, tmp_path / "a.jsonl", **options)


def test_a_server(prompts: str, tmp_path: Path) -> None:
    """Broken off after some of the answers; the same command asks for the others alone."""
    stop = True

    def answer(body: dict[str, Any], number: int) -> Answer:
        if stop and number >= 3:
            return 404, {"error": {"message": "gone"}}
        texts = [f"{body['messages'][0]['content']} {k}" for k in range(body["n"])]
        return reply(*texts, tokens=2 * body["n"], logprobs=[-1.0, -0.5])

    with serving(answer) as (url, bodies):
        options: dict[str, Any] = {"model": None, "server": url, "server_model": "m", "concurrency": 1}
        with pytest.raises(UserError, match="has no model 'm'"):
            run(prompts, tmp_path / "a.jsonl", **options)
        stop, before = False, len(bodies)
        records = run(prompts, tmp_path / "a.jsonl", **options)
        assert len(bodies) - before == 2
    found = keyed(records)
    assert found == {(f"q{k}", n): (f"{q} {n}", 2, "stop") for k, q in enumerate(QUESTIONS) for n in range(3)}
    assert {r["logp"] for r in records if r["kind"] == "sample"} == {-1.5}
    assert url not in (tmp_path / "a.jsonl").read_text()


def test_a_prompt_that_a_server_refuses(prompts: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is left out and told; the same command asks for it again, and for nothing else."""
    least = 1

    def answer(body: dict[str, Any], _: int) -> Answer:
        number = QUESTIONS.index(body["messages"][0]["content"])
        return (
            reply(*["Tea."] * body["n"], tokens=body["n"], logprobs=[-1.0]) if number >= least else refusal("too long")
        )

    path = tmp_path / "a.jsonl"
    with serving(answer) as (url, bodies):
        options: dict[str, Any] = {"model": None, "server": url, "server_model": "m", "concurrency": 2}
        for _ in range(2):
            caplog.clear()
            found = keyed(run(prompts, path, **options))
            assert {item for item, _ in found} == {"q1", "q2", "q3", "q4"}
            assert caplog.text.count("prompt q0 is left out: ") == 1 and "too long" in caplog.text
            [file] = read_samples([path])
            assert file.left_out == {"q0"} and len(file.replies) == 4
        assert url not in path.read_text()
        asked = [body["messages"][0]["content"] for body in bodies]
        assert asked.count(QUESTIONS[1]) == 1 and asked.count(QUESTIONS[0]) > 1
        least = 0
        caplog.clear()
        assert len(keyed(run(prompts, path, **options))) == 15 and not caplog.text.count("left out")
        assert len(read_samples([path])[0].replies) == 5
        least = 9
        with pytest.raises(UserError, match="no prompt has replies"):
            run(prompts, tmp_path / "b.jsonl", **options)


def test_a_server_whose_own_filters_may_hold_says_so_in_the_file(prompts: str, tmp_path: Path) -> None:
    def answer(body: dict[str, Any], _: int) -> Answer:
        odd = {"top_k", "min_p"} & body.keys()
        return (
            refusal(f"unexpected {odd}", 422)
            if odd
            else reply(*["Tea."] * body["n"], tokens=body["n"], logprobs=[-1.0])
        )

    with serving(answer) as (url, _):
        options: dict[str, Any] = {"model": None, "server": url, "server_model": "m", "concurrency": 1}
        for _ in range(2):
            run(prompts, tmp_path / "a.jsonl", **options)
    [file] = read_samples([tmp_path])
    assert len(file.notes) == 1 and "does not take min_p and top_k" in file.notes[0] and not file.left_out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"model": None}, "give either --model"),
        ({"server": "http://localhost:1"}, "give either --model"),
        ({"model": None, "server": "http://localhost:1"}, "--server and --server_model belong together"),
        ({"problems": "arithmetic"}, "--prompts and --problems are two sources"),
        ({"shard": "0/2"}, "shard must be as 3/8"),
        ({"shard": "7/8"}, "shard 7/8 is empty: there are 5 prompts"),
        ({"concurrency": 0}, "concurrency must be 1 or more"),
        ({"num_samples": 0}, "num_samples must be 1 or more"),
        ({"top_p": 2.0}, "top_p must lie"),
        ({"global_temperature": 1.2, "top_p": 0.5}, "stands in place of top_p 0.5"),
        ({"global_temperature": 1.2, "num_particles": 2, "num_runs": 2, "num_samples": 5}, "raise num_particles"),
        ({"max_new_tokens": 4096}, "positions: lower max_new_tokens"),
    ],
)
def test_what_cannot_be_asked(prompts: str, tmp_path: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        run(prompts, tmp_path / "a.jsonl", **options)


@pytest.mark.parametrize("options", [{}, {"global_temperature": 1.5}])
def test_a_prompt_that_is_too_long_is_said_before_anything_is_drawn(tmp_path: Path, options: dict[str, Any]) -> None:
    path, output = tmp_path / "prompts.jsonl", tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("Tea?", "Tea? " * 2000)))
    with pytest.raises(UserError, match=r"prompt 2 has .* positions: lower max_new_tokens, or leave the prompt out"):
        run(str(path), output, **options)
    assert not output.exists()


def test_a_model_that_gives_no_numbers_ends_in_a_sentence(
    prompts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = EvaluatedPolicy.load("tiny").model
    monkeypatch.setattr(model, "forward", wraps_with_nan(model.forward))
    for options in ({}, {"global_temperature": 1.5}):
        with pytest.raises(UserError, match="cannot be drawn from: the model's logits are not finite"):
            run(prompts, tmp_path / f"{len(options)}.jsonl", **options)


def wraps_with_nan(forward: Any) -> Any:
    @functools.wraps(forward)
    def broken(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output.logits = output.logits * float("nan")
        return output

    return broken


def test_an_output_that_is_a_folder_ends_in_a_sentence(
    prompts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["sample", "tiny", "--prompts", prompts, "--output", str(tmp_path), "--max_new_tokens", "4"])
    assert capsys.readouterr().err.startswith(f"error: {tmp_path} could not be written: Is a directory")


def test_samples_of_another_seed_are_of_the_same_problems(tmp_path: Path) -> None:
    rows = [{"question": f"What is {k} + 1?", "answer": k + 1} for k in range(40)]
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = []
    for seed in (0, 1):
        settings = {"problems": str(tmp_path / "problems.jsonl"), "num_prompts": 3, "num_samples": 1, "seed": seed}
        sample("tiny", output=tmp_path / f"{seed}.jsonl", max_new_tokens=1, **settings)
        asked.append(read(tmp_path / f"{seed}.jsonl").of("prompt"))
    assert len(asked[0]) == 3 and asked[0] == asked[1]
