"""What every module that trains a policy shares: the optimiser, checkpoints of what trains, the export."""

import math
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import get_scheduler

from spl.checkpoints import read
from spl.models import ExportFormat, load_policy, save_policy, whole
from spl.modules.flops import matrix_sizes, step_flops
from spl.modules.non_finite import NonFiniteLossError, all_agree, all_finite, check_start
from spl.modules.policy import Policy
from spl.modules.sharding import is_sharded
from spl.secrets import without_secrets
from spl.types import PreferenceBatch, UserError


class PolicyModule(Policy):
    """A policy and its training; `Policy` lists the settings."""

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
        """Write the policy as a Hugging Face folder and check it; see `spl.models.save_policy`. For all processes.

        Returns:
            The largest difference of the logits, where this process wrote the folder.
        """
        text = self.tokenizer("The quick brown fox jumps over the lazy dog.", return_tensors="pt")
        ids = text["input_ids"].to(self.device)
        if is_sharded(self.policy):
            return self._export_gathered(folder, export_format, ids)
        if self.global_rank:
            return None
        with self.generating():
            return save_policy(self.policy, self.tokenizer, folder, export_format, ids)

    @torch.no_grad()
    def _export_gathered(self, folder: Path, export_format: ExportFormat, ids: Tensor) -> float | None:
        """The same of a sharded policy, gathered in the first process's memory, tensor by tensor."""
        with self.generating(), self.trainer.precision_plugin.forward_context():
            logits = self.policy(input_ids=ids).logits.cpu()
        trained: dict[str, Tensor] = {}
        for name, parameter in self.policy.named_parameters():
            if parameter.requires_grad:
                gathered = whole(parameter)
                trained |= {name: gathered.cpu()} if self.global_rank == 0 else {}
        if self.global_rank:
            return None
        policy = self._load(load_policy).eval()
        policy.load_state_dict(trained, strict=False)
        return save_policy(policy, self.tokenizer, folder, export_format, ids.cpu(), logits)
