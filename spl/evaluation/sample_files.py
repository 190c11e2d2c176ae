"""Files of sampled replies, as evaluations take them: from `spl sample`, or any program that writes the same form."""

from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from spl.data.values import shortened
from spl.results import Record, Results, find, read
from spl.types import Message, UserError


class Reply(NamedTuple):
    """A sampled reply."""

    text: str
    num_tokens: int | None  # scored ones, its end included; None where the server did not count
    finish: str  # "stop" where it ended by itself, "length" where it was cut
    logp: float | None  # log pi(y|x) of the policy at temperature 1, nats
    entropy: float | None = None  # of its next-token laws at temperature 1 along the reply, added up, nats
    token_ids: Sequence[int] | None = None  # its end included


@dataclass
class SampleFile:
    """The replies of one policy, decoded in one way, to a set of prompts.

    Attributes:
        policy: label of the policy.
        setting: label of the way of decoding.
        train_seed: of the policy's training run, where it has one.
        headers: of the files that the replies are from.
        paths: of the same files.
        prompts: item to conversation.
        replies: item to replies, in the order in which they were drawn.
        left_out: items that the sampler gave up, as a note in the file says.
        notes: what else the sampler remarked.
    """

    policy: str
    setting: str
    train_seed: int | None
    headers: list[Record]
    paths: list[Path] = field(default_factory=list)
    prompts: dict[str, list[Message]] = field(default_factory=dict)
    replies: dict[str, list[Reply]] = field(default_factory=dict)
    left_out: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)


def read_samples(paths: Sequence[str | Path], with_tokens: bool = False) -> list[SampleFile]:
    """Read files, and folders of files; the parts of one policy, way of decoding and training seed are put together.

    Results of other programs that lie in a folder are passed over.

    Args:
        paths: of files and folders.
        with_tokens: keep token ids too, which take more memory than texts do.

    Raises:
        UserError: a file is no file of samples or not whole, two of one label tell of different models or hold the
            same sample, or a prompt has none.
    """
    found: dict[tuple[Any, ...], SampleFile] = {}
    seen: set[tuple[Any, ...]] = set()
    named = set(map(Path, paths))
    for results in map(read, find(map(Path, paths))):
        if results.header["program"] == "sample":
            policy, setting, train_seed = key = tuple(_fields(results.header, results.path, _HEADER))
            _add(found.setdefault(key, SampleFile(policy, setting, train_seed, headers=[])), results, seen, with_tokens)
        elif results.path in named:
            raise UserError(f"{results.path} holds results of {results.header['program']}, but samples are asked for.")
    if named and not found:
        raise UserError(f"no samples in {', '.join(map(str, named))}: expected files that spl sample wrote.")
    for file in found.values():
        if bare := file.prompts.keys() - file.replies.keys():
            raise UserError(f"{_name(file)}: no sample of prompt {min(bare)!r}; run spl sample to its end.")
    return list(found.values())


def _is_conversation(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(turn, Mapping) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
        for turn in value
    )


def _is(*kinds: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, kinds)


def _are_tokens(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(token, int) for token in value))


_OF_ALL = ("max_new_tokens", "system", "template")  # settings that parts of one policy have in common
_NONE = type(None)
# What is read of a record, in order; what it lacks is null.
_HEADER = {"policy": _is(str), "setting": _is(str), "train_seed": _is(int, _NONE)}
_PROMPT = {"item": _is(str), "messages": _is_conversation}
_SAMPLE = {"item": _is(str), "index": _is(int), "text": _is(str)}
_SAMPLE |= {"num_tokens": _is(int, _NONE), "finish": _is(str), "logp": _is(int, float, _NONE)}
_SAMPLE |= {"entropy": _is(int, float, _NONE), "token_ids": _are_tokens}


def _fields(record: Record, path: Path, form: Mapping[str, Callable[[Any], bool]]) -> list[Any]:
    """Some fields of a record, each of which must fit: any tool may have written the file."""
    for name, fits in form.items():
        if not fits(record.get(name)):
            raise UserError(
                f"{path}: a {record['kind']} has {shortened(record.get(name))} as {name!r}, which is not what "
                "spl sample writes there."
            )
    return [record.get(name) for name in form]


def _add(file: SampleFile, results: Results, seen: set[tuple[Any, ...]], with_tokens: bool) -> None:
    _check_whole(results)
    _check_joins(file, results)
    file.headers.append(results.header)
    file.paths.append(results.path)
    file.left_out |= {record["item"] for record in results.of("note") if "item" in record}
    file.notes += [str(record["text"]) for record in results.of("note") if "item" not in record and "text" in record]
    for item, messages in (_fields(record, results.path, _PROMPT) for record in results.of("prompt")):
        if file.prompts.setdefault(item, messages) != messages:
            raise UserError(f"{results.path}: prompt {item!r} differs from that of another file.")
    samples = [_fields(record, results.path, _SAMPLE) for record in results.of("sample")]
    for item, index, *told in sorted(samples, key=lambda sample: int(sample[1])):
        sample = (file.policy, file.setting, file.train_seed, item, index)
        if sample in seen:
            raise UserError(f"{results.path}: sample {index} of prompt {item!r} is in another file, or here twice.")
        if item not in file.prompts:
            raise UserError(f"{results.path}: a sample of prompt {item!r}, but no such prompt.")
        seen.add(sample)
        reply = Reply(*told)
        kept = array("i", reply.token_ids) if with_tokens and reply.token_ids is not None else None
        file.replies.setdefault(item, []).append(reply._replace(token_ids=kept))


def _check_whole(results: Results) -> None:
    """Refuse what a killed run has left: fewer prompts or replies than were asked for would be measured unawares."""
    asked = results.header.get("num_items")
    if asked is None:  # as other tools write
        return
    num_samples = (results.header.get("settings") or {}).get("num_samples")
    if not isinstance(asked, int) or not isinstance(num_samples, int):
        raise UserError(
            f"{results.path}: its header gives num_items, but num_items or settings.num_samples is no number."
        )
    replies = Counter(record.get("item") for record in results.of("sample"))
    given_up = {record["item"] for record in results.of("note") if "item" in record}
    whole = {item for item, num in replies.items() if num >= num_samples} | (given_up - replies.keys())
    if len(whole) < asked:
        raise UserError(
            f"{results.path} holds all replies to {len(whole)} of {asked} prompts: run the same spl sample "
            "command again, which goes on to its end."
        )


def _check_joins(file: SampleFile, results: Results) -> None:
    """Refuse to take the replies of two models, or to other requests, for those of one."""
    for before, path in zip(file.headers, file.paths, strict=True):
        if differs := _differences(before, results.header):
            raise UserError(
                f"{path} and {results.path} are both of {_name(file)!r}, but {differs[0]} differs: draw with a "
                "--policy of its own for each, or give one of them."
            )


def _differences(*headers: Record) -> list[str]:
    """What should be the same of two parts and is not, as far as they tell: a server's tell no weights."""
    one, two = (settings if isinstance(settings := h.get("settings"), Mapping) else {} for h in headers)
    weights = [header.get("fingerprint") for header in headers]  # none where a server drew
    is_same = weights[0] == weights[1] if all(weights) else any(weights) or one.get("model") == two.get("model")
    return ([] if is_same else ["model"]) + [name for name in _OF_ALL if one.get(name) != two.get(name)]


def _name(file: SampleFile) -> str:
    return ", ".join(filter(None, (file.policy, file.setting)))
