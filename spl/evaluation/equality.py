"""Whether two mathematical answers are equal: math-verify decides, in a process that is ended where it takes too long.

A model may write 9^(9^9), which sympy would compute for hours, inside one instruction that no signal interrupts, or an
expression that takes all memory. math-verify's own time limits rest on signals besides, which only the main thread of a
process may use. Here it has a process of its own, with a main thread, a limit of memory, and a parent that waits.
"""

import cmath
import json
import resource
import select
import subprocess
import sys
import zlib
from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from types import TracebackType
from typing import IO, Any, NamedTuple

from spl.types import UserError

MEMORY = 4 * 2**30
"""Bytes of address space that the process may take."""


class Equality:
    """Finds an answer among others. The process is started by the first question.

    Args:
        seconds: after which an answer is given up; it then equals none.

    Attributes:
        given_up: the number of answers that took too long.
    """

    def __init__(self, seconds: float = 10.0) -> None:
        self.seconds = seconds
        self.given_up = 0
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> "Equality":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def find(self, among: Sequence[str], answer: str) -> int | None:
        """Index of the first of `among`, each read as the right answer, that `answer` equals; None if it equals none.

        Raises:
            UserError: math-verify is not installed, or does not start.
        """
        pipes = self._pipes()
        try:
            pipes.questions.write(json.dumps([list(among), answer]) + "\n")
            pipes.questions.flush()
            ready, _, _ = select.select([pipes.replies], [], [], self.seconds)
            line = pipes.replies.readline() if ready else ""
        except BrokenPipeError:
            line = ""
        if not line:
            self.given_up += 1
            self._stop()
            return None
        found: int | None = json.loads(line)
        return found

    def _pipes(self) -> "_Pipes":
        if self._process is None:
            if not find_spec("math_verify"):
                raise UserError("answers are compared by the package math-verify: pip install 'spl[evaluation]'.")
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            pipes = _Pipes(self._process.stdin, self._process.stdout)
            # It is ready; how long that takes is not the first answer's fault.
            if not pipes.replies.readline():
                self._stop()
                raise UserError(f"the process that compares answers does not start: python -m {__name__} says why.")
            return pipes
        return _Pipes(self._process.stdin, self._process.stdout)

    def _stop(self) -> None:
        if self._process:
            self._process.kill()
            self._process.communicate()
            self._process = None


class _Pipes(NamedTuple):
    questions: IO[str] | Any
    replies: IO[str] | Any


def main() -> None:
    """Answer each line of the input, [right answers, answer], with the index of an equal one or null."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    from math_verify import verify

    sys.stdout.write("null\n")
    sys.stdout.flush()
    for line in sys.stdin:
        among, answer = json.loads(line)
        near = (k for k, right in enumerate(among) if may_equal(right, answer))
        equal = (k for k in near if verify(_parsed(among[k]), _parsed(answer), timeout_seconds=2))
        sys.stdout.write(json.dumps(next(equal, None)) + "\n")
        sys.stdout.flush()


@lru_cache(4096)
def _parsed(answer: str) -> list[Any]:
    """What math-verify makes of an answer: an expression and its text, the text alone, or nothing."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    config = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
    found: list[Any] = parse(rf"\boxed{{{answer}}}", config, parsing_timeout=2)
    return found


def may_equal(right: str, answer: str) -> bool:
    """False for two expressions with different values where their variables are some arbitrary numbers.

    math-verify takes ten milliseconds to tell two such apart, and the answers to a hard problem are many. It rounds
    to six decimals, and reads 18 % as 18 or as 0.18; only what is beyond that is told apart here.
    """
    values = [_value(text) for text in (right, answer)]
    if values[0] is None or values[1] is None:
        return True
    return abs(values[0] - values[1]) <= 1e-4 * (1 + abs(values[0]))


@lru_cache(4096)
def _value(answer: str) -> complex | None:
    """An expression's value with its variables at numbers that their names give; None for what is no expression."""
    from sympy import Expr

    expression = next(iter(_parsed(answer)), None)
    if not isinstance(expression, Expr) or "%" in answer:
        return None
    try:
        numbers = {symbol: 0.3 + zlib.crc32(str(symbol).encode()) / 2**32 for symbol in expression.free_symbols}
        value = complex(expression.subs(numbers).evalf())
    except Exception:  # sympy may fail in any way on what a model wrote; math-verify then has the word
        return None
    return value if cmath.isfinite(value) else None


if __name__ == "__main__":
    main()
