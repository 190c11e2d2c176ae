"""What is measured: replies compared, problems solved, questions answered, and the report of it all."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from spl.evaluation.sample_files import read_samples
from spl.paper.policies import DPO, Arm
from spl.paper.settings import Measuring
from spl.paper.steps import Steps
from spl.results import read
from spl.runs import Run, arguments, file_name

log = logging.getLogger(__name__)

MOST_GIVEN_UP = 0.1
"""Share of the prompts that a way of decoding may give up and still be compared, on those it answers."""


class Evidence:
    """Measures policies in the folder of the steps.

    Args:
        steps: run the commands.
        arms: the policies, first the one that the others start from.
        reward_model: folder of one.
        plan: how much is sampled and asked.
    """

    def __init__(self, steps: Steps, arms: Sequence[Arm], reward_model: str, plan: Measuring) -> None:
        self.steps = steps
        self.arms = arms
        self.start = arms[0]
        self.reward_model = reward_model
        self.plan = plan

    def decoded(self) -> Iterator[Arm]:
        """All policies by their own law, and DPO's in the other ways too."""
        yield from self.arms
        for name, options in self.plan.decodings.items():
            for arm in self.arms:
                if arm.policy == DPO:
                    yield replace(arm, setting=name, options=options)

    def sample(self, arms: Sequence[Arm], folder: str, **settings: Any) -> list[str]:
        """Draw every policy's replies to prompts or problems, to a file each; returns the files to compare.

        A global temperature gives up the prompts on which too few particles survive, perhaps all. Since policies are
        compared on the prompts to which all have replies, one that gave up many is left out.

        Raises:
            SystemExit: a step failed for another reason.
        """
        sure = [self._sampling(arm, folder, settings) for arm in arms if not _may_give_up(arm)]
        self.steps.run(*sure)
        risky = [self._sampling(arm, folder, settings) for arm in arms if _may_give_up(arm)]
        tried = self.steps.attempt(*risky)
        if broken := [run.name for run in risky if run not in tried and not _gave_up(run)]:
            log.error("%s failed, so the rest waits: mend it, and give the same command again.", broken[0])
            raise SystemExit(1)
        return [str(run.result) for run in (*sure, *filter(_answers_most, tried))]

    def _sampling(self, arm: Arm, folder: str, settings: dict[str, Any]) -> Run:
        own = {} if arm.seed is None else {"train_seed": arm.seed}
        name = file_name(arm.policy, arm.setting, *(f"seed={seed}" for seed in own.values()))
        path = self.steps.output / "samples" / folder / f"{name}.jsonl"
        given = {"model": arm.model, "policy": arm.policy, **own, **arm.options, **settings, "device": self.plan.device}
        return self.steps.step(f"samples {folder} {name}", ["sample", *arguments(given), "--output", str(path)], path)

    def evaluate(self, name: str, evaluation: str, *lists: str, **settings: Any) -> None:
        path = self.steps.output / "results" / f"{file_name(name)}.jsonl"
        given = {key: value for key, value in settings.items() if value is not None} | {"device": self.plan.device}
        args = ["evaluate", evaluation, *lists, *arguments(given), "--output", str(path)]
        self.steps.run(self.steps.step(name, args, path))

    def chat(self) -> None:
        """Diversity against quality, of replies to prompts that nothing was trained on."""
        plan = self.plan
        drawn = {"num_samples": plan.num_samples, "max_new_tokens": plan.max_new_tokens}
        files = self.sample([*self.decoded()], "chat", prompts=self.steps.part("prompts_prompts"), **drawn)
        models = {"reward_model": self.reward_model, "reference": self.start.model, "encoder": plan.encoder}
        self.evaluate("diversity-quality", "diversity-quality", "--samples", *files, **models)

    def problems(self) -> None:
        """Best of N, with difficulty by samples that are not compared."""
        plan = self.plan
        for name, number in plan.problems.items():
            source = self.steps.source(name)
            drawn = {"problems": source, "num_prompts": number, "max_new_tokens": plan.problem_tokens}
            files = self.sample([*self.decoded()], name, num_samples=plan.problem_samples, **drawn)
            apart = self.sample([self.start], f"{name}-apart", num_samples=plan.difficulty_samples, seed=1, **drawn)
            given: dict[str, Any] = {"problems": source, "rival": f"{DPO}, t 1"}
            given |= {"easy_samples": plan.easy_samples, "medium_samples": plan.medium_samples}
            given |= {"reward_model": self.reward_model, "encoder": plan.encoder}
            lists = ["--samples", *files, "--difficulty", *apart]
            self.evaluate(f"best-of-n {name}", "best-of-n", *lists, **given)

    def questions(self) -> None:
        """Calibration, and shares of answers against people's."""
        plan, models = self.plan, dict[str, list[str]]()
        for arm in self.arms:
            models.setdefault(arm.policy, []).append(arm.model)
        shown = {"models": models, "base": self.start.policy}
        sources = ["--questions", self.steps.source("mmlu"), self.steps.source("truthfulqa")]
        self.evaluate("calibration", "calibration", *sources, **shown, dpo=DPO, num_questions=plan.num_questions)
        self.evaluate("opinions survey", "opinions", **shown, source="survey", presentation="unlisted")
        world = {"source": self.steps.source("opinions"), "orders": plan.orders, "num_questions": plan.num_opinions}
        self.evaluate("opinions world", "opinions", **shown, **world)

    def report(self) -> None:
        path = self.steps.output / "report.html"
        results = [str(self.steps.output / name) for name in ("results", "samples", "policies")]
        self.steps.run(self.steps.step("report", ["report", *results, "--output", str(path)], path, always=True))


def _may_give_up(arm: Arm) -> bool:
    return "global_temperature" in arm.options


def _gave_up(run: Run) -> bool:
    """Whether it came to its end, but left all prompts out."""
    if not run.result.exists():
        return False
    results = read(run.result)
    left_out = {note["item"] for note in results.of("note") if "item" in note}
    return not results.of("sample") and len(left_out) == results.header["num_items"]


def _answers_most(run: Run) -> bool:
    (file,) = read_samples([run.result])
    num = len(file.left_out | file.prompts.keys())
    if len(file.left_out) <= MOST_GIVEN_UP * num:
        return True
    log.warning("%s gave up %d of %d prompts, so it is not compared.", run.name, len(file.left_out), num)
    return False
