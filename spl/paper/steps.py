"""Steps of the paper: commands that are printed, logged, and skipped where their result is there."""

import logging
from collections.abc import Sequence
from pathlib import Path

from spl.runs import Run, check_jobs, execute, file_name
from spl.types import UserError

log = logging.getLogger(__name__)

SOURCES = {  # how a file in a folder of local data begins, and a data set on the Hub
    "pairs": ("hh_harmless", "Anthropic/hh-rlhf"),
    "mmlu": ("mmlu_val", "cais/mmlu:all:validation"),
    "truthfulqa": ("truthfulqa_mc", "truthfulqa/truthful_qa:multiple_choice:validation"),
    "opinions": ("global_opinions", "Anthropic/llm_global_opinions:default:train"),
    "gsm8k": ("gsm8k_test", "gsm8k"),
    "math": ("math500", "math"),
}


class Steps:
    """Runs the steps in one folder.

    Args:
        output: the folder; `data`, `logs` and all results lie in it.
        local: folder of local data; the Hub without it.
        jobs: steps at a time, where they do not need each other.

    Raises:
        UserError: jobs is below 1.
    """

    def __init__(self, output: Path, local: Path | None = None, jobs: int = 1) -> None:
        check_jobs(jobs)
        self.output = output
        self.local = local
        self.jobs = jobs

    def source(self, name: str) -> str:
        """Where data of a name are read from; a name that is not one of SOURCES stands for itself.

        Raises:
            UserError: the folder of local data lacks them, or has them twice.
        """
        stem, hub = SOURCES.get(name, (name, name))
        if self.local is None or name not in SOURCES:
            return hub
        ends = (".jsonl", ".jsonl.gz")
        found = [path for end in ends if (path := self.local / f"{stem}{end}").is_file()] or [
            path for end in ends for path in sorted(self.local.glob(f"{stem}*{end}"))
        ]
        if len(found) > 1:
            raise UserError(f"{self.local} has both {found[0].name} and {found[1].name}: leave one of them.")
        if not found:
            raise UserError(
                f"{self.local} has no {stem}*.jsonl or {stem}*.jsonl.gz: add one, or leave data out for the Hub."
            )
        return str(found[0])

    def part(self, name: str) -> str:
        """The file of a part of the pairs."""
        return str(self.output / "data" / f"{name}.jsonl")

    def step(self, name: str, args: Sequence[str], result: Path, always: bool = False) -> Run:
        """A command and its log."""
        return Run(name, tuple(args), self.output / "logs" / f"{file_name(name)}.txt", result, always)

    def attempt(self, *steps: Run) -> list[Run]:
        """Run steps that do not need each other; returns those that came to their end."""
        outcomes = execute(steps, max(1, min(self.jobs, len(steps))))
        return [step for step, outcome in zip(steps, outcomes, strict=True) if outcome.state != "failed"]

    def run(self, *steps: Run) -> None:
        """Run steps that do not need each other.

        Raises:
            SystemExit: 1 if one failed.
        """
        if len(self.attempt(*steps)) < len(steps):
            log.error("A step failed, so the rest waits: mend it, and give the same command again.")
            raise SystemExit(1)
