"""`spl evaluate lm-eval`: the tasks of lm-evaluation-harness, put to policies, in our calibration measures."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from spl.evaluation.asked import collect, split
from spl.evaluation.choices import crossed
from spl.evaluation.harness import TaskLog, read_logs, run_tasks
from spl.evaluation.listed import each_policy
from spl.evaluation.scaling import NOTES, SHOWN, Scaling, estimate, records_of
from spl.evaluation.table import print_estimates
from spl.models import Dtype
from spl.results import digest, header, write
from spl.types import UserError

log = logging.getLogger(__name__)

NOTE = (
    "Answers of lm-eval tasks are choices by the log-likelihood of each as a continuation of the prompt, its end not "
    "counted; probabilities are normalised over the choices."
)


def lm_eval(
    output: Path,
    models: dict[str, str | list[str]] | None = None,
    logs: dict[str, str | list[str]] | None = None,
    tasks: list[str] | None = None,
    include: str | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    apply_chat_template: bool = False,
    batch_size: int = 8,
    fit: float = 0.3,
    num_bins: int = 15,
    temperatures: list[float] | None = None,
    base: str | None = None,
    dpo: str | None = None,
    dtype: Dtype = "float32",
    device: str = "auto",
    trust_remote_code: str | None = None,
    draws: int = 500,
    seed: int = 0,
) -> None:
    """Calibration and accuracy in tasks of EleutherAI's lm-evaluation-harness.

    Runs the harness on models, or reads the logs that it wrote elsewhere with --log_samples. Multiple choice gets all
    that `spl evaluate calibration` measures; of generation the tasks' own metrics are taken. Running it needs the
    package lm-eval: pip install 'spl[lm-eval]'.

    Example: spl evaluate lm-eval --models '{dpo: runs/dpo/export}' --tasks hellaswag --output results/hellaswag.jsonl

    Args:
        output: file of results to write; the harness' own files go to a folder beside it, OUTPUT_logs.
        models: a label to a model's folder, adapter, .gguf file or Hub id, or to a list of these, one a training seed.
        logs: a label to the harness' logs, a folder or a file, or to a list of these, one a training seed.
        tasks: to run, by their names in the harness.
        include: folder of more tasks, in YAML.
        num_fewshot: worked examples; the task's own number where not given.
        limit: questions of each task; all where not given.
        apply_chat_template: put questions as turns of a conversation.
        batch_size: questions asked at a time.
        fit: share of each task's questions that temperatures are fitted on, which are then measured no more.
        num_bins: of calibration errors and reliability diagrams; not stated by the paper.
        temperatures: at which every policy is shown too.
        base: label of the policy that the others started from; differences to it are told.
        dpo: label of the policy trained by DPO, see `spl evaluate calibration`.
        dtype: of the weights.
        device: "cpu", "cuda" and so on; "auto" takes CUDA where there is one.
        trust_remote_code: name of a model whose own code may run.
        draws: of the bootstrap, over questions and training seeds.
        seed: of the choice of questions that temperatures are fitted on, and of the bootstrap.

    Raises:
        UserError: the harness is not installed, or a model, task, log or setting cannot be used.
    """
    settings = dict(locals())
    scaling = Scaling(num_bins, draws, seed, tuple(temperatures or ()), base, dpo)
    scaling.check({**(models or {}), **(logs or {})})
    _check(models or {}, logs or {}, tasks or ())
    places = {label: [of] if isinstance(of, str) else list(of) for label, of in (logs or {}).items()}
    ran: dict[str, set[str]] = {}  # the tasks in a folder that are not of an earlier run
    loading = {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code}
    asking = {"num_fewshot": num_fewshot, "limit": limit, "apply_chat_template": apply_chat_template}
    for label, policy in each_policy(models, **loading) if models else ():
        folder = output.with_name(f"{output.stem}_logs") / label / str(len(places.setdefault(label, [])))
        ran[str(folder)] = run_tasks(policy, folder, tasks or (), include, batch_size=batch_size, **asking)
        places[label].append(str(folder))
        del policy  # before the next is loaded
    said = {label: [read_logs(place, ran.get(place)) for place in of] for label, of in places.items()}
    records: list[dict[str, Any]] = [{"kind": "note", "text": text} for text in (NOTE, *NOTES)]
    for task in _common(said):
        records += _records(task, {label: [run[task] for run in runs] for label, runs in said.items()}, fit, scaling)
    hashes = {place: digest(Path(place)) for of in places.values() for place in of}
    write(output, header("lm-eval", settings, (), seed, logs=hashes), records)
    print_estimates(records, SHOWN)
    log.info("Wrote %s.", output)


def _check(models: Mapping[str, Any], logs: Mapping[str, Any], tasks: Sequence[str]) -> None:
    if not models and not logs:
        raise UserError("nothing to read: give models and tasks to run, or logs.")
    if models and not find_spec("lm_eval"):
        raise UserError("running the harness needs the package lm-eval: pip install 'spl[lm-eval]'.")
    if models and not tasks:
        raise UserError("tasks is empty: give the names of tasks to run, such as --tasks arc_easy hellaswag.")
    if both := models.keys() & logs.keys():
        raise UserError(f"models and logs both have the label {min(both)!r}: give each policy one of the two.")


def _common(said: Mapping[str, Sequence[Mapping[str, TaskLog]]]) -> list[str]:
    """Tasks that every run was asked.

    Raises:
        UserError: there is none.
    """
    runs = [run.keys() for of in said.values() for run in of]
    common = set.intersection(*map(set, runs))
    if not common:
        raise UserError("the logs have no task in common: policies are compared on the same tasks.")
    if left := set.union(*map(set, runs)) - common:
        log.warning("Left out, as not all were asked: %s.", ", ".join(sorted(left)))
    return sorted(common)


def _records(
    task: str, said: Mapping[str, Sequence[TaskLog]], fit: float, scaling: Scaling
) -> Iterator[dict[str, Any]]:
    first = next(iter(said.values()))[0]
    if first.answers:
        asked = collect(first.answers, {label: [run.scores for run in runs] for label, runs in said.items()})
        yield from records_of(task, *split(asked, fit, scaling.seed, task), scaling)
    for label, runs in said.items():
        for name in first.metrics:
            yield from _metrics(task, label, name, [run.metrics.get(name, {}) for run in runs], scaling)


def _metrics(
    task: str, label: str, name: str, runs: Sequence[Mapping[str, Mapping[str, float]]], scaling: Scaling
) -> Iterator[dict[str, Any]]:
    """Of generation: the task's own metrics by question, and their means; a filter of replies is the setting."""
    place = {"policy": label, "setting": name, "group": task}
    rows = [row for row in runs[0] if all(row in run for run in runs)]
    for number, run in enumerate(runs):
        for row in rows:
            seeded = {"train_seed": number if len(runs) > 1 else None, "item": row}
            yield {"kind": "item", **place, **seeded, "values": dict(run[row])}
    for metric in dict.fromkeys(metric for row in rows for metric in runs[0][row]):
        known = [row for row in rows if all(metric in run[row] for run in runs)]
        if not known:
            continue
        values = torch.tensor([[run[row][metric] for row in known] for run in runs], dtype=torch.double)
        mean = crossed(lambda of: float(of.mean()), values, draws=scaling.draws, seed=scaling.seed)
        yield estimate(place, metric, mean)
