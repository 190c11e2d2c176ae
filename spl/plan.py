"""`spl plan`: what a run would take, by the settings of `spl fit`; nothing of the run is made."""

import json
import sys
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser

from spl.commands import SPLCommand
from spl.planning.gpus import GPUS
from spl.planning.planner import Options, Planner
from spl.planning.show import show
from spl.settings import check_accumulation
from spl.types import UserError


class PlanCommand(SPLCommand):
    """Parses a command line as `spl fit` does, and prints a plan."""

    def __init__(self, args: list[str]) -> None:
        super().__init__(["fit", *args[1:]])

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        if self.task != "preference":
            raise UserError(f"spl plan knows runs on preferences alone, not the task {self.task}.")
        super().parse_arguments(parser, args)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.usage = "spl plan --config CONFIG [settings]"
        parser.description = "Prints what a run would take, by the settings of spl fit; nothing of the run is made."
        parser.add_argument("--gpu", type=str, default="h100-80gb", help=f"One of {', '.join(GPUS)}.")
        parser.add_argument("--gpus", type=int | None, default=None, help="How many (trainer.devices, or else 8).")
        parser.add_argument("--gpus_per_node", type=int, default=8, help="GPUs that share fast links.")
        parser.add_argument(
            "--tokens", type=int | None, default=None, help="Distinct tokens of a micro-batch, in place of the data's."
        )
        parser.add_argument("--mfu", type=float, default=0.4, help="Share of the GPU's peak that operations run at.")
        parser.add_argument(
            "--network", type=float | None, default=None, help="GB a second, each way, between nodes (the GPU's usual)."
        )
        parser.add_argument("--json", action="store_true", help="Print the numbers, in bytes and seconds, as JSON.")

    def before_instantiate_classes(self) -> None:
        """There is no run folder."""
        check_accumulation(self.settings)

    def instantiate_classes(self) -> None:
        """Nothing of a run is made."""

    def _run_subcommand(self, subcommand: str) -> None:
        settings = self.settings.as_dict()
        options = Options(
            gpu=settings["gpu"],
            gpus=settings["gpus"] or _devices(settings["trainer"]),
            gpus_per_node=settings["gpus_per_node"],
            tokens=settings["tokens"],
            mfu=settings["mfu"],
            network=settings["network"],
        )
        plan = Planner(settings, options).plan()
        if settings["json"]:
            sys.stdout.write(json.dumps(plan, indent=1) + "\n")
        else:
            show(plan)


def _devices(trainer: dict[str, Any]) -> int:
    """Processes of the run by its settings, where they name several."""
    devices = trainer["devices"]
    listed = devices.strip(",").split(",") if isinstance(devices, str) and "," in devices else devices
    count = len(listed) if isinstance(listed, list) else int(listed) if str(listed).isdigit() else 1
    total = count * trainer["num_nodes"]
    return total if total > 1 else 8
