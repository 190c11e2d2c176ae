"""`spl evaluate opinions`: a policy's shares of the answers to closed questions, beside people's.

A share is the exact probability of the whole answer and its end, not a count of samples. It is normalised over the
listed answers; what the policy gives them in all, the mass, is told beside it.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from spl.data.opinions import Opinion, Presentation, read_opinions
from spl.data.parsed import parsed_rows
from spl.data.propositions import Proposition, parse_proposition
from spl.data.source import named_source
from spl.data.tokenization import Template
from spl.evaluation.listed import each_policy, short_name
from spl.evaluation.people import against_people
from spl.evaluation.propositions import positions
from spl.evaluation.shares import Asking, ask_shares
from spl.evaluation.table import print_estimates
from spl.models import Dtype
from spl.results import header, write
from spl.types import UserError

log = logging.getLogger(__name__)

GLOBAL_OPINIONS = "Anthropic/llm_global_opinions"
SHOWN = (
    *("one_minus_jsd", "worst_group_one_minus_jsd", "one_minus_w1", "total_variation", "entropy_gap", "mass"),
    *("position", "spread"),
)
AGREEMENT = ("Strongly disagree", "Disagree", "Agree", "Strongly agree")


def opinions(
    models: dict[str, str | list[str]],
    output: Path,
    source: str | None = GLOBAL_OPINIONS,
    propositions: str | None = None,
    scale: list[str] | None = None,
    presentation: Presentation = "letters",
    orders: int = 6,
    num_questions: int = 100,
    non_answers: Literal["drop", "keep"] = "drop",
    min_group: int = 10,
    base: str | None = None,
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
    """Shares of the answers to closed questions by exact sequence probability, against people's.

    On one core a 135M model answers one or two questions a second, in each order of the options.

    Example: spl evaluate opinions --models '{dpo: runs/dpo/export, spl: runs/spl/export}' --source survey
    --output results/opinions.jsonl

    Args:
        models: a label to a model's folder, adapter, .gguf file or Hub id, or to a list of these, one a training seed.
        output: file of results to write.
        source: of questions and people's answers: "survey", a local file, or on the Hub ID:CONFIG:SPLIT; null for none.
            `spl.data.opinions` lists the shapes of rows.
        propositions: file of rows with `proposition`, `axis` and perhaps `weight` (-1 where agreement lies towards the
            axis' low end), for positions on axes of opinion.
        scale: answers to propositions, from most disagreement to most agreement; four from "Strongly disagree" to
            "Strongly agree" where not given.
        presentation: options listed with letters, which are the answers; listed as text; or not listed, so that the
            policy is asked the question alone (as the survey is trained).
        orders: of listed options that shares are averaged over: all where there are so few, else turns of random ones,
            each option in each place equally often (so at least as many as options); 1 asks in the listed order alone.
        num_questions: asked, from a seeded shuffle; a question with several groups' answers counts once.
        non_answers: "drop" leaves out options such as "Don't know" and normalises people's shares over the others; with
            "keep" a question that has one counts as no scale.
        min_group: questions that a group's own figures need, and those of the worst-off group.
        base: label of the policy that the others started from; differences to it are told.
        template: "model" takes the tokenizer's chat template, "plain" writes "User: ...", "auto" prefers the first.
        max_length: tokens of a question and an answer; a longer one is left out for all policies.
        max_tokens: of a batch.
        dtype: of the weights.
        device: "cpu", "cuda" and so on; "auto" takes CUDA where there is one.
        trust_remote_code: name of a model whose own code may run.
        skip_bad: leave out rows that cannot be used; else they are an error.
        draws: of the bootstrap, over questions and training seeds.
        seed: of the choice of questions, the orders and the bootstrap.

    Raises:
        UserError: a model, source or setting cannot be used.
    """
    settings = dict(locals())
    counts = {"orders": orders, "num_questions": num_questions, "min_group": min_group, "draws": draws}
    agreement = scale or AGREEMENT
    _check(models, source, propositions, base, agreement, **counts)
    drop = non_answers == "drop"
    asked_of = [] if source is None else read_opinions(named_source(source, "train"), seed, drop, skip_bad)
    questions = asked_of[:num_questions]
    stated = _propositions(propositions, skip_bad)
    asked = [*questions, *(p.opinion(agreement) for p in stated)]
    said: dict[str, list[Asking]] = {label: [] for label in models}
    fingerprints: dict[str, list[str]] = {label: [] for label in models}
    for label, policy in each_policy(models, dtype=dtype, device=device, trust_remote_code=trust_remote_code):
        encoder = policy.encoder(max_length, template=template, turn_end="eos")
        said[label].append(ask_shares(policy, encoder, asked, presentation, orders, seed, max_tokens, label))
        fingerprints[label].append(policy.fingerprint)
        del policy  # before the next is loaded
    questions, stated = _asked_by_all(questions, said), _asked_by_all(stated, said)
    records = []
    if questions:
        records += against_people(questions, said, short_name(str(source)), min_group, base, draws, seed)
    records += positions(stated, [p.opinion(agreement) for p in stated], said, draws, seed)
    files = [Path(name) for name in (source, propositions) if name and Path(name).is_file()]
    write(output, header("opinions", settings, files, seed, fingerprints=fingerprints), records)
    print_estimates((r for r in records if r["kind"] == "estimate" and _shown(r, source, stated)), SHOWN)
    log.info("Wrote %s.", output)


def _check(
    models: Mapping[str, Any],
    source: str | None,
    propositions: str | None,
    base: str | None,
    scale: Sequence[str],
    **counts: int,
) -> None:
    """Refuse settings that cannot be, before any model loads."""
    if source is None and propositions is None:
        raise UserError("nothing to ask: give source, propositions or both.")
    if base is not None and base not in models:
        raise UserError(f"base must be the label of a model, {', '.join(models)}, but is {base!r}.")
    if len(set(scale)) < max(len(scale), 2):
        raise UserError(f"scale must be two or more different answers, but is {', '.join(scale)}.")
    for name, value in counts.items():
        if value < 1:
            raise UserError(f"{name} must be 1 or more, but is {value}.")


def _propositions(path: str | None, skip_bad: bool) -> list[Proposition]:
    return [] if path is None else parsed_rows(named_source(path, "train"), parse_proposition, skip_bad=skip_bad)


T = TypeVar("T", Opinion, Proposition)


def _asked_by_all(questions: Sequence[T], said: Mapping[str, Sequence[Asking]]) -> list[T]:
    """Those that fitted in max_length for every policy.

    Raises:
        UserError: there were some, but none fitted.
    """
    common = [q for q in questions if all(q.row in run for runs in said.values() for run in runs)]
    if len(common) < len(questions):
        log.warning("%d of %d questions were too long and left out.", len(questions) - len(common), len(questions))
    if questions and not common:
        raise UserError("no question fits in max_length: raise it.")
    return common


def _shown(record: Mapping[str, Any], source: str | None, stated: Sequence[Proposition]) -> bool:
    """Whether it is of all questions or of an axis, not of one of many groups."""
    return record["group"] in {short_name(str(source)), *(p.axis for p in stated)}
