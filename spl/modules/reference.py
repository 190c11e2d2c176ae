"""The reference of preference training: the exact starting policy, or the numbers kept of it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel
from torch import Tensor, nn

from spl.logprobs.cache import LogpCache
from spl.logprobs.score import first_examples
from spl.models import fingerprint, frozen_copy
from spl.modules.sharding import is_sharded
from spl.types import PreferenceBatch, UserError

Score = Callable[[PreferenceBatch, nn.Module], Tensor]
"""Log-probabilities [R] of a batch's responses under a model."""


class Reference:
    """The starting policy by construction: the policy with its adapters off, or else a frozen copy of it.

    With a cache its numbers are looked up first, and the copy is then loaded only where one is missing.
    It is no torch module, so that no optimiser, checkpoint or wrapper sees the copy.

    Args:
        policy: the policy before its first step.
        reload: loads the starting policy once more.
        cache: of log-probabilities under it.
    """

    def __init__(self, policy: nn.Module, reload: Callable[[], nn.Module], cache: LogpCache | None = None) -> None:
        self.policy = policy
        self.adapters = isinstance(policy, PeftModel)
        self.cache = cache
        self.model = None if self.adapters or cache is not None else self._copy(policy, reload)
        self._aside: nn.Module | None = None  # a copy that only monitors ask for, on the CPU
        self._reload = reload
        self._checked = False
        self._missed = False

    @staticmethod
    def _copy(policy: nn.Module, reload: Callable[[], nn.Module]) -> nn.Module:
        """The policy once more; a sharded one cannot be copied, so another is sharded and takes over its numbers."""
        if not is_sharded(policy):
            return frozen_copy(policy)
        model = reload().requires_grad_(False).eval()
        with torch.no_grad():
            for own, start in zip(model.parameters(), policy.parameters(), strict=True):
                own.copy_(start)
        return model

    def logps(self, batch: PreferenceBatch, score: Score, all_agree: Callable[[bool], bool], untrained: bool) -> Tensor:
        """log pi_ref of the batch's responses [R], nats and float32.

        Args:
            batch: what to score.
            score: the scorer that the policy has too.
            all_agree: whether a statement is true in every process; they score together, or none does.
            untrained: the policy still is the reference.

        Raises:
            UserError: the cache contradicts the model.
        """
        if self.cache is None:
            return self._score(batch, score)
        known = self.cache.get(batch.response_keys)
        if not all_agree(known is not None):
            self._missed = True
            found = self._score(batch, score).float()
            self._compare(batch, found)
            known = self.cache.add(batch.response_keys, found.tolist())
        elif not self._checked:
            self._check(batch, score, untrained)
            self._checked = True
        return torch.tensor(known, dtype=torch.float32, device=batch.input_ids.device)

    def end_epoch(self) -> None:
        """Let the copy go once an epoch has passed that did not need it."""
        if self.cache is not None and not self._missed:
            self.model = None
        self._missed = False

    def needs_copy(self, batch: PreferenceBatch) -> bool:
        """Whether a model besides the policy is held by when a batch is scored."""
        unknown = self.cache is not None and self.cache.get(batch.response_keys) is None
        return self.model is not None or (unknown and not self.adapters)

    @contextmanager
    def as_model(self) -> Iterator[nn.Module]:
        """The reference for a block, on the policy's device; with adapters it is the policy, which cannot run beside.

        Raises:
            UserError: it is not held, and cannot be loaded again.
        """
        if isinstance(self.policy, PeftModel):
            with self.policy.disable_adapter():
                yield self.policy
            return
        if self.model is not None:
            yield self.model.to(self._device)
            return
        self._aside = self._load()
        try:
            yield self._aside.to(self._device)
        finally:
            self._aside.to("cpu")

    @property
    def _device(self) -> torch.device:
        return next(self.policy.parameters()).device

    def _load(self) -> nn.Module:
        """The starting policy as it was kept or is loaded."""
        if self._aside is not None:
            return self._aside
        assert self.cache is not None
        model = self._reload().requires_grad_(False).eval()
        if fingerprint(model) != self.cache.weights:
            raise UserError("the model's files changed during the run, so the reference is gone: start it again.")
        return model

    def _score(self, batch: PreferenceBatch, score: Score) -> Tensor:
        if not self.adapters and self.model is None:
            self.model, self._aside = self._load().to(self._device), None
        with self.as_model() as model:
            return score(batch, model)

    def _check(self, batch: PreferenceBatch, score: Score, untrained: bool) -> None:
        """Hold the first kept numbers of a run to the model, where it is at hand."""
        few = first_examples(batch, 2)
        if self.adapters or self.model is not None:
            self._compare(few, self._score(few, score))
        elif untrained:
            self._compare(few, score(few, self.policy))

    def _compare(self, batch: PreferenceBatch, found: Tensor) -> None:
        """Hold the numbers that are kept of a batch to those found [R]."""
        assert self.cache is not None
        if not any(self.cache.get([key]) for key in batch.response_keys):
            return
        lengths = batch.member_response.bincount(minlength=batch.num_responses).tolist()
        low = next(self.policy.parameters()).dtype == torch.bfloat16 or torch.is_autocast_enabled(found.device.type)
        for response, (key, now) in enumerate(zip(batch.response_keys, found.tolist(), strict=True)):
            for kept in self.cache.get([key]) or ():
                if not abs(kept - now) <= (0.25 if low else 1e-3) * lengths[response]:
                    raise UserError(
                        f"the reference cache {self.cache.folder} says {kept:.3f} nats of a response of "
                        f"{batch.rows[int(batch.response_example[response])]}, and the model {now:.3f}: delete that "
                        "folder, or set --reference.cache none."
                    )

    def describe(self) -> str:
        """Which of its forms it has, for the start-up report."""
        if self.adapters:
            text = "the policy with its adapters off"
        elif self.cache is None:
            text = "a frozen copy of the starting policy"
        else:
            text = "the starting policy, loaded again where a kept number is missing"
        return text if self.cache is None else f"{text}; {len(self.cache):,} numbers kept in {self.cache.folder}"
