"""A policy to evaluate: a model from anywhere, its tokenizer, and the engine that scores replies."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from spl.data.tokenization import Encoder, Template, TurnEnd
from spl.logprobs.laws import score_laws
from spl.logprobs.score import first_examples, gap_to_plain, prepare, score
from spl.models import Dtype, eos_token_ids, fingerprint, load_model, load_tokenizer, num_positions
from spl.trust import check_trust
from spl.types import PreferenceBatch, ResponseLaws, ResponseLogps, UserError

log = logging.getLogger(__name__)

_UNBOUND = 10**9
_ALLOWED_GAP = {torch.float32: 1e-3, torch.bfloat16: 0.25}  # nats a token, as in training


class EvaluatedPolicy:
    """A model in evaluation mode that scores whole replies and can be sampled from.

    Attributes:
        name: as given.
        model: the transformers model, an adapter merged.
        tokenizer: its own.
        device: where it runs.
    """

    def __init__(self, name: str, model: Any, tokenizer: Any, device: torch.device) -> None:
        self.name = name
        self.model: nn.Module = model.to(device).eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.device = device
        self._scorer = ""

    @classmethod
    def load(
        cls,
        name: str,
        *,
        dtype: Dtype = "float32",
        device: str = "auto",
        revision: str | None = None,
        trust_remote_code: str | None = None,
    ) -> "EvaluatedPolicy":
        """Load a policy.

        Args:
            name: a model's folder, an adapter's, a .gguf file, a Hub id, or "tiny".
            dtype: of the weights.
            device: "cpu", "cuda", "cuda:1" and so on; "auto" takes CUDA where there is one.
            revision: of the model on the Hub.
            trust_remote_code: the model's name once more, to run the code that it brings along.

        Raises:
            UserError: there is no such model or device.
        """
        check_trust(trust_remote_code, name)
        where = device_of(device)
        model = load_model(name, getattr(torch, dtype), revision, trust_remote_code)
        return cls(name, model, load_tokenizer(name, revision, trust_remote_code), where)

    @cached_property
    def eos_token_ids(self) -> set[int]:
        """Tokens that end a reply."""
        return eos_token_ids(self.model, self.tokenizer)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the weights."""
        return fingerprint(self.model)

    @property
    def num_positions(self) -> int | None:
        """Most tokens that it was made for."""
        return num_positions(self.model)

    def encoder(
        self, max_length: int | None = 2048, *, template: Template = "auto", turn_end: TurnEnd = "template"
    ) -> Encoder:
        """Of prompts and replies as in training; a prompt that is too long raises, since an evaluation cuts nothing.

        Args:
            max_length: most tokens, at most those that the model was made for; None for no bound.
            template: see `Encoder`.
            turn_end: see `Encoder`.
        """
        most = _UNBOUND if max_length is None else min(max_length, self.num_positions or max_length)
        ends = tuple(sorted(self.eos_token_ids))
        at_end = most == self.num_positions
        advice = "the model has no more positions: leave it out" if at_end else "raise max_length, or leave it out"
        return Encoder(self.tokenizer, most, template, "raise", turn_end, end_ids=ends, advice=advice)

    @torch.inference_mode()
    def score(self, batch: PreferenceBatch) -> ResponseLogps:
        """Log-probabilities and entropies of a batch's responses, in nats."""
        with self._scoring(batch) as (on_device, scorer):
            return score(self.model, on_device, scorer)

    @torch.inference_mode()
    def laws(self, batch: PreferenceBatch, global_temperature: float | None = None) -> ResponseLaws:
        """The next-token laws along a batch's responses; see `score_laws`."""
        with self._scoring(batch) as (on_device, scorer):
            return score_laws(self.model, None, on_device, scorer, global_temperature=global_temperature)

    @contextmanager
    def _scoring(self, batch: PreferenceBatch) -> Iterator[tuple[PreferenceBatch, str]]:
        """The batch where the model is, and the scorer that suits it, found on its first batch; after it, as before."""
        batch = on_device(batch, self.device)
        if not self._scorer:
            self._scorer = self._choose(batch)
        prepare(self.model, self._scorer)
        try:
            yield batch, self._scorer
        finally:
            prepare(self.model, "plain")

    def _choose(self, batch: PreferenceBatch) -> str:
        allowed, reason = _ALLOWED_GAP.get(next(self.model.parameters()).dtype, 0.25), ""
        try:
            gap = gap_to_plain(self.model, first_examples(batch, 2))
        except Exception as error:  # an architecture may refuse in any way it likes
            gap, reason = float("inf"), f" ({type(error).__name__}: {error})"
        if gap <= allowed:
            return "forest"
        log.warning("%s: scored response by response, since the forest differs by %.2g nats%s.", self.name, gap, reason)
        return "plain"


def on_device(batch: PreferenceBatch, device: torch.device) -> PreferenceBatch:
    """The batch in a device's memory."""
    return PreferenceBatch._make(part.to(device) if isinstance(part, Tensor) else part for part in batch)


def device_of(name: str) -> torch.device:
    """A device by its name; "auto" takes CUDA where there is one.

    Raises:
        UserError: there is no such device.
    """
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        said = str(error).split("\n")[0]
        raise UserError(f"device must be cpu, cuda, cuda:1 or the like, and be there, but {name!r}: {said}") from error
    return device
