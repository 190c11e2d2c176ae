"""Replies from any server that speaks OpenAI's chat protocol: vLLM, SGLang, llama.cpp, `transformers serve`.

Servers differ in what they know. What one refuses or passes over is found out on the way, said once, and worked around
where that changes nothing in what was asked; else it is an error. Retries, timeouts and connections are the openai
package's, requests run beside each other in a thread of their own, so that a notebook's event loop is not in the way.
"""

import asyncio
import logging
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from importlib.util import find_spec
from itertools import islice
from typing import Any
from urllib.parse import urlsplit

from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt, wait_exponential

from spl.sampling.logits import Decoding
from spl.sampling.protocol import (
    NEUTRAL,
    ChatRequest,
    Completion,
    completions,
    optional_fields,
    required_fields,
)
from spl.types import Message, UserError

log = logging.getLogger("spl")


class ServerRefusalError(UserError):
    """A server refuses one request, for its length or its words, and may answer another.

    Args:
        base_url: of the server.
        said: what it said.
    """

    def __init__(self, base_url: str, said: str) -> None:
        super().__init__(f"{base_url} refuses the request: {said}.")
        self.said = said


class ChatServer:
    """A server, and what it was found not to know.

    Args:
        base_url: as http://localhost:8000/v1.
        model: its name there.
        concurrency: most requests at a time.
        timeout: seconds to wait for an answer.
        retries: tries after the first where the server is not reached, overloaded, or answers with an error of its own.
        api_key_env: environment variable that holds the key, where the server wants one.
        raw_logprobs: whether the server's log-probabilities are those before temperature and filters, as vLLM's are
            by default. Without it they are taken at temperature 1 without filters only, where there is one law.

    Attributes:
        remarks: what was said of the server, by topic; "law" where its own defaults may have changed it.

    Raises:
        UserError: the package openai is missing, or base_url is no URL.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        concurrency: int = 16,
        timeout: float = 600.0,
        retries: int = 8,
        api_key_env: str = "OPENAI_API_KEY",
        raw_logprobs: bool = False,
    ) -> None:
        if not find_spec("openai"):
            raise UserError("asking a server needs the package openai: pip install 'spl[evaluation]'.")
        url = urlsplit(base_url)
        if url.scheme not in ("http", "https") or not url.netloc:
            raise UserError(f"the server's URL must be as http://localhost:8000/v1, but is {base_url!r}.")
        self.base_url = base_url if url.path.strip("/") else f"{base_url.rstrip('/')}/v1"
        self.model = model
        self.concurrency = concurrency
        self.timeout = timeout
        self.retries = retries
        self.api_key_env = api_key_env
        self.raw_logprobs = raw_logprobs
        self._refused: set[str] = set()  # fields that the server does not take
        self._many = True  # whether it gives n replies to a request, and their lengths
        self.remarks: dict[str, str] = {}

    def complete(
        self,
        messages: Sequence[Message],
        n: int = 1,
        decoding: Decoding | None = None,
        max_tokens: int = 1024,
        seed: int | None = None,
        logprobs: bool = False,
    ) -> list[Completion]:
        """The n replies to one conversation; the arguments are those of `ChatRequest`.

        Raises:
            ServerRefusalError: the server refuses what was asked for.
            UserError: there is no answer.
        """
        request = ChatRequest(messages, n, decoding or Decoding(), max_tokens, seed, logprobs)
        [(_, found)] = self.each([request])
        if isinstance(found, ServerRefusalError):
            raise found
        return found

    def each(self, requests: Iterable[ChatRequest]) -> Iterator[tuple[int, list[Completion] | ServerRefusalError]]:
        """Ask for all of them, several at a time -> (number of the request, its replies) as the answers come.

        Requests are taken from the iterable as there is room. A generator that is left early breaks the others off. A
        refusal takes the place of the replies.

        Raises:
            UserError: there is no answer.
        """
        from anyio.from_thread import start_blocking_portal

        waiting = enumerate(requests)
        running: dict[Future[list[Completion]], int] = {}
        with start_blocking_portal() as portal, portal.wrap_async_context_manager(self._client()) as client:
            room = asyncio.Semaphore(self.concurrency)
            while True:
                for number, request in islice(waiting, self.concurrency - len(running)):
                    running[portal.start_task_soon(self._replies, client, room, request)] = number
                if not running:
                    return
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    yield running.pop(future), _outcome(future)

    def _client(self) -> Any:
        import openai

        key = os.environ.get(self.api_key_env) or "none"
        return openai.AsyncOpenAI(api_key=key, base_url=self.base_url, timeout=self.timeout, max_retries=self.retries)

    async def _replies(self, client: Any, room: asyncio.Semaphore, request: ChatRequest) -> list[Completion]:
        """n replies by one request or, where the server knows no better, by n."""
        found: list[Completion] = []
        if self._many and request.n > 1:
            found = await self._ask(client, room, request, request.n, 0)
            if any(reply.num_tokens is None for reply in found):
                found = []  # only a request by itself tells how long its reply is
            if len(found) < request.n:
                self._many = False
                self._say("n", f"does not tell {request.n} replies apart: each is a request of its own.")
        rest = [self._ask(client, room, request, 1, k) for k in range(len(found), request.n)]
        found += [reply for replies in await asyncio.gather(*rest) for reply in replies[:1]]
        self._compare(found, request)
        return found

    async def _ask(
        self, client: Any, room: asyncio.Semaphore, request: ChatRequest, n: int, first: int
    ) -> list[Completion]:
        """The replies first, first + 1, ... to a request, n or as many as the server gives."""
        required, asked = required_fields(request), optional_fields(request, n, first)
        left_out: set[str] = set()
        while True:
            length = "max_completion_tokens" if "max_tokens" in self._refused else "max_tokens"
            optional = {name: value for name, value in asked.items() if name not in self._refused | left_out}
            body = {"model": self.model, length: request.max_tokens, **required, **optional}
            async with room:
                outcome = await self._send(client, body)
            if not isinstance(outcome, str):
                self._learn(left_out)
                return self._found(outcome, request)
            if "max_completion_tokens" in outcome and length == "max_tokens":
                self._refused.add("max_tokens")
            else:
                left_out |= self._refused_in(outcome, set(optional))

    def _found(self, answer: Any, request: ChatRequest) -> list[Completion]:
        if found := completions(answer, request, self.raw_logprobs):
            return found
        raise UserError(f"{self.base_url} answered without a reply.")

    async def _send(self, client: Any, body: dict[str, Any]) -> Any:
        """The server's answer; what it says where it refuses the request.

        Raises:
            UserError: there is no answer.
        """
        import openai

        extra = {name: body[name] for name in NEUTRAL if name in body}  # which the package has no arguments for
        known = {name: value for name, value in body.items() if name not in extra}
        broken = (openai.APIResponseValidationError, ValueError)  # an answer that was cut is no JSON
        attempts = AsyncRetrying(
            stop=stop_after_attempt(self.retries + 1),
            wait=wait_exponential(0.5, max=8),
            retry=retry_if_exception_type(broken),
            reraise=True,
        )

        async def create() -> Any:
            return await client.chat.completions.create(**known, extra_body=extra)

        try:
            return await attempts(create)
        except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
            return self._words(error)
        except (openai.OpenAIError, *broken) as error:
            raise UserError(self._sentence(error)) from error

    def _words(self, error: Exception) -> str:
        """What was said, on one line and without the key."""
        response: Any = getattr(error, "response", None)
        said = " ".join((f"{response.status_code} {response.text}" if response is not None else str(error)).split())
        key = os.environ.get(self.api_key_env)
        return (said.replace(key, "...") if key else said)[:400].rstrip(".")

    def _sentence(self, error: Exception) -> str:
        """What went wrong and what to do."""
        import openai

        tried = f"{self.retries + 1} tries"
        if isinstance(error, openai.APITimeoutError):
            return f"{self.base_url} gave no answer within {self.timeout:g} s in {tried}: is it overloaded?"
        if isinstance(error, openai.APIConnectionError):
            return f"{self.base_url} cannot be reached ({error.__cause__ or error}) in {tried}: is the server running?"
        if isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
            return f"{self.base_url} wants another key than ${self.api_key_env} holds: {self._words(error)}."
        if isinstance(error, openai.NotFoundError):
            return f"{self.base_url} has no model {self.model!r}, or is no chat server's URL: {self._words(error)}."
        if isinstance(error, openai.APIStatusError):
            return f"{self.base_url} answered with an error in {tried}: {self._words(error)}."
        return f"{self.base_url} gave no usable answer in {tried}: {self._words(error) or type(error).__name__}."

    def _refused_in(self, said: str, optional: set[str]) -> set[str]:
        """The fields that the server named, or all that may be left out.

        Raises:
            ServerRefusalError: none may be.
        """
        refused = {name for name in optional if re.search(rf"\b{name}\b", said)} or optional
        if not refused:
            raise ServerRefusalError(self.base_url, said)
        return refused

    def _learn(self, refused: set[str]) -> None:
        """Leave fields out of every later request, now that one was answered without them."""
        self._refused |= refused
        if law := sorted(refused & NEUTRAL.keys()):
            self._say(
                "law",
                f"does not take {' and '.join(law)}: its own defaults for them hold, so that replies "
                "come from the model's own law only if those are off.",
            )
        if "seed" in refused:
            self._say("seed", "takes no seed: another run will give other replies.")

    def _say(self, topic: str, what: str) -> None:
        if topic not in self.remarks:
            self.remarks[topic] = f"the server {what}"
            log.warning("%s %s", self.base_url, what)

    def _compare(self, replies: list[Completion], request: ChatRequest) -> None:
        """Long replies that are all the same were hardly drawn."""
        same = len(replies) > 3 and len({reply.text for reply in replies}) == 1 and len(replies[0].text) > 100
        if same and request.decoding.temperature > 0.3:
            self._say(
                "greedy",
                f"gave {len(replies)} equal replies at temperature {request.decoding.temperature:g}: "
                "it may pass over temperature or seed (transformers serve does so where the model's "
                "generation_config.json has no do_sample: true).",
            )


def _outcome(future: Future[list[Completion]]) -> list[Completion] | ServerRefusalError:
    try:
        return future.result()
    except ServerRefusalError as refusal:
        return refusal
