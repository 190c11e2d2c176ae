"""Replies to problems, graded: which of them give the right answer, and which give the same one."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from rich.console import Console
from rich.progress import track

from spl.data.problems import Problem
from spl.evaluation.answers import LastNumber, answer_classes, final_answer
from spl.evaluation.equality import Equality
from spl.evaluation.sample_files import Reply, SampleFile
from spl.types import UserError

RIGHT = 0
"""The class of the right answer."""


class Solution(NamedTuple):
    """A reply to a problem."""

    reply: Reply
    answer: int | None  # class of its final answer among all answers to the problem, RIGHT or above; None: not read

    @property
    def correct(self) -> bool:
        return self.answer == RIGHT


@dataclass
class Graded:
    """The replies of a policy, decoded in one way.

    Attributes:
        policy: its label.
        setting: label of the way of decoding.
        train_seeds: of the policy's training runs.
        solutions: [training runs][problems] the replies to a problem.
    """

    policy: str
    setting: str
    train_seeds: list[int | None]
    solutions: list[list[list[Solution]]]

    @property
    def label(self) -> str:
        """Policy and way of decoding."""
        return ", ".join(filter(None, (self.policy, self.setting)))

    @property
    def num_samples(self) -> int:
        """Replies that every problem has at least."""
        return min(len(replies) for run in self.solutions for replies in run)


def matched(
    files: Sequence[SampleFile], apart: Sequence[SampleFile], problems: Sequence[Problem]
) -> tuple[list[Problem], list[str]]:
    """The problems that all samples are of, in order, and a note on those that are left out.

    A sampler may have given up on a problem for one way of decoding; it is then left out for all.

    Args:
        files: of samples, all of the same problems.
        apart: of samples that may be of more problems.
        problems: that they were drawn from.

    Raises:
        UserError: the files are of different problems, or of others than these.
    """
    known = {problem.item: problem for problem in problems}
    items = {item for file in files for item in file.prompts}
    for file in (*files, *apart):
        if differs := sorted(items - file.prompts.keys() - file.left_out):
            other = next(other for other in files if differs[0] in other.prompts)
            raise UserError(
                f"samples of {file.policy!r} and {other.policy!r} are of different problems: {differs[0]!r} is in one "
                "of them alone; draw both from the same problems."
            )
        for item, messages in file.prompts.items():
            if item not in known or known[item].question not in messages[-1]["content"]:
                raise UserError(
                    f"samples of {file.policy!r}: prompt {item!r} is not that of these problems; give the --problems "
                    "that were given to spl sample."
                )
    common = items.intersection(*(file.prompts for file in (*files, *apart)))
    if not common:
        raise UserError("no problem has replies of every policy and way of decoding.")
    notes = list(dict.fromkeys(f"{file.policy}, {file.setting}: {text}" for file in files for text in file.notes))
    asked = items.union(*(file.left_out for file in files))
    if missing := len(asked) - len(common):
        notes.append(f"{missing} of {len(asked)} problems are left out for all, as a sampler gave them up.")
    return [problem for problem in problems if problem.item in common], notes


def grade(
    files: Sequence[SampleFile], problems: Sequence[Problem], equality: Equality, last_number: LastNumber = "ended"
) -> list[Graded]:
    """Grade all files; the training runs of one policy, decoded in one way, come together.

    All answers to a problem, whoever gave them, are sorted into one set of classes.
    """
    found: list[list[list[Solution]]] = [[] for _ in files]
    for problem in track(problems, "grading", console=Console(stderr=True), transient=True):
        for solutions, of_file in zip(found, _problem(files, problem, equality, last_number), strict=True):
            solutions.append(of_file)
    arms: dict[tuple[str, str], Graded] = {}
    for file, solutions in zip(files, found, strict=True):
        arm = arms.setdefault((file.policy, file.setting), Graded(file.policy, file.setting, [], []))
        arm.train_seeds.append(file.train_seed)
        arm.solutions.append(solutions)
    return list(arms.values())


def _problem(
    files: Sequence[SampleFile], problem: Problem, equality: Equality, last_number: LastNumber
) -> list[list[Solution]]:
    """The graded replies of each file to one problem."""
    replies = [file.replies[problem.item] for file in files]
    answers = [[final_answer(r.text, r.finish == "stop", last_number) for r in drawn] for drawn in replies]
    read = [answer for of_file in answers for answer in of_file if answer is not None]
    _, *classes = answer_classes([problem.answer, *read], equality)  # the right answer's is RIGHT
    numbers = iter(classes)
    return [
        [Solution(reply, None if answer is None else next(numbers)) for reply, answer in zip(drawn, found, strict=True)]
        for drawn, found in zip(replies, answers, strict=True)
    ]
