"""`spl sample`: prompts in, N replies to each out, in a file that evaluations read and a killed run goes on with."""

import logging
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from spl.data.conversations import Conversation, opened_with, read_conversations
from spl.data.files import is_local
from spl.data.problems import read_problems
from spl.evaluation.drawing import Drawer, Job, ModelDrawer, Question
from spl.evaluation.drawing_particles import TemperedDrawer
from spl.evaluation.drawing_server import ServerDrawer
from spl.evaluation.policies import EvaluatedPolicy
from spl.models import Dtype
from spl.results import Appender, Record, header
from spl.sampling.global_temperature import Tempering
from spl.sampling.logits import Decoding
from spl.sampling.server import ChatServer
from spl.types import UserError

log = logging.getLogger("spl")


def sample(
    model: str | None = None,
    *,
    output: Path,
    prompts: str | None = None,
    problems: str | None = None,
    num_prompts: int | None = None,
    template: str | None = None,
    system: str | None = None,
    num_samples: int = 16,
    max_new_tokens: int = 512,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    global_temperature: float | None = None,
    num_particles: int = 64,
    num_runs: int = 4,
    resample_below: float = 0.5,
    policy: str | None = None,
    train_seed: int | None = None,
    seed: int = 0,
    shard: str | None = None,
    batch_size: int = 128,
    dtype: Dtype = "float32",
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: str | None = None,
    server: str | None = None,
    server_model: str | None = None,
    concurrency: int = 16,
    timeout: float = 600.0,
    api_key_env: str = "OPENAI_API_KEY",
    raw_logprobs: bool = False,
) -> None:
    """Draw replies to prompts, from a model or from any OpenAI-compatible server.

    The same command goes on where a killed one stopped. With several GPUs or machines, run it once for each with
    `--shard 1/8`, `--shard 2/8` and so on and an output of its own; evaluations take the files together.

    Example: spl sample runs/dpo/export --policy dpo --prompts prompts.jsonl --output samples/dpo.jsonl

    Args:
        model: to draw from: its folder, an adapter's, a .gguf file, a Hub id, or "tiny".
        output: file of the replies, JSON lines.
        prompts: a local file or folder, or a data set's id on the Hub (ID, ID:CONFIG or ID:CONFIG:SPLIT); rows hold a
            prompt, messages, turns, a question or a preference pair.
        problems: in place of prompts the problems of best-of-n: "arithmetic", "gsm8k", "math", or a source as above.
        num_prompts: the first of them (of problems some at random, the same for all seeds); all by default.
        template: how a problem is put, with {question} where it stands; by default arithmetic as it is, others with a
            request to reason and to box the answer. Not stated by the paper.
        system: message that opens every conversation that has none.
        num_samples: replies a prompt.
        max_new_tokens: most tokens of a reply; the paper does not state its own.
        temperature: of every next-token law; 0 takes the most likely token.
        top_k: tokens to keep, the most likely.
        top_p: keep the fewest most likely tokens whose probabilities add up to it.
        min_p: keep tokens at least this share as likely as the most likely one.
        global_temperature: of whole replies, in place of the four above, by sequential Monte Carlo; alpha / beta of SPL
            turns a DPO policy's law into the one SPL would have at its optimum. A prompt of which fewer than 10 % of
            the first particles survive, or whose last weights are worth fewer, is left out.
        num_particles: of each run of the sequential Monte Carlo.
        num_runs: independent runs of it a prompt.
        resample_below: effective sample size, as a share of the particles, below which they are resampled.
        policy: label of the policy in reports; by default the model's name, or of a run's export the run's.
        train_seed: seed of the policy's training run, for intervals over seeds.
        seed: of the replies; equal ones draw the same from the same model, and different policies with equal luck.
        shard: part of the prompts, as 3/8.
        batch_size: most replies drawn together.
        dtype: of the weights.
        device: "cpu", "cuda", "cuda:1" and so on; "auto" takes CUDA where there is one.
        revision: of the model on the Hub.
        trust_remote_code: the model's name once more, to run the code that it brings along.
        server: URL of a server to ask in place of a model, as http://localhost:8000/v1.
        server_model: the model's name there.
        concurrency: most requests to the server at a time.
        timeout: seconds to wait for its answer.
        api_key_env: environment variable that holds the key, where it wants one.
        raw_logprobs: whether its log-probabilities are those before temperature and filters, as vLLM's are by default.

    Raises:
        UserError: a setting cannot be used, or the output was begun with others.
    """
    decoding = Decoding(temperature, top_k, top_p, min_p)
    tempering = _tempering(global_temperature, num_particles, num_runs, resample_below, decoding, server)
    counts = {"batch_size": batch_size, "concurrency": concurrency}
    name = _check(model, server, server_model, num_samples=num_samples, max_new_tokens=max_new_tokens, **counts)
    asked = _conversations(prompts, problems, num_prompts, template)
    questions = _shard([Question(*one) for one in enumerate(opened_with(system, asked))], shard)
    drawing: dict[str, Any] = {"num_samples": num_samples, "max_new_tokens": max_new_tokens, "seed": seed}
    labels = {
        "policy": policy or _label(name),
        "setting": (tempering or decoding).label,
        "train_seed": train_seed,
    }
    drawer: Drawer
    if server:
        client = ChatServer(
            server, name, concurrency=concurrency, timeout=timeout, api_key_env=api_key_env, raw_logprobs=raw_logprobs
        )
        drawer, fingerprint = ServerDrawer(client, decoding, **drawing), None
    else:
        loaded = EvaluatedPolicy.load(
            name, dtype=dtype, device=device, revision=revision, trust_remote_code=trust_remote_code
        )
        fingerprint = loaded.fingerprint
        if tempering:
            drawer = TemperedDrawer(loaded, tempering, labels, **drawing)
        else:
            drawer = ModelDrawer(loaded, decoding, batch_size=batch_size, **drawing)
    first = header(
        "sample",
        {
            **drawing,
            **vars(tempering or decoding),
            "model": name,
            "prompts": prompts or f"problems {problems}",
            "num_prompts": num_prompts,
            "template": template,
            "system": system,
            "shard": shard,
            "dtype": None if server else dtype,
        },
        inputs=[Path(source) for source in (prompts, problems) if source and is_local(source)],
        seed=seed,
        fingerprint=fingerprint,
        num_items=len(questions),
        **labels,
    )
    jobs = drawer.jobs(questions)  # which may find a prompt that cannot be replied to: before the output is begun
    with Appender(output, first) as file:
        _run(drawer, jobs, file)


def _check(model: str | None, server: str | None, server_model: str | None, **counts: int) -> str:
    """The model's name, here or there."""
    if (model is None) == (server is None):
        raise UserError("give either --model to draw from, or --server and --server_model.")
    if (server is None) != (server_model is None):
        raise UserError("--server and --server_model belong together: the URL, and the model's name there.")
    for name, value in counts.items():
        if value < 1:
            raise UserError(f"{name} must be 1 or more, but is {value}.")
    return str(server_model or model)


def _label(name: str) -> str:
    """Of a policy that was given none: its file or folder, of a run's export the run."""
    path = Path(name)
    return path.parent.name if path.name == "export" and path.parent.name else path.name


def _tempering(
    tau: float | None, particles: int, runs: int, below: float, decoding: Decoding, server: str | None
) -> Tempering | None:
    if tau is None:
        return None
    if server:
        raise UserError("--global_temperature needs every token's law, which a server does not give: give --model.")
    if not decoding.is_own_law:
        raise UserError(f"--global_temperature {tau:g} stands in place of {decoding.label}: give one of the two.")
    return Tempering(tau, particles, runs, below)


def _conversations(
    prompts: str | None, problems: str | None, num: int | None, template: str | None
) -> Sequence[Conversation]:
    if prompts:
        if problems:
            raise UserError("--prompts and --problems are two sources: give one.")
        return read_conversations(prompts, num)
    if problems:
        found = read_problems(problems, num, template=template)  # one choice for all seeds: samples drawn apart compare
        return [Conversation(one.item, ({"role": "user", "content": one.prompt},)) for one in found]
    raise UserError("give --prompts, a file or a data set's id on the Hub, or --problems.")


def _shard(questions: list[Question], shard: str | None) -> list[Question]:
    """Every m-th question from the n-th on, of "n/m"."""
    if shard is None:
        return questions
    found = re.fullmatch(r"(\d+)/(\d+)", shard)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise UserError(f"shard must be as 3/8, the third of eight parts, but is {shard!r}.")
    part = questions[int(found[1]) - 1 :: int(found[2])]
    if not part:
        raise UserError(f"shard {shard} is empty: there are {len(questions)} prompts.")
    return part


def _run(drawer: Drawer, jobs: list[Job], file: Appender) -> None:
    """Draw what is missing, and say what came out."""
    records = list(file.records)
    written = {_key(record) for record in records}
    left = [job for job in jobs if not drawer.is_done(job, written)]
    if len(left) < len(jobs):
        log.info("%s holds %d of %d parts: going on.", file.path, len(jobs) - len(left), len(jobs))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    began = time.perf_counter()
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("replies", total=sum(job.size for job in left))
        for job, found in drawer.records(left):
            new = [record for record in found if _key(record) not in written]
            file.add(new)
            records += new
            bar.advance(task, job.size)
    seconds = time.perf_counter() - began
    drawn = _tokens(records[len(file.records) :])
    _tell(records, f"{sum(drawn) / seconds:,.0f}" if drawn else "")
    log.info("Replies are in %s.", file.path)


def _key(record: Record) -> tuple[Any, ...]:
    return record["kind"], record.get("item"), record.get("index")


def _tokens(records: list[Record]) -> list[int]:
    """Of every reply whose length is known."""
    return [r["num_tokens"] for r in records if r["kind"] == "sample" and r["num_tokens"] is not None]


def _tell(records: list[Record], speed: str) -> None:
    """What the file holds, and how fast it came."""
    samples = [record for record in records if record["kind"] == "sample"]
    replied = {record["item"] for record in samples}
    for record in records:
        if record["kind"] == "note" and "item" in record and record["item"] not in replied:
            log.warning(record["text"])
    if not samples:
        raise UserError("no prompt has replies, for the reasons above.")
    lengths, ended = _tokens(records), sum(record["finish"] == "stop" for record in samples) / len(samples)
    cells = {
        "replies": f"{len(samples):,}",
        "mean tokens": f"{sum(lengths) / len(lengths):.1f}" if lengths else "",
        "ended": f"{ended:.1%}",
        "tokens/s": speed,
    }
    values = [record["values"] for record in records if record["kind"] == "item"]
    for name in values[0] if values else ():
        cells[name.replace("_", " ")] = f"{sum(v[name] for v in values) / len(values):.3g}"
    if values and ended < 1:
        log.info("%.1f%% of the replies were cut: their law is the tempered one of cut replies.", 100 * (1 - ended))
    table = Table(show_header=False)
    for cell in cells.items():
        table.add_row(*cell)
    Console().print(table)
