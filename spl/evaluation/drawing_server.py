"""Replies as records from an OpenAI-compatible server."""

from collections.abc import Iterable, Iterator, Sequence

from spl.evaluation.drawing import Job, Key, Question, beginning
from spl.results import Record
from spl.sampling.logits import Decoding
from spl.sampling.protocol import ChatRequest, Completion
from spl.sampling.server import ChatServer, ServerRefusalError


class ServerDrawer:
    """From a server, many requests at a time; conversations come in the order in which they are answered.

    One that the server refuses gets a note in place of replies, and is asked for again when the program goes on.

    Args:
        server: to ask.
        decoding: how tokens are drawn.
        num_samples: replies a conversation.
        max_new_tokens: most tokens of a reply.
        seed: of the replies, as far as the server heeds it.
    """

    def __init__(
        self, server: ChatServer, decoding: Decoding, *, num_samples: int, max_new_tokens: int, seed: int
    ) -> None:
        self.server, self.decoding = server, decoding
        self.num_samples, self.max_new_tokens, self.seed = num_samples, max_new_tokens, seed

    def jobs(self, questions: Sequence[Question]) -> list[Job]:
        return [Job((question,), 0, self.num_samples) for question in questions]

    def records(self, jobs: Iterable[Job]) -> Iterator[tuple[Job, list[Record]]]:
        jobs = list(jobs)
        requests = (self._request(job.questions[0]) for job in jobs)
        for number, completions in self.server.each(requests):
            (question,) = jobs[number].questions
            if isinstance(completions, ServerRefusalError):
                text = f"prompt {question.asked.item} is left out: the server refuses it: {completions.said}."
                yield jobs[number], [{"kind": "note", "item": question.asked.item, "text": text}]
            else:
                samples = [completion_record(question, k, one) for k, one in enumerate(completions)]
                yield jobs[number], [beginning(question), *samples]
        if law := self.server.remarks.get("law"):
            yield Job((), 0, 0), [{"kind": "note", "text": law}]

    def is_done(self, job: Job, written: set[Key]) -> bool:
        return job.is_in(written)

    def _request(self, question: Question) -> ChatRequest:
        # The server's numbers of a reply are the seed times 1,000,003 and its own, in 31 bits.
        seed = (self.seed * 10_007 + question.number) % 2**31
        return ChatRequest(
            question.asked.messages, self.num_samples, self.decoding, self.max_new_tokens, seed, logprobs=True
        )


def completion_record(question: Question, index: int, one: Completion) -> Record:
    return {"kind": "sample", "item": question.asked.item, "index": index, **one._asdict()}
