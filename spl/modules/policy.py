"""A policy by its settings: loaded, scored, asked for replies."""

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar, Literal

import torch
from lightning import LightningModule
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import nn

from spl.logprobs.forest import Backend
from spl.logprobs.kernels import require
from spl.logprobs.laws import score_laws
from spl.logprobs.lora import FusedLinear
from spl.logprobs.score import base_of, first_examples, gap_to_plain, prepare, score
from spl.models import Dtype, eos_token_ids, load_policy, load_tokenizer
from spl.modules.flops import MatrixSizes
from spl.modules.layers import compile_layers
from spl.modules.non_finite import HeldOutGuard, OnNonFinite, StepGuard
from spl.modules.sharding import ShardedStrategy
from spl.secrets import without_secrets
from spl.trust import check_trust, runs_own_code
from spl.types import PreferenceBatch, ResponseLaws, ResponseLogps, Task, UserError

Schedule = Literal["constant", "linear", "cosine"]
Scorer = Literal["auto", "forest", "plain"]

log = logging.getLogger(__name__)


class Policy(LightningModule):
    """A policy and its tokenizer, and the settings of it and of its training.

    Args:
        model: a Hub id, a local folder, a .gguf file (also one in an installed package), or "tiny".
        dtype: of the weights. Sums of log-probabilities and the loss are float32 in any case.
        lora_rank: rank of the LoRA adapters on every linear layer; 0 trains all weights.
        lora_alpha: LoRA scale; adapters are multiplied by lora_alpha / lora_rank.
        lora_targets: names of the layers that get adapters, or "all-linear".
        compile_blocks: have torch.compile make each decoder layer's kernels: faster steps after some minutes, on a GPU.
        gradient_checkpointing: recompute activations in the backward pass: less memory, about a third more time.
        scorer: "forest" runs every distinct token of a batch once, "plain" pads every response; "auto" compares the two
            on two real examples and takes the first unless they differ.
        attention: kernel of the forest: "sdpa" runs anywhere; "flex" (FlexAttention) and "varlen" (flash attention, in
            bfloat16) on CUDA; "auto" takes the fastest that can run.
        head_chunk: response tokens whose logits are held at a time.
        lr: peak learning rate of AdamW.
        betas: of AdamW; a second one of 0.95 forgets the first steps sooner in short runs.
        weight_decay: on matrices; biases and norms get none.
        schedule: of the learning rate, after its warm-up.
        warmup: steps of linear warm-up, or a share of all steps where below 1.
        on_non_finite: what becomes of a step whose loss or gradient is infinite or not a number: "stop" ends the run,
            "skip" leaves the step out, at most 10 in a row. Either way its batch is kept in the run folder's
            non_finite/.
        revision: of the model on the Hub.
        trust_remote_code: the model's name once more, to run the code that it brings along; read that code before.
    """

    policy: nn.Module
    task: ClassVar[Task] = "preference"  # what is learned from a row of the data
    writes_replies: ClassVar[bool] = True  # it can be sampled from

    def __init__(
        self,
        model: str = "tiny",
        *,
        dtype: Dtype = "float32",
        lora_rank: int = 16,
        lora_alpha: int = 16,
        lora_targets: str | list[str] = "all-linear",
        gradient_checkpointing: bool = False,
        compile_blocks: bool = False,
        scorer: Scorer = "auto",
        attention: Backend = "auto",
        head_chunk: int = 512,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        schedule: Schedule = "cosine",
        warmup: float = 0.05,
        on_non_finite: OnNonFinite = "stop",
        revision: str | None = None,
        trust_remote_code: str | None = None,
    ) -> None:
        super().__init__()
        _check("lora_rank", lora_rank, lora_rank >= 0, "0 or more")
        _check("head_chunk", head_chunk, head_chunk >= 1, "1 or more")
        _check("lr", lr, 0 < lr < math.inf, "a number above 0")
        _check("betas", betas, all(0 <= b < 1 for b in betas), "two numbers in [0, 1)")
        _check("weight_decay", weight_decay, 0 <= weight_decay < math.inf, "a number, 0 or more")
        _check("warmup", warmup, 0 <= warmup < math.inf, "a number, 0 or more")
        check_trust(trust_remote_code, model)
        self.save_hyperparameters()
        if scorer == "plain" and attention != "auto":
            raise UserError(
                f"model.attention {attention} is a kernel of the forest, but model.scorer is plain: leave one out."
            )
        self.scorer: Scorer = scorer
        self.backend: Backend = attention
        self.strict_loading = False  # a checkpoint holds what trains, not the frozen base
        self._tokenizer: Any = None
        self._sizes: MatrixSizes | None = None
        self._trained = False  # a step was taken, or a checkpoint loaded
        self.guard = StepGuard(on_non_finite)
        self.held_out = HeldOutGuard()

    @property
    def hparams_initial(self) -> Any:
        """What loggers write of the settings."""
        return without_secrets(dict(super().hparams_initial))

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer, loaded on first use; data modules read it before the model is loaded."""
        if self._tokenizer is None:
            hp = self.hparams
            self._tokenizer = load_tokenizer(hp["model"], hp["revision"], hp["trust_remote_code"])
        return self._tokenizer

    @property
    def trains_adapters(self) -> bool:
        """LoRA adapters on a frozen base, or all weights."""
        return bool(self.hparams["lora_rank"])

    def setup(self, stage: str) -> None:
        if self.trainer.precision not in ("32-true", "64-true", "bf16-mixed"):
            raise UserError(
                f"trainer.precision {self.trainer.precision} would round the loss itself: use 32-true or bf16-mixed, "
                "and model.dtype bfloat16 for weights of half the size."
            )
        strategy = self.trainer.strategy
        if isinstance(strategy, FSDPStrategy | ModelParallelStrategy) and not isinstance(strategy, ShardedStrategy):
            raise UserError(
                f"trainer.strategy {type(strategy).__name__} would not shard this model: "
                "use spl.modules.sharding.ShardedStrategy, as configs/trainer/fsdp.yaml does."
            )
        low = self.trainer.precision == "bf16-mixed" or self.hparams["dtype"] == "bfloat16"
        dtype = torch.bfloat16 if low else torch.float32
        require(self.hparams["attention"], self.trainer.strategy.root_device, dtype)

    def configure_model(self) -> None:
        if hasattr(self, "policy"):
            return
        self.policy = self.load_policy()

    def load_policy(self) -> nn.Module:
        """The policy as it starts."""
        strategy = self._trainer.strategy if self._trainer else None
        policy = self._load(strategy.load_policy if isinstance(strategy, ShardedStrategy) else load_policy)
        if self.hparams["compile_blocks"]:
            compile_layers(policy, self.hparams["gradient_checkpointing"])
        return policy

    def _load(self, load: Callable[..., nn.Module]) -> nn.Module:
        hp = self.hparams
        return load(
            hp["model"],
            dtype=hp["dtype"],
            lora_rank=hp["lora_rank"],
            lora_alpha=hp["lora_alpha"],
            lora_targets=hp["lora_targets"],
            lora_layer=FusedLinear,
            gradient_checkpointing=hp["gradient_checkpointing"],
            scalar_head=self.task == "reward",
            revision=hp["revision"],
            trust_remote_code=hp["trust_remote_code"],
        )

    def score(self, batch: PreferenceBatch, model: nn.Module | None = None, temperature: float = 1.0) -> ResponseLogps:
        """Log-probabilities of the batch's responses under the policy, or under another model of its kind."""
        model = self.policy if model is None else model
        if self.scorer == "auto":
            self._choose_scorer(batch)
        prepare(model, self.scorer)
        return score(model, batch, self.scorer, self.hparams["head_chunk"], self.backend, temperature)

    @property
    def has_reference(self) -> bool:
        """Whether the policy before step 1 is at hand as a model."""
        return self.trains_adapters

    @contextmanager
    def as_reference(self) -> Iterator[nn.Module]:
        """The policy before step 1 as a model, for a block; with adapters it is the policy, which cannot run beside."""
        policy: Any = self.policy
        with nullcontext() if self.untrained else policy.disable_adapter():
            yield policy

    @property
    def untrained(self) -> bool:
        """Whether the policy still is its reference."""
        return not self._trained

    @property
    def global_temperature(self) -> float | None:
        """alpha / beta, where the objective has it."""
        return None

    @torch.no_grad()
    def laws(self, batch: PreferenceBatch, of_reference: bool = False) -> ResponseLaws:
        """The policy's laws beside the reference's along a batch's responses, usually samples; see `score_laws`.

        Without a reference the entries that need one are the policy's own.

        Args:
            batch: responses.
            of_reference: the reference in place of the policy, too.
        """
        if self.scorer == "auto":
            self._choose_scorer(batch)
        prepare(self.policy, self.scorer)
        reference = self.as_reference if self.has_reference and not (of_reference or self.untrained) else None
        with self.as_reference() if of_reference else nullcontext(self.policy) as model:
            hp = self.hparams
            return score_laws(
                model, reference, batch, self.scorer, hp["head_chunk"], self.backend, self.global_temperature
            )

    def _choose_scorer(self, batch: PreferenceBatch) -> None:
        """Hold the fast scorer to the plain one on two real examples."""
        low = torch.is_autocast_enabled(self.device.type) or next(self.policy.parameters()).dtype == torch.bfloat16
        allowed, unit = self._allowed_gap(low)
        # "auto" may have taken a kernel that does not suit the model; sdpa suits all that attend at all.
        fallback: tuple[Backend, ...] = ("sdpa",) if self.backend == "auto" and self.device.type == "cuda" else ()
        for backend in (self.backend, *fallback):
            gap, reason = self._gap(batch, backend)
            if gap <= allowed:
                self.backend = backend
                break
            log.info("Attention %s: off by %.2g %s%s.", backend, gap, unit, reason)
        self.scorer = "forest" if gap <= allowed else "plain"
        kind = type(base_of(self.policy)).__name__
        if self.scorer == "forest":
            log.info("Scorer: forest, every distinct token once; within %.2g %s of the plain one.", gap, unit)
        else:
            log.warning("Scorer: plain, since the forest differs by %.2g %s on %s%s.", gap, unit, kind, reason)

    def _allowed_gap(self, low: bool) -> tuple[float, str]:
        """Between the scorers, and its unit.

        Args:
            low: products are taken in bfloat16.
        """
        return 0.25 if low else 1e-3, "nats a token"

    def _gap_to_plain(self, batch: PreferenceBatch, backend: Backend) -> float:
        return gap_to_plain(self.policy, batch, self.hparams["head_chunk"], backend)

    def _gap(self, batch: PreferenceBatch, backend: Backend) -> tuple[float, str]:
        """Between the scorers with a kernel, on two examples a process; infinite where the model refuses, and why."""
        reason = ""
        try:
            gap = self._gap_to_plain(first_examples(batch, 2), backend)
        except UserError:
            raise  # of a kernel that was asked for and cannot run
        except Exception as error:  # an architecture may refuse in any way it likes
            gap, reason = math.inf, f" ({type(error).__name__}: {error})"
        if self._trainer:  # all take the same scorer
            gap = float(self._trainer.strategy.reduce(torch.tensor(gap, device=self.device), reduce_op="max"))
        return gap, reason

    @property
    def eos_token_ids(self) -> set[int]:
        """Tokens that end a reply."""
        return eos_token_ids(self.policy, self.tokenizer)

    @contextmanager
    def generating(self) -> Iterator[None]:
        """Run a block in evaluation mode, in which activations are not recomputed and so keys and values are kept."""
        training = self.policy.training
        self.policy.eval()
        try:
            yield
        finally:
            self.policy.train(training)

    def describe(self) -> dict[str, str]:
        """What is trained, for the start-up report; the model must be configured."""
        hp = self.hparams
        trained = sum(p.numel() for p in self.policy.parameters() if p.requires_grad)
        total = sum(p.numel() for p in self.policy.parameters())
        how = (
            f"LoRA r={hp['lora_rank']}, alpha={hp['lora_alpha']}, {hp['lora_targets']}"
            if self.trains_adapters
            else "full"
        )
        code = {"remote code": f"runs, from {hp['trust_remote_code']}"} if runs_own_code(self.policy) else {}
        return {
            "policy": f"{hp['model']}, {type(base_of(self.policy)).__name__}, {hp['dtype']} weights",
            **code,
            "trained": f"{trained:,} of {total:,} parameters ({how})",
        }


def _check(name: str, value: object, holds: bool, expected: str) -> None:
    if not holds:
        raise UserError(f"model.{name} must be {expected}, but is {value}.")
