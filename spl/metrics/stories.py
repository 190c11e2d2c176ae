"""What stories about a doctor have in common: the doctor's name, the doctor's gender, and whom the doctor meets.

The first figure of the paper (arXiv 2511.08594) counts such features over many stories; how it finds them is not
stated there, so these rules are ours. They are plain patterns that a reader can check: they miss what is said
otherwise, for every policy alike. A feature that a story does not tell is None.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence

from spl.metrics.diversity import answer_entropy

_WORD = r"(?!Dr\b|Doctor\b)([^\W\d_][\w'\u2019-]*[^\W_])"
# A title names the doctor: "Dr. J. Sarah Lee". Without one, whoever is named first: "a doctor named Sarah".
_NAMES = (
    re.compile(rf"\b(?:Dr\.?|[Dd]octor)\s+(?:[^\W\d_]\.\s*)*{_WORD}"),
    re.compile(rf"\b(?:named|[Nn]ame\s+(?:is|was)|[Mm]y name's|I am|I'm)\s+{_WORD}"),
)
_POSSESSIVE = re.compile(r"['\u2019]s?$")
_GENDERS = dict.fromkeys(("he", "him", "his", "himself"), "male")
_GENDERS |= dict.fromkeys(("she", "her", "hers", "herself"), "female")
_PRONOUN = re.compile(rf"\b({'|'.join(_GENDERS)})\b", re.IGNORECASE)
_RELATIONS = {
    **{word: word for word in ("patient", "nurse", "colleague", "friend", "student", "mentor", "stranger", "neighbor")},
    **{word: word for word in ("mother", "father", "wife", "husband", "son", "daughter", "sister", "brother", "child")},
    **{word: word for word in ("grandmother", "grandfather", "uncle", "aunt", "parent", "villager", "teacher", "boss")},
    **{"patients": "patient", "children": "child", "kid": "child", "baby": "child", "boy": "child", "girl": "child"},
    **{"mom": "mother", "dad": "father", "neighbour": "neighbor", "wives": "wife", "grandma": "grandmother"},
}
_RELATION = re.compile(rf"\b({'|'.join(_RELATIONS)})(?:['\u2019]?s)?\b", re.IGNORECASE)

FEATURES = ("name", "gender", "relation")


def doctor_name(story: str) -> str | None:
    """The first word of the first name that is given, in small letters: "sarah" of "Dr. Sarah Lee".

    A name begins with a capital letter of any alphabet.
    """
    words = (word for pattern in _NAMES for word in pattern.findall(story))
    found = next((word for word in words if word[0].isupper()), None)
    return _POSSESSIVE.sub("", found).casefold() if found else None


def doctor_gender(story: str) -> str | None:
    """ "female" or "male" by the more frequent pronouns of the story, the first of them where they are level."""
    return _most([_GENDERS[word.casefold()] for word in _PRONOUN.findall(story)])


def doctor_relation(story: str) -> str | None:
    """Whom the doctor has to do with: the relation named most often ("patient", "father"), the first where level."""
    return _most([_RELATIONS[word.casefold()] for word in _RELATION.findall(story)])


def _most(values: Sequence[str]) -> str | None:
    return Counter(values).most_common(1)[0][0] if values else None  # ties go to the one met first


def story_features(story: str) -> dict[str, str | None]:
    """FEATURES of one story."""
    return {"name": doctor_name(story), "gender": doctor_gender(story), "relation": doctor_relation(story)}


def story_diversity(stories: Sequence[str]) -> dict[str, float]:
    """Entropy in nats of each feature over the stories that tell it (nan where none does), and the share that do."""
    found = [story_features(story) for story in stories]
    measures = {}
    for name in FEATURES:
        told = [value for features in found if (value := features[name]) is not None]
        measures[f"doctor_{name}_entropy"] = answer_entropy(told)
        measures[f"doctor_{name}_told"] = len(told) / len(stories) if stories else math.nan
    return measures


def feature_shares(stories: Sequence[str], feature: str) -> tuple[dict[str, float], float]:
    """Shares of a feature's values among the stories that tell it, largest first, and the share of those that do."""
    told = Counter(value for story in stories if (value := story_features(story)[feature]) is not None)
    total = sum(told.values())
    return {value: count / total for value, count in told.most_common()}, total / max(len(stories), 1)
