"""Every common shape of a preference row, read into one `PreferenceExample`.

Shapes, told apart by their columns (others are ignored; `prompt` may also be called `messages`):

- `chosen`, `rejected` and perhaps `prompt`, each text or a list of messages. Without a prompt, two conversations share
  theirs, and two texts are raw transcripts ("\\n\\nHuman: ... \\n\\nAssistant: ...").
- `prompt`, `responses` and one of `shares` (of a population; p_ij = s_i / (s_i + s_j)), `scores` (the higher is
  preferred, equal ones tie), `ranking` (indices of the responses, best first), `comparisons` ([i, j, p] triples).
- `prompt`, `response_a`, `response_b`, `votes_a`, `votes_b` and perhaps `votes_tie` (half a vote to each side).

A pair may carry `share`, the share of raters who prefer the chosen reply. Any row may carry `alpha` and `system`.
"""

import math
import re
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from spl.types import Comparison, Message, PreferenceExample, UserError

ROLES = ("system", "user", "assistant", "tool")
_TURN = re.compile(r"\n\n(Human|Assistant):")
_SHAPES = (
    "chosen and rejected (with or without prompt), or prompt and responses with shares, scores, ranking or "
    "comparisons, or prompt, response_a, response_b, votes_a and votes_b"
)


def parse_row(row: Mapping[str, Any], where: str = "", columns: Mapping[str, str] | None = None) -> PreferenceExample:
    """Read one row.

    Args:
        row: column names to values.
        where: "file, row 12", put before every complaint.
        columns: our column names to the row's, where they differ: `{"chosen": "better"}`.

    Raises:
        UserError: the row has no known shape, or a value in it cannot be used; the text says which and why.
    """
    try:
        return _parse(_renamed(row, columns or {}), where)
    except UserError as error:
        raise UserError(f"{where}: {error}" if where else str(error)) from None


def _renamed(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The row under our column names, without empty columns."""
    for ours, theirs in columns.items():
        if theirs not in row:
            raise UserError(f"no column {theirs!r} (set as columns.{ours}); the columns found are {_names(row)}.")
    taken = set(columns.values())
    renamed = {k: v for k, v in row.items() if k not in taken and k not in columns}
    renamed |= {ours: row[theirs] for ours, theirs in columns.items()}
    return {k: v for k, v in renamed.items() if v is not None}


def _names(row: Mapping[str, Any]) -> str:
    return ", ".join(map(repr, row)) or "none"


def _parse(row: dict[str, Any], where: str) -> PreferenceExample:
    if "chosen" in row and "rejected" in row:
        prompt, responses = _pair(row)
        comparisons = [Comparison(0, 1, _share(row.get("share", 1.0), "share"))]
    elif "response_a" in row and "response_b" in row:
        prompt, responses = _prompt(row), [_reply(row[k], k, []) for k in ("response_a", "response_b")]
        comparisons = [Comparison(0, 1, _vote_share(row))]
    elif "responses" in row:
        prompt, responses, comparisons = _many(row)
    else:
        raise UserError(f"expected the columns {_SHAPES}; the columns found are {_names(row)}.")
    if "system" in row and prompt[0]["role"] != "system":
        prompt = [{"role": "system", "content": _text(row["system"], "system")}, *prompt]
    _check_responses(responses)
    return PreferenceExample(tuple(prompt), tuple(responses), tuple(comparisons), _alpha(row.get("alpha")), where)


def _pair(row: dict[str, Any]) -> tuple[list[Message], list[str]]:
    """Prompt and the two replies of a chosen/rejected row."""
    chosen, rejected = row["chosen"], row["rejected"]
    if "prompt" in row or "messages" in row:
        prompt = _prompt(row)
        return prompt, [_reply(chosen, "chosen", prompt), _reply(rejected, "rejected", prompt)]
    conversations = [_conversation(chosen, "chosen"), _conversation(rejected, "rejected")]
    for name, turns in zip(("chosen", "rejected"), conversations, strict=True):
        if len(turns) < 2 or turns[-1]["role"] != "assistant":
            raise UserError(
                f"{name} has no prompt column beside it, so it must be a conversation that ends with a reply."
            )
    if conversations[0][:-1] != conversations[1][:-1]:
        raise UserError("chosen and rejected must differ in the last reply alone, but an earlier turn differs.")
    return conversations[0][:-1], [turns[-1]["content"] for turns in conversations]


def _many(row: dict[str, Any]) -> tuple[list[Message], list[str], list[Comparison]]:
    """Prompt, K replies and their comparisons."""
    prompt = _prompt(row)
    if not _is_list(row["responses"]) or len(row["responses"]) < 2:
        raise UserError(f"responses must be a list of two or more replies, but is {_short(row['responses'])}.")
    responses = [_reply(reply, f"responses[{k}]", prompt) for k, reply in enumerate(row["responses"])]
    given = [name for name in _COMPARE if name in row]
    if len(given) != 1:
        raise UserError(
            f"beside responses, expected one of {', '.join(_COMPARE)}, but found {' and '.join(given) or 'none'}."
        )
    values = row[given[0]]
    if not _is_list(values):
        raise UserError(f"{given[0]} must be a list, but is {_short(values)}.")
    if given[0] != "comparisons" and len(values) != len(responses):
        raise UserError(f"{given[0]} has {len(values)} entries for {len(responses)} responses.")
    return prompt, responses, _COMPARE[given[0]](values, len(responses))


def _from_shares(values: Sequence[Any], _: int) -> list[Comparison]:
    shares = [_share(v, f"shares[{k}]") for k, v in enumerate(values)]
    pairs = [(i, j) for i, j in combinations(range(len(shares)), 2) if shares[i] + shares[j] > 0]
    if not pairs:
        raise UserError("shares are all zero, so nothing is preferred to anything.")
    return [Comparison(i, j, shares[i] / (shares[i] + shares[j])) for i, j in pairs]


def _from_scores(values: Sequence[Any], _: int) -> list[Comparison]:
    scores = [_number(v, f"scores[{k}]") for k, v in enumerate(values)]
    pairs = combinations(range(len(scores)), 2)
    return [Comparison(i, j, 0.5 + 0.5 * ((scores[i] > scores[j]) - (scores[i] < scores[j]))) for i, j in pairs]


def _from_ranking(values: Sequence[Any], count: int) -> list[Comparison]:
    if sorted(v for v in values if _is_index(v, count)) != list(range(count)):
        raise UserError(
            f"ranking must hold each index 0 to {count - 1} of the responses once, best first, but is {_short(values)}."
        )
    return [Comparison(i, j, 1.0) for i, j in combinations(values, 2)]


def _from_comparisons(values: Sequence[Any], count: int) -> list[Comparison]:
    comparisons = []
    for k, value in enumerate(values):
        name = f"comparisons[{k}]"
        if not _is_list(value) or len(value) != 3:
            raise UserError(f"{name} must be [i, j, share], but is {_short(value)}.")
        i, j = (int(v) if isinstance(v, float) and v.is_integer() else v for v in value[:2])
        if not _is_index(i, count) or not _is_index(j, count) or i == j:
            raise UserError(f"{name} must name two different responses of 0 to {count - 1}, but is {_short(value)}.")
        comparisons.append(Comparison(i, j, _share(value[2], name)))
    if not comparisons:
        raise UserError("comparisons is empty: expected at least one [i, j, share].")
    return comparisons


_COMPARE = {
    "shares": _from_shares,
    "scores": _from_scores,
    "ranking": _from_ranking,
    "comparisons": _from_comparisons,
}


def _prompt(row: dict[str, Any]) -> list[Message]:
    """The prompt's turns: a text is one user turn, or a transcript where it is written as one."""
    name = "prompt" if "prompt" in row else "messages"
    if name not in row:
        raise UserError(f"expected a column prompt; the columns found are {_names(row)}.")
    value = row[name]
    turns = _conversation(value, name)
    if turns[-1]["role"] == "assistant":
        raise UserError(f"{name} must end with a turn that a reply can follow, but ends with the assistant's.")
    return turns


def _conversation(value: Any, name: str) -> list[Message]:
    """Turns of a list of messages, a transcript, or a text (one user turn)."""
    if _is_list(value):
        if not len(value):
            raise UserError(f"{name} is an empty list of messages.")
        return [_message(turn, f"{name}[{k}]") for k, turn in enumerate(value)]
    text = _text(value, name)
    if not _TURN.match(text):
        return [{"role": "user", "content": text}]
    parts = _TURN.split(text)[1:]
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = [{"role": roles[r], "content": c.strip()} for r, c in zip(parts[::2], parts[1::2], strict=True)]
    # A prompt may be cut right after "Assistant:", the cue for the reply.
    return turns[:-1] if len(turns) > 1 and turns[-1] == {"role": "assistant", "content": ""} else turns


def _message(turn: Any, name: str) -> Message:
    if not isinstance(turn, Mapping) or not {"role", "content"} <= set(turn):
        raise UserError(f"{name} must be a message with role and content, but is {_short(turn)}.")
    if turn["role"] not in ROLES:
        raise UserError(f"{name} has the role {_short(turn['role'])}; expected one of {', '.join(ROLES)}.")
    return {"role": turn["role"], "content": _text(turn["content"], f"{name}.content", empty=True)}


def _reply(value: Any, name: str, prompt: list[Message]) -> str:
    """The reply's text: a text, one assistant message, or the whole conversation that it ends."""
    if not _is_list(value):
        return _text(value, name, empty=True)
    turns = _conversation(value, name)
    own = turns[len(prompt) :] if turns[: len(prompt)] == prompt else turns
    if len(own) != 1 or own[0]["role"] != "assistant":
        raise UserError(f"{name} must be the prompt's next turn, one assistant message, but is {_short(value)}.")
    return own[0]["content"]


def _check_responses(responses: list[str]) -> None:
    for k, reply in enumerate(responses):
        if not reply.strip():
            raise UserError(f"response {k} is empty: expected a reply to score.")
        if reply.strip() in {r.strip() for r in responses[:k]}:
            raise UserError(f"response {k} is identical to an earlier one ({_short(reply)}): nothing tells them apart.")


def _vote_share(row: dict[str, Any]) -> float:
    a, b, tie = (_number(row.get(k, 0), k) for k in ("votes_a", "votes_b", "votes_tie"))
    if min(a, b, tie) < 0 or a + b + tie <= 0:
        raise UserError(f"votes must be 0 or more with at least one cast, but are {a:g}, {b:g} and {tie:g} for a tie.")
    return (a + tie / 2) / (a + b + tie)


def _alpha(value: Any) -> float | None:
    if value is None:
        return None
    alpha = _number(value, "alpha")
    if alpha <= 0:
        raise UserError(f"alpha must be above 0, but is {alpha:g}.")
    return alpha


def _share(value: Any, name: str) -> float:
    share = _number(value, name)
    if not 0 <= share <= 1:
        raise UserError(f"{name} is a share of raters and must lie in [0, 1], but is {share:g}.")
    return share


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{name} must be a finite number, but is {_short(value)}.")
    return float(value)


def _text(value: Any, name: str, empty: bool = False) -> str:
    if not isinstance(value, str):
        raise UserError(f"{name} must be text or a list of messages, but is {_short(value)}.")
    if not empty and not value.strip():
        raise UserError(f"{name} is empty.")
    return value


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _is_index(value: Any, count: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < count


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
