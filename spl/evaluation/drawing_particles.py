"""Replies as records from a model at a global temperature, and how far its particles can be trusted."""

from collections.abc import Iterable, Iterator, Sequence

from spl.evaluation.drawing import Job, Key, ModelDrawer, Question, beginning, drawing_faults, drawn_record
from spl.evaluation.policies import EvaluatedPolicy
from spl.results import Record
from spl.sampling.global_temperature import LEAST_ANCESTORS, Tempered, Tempering, draw_tempered
from spl.sampling.logits import Decoding
from spl.types import UserError


class TemperedDrawer(ModelDrawer):
    """Whole replies from a model's law at a global temperature, one conversation at a time.

    Args:
        policy: the model.
        tempering: how.
        labels: of the policy and of this way of decoding, with its training seed.
        num_samples: replies a conversation.
        max_new_tokens: most tokens of a reply.
        seed: of the random numbers.

    Raises:
        UserError: there are fewer particles than replies.
    """

    def __init__(
        self,
        policy: EvaluatedPolicy,
        tempering: Tempering,
        labels: Record,
        *,
        num_samples: int,
        max_new_tokens: int,
        seed: int,
    ) -> None:
        super().__init__(
            policy, Decoding(), num_samples=num_samples, max_new_tokens=max_new_tokens, batch_size=1, seed=seed
        )
        self.tempering, self.labels = tempering, labels
        if tempering.num_particles * tempering.num_runs < num_samples:
            raise UserError(
                f"num_samples is {num_samples}, but {tempering.num_runs} runs of {tempering.num_particles} particles "
                "hold fewer: raise num_particles."
            )

    def jobs(self, questions: Sequence[Question]) -> list[Job]:
        self.read(questions)
        return [Job((question,), 0, self.num_samples) for question in questions]

    def records(self, jobs: Iterable[Job]) -> Iterator[tuple[Job, list[Record]]]:
        for job in jobs:
            (question,) = job.questions
            with drawing_faults(self.policy, f"num_particles ({self.tempering.num_particles})"):
                found = self._draw_tempered(question)
            yield job, [*self._replies(question, found), self._particles(question, found)]

    def is_done(self, job: Job, written: set[Key]) -> bool:
        return ("item", job.questions[0].asked.item, None) in written  # the last record of a job

    def _draw_tempered(self, question: Question) -> Tempered:
        return draw_tempered(
            self.policy.model,
            self.prompts[question.number],
            self.num_samples,
            self.tempering,
            eos_token_ids=self.policy.eos_token_ids,
            max_new_tokens=self.max_new_tokens,
            seed=self.seed * 1_000_003 + question.number,
        )

    def _replies(self, question: Question, found: Tempered) -> list[Record]:
        if found.is_usable:
            samples = [drawn_record(question, k, reply, self.encoder) for k, reply in enumerate(found.replies)]
            return [beginning(question), *samples]
        text = (
            f"prompt {question.asked.item} is left out: {found.ancestors:.0%} of the first particles survive, with an "
            f"effective sample size of {found.effective:.0%}, but its replies would be variations of a few below "
            f"{LEAST_ANCESTORS:.0%}. A global temperature nearer to 1, shorter replies or more particles help."
        )
        return [{"kind": "note", "item": question.asked.item, "text": text}]

    def _particles(self, question: Question, found: Tempered) -> Record:
        """How far the replies to a conversation can be trusted."""
        lengths = [len(reply.token_ids) for reply in found.replies]
        values = {
            "surviving_ancestors": found.ancestors,
            "effective_sample_size": found.effective,
            "distinct_replies": found.distinct / len(lengths),
            "log_z": found.log_z,
            "log_z_spread": found.log_z_spread,
            "mean_length": sum(lengths) / len(lengths),
            "share_ended": sum(reply.ended for reply in found.replies) / len(lengths),
        }
        return {"kind": "item", **self.labels, "item": question.asked.item, "group": None, "values": values}
