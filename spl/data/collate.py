"""Tokenised examples to one `PreferenceBatch`: the trie of all their sequences, depth first, no token twice.

Prompts that begin alike (with one system prompt, say) share that beginning too.

Sorted sequences visit a trie depth first, so a sequence adds only the tokens past its common beginning with the one
before it. A last token predicts nothing and is left out: sequences [5 6 7 1], [5 6 8 1] become the row 5 6 7 8 with
subtree_end 4 4 3 4.
"""

import math
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import torch

from spl.types import Comparison, Node, PreferenceBatch


@dataclass(frozen=True)
class EncodedExample:
    """A tokenised example: K whole sequences, where each response starts, and the comparisons among them.

    Attributes:
        sequences: K lists of token ids, prompt and response.
        starts: K indices of the first scored token, at least 1 (a token is predicted by the one before it).
        comparisons: as in PreferenceExample.
        alpha: entropy coefficient of this example; None takes the run's.
        row: where it came from.
    """

    sequences: tuple[tuple[int, ...], ...]
    starts: tuple[int, ...]
    comparisons: tuple[Comparison, ...]
    alpha: float | None
    row: str

    @property
    def num_tokens(self) -> int:
        """An upper bound of the distinct tokens: the longest prompt once, and every response."""
        responses = sum(len(s) - b for s, b in zip(self.sequences, self.starts, strict=True))
        return max(self.starts) + responses


class _Trie:
    """The trie of sequences in one row.

    Attributes:
        paths: for every sequence, the row index of each of its tokens.
        ids, depths, ends, parents: of the row's tokens; a root's parent is -1.
    """

    def __init__(self, sequences: list[tuple[int, ...]]) -> None:
        self.ids: list[int] = []
        self.depths: list[int] = []
        self.ends: list[int] = []
        self.parents: list[int] = []
        self.paths: list[list[int]] = [[] for _ in sequences]
        order = sorted(range(len(sequences)), key=lambda k: sequences[k])
        before: tuple[int, ...] = ()
        path: list[int] = []
        for k in order:
            shared = common(before, sequences[k])
            self._close(path[shared:])
            path = path[:shared]
            new = range(len(self.ids), len(self.ids) + len(sequences[k]) - shared)
            self.ids += sequences[k][shared:]
            self.depths += range(shared, len(sequences[k]))
            self.parents += [path[-1] if path else -1, *new[:-1]] if new else []
            self.ends += [0] * len(new)
            path += new
            self.paths[k], before = path, sequences[k]
        self._close(path)

    def _close(self, path: list[int]) -> None:
        for index in path:
            self.ends[index] = len(self.ids)

    def nodes(self) -> tuple[Node, ...]:
        """Maximal runs in which every token's only child is the next token."""
        children = Counter(self.parents)
        starts = [i for i, p in enumerate(self.parents) if p < 0 or children[p] > 1]
        ends = [*starts[1:], len(self.ids)]
        # A token with several children ends its run, so a run's parent is the run whose last token is its own parent.
        run_ending = {end - 1: n for n, end in enumerate(ends)}
        return tuple(Node(i, end, run_ending.get(self.parents[i], -1)) for i, end in zip(starts, ends, strict=True))


def common(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Length of the common beginning of two sequences."""
    for n, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return n
    return min(len(a), len(b))


def collate(examples: list[EncodedExample], share: float | None = None) -> PreferenceBatch:
    """Lay out a batch. The order of examples, and of responses within each, is kept in the indices.

    Args:
        examples: of one micro-batch.
        share: weight of each in its optimiser step, where micro-batches differ in size: micro-batches of the step over
            its examples. None gives the batch the weight 1.
    """
    trie = _Trie([sequence[:-1] for example in examples for sequence in example.sequences])
    edges: dict[tuple[int, int], int] = {}
    member_edge: list[int] = []
    member_response: list[int] = []
    response_example: list[int] = []
    comparisons: list[tuple[int, int]] = []
    shares: list[float] = []
    for number, example in enumerate(examples):
        first = len(response_example)
        for sequence, start in zip(example.sequences, example.starts, strict=True):
            path = trie.paths[len(response_example)]
            for source, target in zip(path[start - 1 :], sequence[start:], strict=True):
                member_edge.append(edges.setdefault((source, target), len(edges)))
                member_response.append(len(response_example))
            response_example.append(number)
        comparisons += [(first + c.first, first + c.second) for c in example.comparisons]
        shares += [c.share for c in example.comparisons]
    sources, targets = zip(*edges, strict=True)
    return PreferenceBatch(
        input_ids=torch.tensor(trie.ids),
        position_ids=torch.tensor(trie.depths),
        subtree_end=torch.tensor(trie.ends),
        nodes=trie.nodes(),
        edge_source=torch.tensor(sources),
        edge_target=torch.tensor(targets),
        member_edge=torch.tensor(member_edge),
        member_response=torch.tensor(member_response),
        response_example=torch.tensor(response_example),
        comparisons=torch.tensor(comparisons, dtype=torch.long).reshape(-1, 2),
        shares=torch.tensor(shares, dtype=torch.float32),
        alphas=torch.tensor([math.nan if e.alpha is None else e.alpha for e in examples], dtype=torch.float32),
        rows=tuple(e.row for e in examples),
        weight=1.0 if share is None else len(examples) * share,
        response_keys=tuple(
            response_key(s, start) for e in examples for s, start in zip(e.sequences, e.starts, strict=True)
        ),
    )


def response_key(sequence: Sequence[int], start: int) -> bytes:
    """Of a tokenised prompt and response, whose first scored token is at `start`."""
    return blake2b(array("i", (start, *sequence)).tobytes(), digest_size=16).digest()
