"""How much of a text is words at all: what breaks first where a policy is sampled too hot."""

import math
import re
from functools import cache

from spl.types import UserError

_LETTERS = re.compile(r"[^\W\d_]+(?:['\u2019][^\W\d_]+)*")


@cache
def english_words() -> frozenset[str]:
    """The English word list of pyspellchecker, about 160,000 forms of American spelling, in small letters.

    It is kept up, free of common misspellings ("teh"), and needs nothing else; wordfreq's list, which is larger, was
    gathered from the web and takes them for words. Names and terms of programming are mostly not in it.

    Raises:
        UserError: the package is not installed.
    """
    try:
        from spellchecker import SpellChecker
    except ImportError as error:
        raise UserError("lexical integrity needs the package pyspellchecker: pip install 'spl[evaluation]'.") from error
    return frozenset(SpellChecker(language="en").word_frequency.dictionary)


def lexical_integrity(text: str) -> float:
    """Share of a text's words that are English words, in [0, 1]; nan without words.

    A word is a run of letters of any script, with apostrophes inside; "Ann's" is a word where "ann" is. The paper
    (arXiv 2511.08594) does not state its list. Names that are not in the list count against a text: look at differences
    between policies on the same prompts, not at the level.
    """
    known = english_words()
    found = [word.casefold().replace("\u2019", "'") for word in _LETTERS.findall(text)]
    real = sum(word in known or word.removesuffix("'s") in known for word in found)
    return real / len(found) if found else math.nan
