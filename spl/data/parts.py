"""Preference data in parts that share no prompt: to train a policy on, a reward model, to choose by, to sample from."""

import json
import random
from collections.abc import Iterable, Mapping
from pathlib import Path

from spl.data.formats import parse_row
from spl.data.source import Source
from spl.disk import replacing
from spl.types import PreferenceExample, UserError


def short_examples(source: Source, num_rows: int, max_chars: int) -> list[PreferenceExample]:
    """Examples of the first rows whose prompt and longest response have at most max_chars characters together.

    Rows that cannot be used are left out, as in HH-RLHF those whose chosen reply is empty.
    """
    found = []
    for number, (where, row) in enumerate(source.rows()):
        if number == num_rows:
            break
        try:
            if isinstance(row, UserError):
                raise row
            example = parse_row(row, where)
        except UserError:
            continue
        if sum(len(turn["content"]) for turn in example.prompt) + max(map(len, example.responses)) <= max_chars:
            found.append(example)
    return found


def parts(
    examples: Iterable[PreferenceExample], sizes: Mapping[str, int], seed: int
) -> dict[str, list[PreferenceExample]]:
    """As many examples for each part as asked, no conversation's opening in two of them.

    Args:
        examples: all there are.
        sizes: of the parts by their names; they are filled in this order.
        seed: of the shuffle.

    Raises:
        UserError: there are too few.
    """
    by_opening: dict[str, list[PreferenceExample]] = {}
    for example in examples:
        by_opening.setdefault(example.prompt[0]["content"], []).append(example)
    groups = list(by_opening.values())
    random.Random(seed).shuffle(groups)
    found: dict[str, list[PreferenceExample]] = {}
    for name, size in sizes.items():
        part: list[PreferenceExample] = []
        while len(part) < size:
            if not groups:
                raise UserError(
                    f"there are too few examples: {sum(sizes.values())} are asked for ({_said(sizes)}), and "
                    f"{sum(map(len, by_opening.values()))} with {len(by_opening)} openings are there."
                )
            part += groups.pop()
        found[name] = part[:size]
    return found


def _said(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {size}" for name, size in sizes.items())


def keep_rows(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """Write JSON lines, all or none, where they are not there yet.

    Raises:
        UserError: the file has other content.
    """
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    if path.exists() and path.read_bytes() != content:
        raise UserError(
            f"{path} holds other rows than these settings give, and what lies beside it may have been made from them: "
            "give another output folder, or remove that one."
        )
    with replacing(path) as file:
        file.write(content)


def comparison_row(example: PreferenceExample) -> dict[str, object]:
    """A row that `parse_row` reads back."""
    comparisons = [list(comparison) for comparison in example.comparisons]
    return {"prompt": list(example.prompt), "responses": list(example.responses), "comparisons": comparisons}


def demonstration_row(example: PreferenceExample) -> dict[str, object]:
    """The prompt with its preferred response, which alone is learned in SFT."""
    best = max(range(len(example.responses)), key=lambda k: sum(_for(c, k) for c in example.comparisons))
    return {"prompt": list(example.prompt), "response": example.responses[best]}


def _for(comparison: tuple[int, int, float], k: int) -> float:
    """The share that a comparison gives a response."""
    first, second, share = comparison
    return share if k == first else 1 - share if k == second else 0.0


def prompt_row(number: int, example: PreferenceExample) -> dict[str, object]:
    """A prompt with an id."""
    return {"id": f"{number}", "messages": list(example.prompt)}
