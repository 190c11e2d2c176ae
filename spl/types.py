"""The things that travel along a run: an example, a batch, log-probabilities, a step's output.

Everything here is plain data. This file imports nothing from spl, so every package may import it, and torch only for
types, so that `spl --help` answers at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, TypedDict

if TYPE_CHECKING:
    from torch import Tensor

Message = dict[str, str]
"""One turn of a conversation: `{"role": "system" | "user" | "assistant", "content": str}`."""


Task = Literal["preference", "sft", "reward"]
"""What is learned from a row: which reply is better (by the policy, or by a reward model), or to write its replies."""


class UserError(ValueError):
    """A mistake that the user can mend. Its text is one sentence: what was expected, what came, what to do."""


class Comparison(NamedTuple):
    """Response `first` against response `second`, preferred by `share` of the raters (1.0 for a hard label)."""

    first: int
    second: int
    share: float


@dataclass(frozen=True)
class PreferenceExample:
    """One prompt, K >= 2 responses, and comparisons among them. A chosen/rejected pair is K = 2.

    Attributes:
        prompt: the conversation so far, oldest turn first.
        responses: K assistant replies.
        comparisons: index pairs into `responses`, with the share that prefers the first.
        alpha: entropy coefficient of this example; None takes the run's.
        row: where it came from, as "file, row 12", for messages.
    """

    prompt: tuple[Message, ...]
    responses: tuple[str, ...]
    comparisons: tuple[Comparison, ...]
    alpha: float | None = None
    row: str = ""


@dataclass(frozen=True)
class Demonstration:
    """Replies to imitate, each after the turns before it: what the assistant says in one conversation.

    Attributes:
        turns: (prompt, reply) pairs; each prompt holds the conversation so far.
        row: where it came from.
    """

    turns: tuple[tuple[tuple[Message, ...], str], ...]
    row: str = ""

    @property
    def prompt(self) -> tuple[Message, ...]:
        return self.turns[0][0]


class Node(NamedTuple):
    """A run of the forest without a branch: tokens [start, end), continued from the node `parent` (-1: a root)."""

    start: int
    end: int
    parent: int


class PreferenceBatch(NamedTuple):
    """B examples with R responses in all, as a forest of token tries laid out depth first in one row of T tokens.

    A token stands once, however many responses, of one example or of several, begin with it. Token i may attend to
    token j if and only if `j <= i < subtree_end[j]`. An edge is a (predicting token, next token) pair of a response; a
    response's log-probability is the sum over its edges. The last token of a response predicts nothing, so it is not
    in the row.

    Shapes: T tokens, E edges, M (response, edge) members, R responses, C comparisons, B examples.
    """

    input_ids: Tensor  # [T] int64
    position_ids: Tensor  # [T] depth in the trie
    subtree_end: Tensor  # [T] first index after the token's descendants
    nodes: tuple[Node, ...]  # the same tree as unbranched runs, in row order
    edge_source: Tensor  # [E] index of the predicting token in the row
    edge_target: Tensor  # [E] token id predicted
    member_edge: Tensor  # [M] index into edges, in the order of the response's tokens
    member_response: Tensor  # [M] index into responses, ascending
    response_example: Tensor  # [R] index into examples, ascending
    comparisons: Tensor  # [C, 2] indices into responses
    shares: Tensor  # [C] float32, share preferring the first
    alphas: Tensor  # [B] float32, NaN where the run's alpha applies
    rows: tuple[str, ...]  # [B] where each example came from
    weight: float  # of its mean loss in the optimiser step, whose micro-batches may differ in size
    response_keys: tuple[bytes, ...]  # [R] hashes of each response's prompt and tokens

    @property
    def num_examples(self) -> int:
        return len(self.rows)

    @property
    def num_responses(self) -> int:
        return self.response_example.numel()

    @property
    def num_tokens(self) -> int:
        """Distinct tokens that go through the network."""
        return self.input_ids.numel()


class ResponseLogps(NamedTuple):
    """What the log-prob engine says of a batch, in nats and float32."""

    logps: Tensor  # [R] sum over the response's tokens
    entropies: Tensor  # [R] token entropies summed over the response's positions, no gradient
    num_tokens: Tensor  # [R] scored tokens
    per_token_logps: Tensor  # [M] in the order of PreferenceBatch.member_edge


class ResponseLaws(NamedTuple):
    """What the laws of the next token say along a batch's responses: sums over each, in nats and float32, no gradient.

    A sum over a sample's positions of a conditional expectation is a Rao-Blackwellised estimate: `entropies` of the
    sequence entropy, `cross_entropies` of the cross-entropy, their difference of the KL divergence.
    """

    logps: Tensor  # [R] log pi(y|x)
    reference_logps: Tensor  # [R] log pi_ref(y|x)
    entropies: Tensor  # [R] sum_t H(pi(.|y_<t))
    cross_entropies: Tensor  # [R] sum_t H(pi(.|y_<t), pi_ref(.|y_<t))
    log_normalizers: Tensor  # [R] sum_t log Z_t, Z_t = sum_v pi_ref(v|y_<t)^(1 / global temperature)
    num_tokens: Tensor  # [R]


class Prompt(NamedTuple):
    """A prompt to sample replies to."""

    text: str  # as the model sees it
    input_ids: tuple[int, ...]


class StepOutput(TypedDict):
    """What a step returns. Only `loss` carries a gradient; callbacks read the other entries, never `loss`."""

    loss: Tensor  # []
    objective: Tensor  # [] mean loss of the batch's examples, detached; `loss` has the weight in its step besides
    policy_logps: Tensor  # [R]
    reference_logps: Tensor  # [R]
    entropies: Tensor  # [R]
    num_response_tokens: Tensor  # [R]
    rewards: Tensor  # [R] implicit rewards, alpha log pi - beta log pi_ref
    margins: Tensor  # [C]
    shares: Tensor  # [C]
    num_tokens: int
