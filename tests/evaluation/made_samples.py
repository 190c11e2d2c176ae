"""Files of samples made by hand."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spl.results import header, write


def write_samples(
    path: Path,
    replies: Mapping[str, Sequence[str]],
    policy: str = "dpo",
    setting: str = "t 1",
    train_seed: int | None = None,
    prompt: str = "Say {item}",
    **more: Any,
) -> str:
    """A file of the replies to each item, of a token more than letters, with a logp of -1 and an entropy of 2 a token.

    Args:
        path: of the file.
        replies: item to texts; one that ends in "..." was cut.
        policy: its label.
        setting: its label.
        train_seed: of the policy.
        prompt: text of each prompt.
        more: fields of every sample, instead of those.
    """
    first = header("sample", {}, policy=policy, setting=setting, train_seed=train_seed)
    prompts = [
        {"kind": "prompt", "item": item, "messages": [{"role": "user", "content": prompt.format(item=item)}]}
        for item in replies
    ]
    samples = [
        {
            "kind": "sample",
            "item": item,
            "index": index,
            "text": text,
            "num_tokens": len(text) + 1,
            "finish": "length" if text.endswith("...") else "stop",
            "logp": -(len(text) + 1.0),
            "entropy": 2.0 * (len(text) + 1),
        }
        | more
        for item, texts in replies.items()
        for index, text in enumerate(texts)
    ]
    write(path, first, [*prompts, *samples])
    return str(path)
