"""Tokenised examples to one `PreferenceBatch`: the trie of each example's responses, depth first, no token twice.

Sorted sequences visit a trie depth first, so a sequence adds only the tokens past its common beginning with the one
before it. Sequences [5 6 7], [5 6 8] become the row 5 6 7 8 with subtree_end 4 4 3 4.
"""

import math
from dataclasses import dataclass

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


class _Row:
    """The growing row of a batch."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.depths: list[int] = []
        self.ends: list[int] = []
        self.parents: list[int] = []

    def add(self, sequences: list[tuple[int, ...]]) -> list[list[int]]:
        """Lay out one trie; returns, for every sequence, the row index of each of its tokens."""
        order = sorted(range(len(sequences)), key=lambda k: sequences[k])
        paths: list[list[int]] = [[] for _ in sequences]
        before: tuple[int, ...] = ()
        path: list[int] = []
        for k in order:
            shared = _common(before, sequences[k])
            self._close(path[shared:])
            path = path[:shared]
            for depth, token in enumerate(sequences[k][shared:], shared):
                self.ids.append(token)
                self.depths.append(depth)
                self.parents.append(path[-1] if path else -1)
                self.ends.append(0)
                path.append(len(self.ids) - 1)
            paths[k] = path
            before = sequences[k]
        self._close(path)
        return paths

    def _close(self, path: list[int]) -> None:
        for index in path:
            self.ends[index] = len(self.ids)

    def nodes(self) -> tuple[Node, ...]:
        """Maximal runs in which every token's only child is the next token."""
        children = [0] * len(self.ids)
        for parent in self.parents:
            if parent >= 0:
                children[parent] += 1
        nodes: list[Node] = []
        node_of: list[int] = []
        for index, parent in enumerate(self.parents):
            if parent >= 0 and parent == index - 1 and children[parent] == 1:
                nodes[-1] = nodes[-1]._replace(end=index + 1)
            else:
                nodes.append(Node(index, index + 1, node_of[parent] if parent >= 0 else -1))
            node_of.append(len(nodes) - 1)
        return tuple(nodes)


def _common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """Length of the common beginning of two sequences."""
    for n, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return n
    return min(len(a), len(b))


def collate(examples: list[EncodedExample]) -> PreferenceBatch:
    """Lay out a batch. The order of examples, and of responses within each, is kept in the indices."""
    row = _Row()
    edges: dict[tuple[int, int], int] = {}
    member_edge: list[int] = []
    member_response: list[int] = []
    response_example: list[int] = []
    comparisons: list[tuple[int, int]] = []
    shares: list[float] = []
    for number, example in enumerate(examples):
        first = len(response_example)
        paths = row.add([sequence[:-1] for sequence in example.sequences])
        for sequence, start, path in zip(example.sequences, example.starts, paths, strict=True):
            for source, target in zip(path[start - 1 :], sequence[start:], strict=True):
                member_edge.append(edges.setdefault((source, target), len(edges)))
                member_response.append(len(response_example))
            response_example.append(number)
        for i, j, share in example.comparisons:
            comparisons.append((first + i, first + j))
            shares.append(share)
    sources, targets = zip(*edges, strict=True)
    return PreferenceBatch(
        input_ids=torch.tensor(row.ids),
        position_ids=torch.tensor(row.depths),
        subtree_end=torch.tensor(row.ends),
        nodes=row.nodes(),
        edge_source=torch.tensor(sources),
        edge_target=torch.tensor(targets),
        member_edge=torch.tensor(member_edge),
        member_response=torch.tensor(member_response),
        response_example=torch.tensor(response_example),
        comparisons=torch.tensor(comparisons, dtype=torch.long).reshape(-1, 2),
        shares=torch.tensor(shares),
        alphas=torch.tensor([math.nan if e.alpha is None else e.alpha for e in examples]),
        rows=tuple(e.row for e in examples),
    )
