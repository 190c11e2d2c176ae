"""What is trained: the policy that all others start from, a reward model, and the policies, by one sweep."""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from spl.data.parts import comparison_row, demonstration_row, keep_rows, parts, prompt_row, short_examples
from spl.data.source import named_source
from spl.disk import replacing
from spl.paper.settings import Measuring, Sizes, Training
from spl.paper.steps import Steps
from spl.results import read
from spl.runs import arguments, execute
from spl.sweep import Select

log = logging.getLogger(__name__)

DPO = "dpo"
"""Label of the policy that is decoded in several ways."""


def start_label(plan: Training) -> str:
    """Label of the policy that all others start from."""
    return "sft" if plan.sft_steps else "base"


@dataclass(frozen=True)
class Arm:
    """A policy's training run, decoded in one way.

    Attributes:
        policy: its label.
        seed: of its training run; None for the start, which all have in common.
        model: its folder.
        setting: name of the way of decoding; none is its own law.
        options: of spl sample for it.
    """

    policy: str
    seed: int | None
    model: str
    setting: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)


def prepare(steps: Steps, sizes: Sizes) -> None:
    """Share the pairs out among parts without a common prompt.

    Raises:
        UserError: there are too few, or the folder holds other parts, on which what is skipped was made.
    """
    num = asdict(sizes)
    max_chars, num_rows = num.pop("max_chars"), num.pop("num_rows")
    examples = short_examples(named_source(steps.source("pairs"), "train"), num_rows, max_chars)
    found = parts(examples, num, seed=0)
    for name, part in found.items():
        keep_rows(Path(steps.part(name)), map(comparison_row, part))
        keep_rows(Path(steps.part(f"{name}_prompts")), (prompt_row(k, example) for k, example in enumerate(part)))
        keep_rows(Path(steps.part(f"{name}_chosen")), map(demonstration_row, part))
    said = ", ".join(f"{name} {size}" for name, size in num.items())
    log.info("Pairs in %s: %s; no prompt is in two of them.", steps.output / "data", said)


class Trainer:
    """Trains models in the folder of the steps.

    Args:
        steps: run the commands.
        model: that everything starts from.
        plan: steps and learning rates.

    Attributes:
        begun: the model that policies start from.
    """

    def __init__(self, steps: Steps, model: str, plan: Training) -> None:
        self.steps = steps
        self.model = model
        self.plan = plan
        self.begun = model

    def common(self, num_steps: int) -> dict[str, Any]:
        """Settings of all runs; held-out data are looked at before the first step and after the last."""
        own = {
            "model.model": self.model,
            "data.batch_size": self.plan.batch_size,
            "trainer.max_steps": num_steps,
            "trainer.gradient_clip_val": 1.0,
            "trainer.enable_progress_bar": False,
            "trainer.check_val_every_n_epoch": None,
            "trainer.val_check_interval": 1_000_000,
        }
        # The user's come first, since a config among them sets many, and count where they name one of these.
        return self.plan.settings | own | self.plan.settings

    def fit(self, name: str, task: str, parts: tuple[str, str], num_steps: int, lr: float, **more: Any) -> str:
        """Train a model on one part of the pairs, with another held out; returns the folder of its export."""
        folder, (train, val) = self.steps.output / name, map(self.steps.part, parts)
        settings = self.common(num_steps) | {"model.lr": lr, "data.path": train, "data.val_path": val} | more
        args = ["fit", "--task", task, *arguments(settings), "--output", str(folder), "--resume"]
        self.steps.run(self.steps.step(name, args, folder / "summary.json"))
        return str(folder / "export")

    def sft(self, name: str = "sft", **more: Any) -> str:
        """SFT on the preferred responses."""
        return self.fit(name, "sft", ("train_chosen", "dev_chosen"), self.plan.sft_steps, self.plan.sft_lr, **more)

    def start(self) -> None:
        """Make the policy that the others start from."""
        if self.plan.sft_steps:
            self.begun = self.sft()

    def reward_model(self) -> str:
        plan = self.plan
        return self.fit("reward", "reward", ("reward", "reward_dev"), plan.reward_steps, plan.reward_lr)

    def divpo(self, reward_model: str, num: int, measuring: Measuring) -> dict[str, Any]:
        """Pairs by DivPO from samples of the start; the settings of the policy that is trained on them."""
        samples, pairs = (self.steps.output / "divpo" / f"{name}.jsonl" for name in ("samples", "pairs"))
        settings: dict[str, Any] = {
            "model": self.begun,
            "prompts": self.steps.part("train_prompts"),
            "policy": start_label(self.plan),
        }
        settings |= {"num_samples": num, "max_new_tokens": measuring.max_new_tokens, "device": measuring.device}
        drawn = ["sample", *arguments(settings), "--output", str(samples)]
        given = {"reward_model": reward_model, "device": measuring.device, "output": str(pairs)}
        made = ["pairs", "divpo", str(samples), *arguments(given)]
        self.steps.run(self.steps.step("divpo samples", drawn, samples))
        self.steps.run(self.steps.step("divpo pairs", made, pairs))
        return {"model.alpha": None, "data.path": str(pairs)}

    def policies(self, policies: Mapping[str, dict[str, Any]]) -> list[Arm]:
        """Train the policies by a sweep; returns the start and the chosen runs, each decoded by its own law.

        Raises:
            SystemExit: the sweep failed, or no run of DPO has finished.
        """
        settings = self.common(self.plan.steps) | {"model.model": self.begun}
        settings |= {"data.path": self.steps.part("train"), "data.val_path": self.steps.part("dev")}
        folder, config = self.steps.output / "policies", self.steps.output / "policies.yaml"
        sweep = {
            "experiment": [],
            "output": str(folder),
            "policies": dict(policies),
            "grid": {"model.lr": self.plan.lrs},
            "seeds": self.plan.seeds,
            "settings": settings,
            "select": asdict(Select()),
            "cache": str(folder / "reference"),
            "jobs": self.steps.jobs,
        }
        with replacing(config) as file:
            file.write(yaml.safe_dump(sweep, sort_keys=False).encode())
        table = folder / "sweep.jsonl"
        table.unlink(missing_ok=True)  # which would else pass for what a sweep that fails has come to
        # Always: the sweep itself skips what is finished, and tries again what failed.
        execute([self.steps.step("policies", ["sweep", "--config", str(config)], table, always=True)])
        if not table.exists():
            log.error("The sweep failed, so the rest waits: mend it, and give the same command again.")
            raise SystemExit(1)
        arms = list(_finished(table))
        if not any(arm.policy == DPO for arm in arms):
            log.error("No run of %s has finished, so there is nothing to compare the others with.", DPO)
            raise SystemExit(1)
        return [Arm(start_label(self.plan), None, self.begun), *arms]


def _finished(sweep: Path) -> Iterator[Arm]:
    """The chosen runs of a sweep that have come to their end."""
    for row in read(sweep).of("run"):
        if row["chosen"] and row["state"] == "finished":
            yield Arm(row["policy"], row["train_seed"], f"{row['folder']}/export")
