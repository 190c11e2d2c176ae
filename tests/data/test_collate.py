"""The forest against hand-written tries and against sets of prefixes, which know nothing of rows and indices."""

import math
import struct
from collections import Counter
from hashlib import blake2b

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spl.data.collate import EncodedExample, collate, common, response_key
from spl.types import Comparison, Node, PreferenceBatch


def example(
    sequences: list[list[int]],
    starts: list[int],
    comparisons: list[Comparison] | None = None,
    alpha: float | None = None,
) -> EncodedExample:
    chosen = [Comparison(0, 1, 1.0)] if comparisons is None else comparisons
    return EncodedExample(tuple(map(tuple, sequences)), tuple(starts), tuple(chosen), alpha, f"row {sequences[0][0]}")


def edges(batch: PreferenceBatch) -> list[list[tuple[int, int]]]:
    """(predicting token's index, target id) of every response, in order."""
    pairs = list(zip(batch.edge_source.tolist(), batch.edge_target.tolist(), strict=True))
    found: list[list[tuple[int, int]]] = [[] for _ in range(batch.num_responses)]
    for edge, response in zip(batch.member_edge.tolist(), batch.member_response.tolist(), strict=True):
        found[response].append(pairs[edge])
    return found


def test_two_replies_that_part_at_once() -> None:
    batch = collate([example([[5, 6, 7, 1], [5, 6, 8, 1]], [2, 2])])
    assert batch.input_ids.tolist() == [5, 6, 7, 8]
    assert batch.position_ids.tolist() == [0, 1, 2, 2]
    assert batch.subtree_end.tolist() == [4, 4, 3, 4]
    assert batch.nodes == (Node(0, 2, -1), Node(2, 3, 0), Node(3, 4, 0))
    assert edges(batch) == [[(1, 7), (2, 1)], [(1, 8), (3, 1)]]


def test_replies_that_begin_alike_share_tokens_and_edges() -> None:
    batch = collate([example([[5, 6, 8, 3, 1], [5, 6, 7, 1], [5, 6, 7, 2, 1]], [2, 2, 2])])
    assert batch.input_ids.tolist() == [5, 6, 7, 2, 8, 3]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 2, 3]
    assert batch.subtree_end.tolist() == [6, 6, 4, 4, 6, 6]
    assert batch.nodes == (Node(0, 2, -1), Node(2, 4, 0), Node(4, 6, 0))
    assert edges(batch) == [[(1, 8), (4, 3), (5, 1)], [(1, 7), (2, 1)], [(1, 7), (2, 2), (3, 1)]]
    assert len(batch.edge_source) == 7


def test_a_reply_that_begins_another_adds_no_token() -> None:
    batch = collate([example([[5, 6, 7, 8], [5, 6, 7]], [1, 1])])
    assert batch.input_ids.tolist() == [5, 6, 7]
    assert batch.subtree_end.tolist() == [3, 3, 3]
    assert batch.nodes == (Node(0, 3, -1),)
    assert edges(batch) == [[(0, 6), (1, 7), (2, 8)], [(0, 6), (1, 7)]]
    assert len(batch.edge_source) == 3


def test_a_branch_below_a_branch() -> None:
    batch = collate([example([[5, 7, 8, 0], [5, 7, 9, 0], [5, 4, 0]], [1, 1, 1])])
    assert batch.input_ids.tolist() == [5, 4, 7, 8, 9]
    assert batch.subtree_end.tolist() == [5, 2, 5, 4, 5]
    assert batch.nodes == (Node(0, 1, -1), Node(1, 2, 0), Node(2, 3, 0), Node(3, 4, 2), Node(4, 5, 2))


def test_examples_whose_prompts_begin_alike_share_the_beginning() -> None:
    first = example([[5, 6, 1], [5, 7, 1]], [1, 1], [Comparison(1, 0, 0.75)], alpha=0.5)
    second = example([[5, 8, 1], [5, 6, 1], [5, 7, 1]], [1, 1, 1], [Comparison(0, 2, 1.0), Comparison(1, 2, 0.25)])
    batch = collate([first, second])
    assert batch.input_ids.tolist() == [5, 6, 7, 8]
    assert batch.position_ids.tolist() == [0, 1, 1, 1]
    assert batch.subtree_end.tolist() == [4, 2, 3, 4]
    assert [node.parent for node in batch.nodes] == [-1, 0, 0, 0]
    assert edges(batch) == [[(0, 6), (1, 1)], [(0, 7), (2, 1)], [(0, 8), (3, 1)], [(0, 6), (1, 1)], [(0, 7), (2, 1)]]
    assert len(batch.edge_source) == 6
    assert batch.response_example.tolist() == [0, 0, 1, 1, 1]
    assert batch.comparisons.tolist() == [[1, 0], [2, 4], [3, 4]]
    assert batch.shares.tolist() == [0.75, 1.0, 0.25]
    assert batch.alphas[0] == 0.5
    assert math.isnan(batch.alphas[1])
    assert batch.rows == ("row 5", "row 5")


def test_types_and_an_example_without_comparisons() -> None:
    batch = collate([example([[5, 6], [5, 7]], [1, 1], [])])
    assert batch.comparisons.shape == (0, 2)
    assert batch.shares.dtype == batch.alphas.dtype == torch.float32
    for name in ("input_ids", "position_ids", "subtree_end", "edge_source", "edge_target", "member_edge"):
        assert getattr(batch, name).dtype == torch.int64
    for name in ("member_response", "response_example", "comparisons"):
        assert getattr(batch, name).dtype == torch.int64


def test_common_beginning() -> None:
    assert common((1, 2, 3), (1, 2, 4, 5)) == 2
    assert common((1, 2), (1, 2, 3)) == common((1, 2, 3), (1, 2)) == 2
    assert common((), (1,)) == common("abc", "xbc") == 0


def test_a_key_is_of_the_tokens_and_where_they_are_scored() -> None:
    # What a folder of kept numbers holds; another hash would lose all that were computed.
    stored = blake2b(struct.pack("<5i", 2, 5, 6, 70_000, 1), digest_size=16).digest()
    assert response_key([5, 6, 70_000, 1], 2) == response_key((5, 6, 70_000, 1), 2) == stored
    assert response_key([5, 6, 7, 1], 2).hex() == "74ba1deed80440e4e3d6c929e1d26eed"
    others = [
        ([5, 6, 7, 1], 1),
        ([5, 6, 7], 2),
        ([5, 6, 7, 2], 2),
        ([6, 5, 7, 1], 2),
        ([2, 5, 6, 7, 1], 2),
        ([6, 7], 1),
    ]
    assert len({response_key(*other) for other in [([5, 6, 7, 1], 2), *others]}) == 7


def test_keys_go_with_responses_whatever_stands_beside_them() -> None:
    first = example([[5, 6, 8, 1], [5, 6, 7, 1]], [2, 2], [Comparison(1, 0, 0.75)], alpha=0.5)
    second = example([[5, 6, 7, 1], [5, 9, 1], [5, 6, 7, 1]], [2, 1, 1])
    keys = [response_key([5, 6, 8, 1], 2), response_key([5, 6, 7, 1], 2), response_key([5, 6, 7, 1], 2)]
    keys += [response_key([5, 9, 1], 1), response_key([5, 6, 7, 1], 1)]
    assert collate([first, second]).response_keys == tuple(keys)
    assert collate([second, first]).response_keys == tuple(keys[2:] + keys[:2])
    plain = example([[5, 6, 8, 1], [5, 6, 7, 1]], [2, 2])
    assert collate([plain], share=0.1).response_keys == tuple(keys[:2])


SEQUENCE = st.lists(st.integers(0, 2), min_size=2, max_size=7)


@st.composite
def forests(draw: st.DrawFn) -> list[EncodedExample]:
    """Few token ids, so that branches of every kind come up; beginnings that replies share are often long."""
    examples = []
    for _ in range(draw(st.integers(1, 3))):
        prompt = draw(st.lists(st.integers(0, 2), max_size=4))
        sequences = [prompt + reply for reply in draw(st.lists(SEQUENCE, min_size=2, max_size=4))]
        starts = [draw(st.integers(1, len(sequence) - 1)) for sequence in sequences]
        examples.append(example(sequences, starts))
    return examples


def prefixes_of(examples: list[EncodedExample]) -> set[tuple[int, ...]]:
    """The tokens that the network must see, each as the path that leads to it; a last token predicts nothing."""
    return {s[:length] for row in examples for s in row.sequences for length in range(1, len(s))}


def paths_by_depth(batch: PreferenceBatch) -> list[tuple[int, ...]]:
    """Each token's path, from ids and depths alone: in depth-first order its parent is the last one of less depth."""
    path: list[int] = []
    paths = []
    for token, depth in zip(batch.input_ids.tolist(), batch.position_ids.tolist(), strict=True):
        path = [*path[:depth], token]
        assert len(path) == depth + 1
        paths.append(tuple(path))
    return paths


@settings(max_examples=300, deadline=None)
@given(forests())
def test_tokens_and_mask_are_those_of_the_set_of_prefixes(examples: list[EncodedExample]) -> None:
    batch = collate(examples)
    paths = paths_by_depth(batch)
    assert len(paths) == batch.num_tokens == len(prefixes_of(examples))
    assert set(paths) == prefixes_of(examples)
    ends = batch.subtree_end.tolist()
    for i in range(len(paths)):
        for j in range(len(paths)):
            is_ancestor = paths[i][: len(paths[j])] == paths[j]
            assert (j <= i < ends[j]) == is_ancestor


@settings(max_examples=300, deadline=None)
@given(forests())
def test_edges_are_those_of_the_sequences(examples: list[EncodedExample]) -> None:
    batch = collate(examples)
    paths, found = paths_by_depth(batch), edges(batch)
    expected = [
        [(sequence[:k], sequence[k]) for k in range(start, len(sequence))]
        for row in examples
        for sequence, start in zip(row.sequences, row.starts, strict=True)
    ]
    assert [[(paths[source], target) for source, target in response] for response in found] == expected
    owners = [n for n, row in enumerate(examples) for _ in row.sequences]
    assert batch.response_example.tolist() == owners
    distinct = {edge for response in found for edge in response}
    assert len(batch.edge_source) == len(batch.edge_target) == len(distinct)


@settings(max_examples=300, deadline=None)
@given(forests())
def test_nodes_are_the_maximal_unbranched_runs(examples: list[EncodedExample]) -> None:
    batch = collate(examples)
    paths = paths_by_depth(batch)
    index = {path: i for i, path in enumerate(paths)}
    children = Counter(path[:-1] for path in paths)
    cuts = [i for i, path in enumerate(paths) if len(path) == 1 or children[path[:-1]] > 1]
    assert [node.start for node in batch.nodes] == cuts
    assert [node.end for node in batch.nodes] == [*cuts[1:], len(paths)]
    for node in batch.nodes:
        parent = index.get(paths[node.start][:-1], -1)
        holds = [n for n, other in enumerate(batch.nodes) if other.start <= parent < other.end]
        assert [node.parent] == (holds or [-1])


@given(st.lists(st.integers(0, 2), min_size=1, max_size=4), st.lists(SEQUENCE, min_size=2, max_size=4))
def test_num_tokens_bounds_the_distinct_tokens(prompt: list[int], replies: list[list[int]]) -> None:
    row = example([prompt + reply for reply in replies], [len(prompt)] * len(replies))
    assert collate([row]).num_tokens <= row.num_tokens <= sum(map(len, row.sequences))
