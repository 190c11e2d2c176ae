"""Arithmetic of graded difficulty, made in code: a model of 135M parameters too has easy, medium and hard problems.

Six levels, each harder than the one before: the sum of two digits up to 5, the product of two digits, a two-digit and a
one-digit number added or subtracted, a two-digit number times a digit, a product of digits plus a digit, the product of
two numbers from 11 to 25.
"""

from collections.abc import Callable, Iterator

import numpy as np

ARITHMETIC = "arithmetic"
LEVELS = 6
_A_LEVEL = 20  # fewer than the 25 that the first level has

_Draw = Callable[[int, int], int]


def arithmetic(num: int | None = None) -> Iterator[tuple[str, str, str, str]]:
    """Item, level, question and answer of the first `num` problems, levels in turn; the same ones in every run.

    >>> next(arithmetic())[0]
    '1.1'

    Args:
        num: of problems, 120 by default; that is also the most there are.
    """
    levels = [_problems(level) for level in range(1, LEVELS + 1)]
    for k in range(min(num or LEVELS * _A_LEVEL, LEVELS * _A_LEVEL)):
        number, level = divmod(k, LEVELS)
        expression, answer = levels[level][number]
        yield f"{level + 1}.{number + 1}", str(level + 1), f"Compute {expression}. Reply with the result only.", answer


def _problems(level: int) -> list[tuple[str, str]]:
    """Distinct expressions of a level and their values."""
    generator = np.random.default_rng(level)

    def draw(low: int, high: int) -> int:
        return int(generator.integers(low, high + 1))

    found: dict[str, str] = {}
    while len(found) < _A_LEVEL:
        expression, value = _problem(level, draw)
        found[expression] = str(value)
    return list(found.items())


def _problem(level: int, draw: _Draw) -> tuple[str, int]:
    if level == 1:
        a, b = draw(1, 5), draw(1, 5)
        return f"{a} + {b}", a + b
    if level == 2:
        a, b = draw(2, 9), draw(2, 9)
        return f"{a} * {b}", a * b
    if level == 3:
        a, b = draw(11, 89), draw(2, 9)
        return (f"{a} + {b}", a + b) if draw(0, 1) else (f"{a} - {b}", a - b)
    if level == 4:
        a, b = draw(11, 99), draw(3, 9)
        return f"{a} * {b}", a * b
    if level == 5:
        a, b, c = draw(2, 9), draw(2, 9), draw(2, 9)
        return f"{a} * {b} + {c}", a * b + c
    a, b = draw(11, 25), draw(11, 25)
    return f"{a} * {b}", a * b
