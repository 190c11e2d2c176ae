"""What every module that trains a policy shares: the step, the optimiser, checkpoints of what trains, the export."""

import math
import zipfile
from abc import abstractmethod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import get_scheduler

from spl.checkpoints import read
from spl.models import ExportFormat, load_policy, save_policy, whole
from spl.modules.figures import SHOWN, Figures, HeldOutMeans, over_processes
from spl.modules.flops import matrix_sizes, step_flops
from spl.modules.memory import Memory, Setup, peak_memory
from spl.modules.non_finite import NonFiniteLossError, all_agree, all_finite, check_start
from spl.modules.policy import Policy
from spl.modules.shape import shape_of
from spl.modules.sharding import is_sharded
from spl.secrets import without_secrets
from spl.types import PreferenceBatch, UserError


class StartCheck(NamedTuple):
    """What the first step should find."""

    expected_loss: float  # of a batch before step 1
    gap: float | None  # largest |log pi - log pi_ref| a token; None without a reference
    note: str  # what to read the loss against


class PolicyModule(Policy):
    """A policy and its training; `Policy` lists the settings.

    A module says how a batch is evaluated and what figures are shown of it; the step is the same in all.
    """

    means: HeldOutMeans

    @abstractmethod
    def evaluate(self, batch: PreferenceBatch, stage: str) -> tuple[Any, Tensor]:
        """What a step returns of a batch, a TypedDict with at least `loss` [] and `objective` [], and losses [B].

        `loss` carries the gradient, `objective` is the figure that people see, detached.
        """

    @abstractmethod
    def figures_of(self, output: Any, batch: PreferenceBatch, stage: str) -> Figures:
        """Of what `evaluate` gives."""

    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> Any:
        return self._shared_step(batch, "train")

    def validation_step(self, batch: PreferenceBatch, batch_idx: int) -> Any:
        return self._shared_step(batch, "val")

    def test_step(self, batch: PreferenceBatch, batch_idx: int) -> Any:
        return self._shared_step(batch, "test")

    def predict_step(self, batch: PreferenceBatch, batch_idx: int) -> Any:
        return self.evaluate(batch, "predict")[0]

    def _shared_step(self, batch: PreferenceBatch, stage: str) -> Any:
        output, losses = self.evaluate(batch, stage)
        figures = self.figures_of(output, batch, stage)
        if stage == "train":
            output["loss"] = self.guard.note(batch, losses, output["loss"])
            for name, value in over_processes(figures).items():
                self.log(f"train/{name}", value, batch_size=batch.num_examples, prog_bar=name in SHOWN)
        else:
            self.means.add(figures, self.held_out.is_finite(batch, losses))
        return output

    def on_validation_epoch_end(self) -> None:
        self._log_means("val")

    def on_test_epoch_end(self) -> None:
        self._log_means("test")

    def _log_means(self, stage: str) -> None:
        self.log(f"{stage}/non_finite", self.held_out.end())
        for name, value in self.held_out_figures().items():
            self.log(f"{stage}/{name}", value, prog_bar=name in SHOWN)

    def held_out_figures(self) -> dict[str, Tensor]:
        """Over all held-out batches and processes; begins anew."""
        return self.means.end()

    @abstractmethod
    def loss_of(self, batch: PreferenceBatch) -> Tensor:
        """The loss of a batch, with its graph; logs nothing."""

    @abstractmethod
    def start_check(self, batch: PreferenceBatch) -> StartCheck:
        """Evaluate a batch before training."""

    def needs_reference_copy(self, batch: PreferenceBatch) -> bool:
        """Whether a second model is held when a step runs on a batch."""
        return False

    def peak_memory(self, batch: PreferenceBatch) -> Memory:
        """Estimated bytes on one device of a training step on a batch."""
        return peak_memory(shape_of(self.policy), batch, self._memory_setup(batch))

    def _memory_setup(self, batch: PreferenceBatch) -> Setup:
        trainer = self._trainer
        strategy = None if trainer is None else trainer.strategy
        sharded, copied = is_sharded(self.policy), isinstance(strategy, DDPStrategy)
        return Setup(
            layout="fsdp" if sharded else "ddp" if copied else "single",
            devices=1 if trainer is None else trainer.world_size,
            mixed=trainer is not None and trainer.precision == "bf16-mixed",
            checkpointing=self.hparams["gradient_checkpointing"],
            reference_copy=self.needs_reference_copy(batch),
            reshards=getattr(strategy, "reshard_after_forward", True),
            sums_whole=trainer is not None
            and trainer.accumulate_grad_batches > 1
            and not getattr(strategy, "reduce_every_micro_batch", False),
            cpu_offload=getattr(strategy, "cpu_offload", False),
            head_chunk=self.hparams["head_chunk"],
            backend=self.backend,
            cuda=self.device.type == "cuda",
        )

    def on_train_start(self) -> None:
        self.guard.begin()

    def check_start(self, finite: bool, batch: PreferenceBatch, name: str) -> None:
        """See what a batch that was run before step 1 tells; see `spl.modules.non_finite.check_start`."""
        check_start(self, finite, batch, name)

    def on_train_batch_start(self, batch: PreferenceBatch, batch_idx: int) -> None:
        # Whatever draws random numbers in a step draws the same ones after a resume.
        step = 1_000_003 * self.trainer.current_epoch + batch_idx
        torch.manual_seed((step * 1_009 + self.global_rank) % 2**63)

    def needs_reference(self, batch: PreferenceBatch) -> bool:
        """Whether a step on a batch runs a reference."""
        return False

    def step_flops(self, batch: PreferenceBatch) -> float:
        """Floating-point operations that a step on a batch asks for; ask before the step. See `spl.modules.flops`."""
        if self._sizes is None:
            self._sizes = matrix_sizes(self.policy)
        return step_flops(self._sizes, batch, self.needs_reference(batch))

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the Euclidean norm of the step's whole gradient, before it is clipped; see what becomes of the step."""
        self._trained = True
        gradients = [p.grad for p in self.policy.parameters() if p.grad is not None]
        sharded = [g for g in gradients if isinstance(g, DTensor)]
        whole = [g for g in gradients if not isinstance(g, DTensor)]
        norms = [torch.nn.utils.get_total_norm(group) for group in (sharded, whole) if group]  # not of both at once
        parts = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
        norm = torch.stack(parts).norm()
        self.log("train/grad_norm", norm, batch_size=1)
        self.guard.settle(norm, optimizer, self)
        if self.guard.on_non_finite == "skip":
            self.log("train/skipped_steps", float(self.guard.skipped), batch_size=1)

    @property
    def warmup_steps(self) -> int:
        """Optimiser steps before the learning rate is at its peak."""
        warmup: float = self.hparams["warmup"]
        return round(warmup * self.trainer.estimated_stepping_batches) if warmup < 1 else int(warmup)

    def configure_optimizers(self) -> Any:
        hp = self.hparams
        trained = [p for p in self.policy.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim >= 2], "weight_decay": hp["weight_decay"]},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=hp["lr"], betas=hp["betas"])
        steps = self.trainer.estimated_stepping_batches
        if not 0 < steps < math.inf:
            raise UserError("the run has no known length, so the learning rate has no schedule: set trainer.max_steps.")
        name = "constant_with_warmup" if hp["schedule"] == "constant" else hp["schedule"]
        scheduler = get_scheduler(name, optimizer, num_warmup_steps=self.warmup_steps, num_training_steps=int(steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        trained = {name for name, p in self.named_parameters(remove_duplicate=False) if p.requires_grad}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}
        # Raised before a file is touched, so that the last good checkpoint stays.
        if not all_agree(all_finite(checkpoint["state_dict"].values())):
            raise NonFiniteLossError(
                f"the weights are not finite after step {self.global_step}, and were not saved; checkpoints saved "
                "before are kept. Lower model.lr, or set trainer.gradient_clip_val."
            )
        checkpoint["non_finite"] = self.guard.state_dict()
        for settings in checkpoint.keys() & {"hyper_parameters", "datamodule_hyper_parameters"}:
            checkpoint[settings] = without_secrets(checkpoint[settings])

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, **settings: Any) -> Any:  # type: ignore[override]
        """A module with the settings (but for those given) and the trained weights of a checkpoint.

        Raises:
            UserError: the file is damaged or foreign, or holds other weights.
        """
        if zipfile.is_zipfile(checkpoint_path):  # from a plain Trainer, which pickles: tensors and numbers alone
            checkpoint = torch.load(checkpoint_path, map_location="cpu", weights_only=True)
        else:
            checkpoint = read(Path(checkpoint_path))
        module = cls(**checkpoint["hyper_parameters"] | settings)
        module.configure_model()
        module.on_load_checkpoint(checkpoint)
        module.load_state_dict(checkpoint["state_dict"], strict=False)
        return module

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._trained = True
        trained = {name for name, p in self.named_parameters(remove_duplicate=False) if p.requires_grad}
        saved = set(checkpoint["state_dict"])
        if saved != trained:
            odd = sorted(saved ^ trained)
            raise UserError(
                f"the checkpoint holds other weights than this model trains ({len(odd)} names differ, first {odd[0]}): "
                "give the model, lora_rank and lora_targets that it was trained with."
            )
        if "non_finite" in checkpoint:
            self.guard.load_state_dict(checkpoint["non_finite"])
        data: Any = getattr(self._trainer, "datamodule", None)
        if hasattr(data, "convert_progress"):
            data.convert_progress(checkpoint)

    def export(self, folder: Path, export_format: ExportFormat) -> float | None:
        """Write what was trained as a Hugging Face folder and check it; see `_save`. For all processes.

        Returns:
            The largest difference of the numbers that both give, where this process wrote the folder.
        """
        if is_sharded(self.policy):
            return self._export_gathered(folder, export_format)
        if self.global_rank:
            return None
        with self.generating():
            return self._save(self.policy, folder, export_format, self._answers())

    @torch.no_grad()
    def _export_gathered(self, folder: Path, export_format: ExportFormat) -> float | None:
        """The same of a sharded policy, gathered in the first process's memory, tensor by tensor."""
        with self.generating(), self.trainer.precision_plugin.forward_context():
            answers = self._answers().cpu()
        trained: dict[str, Tensor] = {}
        for name, parameter in self.policy.named_parameters():
            if parameter.requires_grad:
                gathered = whole(parameter)
                trained |= {name: gathered.cpu()} if self.global_rank == 0 else {}
        if self.global_rank:
            return None
        policy = self._load(load_policy).eval()
        policy.load_state_dict(trained, strict=False)
        return self._save(policy, folder, export_format, answers)

    @torch.no_grad()
    def _answers(self) -> Tensor:
        """Numbers of the trained model that those of its folder are held to."""
        logits: Tensor = self.policy(input_ids=self._probe()).logits
        return logits

    def _probe(self) -> Tensor:
        ids: Tensor = self.tokenizer("The quick brown fox jumps over the lazy dog.", return_tensors="pt")["input_ids"]
        return ids.to(self.device)

    def _save(self, policy: nn.Module, folder: Path, export_format: ExportFormat, answers: Tensor) -> float:
        """Write a model and hold what it loads to the answers; see `spl.models.save_policy`."""
        return save_policy(policy, self.tokenizer, folder, export_format, self._probe().to(answers.device), answers)
