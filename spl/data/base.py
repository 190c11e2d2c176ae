"""The data module: rows of any common shape in, batches of tries out."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning import LightningDataModule

from spl.data.encode import BadRows, RowEncoder
from spl.data.kept import EncodedData, encode_source
from spl.data.loader import BatchLoader, InOrder, StreamLoader
from spl.data.multiple_choice import EncodedChoice, choice_batches, encode_choices
from spl.data.prompts import example_prompts, reply_batch, text_prompts
from spl.data.quarantine import Quarantine
from spl.data.settings import check_settings, retries_of
from spl.data.source import Source, named_source
from spl.data.tokenization import Encoder, Template, Truncation, TurnEnd
from spl.data.training import TrainingSteps, convert_progress
from spl.data.training_stream import TrainingStream
from spl.secrets import without_secrets
from spl.types import PreferenceBatch, Prompt, Task, UserError

log = logging.getLogger(__name__)


class PreferenceDataModule(LightningDataModule):
    """Examples from the embedded survey, local files or the Hub: preferences, or replies to imitate, as the model asks.

    Args:
        path: "survey"; a local .jsonl, .json, .csv (each perhaps .gz) or .parquet file, or a folder of such; or the id
            of a data set on the Hub. `spl.data.formats` lists the shapes of rows that are understood, and
            `spl.data.demonstrations` those to imitate.
        name: configuration of a data set on the Hub.
        split: its split to train on.
        val_path: held-out data; None sets a part of the training data apart.
        val_split: split of the Hub data set (of val_path, or else of path) that is held out.
        val_size: examples set apart, or a share below 1; whole prompts, so none stands on both sides.
        batch_size: examples a batch and device; an optimiser step sees it times devices and accumulation.
        max_tokens: most distinct tokens that training puts through the network at a time. (An evaluation holds no
            activations and takes batch_size examples.) Each step's examples are then shared out among more
            micro-batches (trainer.accumulate_grad_batches is raised while the run lasts, and with it what else counts
            batches); the step and its gradient stay what they are. A last incomplete step of an epoch is left out.
        group_by_length: share each step's examples out among its micro-batches and devices by length, so that all take
            alike long; changes nothing but speed, save that a last incomplete step of an epoch is left out. Always so
            where max_tokens is given.
        max_length: most tokens of a prompt and response together.
        truncation: of longer rows: "cut" drops the oldest tokens of the prompt, alike for all responses, and then ends
            of responses (of a conversation to imitate, the first prompt's and then the end); "drop" leaves the row out;
            "raise" stops.
        template: "model" for its chat template, "plain" for "User: ...", "auto" for the first if there is one.
        turn_end: "template" scores all that ends a turn, "eos" stops at the end-of-sequence token. A reward is read at
            the last of these tokens, and replies are later scored by "template".
        columns: our column names to the data's, as {chosen: better, rejected: worse}.
        bad_rows: a row that cannot be used stops the run ("raise"), or is skipped and counted ("skip"); the first 100
            are written to quarantine.jsonl in the trainer's default_root_dir.
        max_bad_share: of rows skipped so, past which the run stops all the same, once 100 rows were read; of a stream,
            in each of its lanes.
        retries: how often a file or the Hub is tried again where that may help (a vanished file, a gzip that ends too
            soon, a failing connection; what else is broken on disk is not tried again).
        retry_wait: seconds before the second of these tries; doubled each time, up to a minute.
        streaming: read while training instead of tokenising all first. A stream has no end and no epochs:
            trainer.max_steps is the run's length, and held-out data need val_path or val_split.
        mixture: sources of a stream to their weights, in place of path: local paths, or data sets on the Hub as ID,
            ID:CONFIG or ID:CONFIG:SPLIT (else `split`). Of all examples each gives its share of the weights.
        buffer_size: rows that a stream is shuffled within, for each lane and source; they are in memory.
        lanes: parts that a stream is read in. None takes as many as there are readers (processes times workers). A run
            keeps its lanes, and goes on exactly with any number of readers that divides them.
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
        max_bad_share: float = 0.05,
        retries: int = 8,
        retry_wait: float = 1.0,
        streaming: bool = False,
        mixture: dict[str, float] | None = None,
        buffer_size: int = 1000,
        lanes: int | None = None,
        num_workers: int = 0,
        multiple_choice: str | None = None,
        num_choice_questions: int = 128,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        check_settings(self.hparams)
        self.source = Source(path, name, split)
        self.val_source = Source(val_path or path, name, val_split or split) if val_path or val_split else None
        self.train: EncodedData | None = None
        self.val: EncodedData | None = None
        self.everything: EncodedData | None = None
        self._choices: list[EncodedChoice] = []
        self._taken: TrainingSteps | TrainingStream | None = None
        self.allow_changes = False  # a run may go on with other data than it was begun with

    @property
    def hparams_initial(self) -> Any:
        """What loggers write of the settings."""
        return without_secrets(dict(super().hparams_initial))

    @property
    def encoder(self) -> RowEncoder:
        """With the tokenizer of the model that is trained, and for what it is to learn."""
        if self.trainer is None:
            raise RuntimeError("the data module takes its tokenizer from the model: give both to a Trainer first")
        hp, module = self.hparams, self.trainer.lightning_module
        task: Task = getattr(module, "task", "preference")
        encoder = Encoder(
            module.tokenizer,
            hp["max_length"],
            hp["template"],
            hp["truncation"],
            hp["turn_end"],
            reads_end=task == "reward",
        )
        return RowEncoder(encoder, hp["columns"] or {}, hp["bad_rows"], hp["max_bad_share"], task)

    def _encode(self, source: Source) -> EncodedData:
        """All examples of a source; its bad rows go to the quarantine."""
        data = encode_source(source, self.encoder, retries_of(self.hparams))
        if data.report.samples and self._rank_and_world[0] == 0:
            self._quarantine.add(data.report.samples)
        return data

    @property
    def _quarantine(self) -> Quarantine:
        folder = self.trainer.default_root_dir if self.trainer else "."
        return Quarantine(Path(folder) / "quarantine.jsonl", self._rank_and_world[1])

    def prepare_data(self) -> None:
        """Tokenise once, on one process a node; the others find the kept copy."""
        stage = self.trainer.state.fn if self.trainer else None
        self.setup(str(stage.value) if stage else "fit")

    def setup(self, stage: str) -> None:
        if self.train is None:
            self._taken = None  # a stream so far, perhaps with the tokenizer of an earlier model
        if stage == "predict":
            self.everything = self.everything or self._encode(self.source)
        elif self.train is None and self.val is None:
            self._load()
        if stage in ("validate", "test") and not self.val:
            raise UserError("there is no held-out data: set data.val_path, data.val_split or data.val_size.")
        hp = self.hparams
        if hp["multiple_choice"] and self.encoder.task == "reward":
            raise UserError("data.multiple_choice asks for letters, which a reward model does not write: leave it out.")
        if hp["multiple_choice"] and stage != "predict" and not self._choices:
            questions = named_source(hp["multiple_choice"], "validation")
            self._choices = encode_choices(questions, self.encoder, hp["num_choice_questions"], hp["seed"])
        if stage == "fit":
            self._training.prepare()

    def teardown(self, stage: str) -> None:
        if stage == "fit" and self._taken:
            self._taken.finish()

    def on_exception(self, exception: BaseException) -> None:
        self.teardown("fit")  # Lightning calls it only where a run ends well

    def state_dict(self) -> dict[str, Any]:
        """What a step is made of, on which the count of batches that are done rests; where a stream stands."""
        if not self.trainer:
            return {}
        training = self._training
        stream = {"stream": training.state()} if isinstance(training, TrainingStream) else {}
        return training.progress_unit() | stream

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See also `convert_progress`, which has the rest of the checkpoint."""
        if "stream" in state_dict and self.trainer and self.trainer.state.fn == "fit":
            if not isinstance(training := self._training, TrainingStream):
                raise UserError("the run was begun with data.streaming and cannot go on without: set it to true.")
            training.restore(state_dict["stream"])

    def convert_progress(self, checkpoint: dict[str, Any]) -> None:
        """Count what a checkpoint's run has done in the micro-batches of this run, which may keep to another budget."""
        if self.trainer is None or self.trainer.state.fn != "fit":
            return
        before, now = checkpoint.get(type(self).__qualname__, {}), self._training.progress_unit()
        if before.get("content") != now.get("content"):
            said = f"the data of {self.source.path} are not those that the run was begun with"
            if not self.allow_changes:
                raise UserError(f"{said}: give the old ones, or --allow_changes to go on with the new.")
            log.warning("T%s.", said[1:])
        convert_progress(checkpoint, before, now)

    def _load(self) -> None:
        hp = self.hparams
        if self.val_source:
            self.val = self._encode(self.val_source)
        if hp["streaming"]:
            if not self.val_source and hp["val_size"]:
                raise UserError("a stream has no length to set a part of apart: set data.val_path or data.val_split.")
            return
        self.train = self._encode(self.source)
        if not self.val_source and hp["val_size"]:
            size = hp["val_size"] if hp["val_size"] >= 1 else round(hp["val_size"] * len(self.train))
            if size >= len(self.train):
                raise UserError(f"data.val_size {size} leaves none of the {len(self.train)} examples to train on.")
            self.train, self.val = self.train.split(int(size), hp["seed"])

    @property
    def _training(self) -> TrainingSteps | TrainingStream:
        """What is trained on, as the present trainer takes it; a stream until training data are loaded."""
        if self._taken is None or self._taken.trainer is not self.trainer:
            encoder, trainer = self.encoder, self.trainer
            assert trainer is not None  # or there would be no encoder
            if self.train is None:
                mixture = self.hparams["mixture"] or {}
                sources = {named_source(name, self.source.split): weight for name, weight in mixture.items()}
                self._taken = TrainingStream(
                    sources or {self.source: 1.0}, encoder, self.hparams, trainer, self._quarantine
                )
            else:
                self._taken = TrainingSteps(self.source, self.train, self.hparams, trainer)
        return self._taken

    @property
    def _rank_and_world(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def train_dataloader(self) -> BatchLoader | StreamLoader:
        return self._training.loader()

    def val_dataloader(self) -> BatchLoader | list[Any]:
        return self._in_order(self.val) if self.val else []

    def test_dataloader(self) -> BatchLoader | list[Any]:
        return self.val_dataloader()

    def predict_dataloader(self) -> BatchLoader:
        assert self.everything is not None
        return self._in_order(self.everything)

    def _in_order(self, data: EncodedData) -> BatchLoader:
        rank, world = self._rank_and_world
        if len(data) < world:
            raise UserError(f"{len(data)} examples cannot be shared by {world} processes: lower trainer.devices.")
        plan = InOrder(len(data), self.hparams["batch_size"], rank, world)
        return BatchLoader(data, plan, num_workers=self.hparams["num_workers"])

    def first_batch(self) -> PreferenceBatch:
        """The batch that step 1 trains on; of a stream, its first examples before shuffling."""
        return self._training.first_batch()

    def longest_batch(self) -> PreferenceBatch:
        """The largest batch, or as many examples as one holds, the longest of all (of a stream, of its first 256)."""
        return self._training.longest_batch()

    def prompts(self, num: int, texts: list[str] | None = None, max_tokens: int = 256) -> list[Prompt]:
        """Fixed prompts to sample replies to, the same on every process.

        Args:
            num: most of them; fewer where the data hold fewer.
            texts: user turns to take instead, all of them.
            max_tokens: longer prompts of the data are taken only where the shorter ones are too few.
        """
        if texts is not None:
            return text_prompts(texts, self.encoder.encoder)
        data = self.val or self._training.examples  # held out where there is such
        return example_prompts((data[k] for k in range(len(data))), num, max_tokens, self.encoder.encoder.tokenizer)

    def sample_batch(self, prompts: list[Prompt], replies: list[list[tuple[int, ...]]]) -> PreferenceBatch:
        """Replies to prompts, each a tuple of one or more token ids, as a batch to score; equal replies may repeat."""
        return reply_batch(prompts, replies)

    def choice_batches(self) -> Iterator[tuple[PreferenceBatch, list[int]]]:
        """This process's multiple-choice questions and the index of each one's right letter; empty without such."""
        if self._choices:
            size = 4 * self.hparams["batch_size"]  # a question is a prompt and a letter, an example has whole replies
            yield from choice_batches(self._choices, size, *self._rank_and_world)

    def describe(self) -> dict[str, str]:
        """What is trained on, for the start-up report."""
        apart = f"of {self.val_source.path}" if self.val_source else "set apart"
        held_out = f"{len(self.val):,} examples {apart}" if self.val else "none"
        rows = {"training data": self._training.describe(), "held-out data": held_out}
        if isinstance(training := self._training, TrainingSteps):
            rows["distinct tokens"] = training.describe_lengths()
        return rows

    def decoded_example(self) -> str:
        """The first training example as the model sees it, its scored spans marked; of several replies the first."""
        example = self._training.examples[0]
        return self.encoder.encoder.decode_marked(example, 0 if example.comparisons else None)
