r"""The final answer of a reply, and which answers are the same.

Where a reply states its answer more than once, the first of these that it has counts: the last \boxed{}, the last line
`#### 18`, the last "answer is 18" or "Answer: 18", and, as a setting, its last number. A reply without one has not been
read: it solves nothing, and how many there were is said.
"""

import re
from collections.abc import Hashable, Sequence
from fractions import Fraction
from typing import Literal

from spl.data.problems import last_boxed
from spl.evaluation.equality import Equality

LastNumber = Literal["ended", "always", "never"]

LONGEST = 300
"""Characters past which a text is no final answer."""

# A word after the marks begins a heading in Markdown, unless it ends the reply.
_HEADING = r"[\s*_]*(?:\d+[.)]\s+)?[^\W\d_]{3,}(?:[\s:*]|$)"
_HASHES = re.compile(rf"(?<!#)####(?!#)[ \t]*(?:(?=[^:\n]*\s*\Z)|(?!{_HEADING}))(\S.*)", re.MULTILINE)
_HEDGES = r"(?:therefore|thus|hence|simply|just|exactly|approximately|about|roughly|around|equal\s+to|given\s+by)\b"
_PHRASE = re.compile(rf"\banswer(?:\s+is\b|\s*[:=])[\s:=*]*(?:{_HEDGES}[\s:=*]*)*", re.IGNORECASE)
_SENTENCE_END = re.compile(r"\.(?=\s|$)")
_DIGITS = r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:\s*\\?%)?"
# A minus after a letter, a digit or a bracket takes away; it is no sign.
_LAST_NUMBER = re.compile(rf"(?<![\w.)])-?{_DIGITS}|{_DIGITS}")
# "$18", "18 dollars", "18, since ...", but not "18 x + 1", "18 and 19" or "18 squared". "7 dozen eggs" is 7: mostly
# the problem asks for dozens.
_NUMBER_FIRST = re.compile(
    rf"[$€£]?\s*(-?{_DIGITS})(?:\s+(?!(?:and|or|pi|sqrt)\b|(?:squared|cubed)$)[^\W\d_]{{2,}}[^\d$\\=+*/^,]*)?(?:,\s+[^\W\d_].*)?"
)
_MATH = re.compile(r"\$([^$]+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]")
_PLAIN_NUMBER = re.compile(r"([+-]?)\s*((?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d{1,6})?|\.\d{1,6})")
_WRAPPING = " \t\n*_`\"'"


def final_answer(reply: str, ended: bool = True, last_number: LastNumber = "ended") -> str | None:
    r"""The answer that a reply ends with, None where it states none.

    >>> final_answer("9 + 9 = 18, so the answer is **18 dollars**.")
    '18'

    Args:
        reply: its text.
        ended: whether the reply ended by itself, or was cut.
        last_number: whether the last number of a reply that states no answer is its answer: of all replies, never, or
            only of those that ended, since the last number of a reply that was cut is a step on the way.
    """
    reply = reply.replace("\u2212", "-")  # the sign that Unicode calls minus
    answer = _stated(reply)
    if answer is None and (last_number == "always" or (last_number == "ended" and ended)):
        answer = next((match[0] for match in reversed(list(_LAST_NUMBER.finditer(reply)))), None)
    return answer if answer and len(answer) <= LONGEST else None


def _stated(reply: str) -> str | None:
    boxed = last_boxed(reply)
    if boxed:
        return boxed
    if hashes := _HASHES.findall(reply):
        return _tidy(hashes[-1])
    if phrases := list(_PHRASE.finditer(reply)):
        return _tidy(_SENTENCE_END.split(reply[phrases[-1].end() :].partition("\n")[0])[0])
    return None


def _tidy(text: str) -> str | None:
    """An answer without what wraps it and without its unit."""
    text = text.strip(_WRAPPING).rstrip(".,;").strip(_WRAPPING)
    if match := _NUMBER_FIRST.fullmatch(text):
        return match[1]
    if match := _MATH.search(text):
        return (match[1] or match[2] or match[3]).strip()
    return text or None


def answer_classes(answers: Sequence[str], equality: Equality) -> list[int]:
    """The class of each answer, numbered as they appear; answers that are equal are of one class.

    An answer joins the first class whose first member it equals. Numbers written out are compared here, all else by
    math-verify.
    """
    members: list[str] = []  # the first of each class
    known: dict[Hashable, int] = {}
    classes = []
    for answer in answers:
        number = plain_number(answer)
        key: Hashable = answer if number is None else number
        if key not in known:
            # Two numbers that are not the same key differ.
            open_ = [k for k, member in enumerate(members) if number is None or plain_number(member) is None]
            found = equality.find([members[k] for k in open_], answer) if open_ else None
            known[key] = len(members) if found is None else open_[found]
            members += [answer] if found is None else []
        classes.append(known[key])
    return classes


def plain_number(answer: str) -> Fraction | None:
    """A number of at most six decimals, to which math-verify rounds; None for all else.

    >>> plain_number("1,234.50")
    Fraction(2469, 2)
    """
    match = _PLAIN_NUMBER.fullmatch(answer.strip().lstrip("$"))
    return Fraction(match[1] + match[2].replace(",", "")) if match else None
