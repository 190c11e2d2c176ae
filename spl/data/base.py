"""The data module: rows of any common shape in, batches of tries out."""

import logging
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
from lightning import LightningDataModule

from spl.data.budget import Balanced, fewest
from spl.data.collate import EncodedExample, collate
from spl.data.encode import BadRows, EncodedData, Report, RowEncoder, encode_source
from spl.data.files import is_local
from spl.data.loader import BatchLoader, InOrder, Shuffled, StreamLoader
from spl.data.multiple_choice import EncodedChoice, choice_batches, choice_source, encode_choices
from spl.data.prompts import example_prompts, reply_batch, text_prompts
from spl.data.source import SURVEY, Source
from spl.data.tokenization import Encoder, Template, Truncation, TurnEnd
from spl.types import PreferenceBatch, Prompt, UserError

log = logging.getLogger(__name__)


class PreferenceDataModule(LightningDataModule):
    """Preference examples from the embedded survey, local files or the Hub.

    Args:
        path: "survey"; a local .jsonl, .json, .csv (each perhaps .gz) or .parquet file, or a folder of such; or the id
            of a data set on the Hub. `spl.data.formats` lists the shapes of rows that are understood.
        name: configuration of a data set on the Hub.
        split: its split to train on.
        val_path: held-out data; None sets a part of the training data apart.
        val_split: split of the Hub data set (of val_path, or else of path) that is held out.
        val_size: examples set apart, or a share below 1; whole prompts, so none stands on both sides.
        batch_size: examples a batch and device; an optimiser step sees it times devices and accumulation.
        max_tokens: most distinct tokens that training puts through the network at a time. (An evaluation holds no
            activations and takes batch_size examples.) Each step's examples are then shared out
            among more micro-batches (trainer.accumulate_grad_batches is raised while the run lasts, and with it what
            else counts batches); the step and its gradient stay what they are. A last incomplete step of an epoch is
            left out.
        group_by_length: share each step's examples out among its micro-batches and devices by length, so that all take
            alike long; changes nothing but speed, save that a last incomplete step of an epoch is left out. Always so
            where max_tokens is given.
        max_length: most tokens of a prompt and response together.
        truncation: of longer rows: "cut" drops the oldest tokens of the prompt, alike for all responses, and then ends
            of responses; "drop" leaves the row out; "raise" stops.
        template: "model" for its chat template, "plain" for "User: ...", "auto" for the first if there is one.
        turn_end: "template" scores all that ends a turn, "eos" stops at the end-of-sequence token.
        columns: our column names to the data's, as {chosen: better, rejected: worse}.
        bad_rows: a row that cannot be used stops the run ("raise"), or is skipped and counted ("skip").
        streaming: read while training instead of tokenising all first; held-out data then need val_path or val_split.
        buffer_size: rows that a stream is shuffled within.
        num_workers: processes that prepare batches.
        multiple_choice: rows with a question, its choices and the right one, whose letters the CalibrationMonitor
            scores: a local file, or a data set on the Hub as ID, ID:CONFIG or ID:CONFIG:SPLIT (else its split
            "validation"). `spl.data.multiple_choice` lists the shapes of rows.
        num_choice_questions: most of them that are asked, the first of a seeded shuffle.
        seed: of the order of examples, of what is set apart, and of the multiple-choice questions that are asked.
    """

    def __init__(
        self,
        path: str = "survey",
        *,
        name: str | None = None,
        split: str = "train",
        val_path: str | None = None,
        val_split: str | None = None,
        val_size: float = 0.0,
        batch_size: int = 8,
        max_tokens: int | None = None,
        group_by_length: bool = False,
        max_length: int = 1024,
        truncation: Truncation = "cut",
        template: Template = "auto",
        turn_end: TurnEnd = "template",
        columns: dict[str, str] | None = None,
        bad_rows: BadRows = "raise",
        streaming: bool = False,
        buffer_size: int = 1000,
        num_workers: int = 0,
        multiple_choice: str | None = None,
        num_choice_questions: int = 128,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise UserError(f"data.batch_size must be 1 or more, but is {batch_size}.")
        if max_tokens is not None and max_tokens < 1:
            raise UserError(f"data.max_tokens must be 1 or more, but is {max_tokens}.")
        if num_choice_questions < 1:
            raise UserError(f"data.num_choice_questions must be 1 or more, but is {num_choice_questions}.")
        if streaming and (max_tokens or group_by_length):
            raise UserError(
                "a stream does not tell its lengths ahead: with data.streaming leave out data.max_tokens and "
                "data.group_by_length, and lower data.batch_size (raising trainer.accumulate_grad_batches) instead."
            )
        if val_size < 0 or (val_size > 1 and val_size != int(val_size)):
            raise UserError(f"data.val_size must be a share below 1 or a whole number of examples, but is {val_size}.")
        if val_split and not val_path and (path == SURVEY or is_local(path)):
            raise UserError(
                "data.val_split names a split of a Hub data set; of files, set data.val_path or data.val_size."
            )
        if val_size and (val_path or val_split):
            raise UserError(
                "data.val_size sets a part apart where no held-out data are named: drop it, or val_path/val_split."
            )
        self.save_hyperparameters()
        self.source = Source(path, name, split)
        self.val_source = Source(val_path or path, name, val_split or split) if val_path or val_split else None
        self.train: EncodedData | None = None
        self.val: EncodedData | None = None
        self.everything: EncodedData | None = None
        self._sampled: list[EncodedExample] = []
        self._choices: list[EncodedChoice] = []
        self._given: dict[str, Any] = {}  # the trainer's settings as the user gave them, while they are raised

    @property
    def encoder(self) -> RowEncoder:
        """With the tokenizer of the model that is trained."""
        hp = self.hparams
        if self.trainer is None:
            raise RuntimeError("the data module takes its tokenizer from the model: give both to a Trainer first")
        tokenizer = self.trainer.lightning_module.tokenizer
        encoder = Encoder(tokenizer, hp["max_length"], hp["template"], hp["truncation"], hp["turn_end"])
        return RowEncoder(encoder, hp["columns"] or {}, hp["bad_rows"])

    def prepare_data(self) -> None:
        """Tokenise once, on one process a node; the others find the kept copy."""
        stage = self.trainer.state.fn if self.trainer else None
        self.setup(str(stage.value) if stage else "fit")

    def setup(self, stage: str) -> None:
        if stage == "predict":
            self.everything = self.everything or encode_source(self.source, self.encoder)
        elif self.train is None and self.val is None:
            self._load()
        if stage in ("validate", "test") and not self.val:
            raise UserError("there is no held-out data: set data.val_path, data.val_split or data.val_size.")
        hp = self.hparams
        if hp["multiple_choice"] and stage != "predict" and not self._choices:
            questions = choice_source(hp["multiple_choice"])
            self._choices = encode_choices(questions, self.encoder, hp["num_choice_questions"], hp["seed"])
        if stage == "fit" and self.train is not None:
            plan = self._plan()
            if not len(plan):
                needed = plan.step_size if isinstance(plan, Balanced) else plan.batch_size * plan.world
                raise UserError(
                    f"{self.source.path} has {len(self.train)} examples to train on, fewer than the {needed} that go "
                    "into one step: lower data.batch_size."
                )
            if self.hparams["max_tokens"] and not self._given:
                self._keep_to_budget(self.train)

    def _keep_to_budget(self, train: EncodedData) -> None:
        """Raise the number of micro-batches a step until none exceeds max_tokens."""
        budget, trainer = self.hparams["max_tokens"], self.trainer
        assert trainer is not None
        longest = int(train.num_tokens.argmax())
        if train.num_tokens[longest] > budget:
            raise UserError(
                f"data.max_tokens is {budget}, but {train[longest].row} alone has {train.num_tokens[longest]} distinct "
                "tokens: raise it, or lower data.max_length."
            )
        before = trainer.accumulate_grad_batches
        step_size = self.hparams["batch_size"] * before * self._world
        number = fewest(train.num_tokens, step_size, budget, before, self._world, self.hparams["seed"], self._epochs())
        for name in ("accumulate_grad_batches", "limit_train_batches", "val_check_interval"):
            value = self._given[name] = getattr(trainer, name)
            if type(value) is int:  # batches; a float is a share
                setattr(trainer, name, -(-value * number // before))

    def _epochs(self) -> int:
        """Epochs that the run will see."""
        trainer, plan = self.trainer, self._plan()
        assert trainer is not None
        limit = trainer.limit_train_batches
        batches = min(len(plan), limit) if type(limit) is int else int(len(plan) * limit)
        steps_an_epoch = max(batches // trainer.accumulate_grad_batches, 1)
        bounds = [trainer.max_epochs] if trainer.max_epochs and trainer.max_epochs > 0 else []
        bounds += [-(-trainer.max_steps // steps_an_epoch)] if trainer.max_steps > 0 else []
        few = max(2_000_000 // len(self.train or ()), 1)  # of large data the later epochs are taken to be alike
        return min([*bounds, few]) if bounds else 1

    def teardown(self, stage: str) -> None:
        if stage == "fit" and self.trainer is not None:
            for name, value in self._given.items():
                setattr(self.trainer, name, value)
            self._given = {}

    def on_exception(self, exception: BaseException) -> None:
        self.teardown("fit")  # Lightning calls it only where a run ends well

    def state_dict(self) -> dict[str, Any]:
        """What a step is made of, on which the count of batches that are done rests."""
        if self.train is None or self.trainer is None:
            return {}
        number, plan = self.trainer.accumulate_grad_batches, self._plan()
        size = plan.step_size if isinstance(plan, Balanced) else plan.batch_size * plan.world * number
        return {"step_size": size, "micro_batches": number}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `convert_progress`, which has the rest of the checkpoint as well."""

    def convert_progress(self, checkpoint: dict[str, Any]) -> None:
        """Count what a checkpoint's run has done in the micro-batches of this run, which may keep to another budget."""
        before, now = checkpoint.get(type(self).__qualname__, {}), self.state_dict()
        if before == now or before.get("step_size") != now.get("step_size"):
            return
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for part in ("total", "current"):
            ready = progress[part]["ready"]
            more = -(-ready // before["micro_batches"]) * now["micro_batches"] - ready
            progress[part] = {name: count + more for name, count in progress[part].items()}

    def _load(self) -> None:
        hp = self.hparams
        if self.val_source:
            self.val = encode_source(self.val_source, self.encoder)
        if hp["streaming"]:
            if not self.val_source and hp["val_size"]:
                raise UserError("a stream has no length to set a part of apart: set data.val_path or data.val_split.")
            return
        self.train = encode_source(self.source, self.encoder)
        if not self.val_source and hp["val_size"]:
            size = hp["val_size"] if hp["val_size"] >= 1 else round(hp["val_size"] * len(self.train))
            if size >= len(self.train):
                raise UserError(f"data.val_size {size} leaves none of the {len(self.train)} examples to train on.")
            self.train, self.val = self.train.split(int(size), hp["seed"])

    @property
    def _world(self) -> int:
        return self.trainer.world_size if self.trainer else 1

    @property
    def _rank(self) -> int:
        return self.trainer.global_rank if self.trainer else 0

    def _position(self) -> tuple[int, int]:
        if self.trainer is None:
            return 0, 0
        loop = self.trainer.fit_loop
        epoch, progress = self.trainer.current_epoch, loop.epoch_loop.batch_progress
        if loop.restarting and progress.is_last_batch:
            return epoch + 1, 0  # saved at the end of an epoch, which Lightning closes after this is asked
        return epoch, progress.current.ready

    def _plan(self) -> Shuffled | Balanced:
        hp = self.hparams
        assert self.train is not None
        if not (hp["max_tokens"] or hp["group_by_length"]):
            return Shuffled(len(self.train), hp["batch_size"], hp["seed"], self._rank, self._world)
        assert self.trainer is not None
        accumulated = self.trainer.accumulate_grad_batches
        step_size = hp["batch_size"] * self._given.get("accumulate_grad_batches", accumulated) * self._world
        return Balanced(self.train.num_tokens, step_size, accumulated, hp["seed"], self._rank, self._world)

    def train_dataloader(self) -> BatchLoader | StreamLoader:
        hp = self.hparams
        if self.train is not None:
            return BatchLoader(self.train, self._plan(), self._position, hp["num_workers"])
        stream = self.source.stream()
        if self._world > 1:
            from datasets.distributed import split_dataset_by_node

            stream = split_dataset_by_node(stream, self._rank, self._world)
        return StreamLoader(
            stream, self.encoder, hp["batch_size"], hp["seed"], hp["buffer_size"], self._position, hp["num_workers"]
        )

    def val_dataloader(self) -> BatchLoader | list[Any]:
        return self._in_order(self.val) if self.val else []

    def test_dataloader(self) -> BatchLoader | list[Any]:
        return self.val_dataloader()

    def predict_dataloader(self) -> BatchLoader:
        assert self.everything is not None
        return self._in_order(self.everything)

    def _in_order(self, data: EncodedData) -> BatchLoader:
        if len(data) < self._world:
            raise UserError(f"{len(data)} examples cannot be shared by {self._world} processes: lower trainer.devices.")
        plan = InOrder(len(data), self.hparams["batch_size"], self._rank, self._world)
        return BatchLoader(data, plan, num_workers=self.hparams["num_workers"])

    def _sample(self) -> list[EncodedExample]:
        """The first training examples of a stream, read once."""
        if not self._sampled:
            rows = ((item["where"], item["row"]) for item in self.source.stream())
            self._sampled = [encoded for _, encoded in islice(self.encoder.examples(rows, Report()), 256)]
        if not self._sampled:
            raise UserError(f"{self.source.path}: no usable example in the stream.")
        return self._sampled

    def first_batch(self) -> PreferenceBatch:
        """The batch that step 1 trains on; of a stream, its first examples before shuffling."""
        if self.train is None:
            return collate(self._sample()[: self.hparams["batch_size"]])
        return collate([self.train[k] for k in self._plan()(0)[0]])

    def longest_batch(self) -> PreferenceBatch:
        """The largest batch, or as many examples as one holds, the longest of all (of a stream, of its first 256)."""
        size = self.hparams["batch_size"]
        if self.train is None:
            return collate(sorted(self._sample(), key=lambda e: e.num_tokens)[-size:])
        if isinstance(plan := self._plan(), Balanced):
            return collate([self.train[k] for k in plan.largest(self._epochs())])
        return collate([self.train[int(k)] for k in np.argsort(self.train.num_tokens, kind="stable")[-size:]])

    def prompts(self, num: int, texts: list[str] | None = None, max_tokens: int = 256) -> list[Prompt]:
        """Fixed prompts to sample replies to, the same on every process.

        Args:
            num: most of them; fewer where the data hold fewer.
            texts: user turns to take instead, all of them.
            max_tokens: longer prompts of the data are taken only where the shorter ones are too few.
        """
        if texts is not None:
            return text_prompts(texts, self.encoder.encoder)
        data = self.val or self.train or self._sample()  # held out where there is such
        return example_prompts((data[k] for k in range(len(data))), num, max_tokens, self.encoder.encoder.tokenizer)

    def sample_batch(self, prompts: list[Prompt], replies: list[list[tuple[int, ...]]]) -> PreferenceBatch:
        """Replies to prompts, each a tuple of one or more token ids, as a batch to score; equal replies may repeat."""
        return reply_batch(prompts, replies)

    def choice_batches(self) -> Iterator[tuple[PreferenceBatch, list[int]]]:
        """This process's multiple-choice questions and the index of each one's right letter; empty without such."""
        if self._choices:
            size = 4 * self.hparams["batch_size"]  # a question is a prompt and a letter, an example has whole replies
            yield from choice_batches(self._choices, size, self._rank, self._world)

    def describe(self) -> dict[str, str]:
        """What is trained on, for the start-up report."""
        apart = f"of {self.val_source.path}" if self.val_source else "set apart"
        held_out = f"{len(self.val):,} examples {apart}" if self.val else "none"
        if self.train is None:
            return {"training data": f"{self.source.path}, streamed", "held-out data": held_out}
        lengths = self.train.num_tokens
        marks = ", ".join(f"{q}% {int(np.quantile(lengths, q / 100)):,}" for q in (50, 90, 99))
        counts = self.train.report.describe()
        own_alpha = sum(alpha is not None for alpha in self.train.table["alpha"][:])
        if own_alpha:
            counts += f"; {own_alpha:,} carry an alpha of their own, which goes before model.alpha"
        return {
            "training data": f"{self.source.path}: {counts}; {len(self.train):,} train, {self._sizes()}",
            "held-out data": held_out,
            "distinct tokens": f"an example at most: {marks}, longest {int(lengths.max()):,}",
        }

    def _sizes(self) -> str:
        plan, hp = self._plan(), self.hparams
        if not isinstance(plan, Balanced):
            return f"batches of {hp['batch_size']}"
        most = f" of at most {hp['max_tokens']:,} distinct tokens" if hp["max_tokens"] else ""
        return f"steps of {plan.step_size} in {plan.parts} micro-batches{most}"

    def decoded_example(self) -> str:
        """The first training example's first response as the model sees it, its scored span marked."""
        example = self._sample()[0] if self.train is None else self.train[0]
        return self.encoder.encoder.decode_marked(example)
