"""The LightningCLI behind `spl`: one line from settings to a run in its folder."""

import json
import logging
import os
import warnings
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from lightning import Callback, Trainer
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.logging import RichHandler
from transformers.utils import logging as transformers_logging

from spl.callbacks.checkpoints import Checkpoints, logs_of
from spl.callbacks.export import Export
from spl.callbacks.predictions import PredictionWriter
from spl.callbacks.progress import ProgressBar
from spl.callbacks.reference_cache import ReferenceCache
from spl.callbacks.run_folder import MetricsLogger, RunFolder
from spl.callbacks.run_logs import EventsLogger, logs_in, rewind
from spl.callbacks.sampler import PolicySampler
from spl.callbacks.start import StartEndValidation, StartReport
from spl.callbacks.throughput import ThroughputMonitor
from spl.checkpoints import CheckpointFile, peek
from spl.data.base import PreferenceDataModule
from spl.disk import is_held, replacing
from spl.modules.base import PolicyModule
from spl.modules.preference import PreferenceModule
from spl.modules.reward import RewardModule
from spl.modules.sft import SFTModule
from spl.processes import end_children
from spl.resume import RunFinishedError, changes, end_whole, newest_good
from spl.secrets import SecretFilter, without_secrets
from spl.settings import Parser, check_accumulation, check_groups, in_one_sentence, setting_ahead
from spl.types import Task, UserError

log = logging.getLogger("spl")

MODULES: dict[Task, type[PolicyModule]] = {"preference": PreferenceModule, "sft": SFTModule, "reward": RewardModule}


def quiet() -> None:
    """Leave out what a user can do nothing about."""
    for message in (
        r".*is_gradient_checkpointing.*",  # peft asks transformers by the old name
        r".*Total length of `list` across ranks is zero.*",  # no held-out data
        r"Checkpoint directory .* exists and is not empty",  # it does, in a run that goes on
        r"Be aware that when using `ckpt_path`",  # the callbacks of training, of which evaluation has no need
        r"It is recommended to use `self.log\(.*sync_dist=True",  # what is logged so is the same in all processes
        r".*treespec.*",  # lightning's pytree helper under torch 2.13
    ):
        warnings.filterwarnings("ignore", message)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)  # tips, and hardware it did not find
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]


class SPLCommand(LightningCLI):
    """Parses a command line, builds the three objects, and runs the command."""

    def __init__(self, args: list[str]) -> None:
        strict: dict[str, Any] = {"allow_abbrev": False}
        quiet()
        named = setting_ahead(args, "task")
        self.task: Task = next((task for task in MODULES if task == named), "preference")  # the parser refuses others
        self.groups: dict[str, type] = {
            "model": MODULES[self.task],
            "data": PreferenceDataModule,
            "trainer": Trainer,
            "checkpoint": Checkpoints,
            "export": Export,
            **({"reference": ReferenceCache} if self.task == "preference" else {}),
            **({"samples": PolicySampler} if MODULES[self.task].writes_replies else {}),
        }
        super().__init__(
            MODULES[self.task],
            PreferenceDataModule,
            save_config_callback=None,
            seed_everything_default=0,
            parser_class=Parser,
            parser_kwargs={
                **strict,
                **{name: strict | {"usage": f"spl {name} --config CONFIG [settings]"} for name in self.subcommands()},
            },
            trainer_defaults={
                "num_sanity_val_steps": 0,  # the longest batch and a whole validation run before step 1
                "inference_mode": False,  # FSDP2 cannot run under it
                "log_every_n_steps": 1,
                "enable_model_summary": False,
                "use_distributed_sampler": False,
            },
            args=args,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        hidden = {"weights_only", "return_predictions"}
        return {name: skip | hidden for name, skip in LightningCLI.subcommands().items()}

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        assert isinstance(parser, Parser)
        self.config = parser.parse_settings(args)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--output", type=str | None, default=None, help="Folder of the run (runs/CONFIG-TIME).")
        parser.add_argument(
            "--resume", action="store_true", help="Go on from the output folder's newest checkpoint; begin if none."
        )
        parser.add_argument(
            "--allow_changes", action="store_true", help="Go on with other settings or data than before."
        )
        parser.add_argument(
            "--task",
            type=Task,
            default="preference",
            help="What is trained: a policy on preferences, a policy to write replies (sft), or a reward model. The "
            "settings of the model are of the task: spl fit --task sft --help.",
        )
        for name, kind in self.groups.items():
            if issubclass(kind, Callback):
                parser.add_lightning_class_args(kind, name)

    @property
    def settings(self) -> Any:
        """Of the command that runs."""
        return self.config[self.config["subcommand"]]

    def before_instantiate_classes(self) -> None:
        settings = self.settings
        check_groups(settings, self.groups)
        check_accumulation(settings)
        self.output = Path(settings.output or _default_output(settings.config))
        if settings.trainer.default_root_dir:
            raise UserError(
                f"trainer.default_root_dir is {settings.trainer.default_root_dir!r}, but a run keeps everything in one "
                "folder: give --output instead."
            )
        if self.subcommand == "fit":
            begun = any((self.output / "checkpoints").glob("*.ckpt")) or (self.output / "metrics.csv").exists()
            if begun and not settings.resume:
                raise UserError(
                    f"{self.output} holds a run already: go on with it by --resume, or give another --output."
                )
        _log_to(self.output / "log.txt", alone=self.subcommand == "fit")
        if self.subcommand == "fit" and settings.resume:
            self._resume()

    def _resume(self) -> None:
        """Find the checkpoint to go on from, and leave of the logs what it knows of.

        Raises:
            UserError: it would be another run.
            RunFinishedError: nothing is left to do.
        """
        settings, summary, config = self.settings, self.output / "summary.json", self.output / "config.yaml"
        if not settings.output:
            raise UserError("--resume needs --output DIR, the folder of the run to go on with.")
        changed = changes(config, self._kept_settings(), settings.allow_changes)
        if not config.exists() and (left := [path.name for path in (summary, *logs_in(self.output)) if path.exists()]):
            raise UserError(
                f"{self.output} is not the folder of a run: it holds {left[0]}, but no config.yaml, which a run writes "
                "first. Give another --output."
            )
        if summary.exists() and not changed:
            steps = json.loads(summary.read_text())["steps"]
            raise RunFinishedError(f"{self.output} is finished: {steps:,} steps. Nothing to resume.")
        path = newest_good(self.output / "checkpoints")
        if path:
            settings.ckpt_path = str(path)
        else:
            log.info("Nothing was saved in %s, so the run begins.", self.output)
        if getattr(rank_zero_only, "rank", 0) == 0:
            summary.unlink(missing_ok=True)
            rewind(self.output, logs_of(path) if path else {})

    def _parse_ckpt_path(self) -> None:
        """Not Lightning's, which lays a checkpoint's settings over those that were given; see `_compare`."""
        path = self.settings.get("ckpt_path")
        if path and not Path(path).exists():
            raise UserError(f"no checkpoint {path!r}: --ckpt_path takes a file that a run saved in its checkpoints/.")

    def _compare(self, path: str) -> None:
        """Say how the settings differ from those a checkpoint was trained with.

        Raises:
            UserError: in what its weights mean.
        """
        saved = peek(Path(path))
        groups = {"model": saved.get("hyper_parameters", {}), "data": saved.get("datamodule_hyper_parameters", {})}
        for group, values in groups.items():
            for name, value in values.items():
                given = without_secrets(self.settings[group].get(name, value))
                if given == value or (group == "data" and self.subcommand != "fit"):
                    continue
                said = f"{group}.{name} is {given!r}, but the checkpoint was trained with {value!r}"
                if f"{group}.{name}" in ("model.model", "model.lora_rank", "model.lora_alpha", "model.dtype"):
                    raise UserError(f"{said}: give the same.")
                log.warning("%s; the given one counts.", said)

    def _run_subcommand(self, subcommand: str) -> None:
        try:
            super()._run_subcommand(subcommand)
        except BaseException:
            end_children(self.trainer)
            raise

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except (UserError, MisconfigurationException):
            raise
        except Exception as error:  # Lightning, and the classes that a config names, refuse settings in their own ways
            said = in_one_sentence(f"{type(error).__name__}: {error}")
            raise UserError(f"a setting cannot be used: {said}") from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        if self.settings.get("ckpt_path"):
            self._compare(self.settings.ckpt_path)
        given = self.config_init[self.subcommand].trainer.logger
        if given is not False:
            extra = [EventsLogger(self.output)] if given in (None, True) else given
            kwargs["logger"] = [
                MetricsLogger(self.output),
                *(extra if isinstance(extra, list) else [extra]),
            ]
        kwargs["default_root_dir"] = str(self.output)
        trainer = super().instantiate_trainer(**kwargs)
        if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
            raise UserError("trainer.strategy spawns or forks processes, to which no run can be handed over: set ddp.")
        end_whole(trainer)
        # Lightning's handlers would broadcast from within a signal, and requeue SLURM jobs by themselves.
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
        return trainer

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: Any) -> Trainer:
        savers = [c for c in callbacks if isinstance(c, Checkpoints)]
        # In this order: the last checkpoint is written before the last validation begins.
        ours = [StartReport(), ThroughputMonitor(), RunFolder(), *savers, StartEndValidation()]
        if config.get("enable_progress_bar") is not False:
            ours.append(ProgressBar())
        given = config.get("callbacks") or []
        config["enable_checkpointing"] = self.subcommand == "fit" and any(isinstance(c, Checkpoint) for c in given)
        callbacks = [c for c in callbacks if c not in savers]
        config["plugins"] = [*_as_list(config.get("plugins")), CheckpointFile()]
        return super()._instantiate_trainer(config, [*ours, PredictionWriter(), *callbacks])

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kept = {"return_predictions": False} if subcommand == "predict" else {}  # PredictionWriter has them
        return {**super()._prepare_subcommand_kwargs(subcommand), **kept}

    def before_fit(self) -> None:
        self.datamodule.allow_changes = self.settings.allow_changes
        if self.trainer.is_global_zero:
            path = self.output / "config.yaml"
            text = yaml.safe_dump(self._kept_settings(), sort_keys=False, allow_unicode=True)
            with replacing(path) as file:
                file.write(f"# spl fit --config {path} --output NEW\n{text}".encode())

    def _kept_settings(self) -> dict[str, Any]:
        """Of the run, without where it lies and without secrets."""
        settings = self.settings.clone()
        for own in ("config", "output", "resume", "allow_changes", "ckpt_path"):
            settings.pop(own, None)
        kept: dict[str, Any] = without_secrets(yaml.safe_load(self._parser("fit").dump(settings, skip_none=False)))
        return kept


def _as_list(value: Any) -> list[Any]:
    """What a Trainer takes as one or as several."""
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]


def _default_output(configs: Any) -> str:
    """runs/NAME-TIME, by the last config file's name; the processes that a run launches find the same.

    Raises:
        UserError: several processes were started from outside, and none knows what name another makes up.
    """
    by_torchrun = "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("WORLD_SIZE") != "1"
    if by_torchrun or (SLURMEnvironment.detect() and os.environ.get("SLURM_NTASKS") != "1"):
        raise UserError(
            "processes that torchrun or srun starts share one folder, so it needs a name: give --output DIR."
        )
    if "LOCAL_RANK" not in os.environ:
        name = Path(str(configs[-1])).stem if configs else "fit"
        os.environ["SPL_OUTPUT"] = f"runs/{name}-{datetime.now():%Y%m%d-%H%M%S}"
    return os.environ.get("SPL_OUTPUT", "runs/fit")


def _log_to(path: Path, alone: bool) -> None:
    """Messages of spl to the terminal and to the run's log.txt.

    Args:
        alone: hold the file until it is closed, against a second run in the same folder.

    Raises:
        UserError: the folder cannot be made, or another run is at work in it.
    """
    log.setLevel(logging.INFO)
    if getattr(rank_zero_only, "rank", 0) == 0:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = logging.FileHandler(path, encoding="utf-8")
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror}. Give another --output.") from error
        if alone and file.stream and is_held(file.stream):
            file.close()
            raise UserError(f"another run is at work in {path.parent}: wait for its end, or give another --output.")
        file.handleError = lambda record: None  # type: ignore[method-assign]  # a full disk is told of elsewhere
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        for handler in (file, RichHandler(console=Console(stderr=True), show_path=False, show_time=False)):
            handler.addFilter(SecretFilter())
            log.addHandler(handler)
