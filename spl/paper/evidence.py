"""What is measured: replies compared, problems solved, questions answered, and the report of it all."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from spl.paper.policies import DPO, START, Arm
from spl.paper.settings import Measuring
from spl.paper.steps import Steps
from spl.runs import Run, arguments, file_name


class Evidence:
    """Measures policies in the folder of the steps.

    Args:
        steps: run the commands.
        arms: the policies.
        reward_model: folder of one.
        plan: how much is sampled and asked.
    """

    def __init__(self, steps: Steps, arms: Sequence[Arm], reward_model: str, plan: Measuring) -> None:
        self.steps = steps
        self.arms = arms
        self.start = next(arm for arm in arms if arm.policy == START)
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
        """Draw every policy's replies to prompts or problems, to a file each; returns the files."""
        runs = [self._sampling(arm, folder, settings) for arm in arms]
        self.steps.run(*runs)
        return [str(run.result) for run in runs]

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
        shown = {"models": models, "base": START}
        sources = ["--questions", self.steps.source("mmlu"), self.steps.source("truthfulqa")]
        self.evaluate("calibration", "calibration", *sources, **shown, dpo=DPO, num_questions=plan.num_questions)
        self.evaluate("opinions survey", "opinions", **shown, source="survey", presentation="unlisted")
        world = {"source": self.steps.source("opinions"), "orders": plan.orders, "num_questions": plan.num_opinions}
        self.evaluate("opinions world", "opinions", **shown, **world)

    def report(self) -> None:
        path = self.steps.output / "report.html"
        results = [str(self.steps.output / name) for name in ("results", "samples", "policies")]
        self.steps.run(self.steps.step("report", ["report", *results, "--output", str(path)], path, always=True))
