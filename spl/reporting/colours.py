"""One colour for a policy wherever it is drawn: references grey, DPO orange, SPL greens that deepen with alpha / beta.

The hues are those of Okabe and Ito (2008), which people with any colour vision tell apart; the greens differ in
lightness too.
"""

import math
from collections.abc import Iterable

from spl.reporting.evidence import family, number_in

_GREYS = ("#8c8c8c", "#b8b8b8", "#646464")
_DPO = ("#e8871e", "#f0b06a", "#b8620a")
_GREENS = ("#9fdcc0", "#62c69c", "#2fa97a", "#128a5f", "#0b6e4d")  # lightness 83 to 41
_OTHERS = ("#3b78c4", "#b5368c", "#63b6e8", "#8c5a2b", "#d9b310", "#7a5bb0", "#c0392b")


def colours(policies: Iterable[str]) -> dict[str, str]:
    """A colour for each label, in the order given."""
    found: dict[str, str] = {}
    counts = {"base": 0, "dpo": 0, "": 0}
    given = list(policies)
    spl = _greens([policy for policy in given if family(policy) == "spl"])
    for policy in given:
        if policy in spl:
            found[policy] = spl[policy]
            continue
        kind = family(policy) if family(policy) in counts else ""
        row = {"base": _GREYS, "dpo": _DPO, "": _OTHERS}[kind]
        found[policy] = row[counts[kind] % len(row)]
        counts[kind] += 1
    return found


def _greens(policies: list[str]) -> dict[str, str]:
    """From light to deep by the logarithm of the number in the label; one alone stands in the middle."""
    levels = {policy: math.log(max(number_in(policy), 1e-3)) for policy in policies}
    low, high = min(levels.values(), default=0.0), max(levels.values(), default=0.0)
    if low == high:
        return dict.fromkeys(policies, _GREENS[2])
    return {policy: _between((level - low) / (high - low)) for policy, level in levels.items()}


def _between(share: float) -> str:
    """A green at a share of the way from the lightest to the deepest."""
    place = share * (len(_GREENS) - 1)
    first = min(int(place), len(_GREENS) - 2)
    ends = [[int(colour[k : k + 2], 16) for k in (1, 3, 5)] for colour in _GREENS[first : first + 2]]
    return "#" + "".join(f"{round(a + (b - a) * (place - first)):02x}" for a, b in zip(*ends, strict=True))
