"""`spl evaluate calibration`: does a policy know what it knows, from the probabilities of answer letters.

MMLU and TruthfulQA by default, or any multiple-choice questions. A policy appears as it is and with a temperature
fitted on questions that nothing else is measured on: what such a temperature does, training need not be credited with.
"""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from spl.data.collate import EncodedExample
from spl.data.files import is_local
from spl.data.multiple_choice import MultipleChoice, encode_choice, parse_choices
from spl.data.orders import orders_of
from spl.data.parsed import parsed_rows
from spl.data.source import Source, named_source
from spl.data.tokenization import Encoder, Template, TooLongError
from spl.evaluation.asked import Scores, collect, split
from spl.evaluation.listed import each_policy, listed_logps, short_name
from spl.evaluation.policies import EvaluatedPolicy
from spl.evaluation.scaling import NOTES, SHOWN, Scaling, records_of
from spl.evaluation.table import print_estimates
from spl.models import Dtype
from spl.results import header, write
from spl.types import UserError

log = logging.getLogger(__name__)

MMLU = "cais/mmlu:all:validation"
TRUTHFULQA = "truthfulqa/truthful_qa:multiple_choice:validation"
MMLU_SHOTS = "cais/mmlu:all:dev"


def calibration(
    models: dict[str, str | list[str]],
    output: Path,
    questions: list[str] | None = None,
    fit: float | str = 0.3,
    few_shot: int = 0,
    shots: str = MMLU_SHOTS,
    orders: int = 1,
    num_questions: int = 200,
    num_bins: int = 15,
    temperatures: list[float] | None = None,
    base: str | None = None,
    dpo: str | None = None,
    template: Template = "auto",
    max_length: int = 2048,
    max_tokens: int = 2048,
    dtype: Dtype = "float32",
    device: str = "auto",
    trust_remote_code: str | None = None,
    skip_bad: bool = False,
    draws: int = 500,
    seed: int = 0,
) -> None:
    """Calibration of multiple-choice answers, from the log-probabilities of their letters.

    Probabilities are normalised over the letters; the mass on them is told beside. On one core a 135M model answers
    one or two questions a second.

    Example: spl evaluate calibration --models '{sft: runs/sft/export, dpo: runs/dpo/export}' --base sft
    --output results/calibration.jsonl

    Args:
        models: a label to a model's folder, adapter, .gguf file or Hub id, or to a list of these, one a training seed.
        output: file of results to write.
        questions: MMLU's and TruthfulQA's shapes of rows: local files, or on the Hub ID:CONFIG:SPLIT. MMLU's validation
            split and TruthfulQA where none are given. Measures are of each by itself.
        fit: what temperatures are fitted on: a share of each source's questions, which is then measured no more, or
            another source.
        few_shot: worked examples before each question, of its own subject.
        shots: where these come from.
        orders: of the choices that probabilities are averaged over, see `spl.data.orders`; 1 asks once, MMLU's choices
            in their own order and TruthfulQA's shuffled.
        num_questions: of each source, from a seeded shuffle.
        num_bins: of calibration errors and reliability diagrams; not stated by the paper.
        temperatures: at which every policy is shown too, such as alpha / beta of the policies trained by SPL.
        base: label of the policy that the others started from; differences to it are told, with it shown at the
            temperatures fitted for the others.
        dpo: label of the policy trained by DPO: told is the temperature at which its letters come closest to each other
            policy's. That SPL acts as a temperature says it is alpha / beta.
        template: "model" takes the tokenizer's chat template, "plain" writes "User: ...", "auto" prefers the first.
        max_length: tokens of a question with its worked examples; a longer one is left out for all policies.
        max_tokens: of a batch.
        dtype: of the weights.
        device: "cpu", "cuda" and so on; "auto" takes CUDA where there is one.
        trust_remote_code: name of a model whose own code may run.
        skip_bad: leave out rows that cannot be used; else they are an error.
        draws: of the bootstrap, over questions and training seeds.
        seed: of the choice of questions, their order and the bootstrap.

    Raises:
        UserError: a model, source or setting cannot be used.
    """
    settings = dict(locals())
    scaling = Scaling(num_bins, draws, seed, tuple(temperatures or ()), base, dpo)
    scaling.check(models)
    sources = questions or [MMLU, TRUTHFULQA]
    apart = [fit] if isinstance(fit, str) else []
    _check(few_shot, orders, num_questions, fit, sources)
    read = {name: _read(name, num_questions, seed, skip_bad) for name in (*sources, *apart)}
    asking = Asking(few_shot, _shots(shots, seed, skip_bad) if few_shot else {}, orders, seed, max_tokens)
    said: dict[str, list[dict[str, Scores]]] = {label: [] for label in models}
    fingerprints: dict[str, list[str]] = {label: [] for label in models}
    for label, policy in each_policy(models, dtype=dtype, device=device, trust_remote_code=trust_remote_code):
        encoder = policy.encoder(max_length, template=template)
        said[label].append({of: asking.ask(policy, encoder, asked, label) for of, asked in read.items()})
        fingerprints[label].append(policy.fingerprint)
        del policy  # before the next is loaded
    asked = {of: collect(_answers(choices), _of(of, said)) for of, choices in read.items()}
    records: list[dict[str, Any]] = [{"kind": "note", "text": text} for text in NOTES]
    for name in sources:
        held, kept = (asked[fit], asked[name]) if isinstance(fit, str) else split(asked[name], fit, seed, name)
        records += records_of(short_name(name), held, kept, scaling)
    files = [Path(name) for name in read if Path(name).is_file()]
    write(output, header("calibration", settings, files, seed, fingerprints=fingerprints), records)
    print_estimates(records, SHOWN)
    log.info("Wrote %s.", output)


def _check(few_shot: int, orders: int, num_questions: int, fit: float | str, sources: Sequence[str]) -> None:
    for name, value, least in (("few_shot", few_shot, 0), ("orders", orders, 1), ("num_questions", num_questions, 4)):
        if value < least:
            raise UserError(f"{name} must be {least} or more, but is {value}.")
    if not isinstance(fit, str) and not 0 < fit < 1:
        raise UserError(f"fit must be a share between 0 and 1, or a source of other questions, but is {fit:g}.")
    if twice := [name for name, count in Counter(map(short_name, sources)).items() if count > 1]:
        raise UserError(
            f"questions names more than one source {twice[0]!r}, which results could not tell apart: ask them in runs "
            "of their own, or give the files other names."
        )
    if isinstance(fit, str) and _found(fit) in map(_found, sources):
        raise UserError(
            f"fit must be other questions than are measured, but is {fit!r} too: give a share, such as 0.3."
        )


def _found(name: str) -> Source:
    """The source, however it is written."""
    source = named_source(name, "validation")
    return replace(source, path=str(Path(name).resolve())) if is_local(name) else source


def _read(name: str, num: int, seed: int, skip_bad: bool) -> list[MultipleChoice]:
    return parsed_rows(named_source(name, "validation"), parse_choices, num, seed, skip_bad)


def _answers(choices: Sequence[MultipleChoice]) -> dict[str, int]:
    return {choice.row: choice.answer for choice in choices}


def _of(source: str, said: Mapping[str, Sequence[Mapping[str, Scores]]]) -> dict[str, list[Scores]]:
    return {label: [run[source] for run in runs] for label, runs in said.items()}


def _shots(name: str, seed: int, skip_bad: bool) -> dict[str, list[MultipleChoice]]:
    """Worked examples of each subject."""
    found: dict[str, list[MultipleChoice]] = {}
    for choice in parsed_rows(named_source(name, "dev"), parse_choices, None, seed, skip_bad):
        found.setdefault(choice.subject, []).append(choice)
    return found


@dataclass(frozen=True)
class Asking:
    """How questions are put.

    Attributes:
        few_shot: worked examples before each.
        shots: these by subject.
        orders: of the choices, as `orders_of` takes it.
        seed: of the orders.
        max_tokens: of a batch.
    """

    few_shot: int
    shots: Mapping[str, Sequence[MultipleChoice]]
    orders: int
    seed: int
    max_tokens: int

    def ask(self, policy: EvaluatedPolicy, encoder: Encoder, questions: Sequence[MultipleChoice], label: str) -> Scores:
        """Log-probabilities of the letters, a question's row to [orders, K], in the choices' own order.

        Questions that are too long are left out.
        """
        fitting: list[tuple[MultipleChoice, list[EncodedExample]]] = []
        for choice in questions:
            try:
                fitting.append((choice, self._encoded(choice, encoder)))
            except TooLongError:
                continue
        examples = [example for _, of in fitting for example in of]
        logps = iter(listed_logps(policy, examples, self.max_tokens, label))
        found = {}
        for choice, _ in fitting:
            orders = self._orders(choice)
            # order[k] is the choice in place k, so that sorting the places brings the choices into their own order.
            found[choice.row] = torch.stack([next(logps)[torch.tensor(order).argsort()] for order in orders])
        return found

    def _encoded(self, choice: MultipleChoice, encoder: Encoder) -> list[EncodedExample]:
        shots = self.shots.get(choice.subject, ())[: self.few_shot]
        if len(shots) < self.few_shot:
            raise UserError(
                f"{choice.row}: expected {self.few_shot} worked examples of its subject {choice.subject!r} in shots, "
                f"but there are {len(shots)}: lower few_shot, or ask these questions in a run of their own."
            )
        return [encode_choice(choice.reordered(order), encoder, shots).example for order in self._orders(choice)]

    def _orders(self, choice: MultipleChoice) -> list[tuple[int, ...]]:
        return orders_of(len(choice.choices), self.orders, (self.seed, *choice.row.encode()))
