"""Replies scored by a reward model: ours or anyone's."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from spl.data.tokenization import Encoder
from spl.evaluation.policies import device_of
from spl.models import fingerprint
from spl.reward_models import load_reward_model
from spl.types import Message, PreferenceExample, UserError

Ids = tuple[int, ...]


class RewardScorer:
    """A reward model and how it reads a conversation: by its own chat template, at the last token.

    Args:
        model: a sequence-classification model with one label.
        tokenizer: its tokenizer.
        max_length: most tokens of a conversation; longer ones are cut as `Encoder` says.
        batch_tokens: most tokens that go through the network at a time, padding counted.
    """

    def __init__(self, model: Any, tokenizer: Any, max_length: int = 2048, batch_tokens: int = 16_384) -> None:
        self.model = model
        self.encoder = Encoder(tokenizer, max_length)
        self.batch_tokens = batch_tokens
        self.fingerprint = fingerprint(model)

    @classmethod
    def load(
        cls,
        name: str,
        device: str = "auto",
        dtype: str = "float32",
        max_length: int = 2048,
        revision: str | None = None,
        trust_remote_code: str | None = None,
    ) -> "RewardScorer":
        """By the name of a folder or on the Hub; see `spl.reward_models.load_reward_model`.

        Raises:
            UserError: there is no such model or device.
        """
        where = device_of(device)
        model, tokenizer = load_reward_model(name, getattr(torch, dtype), revision, trust_remote_code)
        return cls(model.to(where), tokenizer, max_length)

    def score(self, conversations: Sequence[Sequence[Message]], replies: Sequence[Sequence[str]]) -> list[list[float]]:
        """The reward of each reply to each conversation; equal replies are read once.

        Raises:
            UserError: the chat template refuses a conversation.
        """
        encoded = [self._encode(turns, drawn) for turns, drawn in zip(conversations, replies, strict=True)]
        rewards = self._rewards({ids for rows in encoded for ids in rows})
        return [[rewards[ids] for ids in rows] for rows in encoded]

    def _encode(self, turns: Sequence[Message], replies: Sequence[str]) -> list[Ids]:
        rows = []
        for outcome in self.encoder.encode_all([PreferenceExample(tuple(turns), (reply,), ()) for reply in replies]):
            if isinstance(outcome, UserError):
                raise outcome
            rows.append(outcome[0].sequences[0])
        return rows

    @torch.inference_mode()
    def _rewards(self, sequences: set[Ids]) -> dict[Ids, float]:
        rewards: dict[Ids, float] = {}
        for few in self._batches(sorted(sequences, key=lambda ids: (len(ids), ids))):
            rewards.update(zip(few, self._read(few).tolist(), strict=True))
        return rewards

    def _batches(self, by_length: list[Ids]) -> Iterator[list[Ids]]:
        padding = self.model.config.get_text_config().pad_token_id
        few: list[Ids] = []
        for ids in by_length:
            # Without a padding token the model takes rows one by one.
            if few and (padding is None or (len(few) + 1) * len(ids) > self.batch_tokens):
                yield few
                few = []
            few.append(ids)
        if few:
            yield few

    def _read(self, rows: list[Ids]) -> Tensor:
        """Rewards [N] of rows of token ids, padded on the right."""
        padding = self.model.config.get_text_config().pad_token_id or 0
        ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=padding)
        mask = torch.arange(ids.shape[1]) < torch.tensor([[len(row)] for row in rows])
        device = self.model.device
        logits: Tensor = self.model(input_ids=ids.to(device), attention_mask=mask.long().to(device)).logits
        return logits[:, 0].float()
