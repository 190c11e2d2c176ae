"""The obvious definition: each response as a padded sequence through the whole model, log-softmax over all logits.

Slow and plain on purpose. Every other way of scoring must equal it, values and gradients.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from spl.logprobs.linear import widen
from spl.types import PreferenceBatch, ResponseLogps


def unpack(batch: PreferenceBatch) -> list[tuple[Tensor, int]]:
    """Each response as (token ids of prompt + response [L], number of scored tokens), found by the mask rule alone."""
    index = torch.arange(batch.num_tokens, device=batch.input_ids.device)
    sequences = []
    for response in range(batch.num_responses):
        edges = batch.member_edge[batch.member_response == response]
        last = batch.edge_source[edges[-1]]
        path = (index <= last) & (last < batch.subtree_end)
        ids = torch.cat([batch.input_ids[path], batch.edge_target[edges[-1:]]])
        sequences.append((ids, len(edges)))
    return sequences


def sequence_logps(model: nn.Module, batch: PreferenceBatch, rows: int = 8, temperature: float = 1.0) -> ResponseLogps:
    """Log-probabilities of the batch's responses at a token temperature, `rows` right-padded sequences at a time.

    Padding stands right of every scored token, so under a causal mask it changes nothing.
    """
    logps, entropies = [], []
    for logits, target in sequence_logits(model, batch, rows):
        log_probs = (logits / temperature).log_softmax(-1)
        logps.append(log_probs.gather(1, target[:, None]).squeeze(1))
        entropies.append(-(log_probs.exp() * log_probs).sum(-1).detach())
    return ResponseLogps(
        logps=torch.stack([x.sum() for x in logps]),
        entropies=torch.stack([x.sum() for x in entropies]),
        num_tokens=torch.tensor([len(x) for x in logps], device=logps[0].device),
        per_token_logps=torch.cat(logps),
    )


def sequence_logits(model: nn.Module, batch: PreferenceBatch, rows: int = 8) -> Iterator[tuple[Tensor, Tensor]]:
    """For each response its n scored tokens' logits [n, V], in the dtype of reductions, and their ids [n].

    A sharded model takes all rows at once: processes must run it equally often, and have unequal numbers of responses.
    """
    sequences = unpack(batch)
    rows = len(sequences) if hasattr(model, "run_as_forward") else rows
    for start in range(0, len(sequences), rows):
        group = sequences[start : start + rows]
        ids = nn.utils.rnn.pad_sequence([ids for ids, _ in group], batch_first=True)
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(ids) for ids, _ in group], batch_first=True)
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        for row, (sequence, scored) in enumerate(group):
            first, last = len(sequence) - scored, len(sequence)
            yield widen(logits[row, first - 1 : last - 1]), sequence[first:]
