"""Rewards of whole responses: one number read from the network's last state, in place of a law over the vocabulary.

The head is the output embedding of a model that `spl.models.load_policy` gave a scalar one. The batch must be one that
was encoded to be read to its end (`Encoder.reads_end`): a response's last edge then starts at its last token.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from spl.logprobs.forest import Backend
from spl.logprobs.linear import widen
from spl.logprobs.score import as_forward, base_of, both_ways, edge_states, precision_of
from spl.logprobs.sequence import unpack
from spl.types import PreferenceBatch


def score_rewards(
    model: nn.Module, batch: PreferenceBatch, scorer: str = "forest", backend: Backend = "auto"
) -> Tensor:
    """Rewards [R] of every response of a batch, in float32; the arguments are those of `spl.logprobs.score.score`."""
    return as_forward(model, lambda: read_head(model, _last_states(model, batch, scorer, backend)))


def read_head(model: nn.Module, states: Tensor) -> Tensor:
    """The head's numbers [N] of final states [N, H]."""
    with torch.autocast(states.device.type, enabled=False):
        return widen(states) @ widen(base_of(model).get_output_embeddings().weight)[0]


def state_gap(model: nn.Module, batch: PreferenceBatch, backend: Backend = "auto") -> float:
    """Largest difference of the forest's last states from the plain definition's, as a share of their length.

    Of states, since a head that has not learned yet gives the same number for any. Raises as `both_ways` does.
    """

    def states(scorer: str) -> Tensor:
        return as_forward(model, lambda: _last_states(model, batch, scorer, backend)).float()

    fast, plain = both_ways(model, states)
    gap = ((fast - plain).norm(dim=1) / plain.norm(dim=1)).max().item()
    return math.inf if math.isnan(gap) else gap


def _last_states(model: nn.Module, batch: PreferenceBatch, scorer: str, backend: Backend) -> Tensor:
    """Final states [R, H] of the last token of every response."""
    if scorer == "plain":
        return plain_states(model, [ids[:-1] for ids, _ in unpack(batch)])
    return last_states(model, batch, backend)


def last_states(model: nn.Module, batch: PreferenceBatch, backend: Backend = "auto") -> Tensor:
    """Final states [R, H] from which the last token of every response is predicted, each token run once.

    The model must be prepared for "forest", as for `spl.logprobs.score.edge_states`.
    """
    lengths = batch.member_response.bincount(minlength=batch.num_responses)
    return edge_states(model, batch, backend)[batch.member_edge[lengths.cumsum(0) - 1]]


def plain_states(model: nn.Module, rows: list[Tensor], together: int = 8) -> Tensor:
    """The obvious definition: final states [N, H] of the last tokens of N rows of token ids, padded on the right."""
    base, found = base_of(model), []
    together = len(rows) if hasattr(model, "run_as_forward") else together  # all processes run it equally often
    for start in range(0, len(rows), together):
        few = rows[start : start + together]
        mask = pad_sequence([torch.ones_like(row) for row in few], batch_first=True)
        with precision_of(base):
            hidden = base.get_decoder()(
                input_ids=pad_sequence(few, batch_first=True), attention_mask=mask, use_cache=False
            ).last_hidden_state
        found.append(hidden[torch.arange(len(few)), mask.sum(1) - 1])
    return torch.cat(found)
