"""Which of the replies to a prompt say the same: classes of equal answers, as of NoveltyBench (arXiv 2504.05228).

Replies are taken in the order they were drawn. Each joins the first class whose first reply it equals, or begins one of
its own, so that a partition is a list of class numbers, 0 first: [0, 1, 0, 2].
"""

from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import normalize

from spl.evaluation.judge import Judge, Question
from spl.evaluation.judge_prompts import EQUIVALENCE, JudgePrompt, two_answers
from spl.metrics.diversity import canonical
from spl.types import Message


def exact_partition(texts: Sequence[str]) -> list[int]:
    """Replies are equal whose canonical forms are: case, white space and wrapping marks do not matter."""
    classes: dict[str, int] = {}
    return [classes.setdefault(canonical(text), len(classes)) for text in texts]


def embedding_partition(vectors: Tensor, same_above: float) -> list[int]:
    """Replies are equal to a class's first where the cosine of their vectors [N, D] is at least `same_above`."""
    unit = normalize(vectors.double(), dim=1)
    firsts: list[int] = []
    classes: list[int] = []
    for cosines in (unit @ unit.T).tolist():
        found = next((k for k, first in enumerate(firsts) if cosines[first] >= same_above), len(firsts))
        if found == len(firsts):
            firsts.append(len(classes))
        classes.append(found)
    return classes


def judged_partitions(
    judge: Judge,
    conversations: Sequence[Sequence[Message]],
    replies: Sequence[Sequence[str]],
    asked: JudgePrompt = EQUIVALENCE,
) -> list[list[int] | None]:
    """Replies are equal that the judge calls the same, by the prompt that is asked.

    None for a prompt where a verdict could not be read. Replies whose canonical forms are equal are not asked about.
    The second replies of all prompts are asked about together, then the third, and so on.
    """
    prompts = [_Classes(messages, texts) for messages, texts in zip(conversations, replies, strict=True)]
    while waiting := [prompt for prompt in prompts if prompt.pairs()]:
        pairs = [pair for prompt in waiting for pair in prompt.pairs()]
        questions = [Question(asked, two_answers(*pair)) for pair in pairs]
        verdicts = iter([verdict["verdict"] == "same" if verdict else None for verdict in judge.ask(questions)])
        for prompt in waiting:
            prompt.answer([next(verdicts) for _ in prompt.firsts])
    return [prompt.partition() for prompt in prompts]


class _Classes:
    """The classes of one prompt's replies as they come about; replies that are equal as texts are one."""

    def __init__(self, messages: Sequence[Message], texts: Sequence[str]) -> None:
        self.messages = messages
        self.exact = exact_partition(texts)
        self.texts = [texts[self.exact.index(k)] for k in range(max(self.exact, default=-1) + 1)]
        self.firsts = [0] if self.texts else []
        self.classes = [0] if self.texts else []
        self.unread = False

    def pairs(self) -> list[tuple[Sequence[Message], str, str]]:
        """The first of each class, each with the next text; none where there is nothing left to ask."""
        if self.unread or len(self.classes) == len(self.texts):
            return []
        text = self.texts[len(self.classes)]
        return [(self.messages, self.texts[first], text) for first in self.firsts]

    def answer(self, same: Sequence[bool | None]) -> None:
        self.unread = None in same and True not in same[: same.index(None)]
        found = same.index(True) if True in same else len(self.firsts)
        if found == len(self.firsts):
            self.firsts.append(len(self.classes))
        self.classes.append(found)

    def partition(self) -> list[int] | None:
        return None if self.unread else [self.classes[k] for k in self.exact]
