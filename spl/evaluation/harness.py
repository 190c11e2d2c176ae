"""EleutherAI's lm-evaluation-harness: its tasks put to a policy, and the logs of samples that it writes, read.

A log has a record a question. One of multiple choice holds the log-likelihood of every choice, as a continuation of the
prompt; one of generation holds the reply and the metrics of the task.
"""

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spl.evaluation.policies import EvaluatedPolicy
from spl.types import UserError

_NAME = re.compile(r"samples_(?P<task>.+)_(?P<time>\d{4}-\d\d-\d\dT[\d.-]+)\.jsonl")


@dataclass(frozen=True)
class TaskLog:
    """What one run of a policy said in a task.

    Attributes:
        answers: of multiple choice, a question's row to the index of its right choice.
        scores: of multiple choice, a question's row to the log-likelihoods of its choices, [1, K].
        metrics: of generation, by filter a question's row to its metrics.
    """

    answers: dict[str, int]
    scores: dict[str, Tensor]
    metrics: dict[str, dict[str, dict[str, float]]]


def run_tasks(
    policy: EvaluatedPolicy, folder: Path, tasks: Sequence[str], include: str | None, batch_size: int, **asking: Any
) -> set[str]:
    """Put tasks to a policy; the harness writes its results and logs of samples into a folder -> the logs' tasks.

    Args:
        policy: to ask.
        folder: for the logs.
        tasks: names of the harness' own, or of those in `include`.
        include: folder of more tasks, in YAML.
        batch_size: questions asked at a time.
        asking: further arguments of the harness' `simple_evaluate`.

    Raises:
        UserError: a task cannot be run.
    """
    from lm_eval import simple_evaluate
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    tracker = EvaluationTracker(output_path=str(folder / "results.json"))  # which puts the logs beside that file
    model = HFLM(pretrained=policy.model, tokenizer=policy.tokenizer, batch_size=batch_size)
    try:
        manager = TaskManager(include_path=include)
        found = simple_evaluate(
            model,
            tasks=list(tasks),
            task_manager=manager,
            evaluation_tracker=tracker,
            log_samples=True,
            bootstrap_iters=0,
            **asking,
        )
    except (KeyError, ValueError, OSError) as error:
        said = str(error).strip().split("\n")[0]
        raise UserError(f"lm-eval cannot run {', '.join(tasks)}: {said}") from error
    samples = found.pop("samples")
    tracker.save_results_aggregated(results=found, samples=samples)
    for task, of in samples.items():
        tracker.save_results_samples(task, of)
    return set(samples)


def read_logs(place: str, tasks: Collection[str] | None = None) -> dict[str, TaskLog]:
    """The newest log of every task in a folder and those below it, or a single log.

    Args:
        place: of the logs.
        tasks: those to read; all where not given.

    Raises:
        UserError: there is none, or one cannot be read; names file and line.
    """
    path = Path(place)
    files = sorted(path.rglob("samples_*.jsonl") if path.is_dir() else [path], key=_time)
    newest = {_task(file): file for file in files if file.is_file() and (tasks is None or _task(file) in tasks)}
    if not newest:
        raise UserError(f"no log of lm-eval in {place!r}: expected samples_TASK_TIME.jsonl, as --log_samples writes.")
    return {task: _read(task, file) for task, file in sorted(newest.items())}


def _time(file: Path) -> str:
    found = _NAME.fullmatch(file.name)
    return found["time"] if found else ""


def _task(file: Path) -> str:
    found = _NAME.fullmatch(file.name)
    return found["task"] if found else file.stem


def _read(task: str, file: Path) -> TaskLog:
    log = TaskLog({}, {}, {})
    records = list(_records(file))
    # A task with several right choices, such as truthfulqa_mc2, has shares of them as acc, and its own metrics alone.
    single = all(record.get("acc", 0) in (0, 1) for _, record in records)
    listed = [record for _, record in records if single and _is_choice(record)]
    by_text = bool(listed) and not all(_agrees(record, _by_index(record)) for record in listed)
    for where, record in records:
        row = f"{task} {record['doc_id']} {record['doc_hash'][:8]}"
        if single and _is_choice(record):
            answer = _by_text(record) if by_text else _by_index(record)
            if answer is None or not _agrees(record, answer):
                raise UserError(f"{where}: the target {record['target']!r} is not the choice that acc counts as right.")
            log.answers[row] = answer
            log.scores[row] = torch.tensor([_scores(record)], dtype=torch.double)
        else:
            metrics = {name: record.get(name) for name in record["metrics"]}
            numbers = {name: float(v) for name, v in metrics.items() if isinstance(v, int | float)}
            log.metrics.setdefault(str(record["filter"]), {})[row] = numbers
    return log


def _records(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    needed = {"doc_id", "doc_hash", "target", "arguments", "filtered_resps", "filter", "metrics"}
    # Not splitlines: the harness writes Unicode's other ends of lines as they are.
    for number, line in enumerate(file.read_text(encoding="utf-8").rstrip("\n").split("\n"), 1):
        where = f"{file}, line {number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(f"{where}: no JSON ({error}).") from error
        if not isinstance(record, dict) or (missing := needed - record.keys()):
            raise UserError(f"{where}: no sample of lm-eval: {', '.join(sorted(missing))} missing.")
        yield where, record


def _is_choice(record: Mapping[str, Any]) -> bool:
    """Whether every answer is a log-likelihood and whether it is what greedy decoding writes."""
    answers = record["filtered_resps"]
    return len(answers) > 1 and all(isinstance(a, list) and len(a) == 2 and str(a[1]) in _FLAGS for a in answers)


_FLAGS = ("True", "False")


def _scores(record: Mapping[str, Any]) -> list[float]:
    return [float(answer[0]) for answer in record["filtered_resps"]]


def _by_index(record: Mapping[str, Any]) -> int | None:
    """The target as a number, which most tasks give."""
    target = str(record["target"])
    return int(target) if target.isdecimal() and int(target) < len(record["filtered_resps"]) else None


def _by_text(record: Mapping[str, Any]) -> int | None:
    """The target as one of the choices' texts; logs do not tell which of the two a task gives."""
    texts = [str(record["arguments"][f"gen_args_{k}"]["arg_1"]).strip() for k in range(len(record["filtered_resps"]))]
    target = str(record["target"]).strip()
    if texts == [target, target] and "acc" in record:
        # Two beginnings of one text, as of winogrande: which of them is right only acc tells.
        best = int(torch.tensor(_scores(record)).argmax())
        return best if record["acc"] else 1 - best
    return texts.index(target) if texts.count(target) == 1 else None


def _agrees(record: Mapping[str, Any], answer: int | None) -> bool:
    """Whether the harness' own accuracy says the same."""
    scores = _scores(record)
    return answer is not None and ("acc" not in record or (scores.index(max(scores)) == answer) == bool(record["acc"]))
