"""A judge: a model behind a server that compares answers, rates how they differ, or tells whether two say the same.

It is asked at temperature 0, and every answer is kept on disk as it comes, by the judge's name, the prompt's version
and the content: a run that was killed or is repeated asks nothing twice. An answer that cannot be read is asked for
once more with a reminder of the form; if that cannot be read either there is no verdict, which is counted, not guessed.
Nor is there one where the server refuses a question, for its length or its words; it is asked anew by the next run.
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.progress import track

from spl.evaluation.judge_prompts import COMPARISON, DIVERSITY, JudgePrompt, many_answers, two_answers
from spl.results import Appender, header
from spl.sampling.logits import Decoding
from spl.sampling.protocol import ChatRequest
from spl.sampling.server import ChatServer, ServerRefusalError
from spl.types import Message

log = logging.getLogger("spl")

Verdict = dict[str, str]
Asked = tuple[JudgePrompt, list[Message]]

_POINTS = {"a": 1.0, "tie": 0.5, "b": 0.0}  # of the answer that stands first


class Question(NamedTuple):
    """What is asked of what."""

    prompt: JudgePrompt
    content: str


class Comparison(NamedTuple):
    """A reply to compare with a baseline's."""

    messages: Sequence[Message]
    reply: str
    baseline: str


class Judge:
    """Asks a server, or the disk where it was asked before.

    Args:
        server: that the judge is behind.
        cache: file of the answers; several runs may share one.
        max_tokens: most tokens of an answer.

    Raises:
        ResultsError: the cache is another file.
    """

    def __init__(self, server: ChatServer, cache: Path, max_tokens: int = 1024) -> None:
        self.server = server
        self.max_tokens = max_tokens
        self._file = Appender(cache, header("judge", {}), alone=False)
        self._known: dict[str, str] = {record["key"]: record["text"] for record in self._file.records}

    def ask(self, questions: Sequence[Question]) -> list[Verdict | None]:
        """A verdict on each, in order; None where the judge's answers could not be read, or the question was refused.

        Raises:
            UserError: the server does not answer; what it has answered is kept.
        """
        answers = self._answers([(prompt, prompt.messages(content)) for prompt, content in questions])
        verdicts = [_read(question.prompt, answer) for question, answer in zip(questions, answers, strict=True)]
        unread = {
            k: (question.prompt, question.prompt.again(question.content, answer))
            for k, (question, answer) in enumerate(zip(questions, answers, strict=True))
            if answer is not None and verdicts[k] is None
        }
        for k, answer in zip(unread, self._answers(list(unread.values())), strict=True):
            verdicts[k] = _read(questions[k].prompt, answer)
        return verdicts

    def _answers(self, asked: Sequence[Asked]) -> list[str | None]:
        """None of what the server refuses.

        Raises:
            ServerRefusalError: it has refused all that it was ever asked.
        """
        keys = [self._key(prompt, messages) for prompt, messages in asked]
        new = {key: one for key, one in zip(keys, asked, strict=True) if key not in self._known}
        requests = [
            ChatRequest(messages, decoding=Decoding(0), max_tokens=self.max_tokens) for _, messages in new.values()
        ]
        waiting = list(new.items())
        answered = self.server.each(requests)
        said = f"asking {self.server.model}"
        console = Console(stderr=True)
        quiet = not console.is_terminal
        refused: list[ServerRefusalError] = []
        for number, completions in track(answered, said, len(requests), console=console, transient=True, disable=quiet):
            key, (prompt, _) = waiting[number]
            if isinstance(completions, ServerRefusalError):
                refused.append(completions)
            else:
                self._keep(key, prompt, completions[0].text)
        if refused and not self._known:
            raise refused[0]
        if refused:
            log.warning("No verdict on %d questions. Of the first: %s", len(refused), refused[0])
        return [self._known.get(key) for key in keys]

    def _keep(self, key: str, prompt: JudgePrompt, text: str) -> None:
        self._file.add(
            [{"kind": "answer", "key": key, "judge": self.server.model, "prompt": prompt.name, "text": text}]
        )
        self._known[key] = text

    def _key(self, prompt: JudgePrompt, messages: list[Message]) -> str:
        asked = json.dumps([self.server.model, prompt.name, self.max_tokens, messages])
        return hashlib.sha256(asked.encode()).hexdigest()


def _read(prompt: JudgePrompt, answer: str | None) -> Verdict | None:
    return None if answer is None else prompt.read(answer)


def win_rates(judge: Judge, comparisons: Sequence[Comparison]) -> list[dict[str, float]]:
    """Each reply against its baseline, asked in both orders -> for each its measures.

    `win_rate` is the mean over the two orders of 1 for a win, 1/2 for a tie and 0 for a loss; without a verdict on both
    there is none, since the place alone sways judges. `judge_first` is the same for whichever answer stood first (1/2
    where the place does not matter), `judge_ties` the share of ties, `judge_unread` that of missing verdicts.
    """
    questions = []
    for messages, reply, baseline in comparisons:
        questions += [
            Question(COMPARISON, two_answers(messages, *pair)) for pair in ((reply, baseline), (baseline, reply))
        ]
    verdicts = judge.ask(questions)
    return [_win_rate(verdicts[k : k + 2]) for k in range(0, len(verdicts), 2)]


def _win_rate(verdicts: Sequence[Verdict | None]) -> dict[str, float]:
    read = [verdict["verdict"] for verdict in verdicts if verdict is not None]
    measures = {"judge_unread": 1 - len(read) / 2}
    if len(read) == 2:
        first, second = (_POINTS[verdict] for verdict in read)
        measures["win_rate"] = (first + 1 - second) / 2
        measures["judge_first"] = (first + second) / 2
        measures["judge_ties"] = read.count("tie") / 2
    return measures


def diversity_scores(
    judge: Judge, conversations: Sequence[Sequence[Message]], replies: Sequence[Sequence[str]]
) -> list[dict[str, float]]:
    """The paper's three scores from 1 to 5 of the replies to each prompt, or `judge_scores_unread` alone."""
    pairs = zip(conversations, replies, strict=True)
    verdicts = judge.ask([Question(DIVERSITY, many_answers(messages, texts)) for messages, texts in pairs])
    return [
        {name: float(score) for name, score in (verdict or {}).items()}
        | {"judge_scores_unread": float(verdict is None)}
        for verdict in verdicts
    ]
