"""Replies as records, job by job, and how they are drawn from a model token by token.

Jobs are the same whatever is there already, and the random numbers of a reply are its own, so that a program that was
killed writes what it would have written.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from spl.data.conversations import Conversation
from spl.data.prompts import conversation_prompt
from spl.data.tokenization import Encoder
from spl.evaluation.policies import EvaluatedPolicy
from spl.results import Record
from spl.sampling.generate import Drawn, draw
from spl.sampling.logits import Decoding
from spl.types import UserError

Key = tuple[Any, ...]
"""Kind, item and index of a record, which together are its own."""


class Question(NamedTuple):
    """A conversation, and its number among all of them, by which its random numbers go."""

    number: int
    asked: Conversation


@dataclass(frozen=True)
class Job:
    """Replies first, first + 1, ... to each of some conversations, drawn together."""

    questions: tuple[Question, ...]
    first: int
    num: int

    @property
    def size(self) -> int:
        """Replies."""
        return len(self.questions) * self.num

    def is_in(self, written: set[Key]) -> bool:
        """Whether all of its replies are."""
        numbers = range(self.first, self.first + self.num)
        return all(("sample", q.asked.item, k) in written for q in self.questions for k in numbers)


class Drawer(Protocol):
    """Whatever draws."""

    def jobs(self, questions: Sequence[Question]) -> list[Job]:
        """The work in parts.

        Raises:
            UserError: a conversation cannot be replied to. It is said before anything is drawn.
        """

    def is_done(self, job: Job, written: set[Key]) -> bool:
        """Whether all records of a part are written."""

    def records(self, jobs: Iterable[Job]) -> Iterator[tuple[Job, list[Record]]]:
        """Do some of it; the conversation's record stands before its first reply."""


def beginning(question: Question) -> Record:
    """The record of a conversation."""
    return {"kind": "prompt", "item": question.asked.item, "messages": list(question.asked.messages)}


def split(questions: Sequence[Question], num_samples: int, batch_size: int) -> list[Job]:
    """Jobs of at most batch_size replies: all replies to several conversations, or some of those to one."""
    together = max(1, batch_size // num_samples)
    groups = [tuple(questions[k : k + together]) for k in range(0, len(questions), together)]
    step = min(num_samples, batch_size)
    parts = [(first, min(step, num_samples - first)) for first in range(0, num_samples, step)]
    return [Job(group, first, num) for group in groups for first, num in parts]


class ModelDrawer:
    """Token by token from a model.

    Args:
        policy: the model.
        decoding: how tokens are drawn.
        num_samples: replies a conversation.
        max_new_tokens: most tokens of a reply.
        batch_size: most replies drawn together.
        seed: of the random numbers.
    """

    def __init__(
        self,
        policy: EvaluatedPolicy,
        decoding: Decoding,
        *,
        num_samples: int,
        max_new_tokens: int,
        batch_size: int,
        seed: int,
    ) -> None:
        self.policy, self.decoding = policy, decoding
        self.num_samples, self.max_new_tokens = num_samples, max_new_tokens
        self.batch_size, self.seed = batch_size, seed
        self.encoder = policy.encoder(None)  # the length is checked with the reply's

    def jobs(self, questions: Sequence[Question]) -> list[Job]:
        """Conversations of about one length together, since each is padded to the longest."""
        self.read(questions)
        ordered = sorted(questions, key=lambda q: len(self.prompts[q.number]))
        return split(ordered, self.num_samples, self.batch_size)

    def read(self, questions: Sequence[Question]) -> None:
        """Tokenise the conversations.

        Raises:
            UserError: with a reply one is longer than the model can read, or the template refuses it.
        """
        self.prompts = {q.number: self._prompt(q.asked) for q in questions}

    def records(self, jobs: Iterable[Job]) -> Iterator[tuple[Job, list[Record]]]:
        for job in jobs:
            with drawing_faults(self.policy, f"batch_size ({self.batch_size})"):
                drawn = self._draw(job)
            records: list[Record] = []
            for question, replies in zip(job.questions, drawn, strict=True):
                records += [beginning(question)] if job.first == 0 else []
                records += [
                    drawn_record(question, job.first + k, reply, self.encoder) for k, reply in enumerate(replies)
                ]
            yield job, records

    def is_done(self, job: Job, written: set[Key]) -> bool:
        return job.is_in(written)

    def _draw(self, job: Job) -> list[list[Drawn]]:
        return draw(
            self.policy.model,
            [self.prompts[q.number] for q in job.questions],
            job.num,
            eos_token_ids=self.policy.eos_token_ids,
            max_new_tokens=self.max_new_tokens,
            decoding=self.decoding,
            seeds=[self.seed * 1_000_003 + q.number for q in job.questions],
            first=job.first,
        )

    def _prompt(self, asked: Conversation) -> Sequence[int]:
        """Token ids up to where the reply begins."""
        ids = conversation_prompt(asked.messages, f"prompt {asked.item}", self.encoder).input_ids
        most = self.policy.num_positions
        if most and len(ids) + self.max_new_tokens > most:
            raise UserError(
                f"prompt {asked.item} has {len(ids):,} tokens, which with max_new_tokens {self.max_new_tokens:,} are "
                f"more than the model's {most:,} positions: lower max_new_tokens, or leave the prompt out."
            )
        return ids


@contextmanager
def drawing_faults(policy: EvaluatedPolicy, size: str) -> Iterator[None]:
    """Say in a sentence why a model cannot be drawn from.

    Args:
        policy: the model.
        size: the setting that takes less memory when it is lowered, with its value.

    Raises:
        UserError: there is no memory left, or the model gives no numbers.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(f"{policy.device} is out of memory: lower {size}.") from error
    except FloatingPointError as error:
        raise UserError(f"{policy.name} cannot be drawn from: {error}. Try --dtype float32.") from error


def drawn_record(question: Question, index: int, reply: Drawn, encoder: Encoder) -> Record:
    return {
        "kind": "sample",
        "item": question.asked.item,
        "index": index,
        "text": encoder.decode_reply(reply.token_ids[:-1] if reply.ended else reply.token_ids),
        "num_tokens": len(reply.token_ids),
        "finish": "stop" if reply.ended else "length",
        "logp": reply.logp,
        "entropy": reply.entropy,
        "token_ids": reply.token_ids,
    }
