"""What a reader of best-of-n results must know beside the figures, and replies to look at."""

from collections.abc import Mapping, Sequence

from spl.evaluation.difficulty import Protocol, ordered
from spl.evaluation.sample_files import SampleFile
from spl.evaluation.solved import Measured
from spl.results import Record
from spl.types import Message

_FEW = 30
"""Problems of a group below which a note says how far its numbers may be off."""
_EXAMPLE_REPLIES = 4


def caveats(
    found: Sequence[Measured], groups: Mapping[str, str], num: int, max_k: int, protocol: Protocol
) -> list[str]:
    """What a reader must know beside the figures."""
    notes = []
    if protocol == "paper":
        notes.append(
            "Difficulty was defined on the evaluated samples themselves, as in the paper: what a group's problems are "
            "worth is biased, and a comparison with the policy that sorted them favours the others on hard problems."
        )
    if num < max_k:
        notes.append(f"Compared are up to {num} samples a problem, as many as every policy has of each.")
    for group in ordered(groups):
        count = sum(name == group for name in groups.values())
        if count < _FEW:
            error = 50 / count**0.5
            notes.append(
                f"Only {count} problems are {group}: the standard error of a share is up to {error:.0f} points."
            )
    for name, says in (
        ("unread", "state no answer that could be read: these are wrong, and add no distinct one"),
        ("truncation_rate", "were cut at the most tokens"),
    ):
        shares = {one.arm.label: float(one.values[name].mean()) for one in found}
        worst = max(shares, key=shares.__getitem__)
        if shares[worst] >= 0.01:
            notes.append(f"Up to {shares[worst]:.0%} of the replies ({worst}) {says}.")
    return notes


def examples(
    files: Sequence[SampleFile], conversations: Sequence[list[Message]], items: Sequence[str], num: int
) -> list[Record]:
    """The first replies to some problems, to look at."""
    return [
        {
            "kind": "example",
            "policy": file.policy,
            "setting": file.setting,
            "train_seed": file.train_seed,
            "item": item,
            "prompt": messages[-1]["content"],
            "texts": [reply.text for reply in file.replies[item][:_EXAMPLE_REPLIES]],
        }
        for file in files
        for item, messages in list(zip(items, conversations, strict=True))[:num]
    ]
