"""A plan as tables for people."""

from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Table

from spl.planning.gpus import GPUS
from spl.planning.planner import Numbers

GIB = 2**30
WIDTH = 100

_PARTS = {
    "weights": "weights",
    "gradients": "gradients",
    "moments": "AdamW's moments",
    "reference": "frozen reference, until its numbers are kept",
    "gathered": "gathered layers, or buckets",
    "outside": "CUDA, NCCL, fragments",
    "activations": "activations of the largest batch",
    "head": "+ head: a chunk of logits",
    "layer": "+ or backward of one layer",
    "end": "or, these gone, AdamW's copy",
}
_LAYOUTS = {"single": "one", "ddp": "DDP", "fsdp": "FSDP2"}


def show(plan: Numbers) -> None:
    """Print a plan."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    for part in _parts(plan):
        console.print(part)


def _parts(plan: Numbers) -> Iterator[Any]:
    assumed, model, step = plan["assumed"], plan["model"], plan["step"]
    how = f"LoRA r={model['lora_rank']}" if model["lora_rank"] else "all weights train"
    products = ", bf16-mixed" if model["bf16_mixed"] else ""
    yield (
        f"[bold]{model['name']}[/bold]: {model['parameters']:,} parameters, {model['trained']:,} trained ({how}), "
        f"{model['dtype']} weights{products}\n"
        f"Lengths: {step['lengths']}. Largest micro-batch {step['largest_tokens']:,} distinct tokens; a step takes "
        f"{step['tokens']:,.0f} a GPU in {step['micro_batches']} micro-batches.\n"
        "On paper: nothing was run. Memory follows what small real runs held; rates are data sheets'."
    )
    yield _memory(plan)
    yield _kinds(plan)
    yield _operations(step)
    yield _fits(plan)
    yield _time(plan)
    yield _growth(plan)
    yield (
        f"Assumed: operations at {assumed['mfu']:.0%} of the peak of {assumed['gpu']} (--mfu), which small batches do "
        f"not reach; {assumed['gpus_per_node']} GPUs a node (--gpus_per_node); 80 % of a link's rate. Lost: time spent "
        "waiting for traffic."
    )


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", padding=(0, 1), pad_edge=False)
    table.add_column(columns[0])
    for column in columns[1:]:
        table.add_column(column, justify="right")
    return table


def _memory(plan: Numbers) -> Table:
    ways, gpus = plan["memory"], plan["assumed"]["gpus"]
    table = _table("Memory of a GPU by part, GiB", "part", "one GPU", f"DDP on {gpus}", f"FSDP2 on {gpus}")
    for part, name in _PARTS.items():
        table.add_row(name, *(_gib(way[part]) for way in ways.values()))
    table.add_row("at most", *(_gib(way["total"]) for way in ways.values()), style="bold")
    return table


def _kinds(plan: Numbers) -> Table:
    columns = ("one", "one_checkpointing", "ddp", "fsdp", "fsdp_checkpointing", "fsdp_offload")
    names = ("one GPU", "recomputed", "DDP", "FSDP2", "recomputed", "+ CPU offload")
    table = _table(f"Memory of a GPU in all, GiB; several are {plan['assumed']['gpus']}", "trained", "kind", *names)
    for row in plan["kinds"]:
        trained = f"LoRA r={row['lora_rank']}" if row["lora_rank"] else "all weights"
        table.add_row(trained, row["kind"], *(_gib(row[column]) for column in columns))
    return table


def _operations(step: Numbers) -> Table:
    table = _table("An optimiser step of one GPU", "", "tokens", "TFLOPs")
    ours = step["policy_flops"] + step["reference_flops"]
    table.add_row("policy, forward and backward", f"{step['tokens']:,.0f}", f"{step['policy_flops'] / 1e12:,.2f}")
    table.add_row("reference, until its numbers are kept", "", f"{step['reference_flops'] / 1e12:,.2f}")
    padded, more = step["padded_flops"], step["padded_flops"] / ours
    table.add_row(f"were it padded ({more:.1f} times)", f"{step['padded_tokens']:,.0f}", f"{padded / 1e12:,.2f}")
    return table


def _fits(plan: Numbers) -> Table:
    table = _table("The smallest way that fits", "GPU", "LoRA", "GiB", "all weights", "GiB")
    table.caption = (
        "recomputed: gradient_checkpointing; tokens: max_tokens; reduced each time: reduce_every_micro_batch"
    )
    table.caption_justify = "left"
    table.columns[1].justify = table.columns[3].justify = "left"
    for row in plan["fits"]:
        cells = []
        for fit in (row["lora"], row["full"]):
            cells += [_way(fit), _gib(fit["memory"])] if fit else ["none", ""]
        table.add_row(row["gpu"], *cells)
    return table


def _way(fit: Numbers) -> str:
    words = ["one GPU" if fit["gpus"] == 1 else f"{fit['gpus']} GPUs {_LAYOUTS[fit['layout']]}"]
    words += ["recomputed"] if fit["checkpointing"] else []
    words += [f"{fit['max_tokens']:,} tokens"] if fit["max_tokens"] else []
    words += ["reduced each time"] if fit["reduce_every_micro_batch"] else []
    return ", ".join(words)


def _time(plan: Numbers) -> Table:
    gpu = plan["assumed"]["gpu"]
    columns = ("GiB", "compute s", "sent GB", "traffic s", "lost s", "lost", "tokens/s")
    table = _table(f"A step on {gpu} GPUs", "GPUs", "layout", *columns)
    table.columns[1].justify = "left"
    for row in plan["time"]:
        fits = row["memory"] <= GPUS[gpu].memory
        table.add_row(
            f"{row['gpus']:,}",
            _LAYOUTS[row["layout"]],
            _gib(row["memory"]) if fits else f"[red]{_gib(row['memory'])}[/red] too much",
            _short(row["compute"]),
            _short(row["sent"] / 1e9),
            _short(row["traffic"]),
            _short(row["lost"]),
            f"{row['lost_share']:.0%}",
            _count(row["tokens_per_second"]),
        )
    return table


def _growth(plan: Numbers) -> Table:
    counts = [f"{row['gpus']:,}" for row in plan["time"]]
    title = f"Distinct tokens/s and share lost on so many {plan['assumed']['gpu']} GPUs, by the first way that fits"
    table = _table(title, "model", *dict.fromkeys(counts))
    for row in plan["growth"]:
        cells = ["does not fit" if cell is None else _cell(cell) for cell in row["cells"]]
        table.add_row(row["model"], *cells)
    return table


def _cell(cell: Numbers) -> str:
    layout = "" if cell["layout"] == "single" else f" {_LAYOUTS[cell['layout']]}"
    return f"{_count(cell['tokens_per_second'])} {cell['lost_share']:.0%}{layout}"


def _gib(count: float) -> str:
    return f"{count / GIB:.2f}" if count < 9.995 * GIB else f"{count / GIB:,.1f}"


def _short(number: float) -> str:
    return f"{number:,.3g}" if number < 1000 else f"{number:,.0f}"


def _count(number: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.0f}"
