"""A baseline's answers, one a prompt: from a file of samples, or of rows as Arena-Hard's model answers are."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spl.data.source import named_source
from spl.data.values import text_of
from spl.evaluation.sample_files import read_samples
from spl.results import is_results
from spl.types import Message, UserError

_IDS = ("uid", "id", "question_id", "item")
_REPLIES = ("response", "answer", "completion", "output")


def read_baseline(name: str) -> dict[str, str]:
    """Item to answer.

    Args:
        name: a file that `spl sample` wrote, whose first reply to each prompt is taken; or rows, local or on the Hub,
            with an id (uid, id, question_id) and the answer, as the last turn of `messages` or as a text (response,
            answer, completion, output).

    Raises:
        UserError: it is neither.
    """
    if Path(name).is_file() and is_results(Path(name)):
        files = read_samples([name])
        if len(files) != 1:
            raise UserError(f"{name} must hold the answers of one policy, but holds those of {len(files)}.")
        return {item: replies[0].text for item, replies in files[0].replies.items()}
    answers: dict[str, str] = {}
    for where, row in named_source(name, "train").rows():
        if isinstance(row, UserError):
            raise row
        item = next((str(row[key]) for key in _IDS if row.get(key) is not None), None)
        if item is None:
            raise UserError(f"{where}: a baseline's answer needs an id, as uid or id, to find its prompt by.")
        if item in answers:
            raise UserError(f"{where}: the id {item!r} is there twice: give the answers of one model.")
        answers[item] = _answer(row, where)
    return answers


def _answer(row: Mapping[str, Any], where: str) -> str:
    messages: Sequence[Message] | None = row.get("messages")
    if messages and messages[-1].get("role") == "assistant":
        content: Any = messages[-1].get("content")
        # Arena-Hard's newer files hold {"answer": ...} there.
        return text_of(content.get("answer") if isinstance(content, Mapping) else content, f"{where}: the answer")
    for name in _REPLIES:
        if row.get(name) is not None:
            return text_of(row[name], f"{where}: {name}")
    raise UserError(
        f"{where}: expected messages that end with an assistant turn, or {' or '.join(_REPLIES)}, but got "
        f"{', '.join(row)}."
    )
