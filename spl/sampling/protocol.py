"""OpenAI's chat protocol: what is asked, which fields say it, and what an answer holds."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from spl.sampling.logits import Decoding
from spl.types import Message

# What asks for the model's law itself. Left out, a server's own defaults hold (llama.cpp: top_k 40, min_p 0.05).
NEUTRAL = {"top_k": -1, "min_p": 0.0}


class Completion(NamedTuple):
    """One reply."""

    text: str
    num_tokens: int | None  # None where the server does not count
    finish: Literal["stop", "length"]
    logp: float | None  # of its tokens under the model's law at temperature 1, nats; None where that is not known


@dataclass(frozen=True)
class ChatRequest:
    """What to ask of a server.

    Attributes:
        messages: the conversation, which ends with a turn that a reply can follow.
        n: replies.
        decoding: how their tokens are drawn.
        max_tokens: most tokens of a reply.
        seed: of the replies; a server may pass over it.
        logprobs: whether the replies' log-probabilities are wanted.
    """

    messages: Sequence[Message]
    n: int = 1
    decoding: Decoding = field(default_factory=Decoding)
    max_tokens: int = 1024
    seed: int | None = None
    logprobs: bool = False


def required_fields(request: ChatRequest) -> dict[str, Any]:
    """What must be said of a request, but for the model and the most tokens."""
    decoding = request.decoding
    asked = {name: decoding.filters[name] for name in NEUTRAL if name in decoding.filters}
    told = {"temperature": decoding.temperature, "top_p": decoding.top_p or 1.0}
    return {"messages": list(request.messages), **told, **asked}


def optional_fields(request: ChatRequest, n: int, first: int) -> dict[str, Any]:
    """What is asked for besides, for the replies first, first + 1, ... of a request, n together."""
    fields: dict[str, Any] = {name: value for name, value in NEUTRAL.items() if name not in request.decoding.filters}
    if request.seed is not None:
        fields["seed"] = (request.seed * 1_000_003 + first) % 2**31  # vLLM adds the reply's number itself
    if request.logprobs or n > 1:  # also tells how long each of several replies is
        fields["logprobs"] = True
    if n > 1:
        fields["n"] = n
    return fields


_CUT = ("length", "max_tokens", "content_filter", "abort", "error")  # why a reply ends that did not by itself


def completions(answer: Any, request: ChatRequest, raw_logprobs: bool) -> list[Completion]:
    """The replies that an answer of the openai package holds.

    Args:
        answer: to the request.
        request: what was asked.
        raw_logprobs: whether its log-probabilities are those before temperature and filters.
    """
    usage = getattr(answer.usage, "completion_tokens", None)
    choices = answer.choices or []
    logprobs = [[t.logprob for t in getattr(choice.logprobs, "content", None) or []] for choice in choices]
    # A server may leave the last token, EOS, out of these.
    counted = all(logprobs) and usage in (None, sum(map(len, logprobs)))
    known = counted and request.logprobs and (request.decoding.is_own_law or raw_logprobs)
    return [
        Completion(
            text=choice.message.content or "",
            num_tokens=len(values) if counted else usage if len(choices) == 1 else None,
            finish="length" if choice.finish_reason in _CUT else "stop",
            logp=sum(values) if known else None,
        )
        for choice, values in zip(choices, logprobs, strict=True)
    ]
