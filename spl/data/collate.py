"""Tokenised examples to one `PreferenceBatch`: the trie of all their sequences, depth first, no token twice.

Prompts that begin alike (with one system prompt, say) share that beginning too.

Sorted sequences visit a trie depth first, so a sequence adds only the tokens past its common beginning with the one
before it. A last token predicts nothing and is left out: sequences [5 6 7 1], [5 6 8 1] become the row 5 6 7 8 with
subtree_end 4 4 3 4.
"""

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
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
        """An upper bound of the distinct tokens: the longest prompt once, and every response.

        Replies of one conversation lie one behind the other, and the last sequence holds all.
        """
        longest = max(self.sequences, key=len)
        if all(longest[: len(s)] == s for s in self.sequences):
            return len(longest)
        responses = sum(len(s) - b for s, b in zip(self.sequences, self.starts, strict=True))
        return max(self.starts) + responses


class _Trie:
    """The trie of sequences in one row.

    Attributes:
        paths: for every sequence, the row index of each of its tokens.
        ids, depths, ends, parents: [T] of the row's tokens; a root's parent is -1.
    """

    def __init__(self, sequences: list[tuple[int, ...]]) -> None:
        self.paths = [_array(())] * len(sequences)
        self.ends = _array(range(sum(map(len, sequences))))
        ids, depths, parents = [_array(())], [_array(())], [_array(())]
        length, before, path = 0, _array(()), _array(())
        for k in sorted(range(len(sequences)), key=lambda k: sequences[k]):
            sequence = _array(sequences[k])
            shared = _shared(before, sequence)
            self.ends[path[shared:]] = length
            new = np.arange(length, length + len(sequence) - shared)
            ids.append(sequence[shared:])
            depths.append(np.arange(shared, len(sequence)))
            parents.append(new - 1)
            if len(new):
                parents[-1][0] = path[shared - 1] if shared else -1
            length += len(new)
            path, before = np.concatenate((path[:shared], new)), sequence
            self.paths[k] = path
        self.ends[path] = length
        self.ends = self.ends[:length]
        self.ids, self.depths, self.parents = map(np.concatenate, (ids, depths, parents))

    def nodes(self) -> tuple[Node, ...]:
        """Maximal runs in which every token's only child is the next token."""
        children = np.bincount(self.parents + 1, minlength=len(self.ids) + 1)[1:]
        starts = np.flatnonzero((self.parents < 0) | (children[self.parents] > 1))
        ends = np.append(starts[1:], len(self.ids))
        # A token with several children ends its run, so a run's parent is the run whose last token is its own parent.
        above = np.where(self.parents[starts] < 0, -1, np.searchsorted(ends, self.parents[starts], "right"))
        return tuple(map(Node, starts.tolist(), ends.tolist(), above.tolist()))


def _array(values: Sequence[int]) -> Any:
    """int64; by way of `array`, which takes Python's numbers faster than numpy does."""
    return np.array(array("q", values))


def _shared(a: Any, b: Any) -> int:
    """Length of the common beginning of two arrays."""
    size = min(len(a), len(b))
    differ = a[:size] != b[:size]
    first = int(differ.argmax()) if size else 0
    return first if size and differ[first] else size


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
    sequences = [(_array(s), start) for e in examples for s, start in zip(e.sequences, e.starts, strict=True)]
    lengths = [len(sequence) - start for sequence, start in sequences]
    sources = np.concatenate([path[start - 1 :] for path, (_, start) in zip(trie.paths, sequences, strict=True)])
    targets = np.concatenate([sequence[start:] for sequence, start in sequences])
    edges, member_edge = _distinct(sources, targets)
    counts = np.array([len(example.sequences) for example in examples])
    firsts = np.cumsum(counts) - counts
    comparisons = [
        (first + c.first, first + c.second)
        for first, example in zip(firsts.tolist(), examples, strict=True)
        for c in example.comparisons
    ]
    shares = [c.share for example in examples for c in example.comparisons]
    return PreferenceBatch(
        input_ids=torch.from_numpy(trie.ids),
        position_ids=torch.from_numpy(trie.depths),
        subtree_end=torch.from_numpy(trie.ends),
        nodes=trie.nodes(),
        edge_source=torch.from_numpy(sources[edges]),
        edge_target=torch.from_numpy(targets[edges]),
        member_edge=torch.from_numpy(member_edge),
        member_response=torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)),
        response_example=torch.from_numpy(np.repeat(np.arange(len(examples)), counts)),
        comparisons=torch.tensor(comparisons, dtype=torch.long).reshape(-1, 2),
        shares=torch.tensor(shares, dtype=torch.float32),
        alphas=torch.tensor([math.nan if e.alpha is None else e.alpha for e in examples], dtype=torch.float32),
        rows=tuple(e.row for e in examples),
        weight=1.0 if share is None else len(examples) * share,
        response_keys=tuple(
            response_key(s, start) for e in examples for s, start in zip(e.sequences, e.starts, strict=True)
        ),
    )


def _distinct(sources: Any, targets: Any) -> tuple[Any, Any]:
    """Where each distinct (source, target) pair stands first, in that order, and the number of every member's pair."""
    pairs = sources * (int(targets.max()) + 1) + targets
    _, firsts, inverse = np.unique(pairs, return_index=True, return_inverse=True)
    order = np.argsort(firsts)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return firsts[order], rank[inverse]


def response_key(sequence: Sequence[int], start: int) -> bytes:
    """Of a tokenised prompt and response, whose first scored token is at `start`."""
    return blake2b(array("i", (start, *sequence)).tobytes(), digest_size=16).digest()
