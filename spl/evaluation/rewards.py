"""Replies scored by a reward model: ours or anyone's."""

import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from spl.data.collate import EncodedExample, collate
from spl.data.tokenization import Encoder
from spl.evaluation.choices import wilson
from spl.evaluation.listed import Tokens, batches, tries
from spl.evaluation.policies import device_of, on_device
from spl.logprobs.attention import FOREST, attention
from spl.logprobs.linear import widen
from spl.logprobs.rewards import last_states
from spl.logprobs.score import both_ways
from spl.models import fingerprint, num_positions
from spl.reward_models import load_reward_model
from spl.types import Message, PreferenceExample, UserError

log = logging.getLogger(__name__)

Ids = tuple[int, ...]


def caveat(name: str) -> list[str]:
    """How well a reward model tells held-out replies apart, by the run that it was trained in, where that is known.

    Args:
        name: a model's, perhaps the export of a run of `spl fit --task reward`, whose summary.json lies beside it.
    """
    try:
        end = json.loads((Path(name).parent / "summary.json").read_text())["end"]
        share, num = float(end["val/rewards/accuracies"]), float(end["val/rewards/num"])
    except (OSError, ValueError, KeyError, TypeError):
        return []
    low, high = (bound.item() for bound in wilson(torch.tensor(share), torch.tensor(num)))
    told = f"The reward model prefers the better of two held-out replies in {share:.0%} of {num:.0f} comparisons"
    chance = ": not to be told from chance, so that rewards say little of quality" if low <= 0.5 <= high else ""
    return [f"{told} [{low:.0%}, {high:.0%}]{chance}."]


class RewardScorer:
    """A reward model and how it reads a conversation: by its own chat template, at the last token.

    Replies to one conversation share its tokens, if the model's rewards are the same so.

    Args:
        model: a sequence-classification model with one label.
        tokenizer: its tokenizer.
        max_length: most tokens of a conversation, at most those that the model was made for; longer ones are cut as
            `Encoder` says.
        batch_tokens: most tokens that go through the network at a time, padding counted where there is any.
    """

    def __init__(self, model: Any, tokenizer: Any, max_length: int = 2048, batch_tokens: int = 16_384) -> None:
        self.model = model
        known = [most - 1 for most in (num_positions(model), tokenizer.model_max_length) if most]  # one more is read
        self.encoder = Encoder(tokenizer, min(max_length, *known))
        self.batch_tokens = batch_tokens
        self.fingerprint = fingerprint(model)
        self._shares: bool | None = None  # not known yet

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
        rewards = self._rewards([example for rows in encoded for example in tries(rows, self.batch_tokens)])
        return [[rewards[row.sequence] for row in rows] for rows in encoded]

    def _encode(self, turns: Sequence[Message], replies: Sequence[str]) -> list[Tokens]:
        """Up to the token at which each is read, and one more, so that this one goes through the network too."""
        rows = []
        for outcome in self.encoder.encode_all([PreferenceExample(tuple(turns), (reply,), ()) for reply in replies]):
            if isinstance(outcome, UserError):
                raise outcome
            ids, start = outcome[0].sequences[0], outcome[0].starts[0]
            while len(ids) > 1 and ids[-1] == self._padding:
                ids = ids[:-1]
            rows.append(Tokens((*ids, ids[-1]), min(start, len(ids))))
        return rows

    @property
    def _padding(self) -> int | None:
        return self.model.config.get_text_config().pad_token_id  # type: ignore[no-any-return]

    @torch.inference_mode()
    def _rewards(self, examples: Sequence[EncodedExample]) -> dict[Ids, float]:
        rewards: dict[Ids, float] = {}
        for group in batches(examples, self.batch_tokens):
            if self._shares is None:
                self._shares = self._agrees(group[0])
            found = self._by_forest(group) if self._shares else self._by_rows(group)
            rewards |= dict(zip((ids for example in group for ids in example.sequences), found.tolist(), strict=True))
        return rewards

    def _agrees(self, example: EncodedExample) -> bool:
        """Whether replies that share their prompt's tokens have the rewards of whole rows, tried on two of them."""
        few = [EncodedExample(example.sequences[:2], example.starts[:2], (), None, "")]
        try:
            shared, rows = both_ways(
                self.model, lambda scorer: self._by_forest(few) if scorer == "forest" else self._by_rows(few)
            )
        except Exception as error:  # an architecture may refuse in any way it likes
            log.info("Rewards are read row by row: %s: %s.", type(error).__name__, error)
            return False
        allowed = 1e-3 if self.model.dtype in (torch.float32, torch.float64) else 0.1
        if ((shared - rows).abs() <= allowed * (1 + rows.abs())).all():
            return True
        log.info("Rewards are read row by row, from which shared prompts differ by %.2g.", (shared - rows).abs().max())
        return False

    def _by_forest(self, group: Sequence[EncodedExample]) -> Tensor:
        """Rewards [R] of a group's replies, a prompt's tokens run once."""
        batch = on_device(collate(list(group)), self.model.device)
        with attention(self.model, FOREST):
            return (widen(last_states(self.model, batch)) @ widen(self._head())[0]).cpu()

    def _head(self) -> Tensor:
        """The weights [1, H] of a head without anything else.

        Raises:
            TypeError: the model's is another.
        """
        inside = f"{self.model.base_model_prefix}."
        own: list[Tensor] = [weight for name, weight in self.model.named_parameters() if not name.startswith(inside)]
        if [weight.shape for weight in own] != [(1, self.model.config.get_text_config().hidden_size)]:
            raise TypeError("the head is more than one number's weights")
        return own[0]

    def _by_rows(self, group: Sequence[EncodedExample]) -> Tensor:
        """Rewards [R] of a group's replies as transformers gives them, in padded rows of about one length."""
        rows = [ids[:-1] for example in group for ids in example.sequences]
        order = sorted(range(len(rows)), key=lambda k: len(rows[k]))
        found = torch.empty(len(rows))
        for few in self._padded(order, [len(row) for row in rows]):
            found[few] = self._read([rows[k] for k in few]).cpu()
        return found

    def _padded(self, order: Sequence[int], lengths: Sequence[int]) -> Iterator[list[int]]:
        """Rows by their numbers, from the shortest on, of at most batch_tokens together, padding counted."""
        few: list[int] = []
        for k in order:
            # Without a padding token the model takes rows one by one.
            if few and (self._padding is None or (len(few) + 1) * lengths[k] > self.batch_tokens):
                yield few
                few = []
            few.append(k)
        if few:
            yield few

    def _read(self, rows: list[Ids]) -> Tensor:
        """Rewards [N] of rows of token ids, padded on the right."""
        ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=self._padding or 0)
        mask = torch.arange(ids.shape[1]) < torch.tensor([[len(row)] for row in rows])
        device = self.model.device
        logits: Tensor = self.model(input_ids=ids.to(device), attention_mask=mask.long().to(device)).logits
        return logits[:, 0].float()
