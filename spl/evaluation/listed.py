"""Log-probabilities of listed answers: all answers of a question in one trie, several questions in a batch."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from spl.data.collate import EncodedExample, collate
from spl.evaluation.policies import EvaluatedPolicy
from spl.types import UserError


def each_policy(models: Mapping[str, str | list[str]], **loading: Any) -> Iterator[tuple[str, EvaluatedPolicy]]:
    """Every model with its label; one in memory at a time, if the caller lets go of it before it asks for the next.

    Args:
        models: a label to a model's name, or to those of one policy's training runs.
        loading: as `EvaluatedPolicy.load` takes it.

    Raises:
        UserError: there is none, or one cannot be loaded.
    """
    if not models:
        raise UserError("models is empty: give a label and a model, such as --models '{dpo: runs/dpo/export}'.")
    for label, names in models.items():
        for name in [names] if isinstance(names, str) else names:
            yield label, EvaluatedPolicy.load(name, **loading)


def listed_logps(
    policy: EvaluatedPolicy, examples: Sequence[EncodedExample], max_tokens: int, label: str
) -> list[Tensor]:
    """The exact log-probability of each response of each example, in nats -> of every example [K] in float64.

    Args:
        policy: to ask.
        examples: questions, their responses the answers.
        max_tokens: of a batch; an example longer than that has one for itself.
        label: what to call the policy while it works.
    """
    found: list[Tensor] = []
    groups = list(batches(examples, max_tokens))
    console = Console(stderr=True)
    for group in track(groups, f"asking {label}", console=console, transient=True, disable=not console.is_terminal):
        logps = policy.score(collate(group)).logps.double().cpu()
        found += torch.split(logps, [len(example.sequences) for example in group])
    return found


class Tokens(NamedTuple):
    """A conversation with a reply, and where the reply starts in it."""

    sequence: tuple[int, ...]
    start: int


def tries(rows: Iterable[Tokens], max_tokens: int) -> Iterator[EncodedExample]:
    """The different replies to one prompt, as examples of at most max_tokens or of one reply; empty ones are left out.

    Args:
        rows: of one prompt.
        max_tokens: of an example.
    """
    part: list[Tokens] = []
    for row in sorted({row for row in rows if len(row.sequence) > row.start}):
        if part and row.start + sum(len(s) - b for s, b in [*part, row]) > max_tokens:
            yield _example(part)
            part = []
        part.append(row)
    if part:
        yield _example(part)


def _example(part: Sequence[Tokens]) -> EncodedExample:
    return EncodedExample(tuple(s for s, _ in part), tuple(b for _, b in part), (), None, "")


def batches(examples: Sequence[EncodedExample], max_tokens: int) -> Iterator[list[EncodedExample]]:
    """In order, for neighbours (orders of one question, questions after the same worked examples) begin alike."""
    group: list[EncodedExample] = []
    tokens = 0
    for example in examples:
        if group and tokens + example.num_tokens > max_tokens:
            yield group
            group, tokens = [], 0
        group.append(example)
        tokens += example.num_tokens
    if group:
        yield group


def short_name(source: str) -> str:
    """What a data set is called in results: of a file its name alone, of one on the Hub what follows the owner."""
    return Path(source.split(":")[0]).name.split(".")[0]
