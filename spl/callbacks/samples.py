"""The samples themselves: in the run folder, in the loggers, and a few on the screen."""

import json
import re
from collections.abc import Iterable, Sequence
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import torch.distributed
from lightning import Callback, LightningModule, Trainer
from rich import get_console
from rich.table import Table
from rich.text import Text

from spl.callbacks.record import log_table
from spl.callbacks.run_logs import spared
from spl.callbacks.sampler import PromptSamples, SampleRound, ensure_sampler
from spl.disk import append
from spl.types import UserError

Asked = tuple[PromptSamples, PromptSamples | None]
"""The policy's replies to a prompt and, where there is a reference, the reference's."""


class SampleTable(Callback):
    """Keeps every sample in `samples.jsonl`, gives the loggers a table `samples`, prints a few beside the reference's.

    `samples.jsonl` has a line for each prompt of each round: `step`, `prompt`, `policy` and `reference` (texts),
    `policy_lengths` and `reference_lengths` (tokens, the EOS token among them), `policy_ended` and `reference_ended`
    (false where a reply was cut at the sampler's most tokens). The reference's are lists without an entry where there
    is no reference. Loggers get the first reply to every prompt, the screen those to the first few prompts.

    Args:
        num_shown: prompts on the screen; 0 prints nothing.
        width: most characters of a reply on the screen, its first; of a prompt the last, half as many.

    Raises:
        UserError: num_shown is negative or width not positive.
    """

    def __init__(self, num_shown: int = 3, width: int = 240) -> None:
        if num_shown < 0 or width < 1:
            raise UserError(
                f"num_shown must be 0 or more and width 1 or more (characters); they are {num_shown} and {width}."
            )
        self.num_shown = num_shown
        self.width = width
        self._begun = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        ensure_sampler(trainer)
        self._begun = False

    def on_samples(self, trainer: Trainer, pl_module: LightningModule, samples: SampleRound) -> None:
        asked = _all_processes(list(zip_longest(samples.policy, samples.reference)))
        if not trainer.is_global_zero:
            return
        if trainer.state.fn == "fit":  # a checkpoint that is looked at later leaves its run's file alone
            self._write(Path(trainer.default_root_dir) / "samples.jsonl", samples.step, asked)
        rows = [
            [policy.prompt, policy.texts[0], reference.texts[0] if reference else ""] for policy, reference in asked
        ]
        log_table(trainer, "samples", ["prompt", "policy", "reference"], rows)
        if self.num_shown:
            # The console that the progress bar lives on, which makes room above it.
            get_console().print(sample_table(samples.step, asked[: self.num_shown], self.width))

    def _write(self, path: Path, step: int, asked: Sequence[Asked]) -> None:
        with spared(str(path)):
            if not self._begun:
                _drop_from(path, step)
                self._begun = True
            append(path, "".join(_line(step, *pair) for pair in asked))


def _all_processes(own: list[Asked]) -> list[Asked]:
    """What every process has, in the order of the prompts: the sampler deals them out in turn."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return own
    shares: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(shares, own)
    return [pair for pair in chain.from_iterable(zip_longest(*shares)) if pair is not None]


def _line(step: int, policy: PromptSamples, reference: PromptSamples | None) -> str:
    record: dict[str, Any] = {"step": step, "prompt": policy.prompt}
    sides = (("policy", policy), ("reference", reference))
    for name, side in sides:
        record[name] = side.texts if side else ()
    for name, side in sides:
        record[f"{name}_lengths"] = [len(tokens) for tokens in side.token_ids] if side else ()
        record[f"{name}_ended"] = side.ended if side else ()
    return json.dumps(record, ensure_ascii=False) + "\n"


def _drop_from(path: Path, step: int) -> None:
    """Leave only lines of earlier steps: those of a run that was killed later, or of one before this, are written anew.

    A line that was cut as its process was killed goes too.
    """
    if not path.is_file():
        return
    rest = path.with_suffix(".jsonl.part")
    with path.open(encoding="utf-8", errors="replace") as file, rest.open("w", encoding="utf-8") as kept:
        kept.writelines(_earlier(file, step))
    rest.replace(path)


def _earlier(lines: Iterable[str], step: int) -> Iterable[str]:
    for line in lines:
        if line.endswith("}\n") and json.loads(line)["step"] < step:
            yield line


def sample_table(step: int, asked: Sequence[Asked], width: int) -> Table:
    """A table prompt | policy | reference of one reply each, with its length in tokens.

    Args:
        step: of the samples.
        asked: prompts to show; the column of the reference is there if one of them has a reference's replies.
        width: most characters of a reply; a prompt has half as many.
    """
    with_reference = any(reference for _, reference in asked)
    table = Table(title=f"Samples at step {step:,}", title_justify="left", show_lines=True, expand=True)
    table.add_column("prompt", ratio=2, style="dim", overflow="fold")
    for name in ("policy", "reference") if with_reference else ("policy",):
        table.add_column(name, ratio=3, overflow="fold")
    for policy, reference in asked:
        cells = [_short(policy.prompt, -max(width // 2, 1)), _reply(policy, width)]
        table.add_row(*cells, *([_reply(reference, width)] if reference else []))
    return table


def _reply(samples: PromptSamples, width: int) -> Text:
    """The first reply, and below it its length."""
    num = len(samples.token_ids[0])
    tokens = f"{num} token{'s' if num != 1 else ''}{'' if samples.ended[0] else ', cut'}"
    text = _short(samples.texts[0], width)
    return Text.assemble(text, "\n", (tokens, "dim")) if text else Text(f"no text, {tokens}", style="dim")


def _short(text: str, width: int) -> Text:
    """The first `width` characters in one paragraph, the last where it is negative; control characters become spaces.

    A Text, so that brackets in what a model says are no markup.
    """
    line = " ".join(re.sub(r"[\x00-\x1f\x7f-\x9f]", " ", text).split())
    if len(line) <= abs(width):
        return Text(line)
    return Text(f"{line[: width - 1]}…" if width > 0 else f"…{line[len(line) + width + 1 :]}")
