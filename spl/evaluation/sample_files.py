"""Files of sampled replies, as evaluations take them: from `spl sample`, or any program that writes the same form."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from spl.results import Record, Results, find, read
from spl.types import Message, UserError


class Reply(NamedTuple):
    """A sampled reply."""

    text: str
    num_tokens: int | None  # scored ones, its end included; None where the server did not count
    finish: str  # "stop" where it ended by itself, "length" where it was cut
    logp: float | None  # log pi(y|x) of the policy at temperature 1, nats


@dataclass
class SampleFile:
    """The replies of one policy, decoded in one way, to a set of prompts.

    Attributes:
        policy: label of the policy.
        setting: label of the way of decoding.
        train_seed: of the policy's training run, where it has one.
        headers: of the files that the replies are from.
        prompts: item to conversation.
        replies: item to replies, in the order in which they were drawn.
        left_out: items that the sampler gave up, as a note in the file says.
    """

    policy: str
    setting: str
    train_seed: int | None
    headers: list[Record]
    prompts: dict[str, list[Message]] = field(default_factory=dict)
    replies: dict[str, list[Reply]] = field(default_factory=dict)
    left_out: set[str] = field(default_factory=set)

    @property
    def num_samples(self) -> int:
        """Replies that every prompt has at least."""
        return min(len(replies) for replies in self.replies.values())


def read_samples(paths: Sequence[str | Path]) -> list[SampleFile]:
    """Read files, and folders of files; the parts of one policy, way of decoding and training seed are put together.

    Raises:
        UserError: a file is no file of samples, two of them hold the same sample, or a prompt has none.
    """
    found: dict[tuple[str, str, Any], SampleFile] = {}
    seen: set[tuple[Any, ...]] = set()
    for path in find(map(Path, paths)):
        results = read(path)
        if results.header["program"] != "sample":
            raise UserError(f"{path} holds results of {results.header['program']}, but samples are asked for.")
        first = results.header
        key = (first["policy"], first["setting"], first.get("train_seed"))
        _add(found.setdefault(key, SampleFile(*key, headers=[])), results, seen)
    for file in found.values():
        if bare := file.prompts.keys() - file.replies.keys():
            raise UserError(f"{_name(file)}: no sample of prompt {min(bare)!r}; run spl sample to its end.")
    return list(found.values())


def _add(file: SampleFile, results: Results, seen: set[tuple[Any, ...]]) -> None:
    file.headers.append(results.header)
    file.left_out |= {record["item"] for record in results.of("note") if "item" in record}
    for record in results.of("prompt"):
        if file.prompts.setdefault(record["item"], record["messages"]) != record["messages"]:
            raise UserError(f"{results.path}: prompt {record['item']!r} differs from that of another file.")
    for record in sorted(results.of("sample"), key=lambda record: int(record["index"])):
        item, index = record["item"], record["index"]
        sample = (file.policy, file.setting, file.train_seed, item, index)
        if sample in seen:
            raise UserError(f"{results.path}: sample {index} of prompt {item!r} is in another file, or here twice.")
        if item not in file.prompts:
            raise UserError(f"{results.path}: a sample of prompt {item!r}, but no such prompt.")
        seen.add(sample)
        reply = Reply(record["text"], record["num_tokens"], record["finish"], record.get("logp"))
        file.replies.setdefault(item, []).append(reply)


def _name(file: SampleFile) -> str:
    return ", ".join(filter(None, (file.policy, file.setting)))
