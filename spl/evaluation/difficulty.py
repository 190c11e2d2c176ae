"""How hard a problem is: by the samples that it takes to solve, or by its level in its source.

Whoever sorts problems by the very samples that are then evaluated sorts by luck: of the problems called hard since few
of these samples solved them, few of these samples do, and those called easy flatter. Only samples drawn apart say what
a group of problems is worth. The paper's own way is there for comparison, and its results carry a note.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

from spl.data.problems import Problem
from spl.types import UserError

Protocol = Literal["separate", "paper", "level"]
GROUPS = ("easy", "medium", "hard")


def samples_to_solve(num: int, correct: int) -> float:
    """Expected place of the first correct one among num replies in random order: (n + 1) / (c + 1).

    Where none is correct that is n + 1, of which no more is known than that it is above n.
    """
    return (num + 1) / (correct + 1)


def check_thresholds(easy: int, medium: int) -> None:
    """Check the thresholds of `difficulty_groups`.

    Raises:
        UserError: they do not rise.
    """
    if not 1 <= easy < medium:
        raise UserError(
            f"medium_samples must be above easy_samples, which is 1 or more, but they are {medium} and {easy}."
        )


def difficulty_groups(graded: Mapping[str, Sequence[bool]], easy: int, medium: int) -> dict[str, str]:
    """Item to "easy", "medium" or "hard".

    Args:
        graded: of each problem, which of its replies are correct.
        easy: most samples to solve of an easy problem.
        medium: most samples to solve of a medium one.

    Raises:
        UserError: there are too few replies to tell that a problem is hard.
    """
    fewest = min(len(correct) for correct in graded.values())
    if fewest < medium:
        raise UserError(
            f"a problem is hard that takes more than {medium} samples, but difficulty rests on {fewest} of each: "
            "draw more, or lower --medium_samples."
        )
    groups = {}
    for item, correct in graded.items():
        samples = samples_to_solve(len(correct), sum(correct))
        groups[item] = GROUPS[(samples > easy) + (samples > medium)]
    return groups


def level_groups(problems: Sequence[Problem]) -> dict[str, str]:
    """Item to "level 3" and so on; problems without a level are in no group.

    Raises:
        UserError: none has a level.
    """
    groups = {problem.item: f"level {problem.level}" for problem in problems if problem.level is not None}
    if not groups:
        raise UserError("protocol level: the problems have no column level.")
    return groups


def ordered(groups: Mapping[str, str]) -> list[str]:
    """The names of the groups, the easiest first."""
    return sorted(set(groups.values()), key=lambda group: (GROUPS.index(group) if group in GROUPS else 0, group))
