"""The whole laws of the next token, policy beside reference, along the responses of a batch.

Where `score` asks only for the probability of the token that came, this compares two laws over the vocabulary at each
position: entropy, cross-entropy and so the KL divergence as conditional expectations, of far lower variance than
log-probabilities of samples. Both models run the forest once; their logits are made and dropped chunk by chunk.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from spl.logprobs.forest import Backend
from spl.logprobs.linear import head_logits, head_of
from spl.logprobs.score import as_forward, base_of, edge_states, precision_of, sum_by_response
from spl.logprobs.sequence import sequence_logits
from spl.types import PreferenceBatch, ResponseLaws

AsReference = Callable[[], AbstractContextManager[nn.Module]]
"""Gives the reference for the length of a `with` block, in which the policy may be the reference."""


class _Model(NamedTuple):
    """A model that has run, and can give its logits piece by piece."""

    model: nn.Module
    states: Tensor  # [E, H] as of `edge_states`

    def logits(self, rows: slice) -> Tensor:
        base = base_of(self.model)
        with precision_of(base):
            return head_logits(self.states[rows], head_of(base))


class _Laws(NamedTuple):
    """Of n positions, [n] each; in the order of ResponseLaws."""

    logps: Tensor
    reference_logps: Tensor
    entropies: Tensor
    cross_entropies: Tensor
    log_normalizers: Tensor


@torch.no_grad()
def score_laws(
    policy: nn.Module,
    as_reference: AsReference | None,
    batch: PreferenceBatch,
    scorer: str = "forest",
    chunk: int = 512,
    backend: Backend = "auto",
    global_temperature: float | None = None,
) -> ResponseLaws:
    """Entropy, cross-entropy and log-probabilities along every response of a batch, in nats and float32.

    Args:
        policy: as `score` takes it.
        as_reference: gives the reference; None where the policy still is the reference.
        batch: responses, usually samples of the policy: over others the sums are no estimates of its entropy or KL.
        scorer: as of `score`.
        chunk: positions whose logits, of both models, are held at a time.
        backend: as of `score`.
        global_temperature: alpha / beta, for the log normalisers; without it they are NaN.
    """
    if scorer == "plain":
        return _plain(policy, as_reference, batch, global_temperature)
    return as_forward(policy, lambda: _forest(policy, as_reference, batch, chunk, backend, global_temperature))


def _forest(
    policy: nn.Module,
    as_reference: AsReference | None,
    batch: PreferenceBatch,
    chunk: int,
    backend: Backend,
    temperature: float | None,
) -> ResponseLaws:
    own = _Model(policy, edge_states(policy, batch, backend))
    if as_reference is None:
        return _sums(own, None, batch, chunk, temperature)
    with as_reference() as reference:

        def beside() -> ResponseLaws:
            other = _Model(reference, edge_states(reference, batch, backend))
            return _sums(own, other, batch, chunk, temperature)

        return beside() if reference is policy else as_forward(reference, beside)


def _sums(
    own: _Model, other: _Model | None, batch: PreferenceBatch, chunk: int, temperature: float | None
) -> ResponseLaws:
    """Over each response, the terms of its positions, `chunk` of them at a time."""
    parts = []
    for k, target in enumerate(torch.split(batch.edge_target, chunk)):
        rows = slice(k * chunk, k * chunk + len(target))
        reference_logits = None if other is None else other.logits(rows)
        parts.append(_compare(own.logits(rows), reference_logits, target, temperature))
    edges = _Laws(*(torch.cat(part) for part in zip(*parts, strict=True)))
    sums = [sum_by_response(part[batch.member_edge], batch) for part in edges]
    return ResponseLaws._make([*sums, sum_by_response(torch.ones_like(batch.member_response), batch)])


def _compare(logits: Tensor, reference_logits: Tensor | None, target: Tensor, temperature: float | None) -> _Laws:
    """The sums' terms at n positions, from logits [n, V] in float32."""
    log_p = logits.log_softmax(-1)
    log_q = log_p if reference_logits is None else reference_logits.log_softmax(-1)
    p = log_p.exp()
    entropies = -(p * log_p).sum(-1)
    return _Laws(
        logps=log_p.gather(1, target[:, None]).squeeze(1),
        reference_logps=log_q.gather(1, target[:, None]).squeeze(1),
        entropies=entropies,
        cross_entropies=entropies if log_q is log_p else -(p * log_q).sum(-1),
        log_normalizers=_log_normalizers(log_q, temperature),
    )


def _log_normalizers(log_q: Tensor, temperature: float | None) -> Tensor:
    """log sum_v q(v)^(1/temperature) of laws [n, V] -> [n]; without rounding 0 at temperature 1."""
    if temperature is None or temperature == 1:
        return log_q.new_full(log_q.shape[:1], math.nan if temperature is None else 0.0)
    return (log_q / temperature).logsumexp(-1)


def _plain(
    policy: nn.Module, as_reference: AsReference | None, batch: PreferenceBatch, temperature: float | None
) -> ResponseLaws:
    """The obvious definition: response by response through both whole models."""

    def logits(model: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        return sequence_logits(model, batch, rows=1)

    laws = []
    if as_reference is None:
        laws = [_compare(own, None, target, temperature) for own, target in logits(policy)]
    else:
        policies = [own.cpu() for own, _ in logits(policy)]
        with as_reference() as reference:
            for own, (other, target) in zip(policies, logits(reference), strict=True):
                laws.append(_compare(own.to(other.device), other, target, temperature))
    sums = [torch.stack([part.sum() for part in parts]) for parts in zip(*laws, strict=True)]
    return ResponseLaws._make([*sums, torch.tensor([len(law.logps) for law in laws], device=sums[0].device)])
