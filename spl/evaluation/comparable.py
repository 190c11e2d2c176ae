"""What must be the same before policies are compared: prompts, and the number of replies to each."""

from collections.abc import Sequence

from spl.evaluation.sample_files import SampleFile
from spl.types import UserError


def label(file: SampleFile) -> str:
    """A policy, way of decoding and training seed in words."""
    seed = f"seed {file.train_seed}" if file.train_seed is not None else ""
    return ", ".join(filter(None, (file.policy, file.setting, seed)))


def comparable(files: Sequence[SampleFile]) -> tuple[list[str], int, list[str]]:
    """The items that all have, in order, the number of replies that are compared, and notes on what was left out.

    Many measures depend on the number of replies, so all are cut to the smallest. A sampler may have given up on a
    prompt for one way of decoding; it is then left out for all.

    Raises:
        UserError: they are replies to different prompts, or two are of one policy, decoding and training seed.
    """
    labels = [label(file) for file in files]
    if twice := [name for k, name in enumerate(labels) if name in labels[:k]]:
        raise UserError(f"{twice[0]} is there twice: give each policy, decoding and training seed once.")
    whole = max(files, key=lambda file: len(file.prompts))
    for file in files:
        _check(file, whole)
    items = [item for item in whole.prompts if all(file.replies.get(item) for file in files)]
    if not items:
        raise UserError("no prompt has replies of every policy and way of decoding.")
    notes = list(dict.fromkeys(f"{label(file)}: {text}" for file in files for text in file.notes))
    asked = set().union(*(file.prompts.keys() | file.left_out for file in files))
    if missing := len(asked) - len(items):
        fewer = [label(file) for file in files if len(file.prompts) < len(asked)]
        notes.append(f"{missing} of {len(asked)} prompts are left out for all, as the sampler did: {_few(fewer)}.")
    counts = {label(file): min(len(file.replies[item]) for item in items) for file in files}
    num = min(counts.values())
    if larger := [name for name, count in counts.items() if count > num]:
        notes.append(f"Compared are the first {num} replies to each prompt; there are more of {_few(larger)}.")
    return items, num, notes


def _check(file: SampleFile, whole: SampleFile) -> None:
    """Refuse a file whose prompts are not those of the one that has most of them, but for those it gave up."""
    missing = whole.prompts.keys() - file.prompts.keys() - file.left_out
    if odd := sorted(missing | (file.prompts.keys() - whole.prompts.keys() - whole.left_out)):
        said = f"have {len(file.prompts)} and {len(whole.prompts)} prompts, {odd[0]!r} in one of them alone"
    elif changed := [i for i in file.prompts if i in whole.prompts and file.prompts[i] != whole.prompts[i]]:
        said = f"have different prompts {changed[0]!r}"
    else:
        return
    raise UserError(f"{label(file)} and {label(whole)} {said}: draw both with one --prompts.")


def _few(names: Sequence[str]) -> str:
    return "; ".join(names[:3]) + (f" and {len(names) - 3} others" if len(names) > 3 else "")
