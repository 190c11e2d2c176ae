"""What goes through the network in a step: examples of the run's own data where they are at hand, or made-up ones."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import Any

from spl.data.collate import EncodedExample, collate
from spl.data.encode import Report, RowEncoder
from spl.data.files import is_local
from spl.data.source import SURVEY, Source
from spl.data.tokenization import Encoder
from spl.models import load_tokenizer
from spl.modules.flops import MatrixSizes, step_flops
from spl.planning.architectures import ARCHITECTURES
from spl.types import Comparison, PreferenceBatch, UserError

ASSUMED = 2048  # distinct tokens of a micro-batch of which nothing is known
READ = 256  # examples that are read of the data
TYPICAL = 64  # of them that operations are counted on


@dataclass(frozen=True, eq=False)
class Work:
    """A process's share of an optimiser step.

    Attributes:
        examples: as the data have them.
        batch_size: of a batch.
        accumulated: batches a step.
        max_tokens: most distinct tokens of a micro-batch.
        source: where the lengths are from.
    """

    examples: tuple[EncodedExample, ...]
    batch_size: int
    accumulated: int
    max_tokens: int | None
    source: str

    @property
    def tokens(self) -> float:
        """Distinct tokens of a step."""
        return self.accumulated * _mean(batch.num_tokens for batch in self.typical)

    @property
    def micro_batches(self) -> int:
        """Of a step."""
        if self.max_tokens is None:
            return self.accumulated
        return max(self.accumulated, -int(-self.tokens // self.max_tokens))

    def flops(self, sizes: MatrixSizes, reference: bool) -> float:
        """Operations of a step."""
        return self.accumulated * _mean(step_flops(sizes, batch, reference) for batch in self.typical)

    @cached_property
    def typical(self) -> list[PreferenceBatch]:
        """Batches of the first examples."""
        return [collate(list(few)) for few in self._batches()]

    @cached_property
    def largest(self) -> list[tuple[int | None, PreferenceBatch]]:
        """The largest micro-batch, and below it those of budgets of half as many tokens, down to the longest example.

        Each with its budget; the first has the run's own, or None.
        """
        least = max(example.num_tokens for example in self.examples)
        found = [(self.max_tokens, self._within(self.max_tokens))]
        budget = found[0][1].num_tokens // 2
        while budget > least:
            found.append((budget, self._within(budget)))
            budget //= 2
        return found if found[-1][1].num_examples == 1 else [*found, (least, self._within(least))]

    def _within(self, budget: int | None) -> PreferenceBatch:
        """As many of the longest examples as a batch has and a budget of tokens takes."""
        by_length = sorted(self.examples, key=lambda e: -e.num_tokens)
        if budget is None:
            return collate(by_length[: self.batch_size])
        taken, rest = by_length[:1], budget - by_length[0].num_tokens
        for example in by_length[1:]:
            if example.num_tokens <= rest and len(taken) < self.batch_size:
                taken.append(example)
                rest -= example.num_tokens
        return collate(taken)

    def padded(self) -> "Work":
        """The same step where every response stands with its prompt and is padded to the longest of its batch.

        The head runs over every token then, as it does in trainers that take the logits of whole sequences.
        """
        return replace(self, examples=tuple(map(_padded, self._batches())), batch_size=1, max_tokens=None)

    def _batches(self) -> list[tuple[EncodedExample, ...]]:
        """Of the data's order; the last of several is whole as well."""
        size, stop = self.batch_size, min(len(self.examples), max(TYPICAL, self.batch_size))
        whole = max(stop // size * size, min(stop, size))
        return [self.examples[start : start + size] for start in range(0, whole, size)]


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers)


def _padded(examples: Iterable[EncodedExample]) -> EncodedExample:
    """One example whose sequences share nothing, all as long as the longest."""
    sequences = [s for example in examples for s in example.sequences]
    length = max(map(len, sequences)) + 1  # the last token of a sequence goes through no network
    return EncodedExample(tuple((k,) * length for k in range(len(sequences))), (1,) * len(sequences), (), None, "")


def planned_work(
    model: str,
    data: Mapping[str, Any],
    accumulated: int,
    tokens: int | None,
    *,
    revision: str | None,
    trusted: str | None,
) -> Work:
    """The work of a run by its settings.

    Args:
        model: whose tokenizer cuts the data.
        data: the data module's settings.
        accumulated: batches a step.
        tokens: distinct tokens of a micro-batch, in place of the data's.
        revision: of the model on the Hub.
        trusted: the model whose own code may run.

    Raises:
        UserError: a row of the data cannot be used.
    """
    why = f"--tokens {tokens:,}" if tokens else _why_unread(model, data)
    if not why:
        tokenizer = load_tokenizer(model, revision, trusted)
        encoder = Encoder(tokenizer, data["max_length"], data["template"], data["truncation"], data["turn_end"])
        rows_of = RowEncoder(encoder, data["columns"] or {}, data["bad_rows"])
        rows = Source(data["path"], data["name"], data["split"]).rows()
        examples = tuple(encoded for _, encoded in islice(rows_of.examples(rows, Report()), READ))
        if not examples:
            raise UserError(f"{data['path']}: no usable example among its rows.")
        source = f"the first {len(examples)} examples of {data['path']}"
        return Work(examples, data["batch_size"], accumulated, data["max_tokens"], source)
    budget = tokens or data["max_tokens"] or ASSUMED
    size = data["batch_size"]
    return Work(tuple(_made_up(k, budget // size) for k in range(size)), size, accumulated, data["max_tokens"], why)


def _why_unread(model: str, data: Mapping[str, Any]) -> str:
    """Why the lengths of the data are not known, or nothing where they can be."""
    if data["mixture"]:
        return "assumed, since data.mixture names several sources (--tokens sets it)"
    if data["path"] != SURVEY and not is_local(data["path"]):
        return f"assumed, since {data['path']} is not a local file (--tokens sets it)"
    if model in ARCHITECTURES:
        return f"assumed, since {model} has no tokenizer at hand (--tokens sets it)"
    return ""


def _made_up(number: int, tokens: int) -> EncodedExample:
    """A pair of so many distinct tokens: half are the prompt, a quarter each response."""
    prompt = max(tokens // 2, 1)
    first, second = (tokens - prompt) // 2, (tokens - prompt + 1) // 2
    start = (2 * number,) * prompt
    ends = tuple((2 * number + k,) * (max(n, 1) + 1) for k, n in ((0, first), (1, second)))
    return EncodedExample(tuple(start + end for end in ends), (prompt,) * 2, (Comparison(0, 1, 1.0),), None, "")
