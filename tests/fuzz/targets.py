"""What is fuzzed. Each target takes an input and may raise nothing: what the code tells a user is caught here.

A `Provider` gives the parts of an input: atheris' FuzzedDataProvider, so that coverage steers what is built.
"""

import contextlib
import csv
import gzip
import hashlib
import io
import json
import math
import struct
import tempfile
from datetime import date, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet as parquet
import torch

from spl import checkpoints
from spl.commands import SPLCommand
from spl.data.base import PreferenceDataModule
from spl.data.demonstrations import parse_demonstration
from spl.data.formats import ROLES, parse_row
from spl.data.multiple_choice import parse_choices
from spl.data.opinions import parse_opinion, without_non_answers
from spl.data.propositions import parse_proposition
from spl.data.shards import Retries
from spl.data.source import Source
from spl.modules.preference import PreferenceModule
from spl.secrets import redact
from spl.settings import check_groups
from spl.types import Demonstration, UserError

Provider = Any
FOLDER = Path(tempfile.mkdtemp(prefix="spl-fuzz-"))

COLUMNS = (
    *("prompt", "messages", "system", "alpha", "chosen", "rejected", "share", "responses", "shares", "scores"),
    *("ranking", "comparisons", "response_a", "response_b", "votes_a", "votes_b", "votes_tie"),
)
CHOICE_COLUMNS = ("question", "choices", "answer", "mc1_choices", "mc1_labels", "mc1_targets", "labels")
TEXTS = (
    "yes", "no", "", " ", "\n\nHuman: a\n\nAssistant: b", "Human: a\n\nAssistant:", "\ud800", "\x00", "\u2028", "A",
    "[1, 2]", '["a", "b"]', "nan", "1e999", "٣", "²", "9" * 5000, "[" * 3000, "{" * 3000, '{"a": ' * 500, *ROLES,
)  # fmt: skip
ODD = (
    None, True, False, 0, 1, 2, -1, 0.5, 1.0, 0.25, math.nan, math.inf, -math.inf, -0.0, 1e308, 1e300, 5e-324, 10**400,
    -(10**400), 2**63, 1j, b"\xff", np.float32(0.5), np.int64(1), np.nan, np.array([0.5, 0.5]), np.array(["a", "b"]),
    np.array([]), np.array([[0, 1, 1.0]]), np.array([None, "a"], dtype=object), np.datetime64("NaT"), Decimal("NaN"),
    Decimal(1), date(2020, 1, 1), timedelta(1), (0, 1), {"a"}, frozenset(), object, float("1e-400"), torch.tensor(0.5),
    torch.tensor([0.5, 0.5]), range(2), iter(()), memoryview(b"ab"), ..., ValueError("x"),
)  # fmt: skip


def told(action: Any, *allowed: type[BaseException]) -> Any:
    """The result, or None where a user would be told in one sentence of ours what is wrong."""
    try:
        return action()
    except UserError as error:
        said = str(error)
        assert said and len(said) < 2000 and "\n" not in said, f"no sentence of sane length: {said[:200]!r}"
        said.encode("utf-8", "backslashreplace")
        return None
    except allowed:
        return None


def value(source: Provider, depth: int = 0) -> Any:
    """A value of any kind that JSON, CSV, Parquet or pandas may hold, and of some that they may not."""
    kind = source.ConsumeIntInRange(0, 9 if depth < 4 else 5)
    if kind < 2:
        return source.PickValueInList(list(TEXTS))
    if kind < 4:
        return source.PickValueInList(list(ODD))
    if kind == 4:
        return source.ConsumeUnicode(12)
    if kind == 5:
        return source.ConsumeRegularFloat() if source.ConsumeBool() else source.ConsumeInt(9)
    if kind == 6:
        message = {"role": source.PickValueInList([*ROLES, "bot"]), "content": value(source, depth + 1)}
        return [message] * source.ConsumeIntInRange(0, 2) + [message | {"role": "assistant"}]
    if kind < 9:
        return [value(source, depth + 1) for _ in range(source.ConsumeIntInRange(0, 4))]
    return {value_key(source): value(source, depth + 1) for _ in range(source.ConsumeIntInRange(0, 3))}


def value_key(source: Provider) -> Any:
    return source.PickValueInList([*COLUMNS[:4], *CHOICE_COLUMNS, "role", "content", "", 1, None, "\ud800"])


SHAPES = (
    ("prompt", "chosen", "rejected", "share", "alpha", "system"),
    ("prompt", "responses", "shares", "alpha"),
    ("messages", "responses", "scores"),
    ("prompt", "responses", "ranking"),
    ("prompt", "responses", "comparisons"),
    ("prompt", "response_a", "response_b", "votes_a", "votes_b", "votes_tie"),
    COLUMNS,
)


def usual(source: Provider, column: str) -> Any:
    """What a good row has in a column."""
    if column in ("prompt", "chosen", "rejected", "response_a", "response_b", "system", "messages"):
        return source.PickValueInList(["Tea?", "Yes.", "No.", "\n\nHuman: Tea?\n\nAssistant: Yes.", "a", "b"])
    lists = {"responses": ["a", "b", "c"], "shares": [0.5, 0.3, 0.2], "scores": [1, 2, 2.0], "ranking": [2, 0, 1]}
    return lists.get(column, [[0, 1, 0.5], [1, 2, 1.0]] if column == "comparisons" else source.ConsumeProbability())


def rows(source: Provider) -> None:
    """One row of preferences: read, and then what an example promises, or refused."""
    shape = source.PickValueInList(list(SHAPES))
    row = {c: usual(source, c) if source.ConsumeIntInRange(0, 3) else value(source) for c in shape}
    if not source.ConsumeIntInRange(0, 9):
        row = value(source)
    columns = {source.PickValueInList(list(COLUMNS)): "prompt"} if not source.ConsumeIntInRange(0, 9) else None
    shown = told(lambda: parse_demonstration(row, "a, row 1", columns))
    for prompt, reply in shown.turns if isinstance(shown, Demonstration) else ():
        assert prompt and prompt[-1]["role"] != "assistant" and reply.strip()
    example = told(lambda: parse_row(row, "a, row 1", columns))
    if example is None:
        return
    number = len(example.responses)
    assert number >= 2 and all(isinstance(text, str) and text.strip() for text in example.responses)
    assert len({text.strip() for text in example.responses}) == number
    assert example.prompt and example.prompt[-1]["role"] != "assistant"
    for turn in example.prompt:
        assert turn["role"] in ROLES
        turn["content"].encode()
    assert example.comparisons
    for first, second, share in example.comparisons:
        assert first != second and min(first, second) >= 0 and max(first, second) < number
        assert isinstance(share, float) and 0 <= share <= 1
    assert example.alpha is None or 0 < torch.tensor(example.alpha, dtype=torch.float32) < math.inf


def choices(source: Provider) -> None:
    """One multiple-choice question."""
    names = source.PickValueInList([("question", "choices", "answer"), ("question", "mc1_choices", "mc1_labels"),
                                    ("question", "mc1_targets"), CHOICE_COLUMNS])  # fmt: skip
    good = {"question": "2 + 2?", "choices": ["3", "4"], "answer": "B", "mc1_choices": ["a", "b"], "mc1_labels": [1, 0],
            "mc1_targets": {"choices": ["a", "b"], "labels": [0, 1]}, "labels": 0}  # fmt: skip
    row = {name: good[name] if source.ConsumeIntInRange(0, 2) else value(source) for name in names}
    found = told(lambda: parse_choices(row, "a, row 1"))
    if found is not None:
        assert 0 <= found.answer < len(found.choices) <= 26
        found.render().encode()


def opinions(source: Provider) -> None:
    """A closed question with people's answers, or a proposition."""
    good = {"question": "Tea?", "options": ["Yes", "No", "Don't know"], "shares": [0.5, 0.3, 0.2], "votes": [5, 3, 2],
            "selections": "defaultdict(<class 'list'>, {'Chad': [0.2, 0.3, 0.5]})", "group": "cooks", "ordered": True,
            "premise": "a", "hypothesis": "b", "obs1": "a", "obs2": "b", "hyp1": "c", "hyp2": "d",
            "proposition": "Obey.", "axis": "x", "weight": -1}  # fmt: skip
    names = source.PickValueInList([("question", "options", "shares", "group"), ("question", "options", "selections"),
                                    ("question", "options", "votes", "ordered"), ("premise", "hypothesis", "votes"),
                                    ("obs1", "obs2", "hyp1", "hyp2", "votes"),
                                    ("proposition", "axis", "weight")])  # fmt: skip
    row = {name: good[name] if source.ConsumeIntInRange(0, 2) else value(source) for name in names}
    if "proposition" in names:
        stated = told(lambda: parse_proposition(row, "a, row 1"))
        assert stated is None or (stated.text and stated.axis and abs(stated.weight) > 0)
        return
    found = told(lambda: parse_opinion(row, "a, row 1"))
    for opinion in (found, without_non_answers(found)) if found else ():
        if opinion:
            assert len(set(opinion.options)) == len(opinion.options) >= 2
            opinion.render("text", range(len(opinion.options))).encode()
            for group, shares in opinion.people.items():
                group.encode()
                assert len(shares) == len(opinion.options) and min(shares) >= 0 and abs(sum(shares) - 1) < 1e-9


SUFFIXES = (".jsonl", ".json", ".csv", ".jsonl.gz", ".csv.gz", ".parquet")


def file_seeds() -> list[bytes]:
    """Good files of each kind, and some that are known to be difficult, with a first byte that says the kind."""
    row = {"prompt": "Tea?", "chosen": "Yes.", "rejected": "No.", "share": 0.75}
    lines = f"{json.dumps(row)}\n".encode() * 2
    table = io.StringIO()
    writer = csv.DictWriter(table, list(row))
    writer.writeheader()
    writer.writerows([row, row])
    packed = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist([row, row]), packed)
    text = table.getvalue().encode()
    contents = [lines, json.dumps([row, row]).encode(), text, gzip.compress(lines), gzip.compress(text)]
    seeds = [bytes([kind]) + content for kind, content in enumerate([*contents, packed.getvalue()])]
    hard = [b'{"prompt": ' + b"[" * 5000, b"[" * 5000, b"9" * 5000, b'{"a": ' + b"9" * 5000 + b"}", b'{"a": NaN}',
            b'{"a": "\\ud800"}', b"\xef\xbb\xbf{}", b"\x00", b'{"chosen": 1e999}', b"[1,"]  # fmt: skip
    seeds += [bytes([kind]) + content for kind in (0, 1) for content in hard]
    seeds += [
        b"\x02" + content for content in (b"shares\n" + b"[" * 5000, b'a\n"', b"a\n\x00", b"alpha\n" + b"9" * 5000)
    ]
    return seeds


def files(data: bytes) -> None:
    """The bytes of a file of rows."""
    if not data:
        return
    path = FOLDER / f"rows{SUFFIXES[data[0] % len(SUFFIXES)]}"
    path.write_bytes(data[1:])
    for where, row in told(lambda: list(Source(str(path)).rows(Retries(number=0)))) or ():
        if isinstance(row, dict):
            told(lambda where=where, row=row: parse_row(row, where))


def checkpoint_seeds() -> list[bytes]:
    """A good checkpoint, as it is (0), and its header alone, to be completed with a digest that fits (1)."""
    path = FOLDER / "seed.ckpt"
    checkpoints.write({"global_step": 3, "state_dict": {"a": torch.ones(2), "b": (1, None)}, "t": torch.bfloat16}, path)
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = content[8 : 8 + length]
    deep = json.dumps({"__metadata__": {"format": checkpoints.FORMAT, "version": "1", "structure": "[" * 5000}})
    huge = b'{"a": {"dtype": "F32", "shape": [1152921504606846976], "data_offsets": [0, 4611686018427387904]}}'
    whole = [b"\x00" + content, b"\x00" + struct.pack("<Q", 2**60) + b"{", b"\x00PK\x03\x04", b"\x00\x80\x02"]
    return [*whole, b"\x01" + header, b"\x01" + deep.encode(), b"\x01" + huge, b"\x01" + b'{"a":' * 5000]


def checkpoint(data: bytes) -> None:
    """The bytes of a checkpoint."""
    if not data:
        return
    path, content = FOLDER / "fuzzed.ckpt", data[1:]
    if data[0] % 2:
        content = struct.pack("<Q", len(content)) + content + struct.pack("<ff", 1, 2)
        content += hashlib.sha256(content).digest()
    path.write_bytes(content)
    for action in (checkpoints.peek, checkpoints.read, checkpoints.verify):
        told(lambda action=action: action(path))
    checkpoints.find(FOLDER)


class _ParsedError(Exception):
    """Carries a parser out of the command that builds it."""


class _Grab(SPLCommand):
    def parse_arguments(self, parser: Any, args: Any) -> None:
        raise _ParsedError(parser)


def _fit_parser() -> Any:
    try:
        _Grab(["fit"])
    except _ParsedError as found:
        return found.args[0]._subcommands_action._name_parser_map["fit"]


_parsers: list[Any] = []
CONFIGS = (
    "model: {lr: 0.1, alpha: 1}", "model: {betas: [0.9, 0.95], lora_targets: [q_proj]}", "data: {path: survey}",
    "data: {columns: {chosen: better}, val_size: 0.1, max_tokens: 5}", "trainer: {max_steps: 5, precision: bf16-mixed}",
    "trainer: {logger: {class_path: CSVLogger, init_args: {save_dir: x}}}", "trainer: {callbacks: [5]}",
    "model: {lr: .nan, weight_decay: .inf, warmup: -1}", "model: {lora_rank: 99999999999999999999}", "a: &a [*a]",
    "x: &x {y: *x}", "model: &m {lr: 1}\ndata: *m", "model: !!python/object/apply:os.getcwd []", "model: {<<: 5}",
    "? [a]\n: b", "model: {lr: !!binary aGk=}", "--- a\n--- b", "model: {trust_remote_code: true}", "model.lr: 1",
    "model: 2020-01-01", "model: !!set {a}", '"\\ud800": 1', "model: {model: '\x85'}", "{" * 900, "- " * 900,
    "x0: &x0 [x,x,x,x,x,x,x,x]\n" + "".join(f"x{i}: &x{i} [{','.join([f'*x{i - 1}'] * 8)}]\n" for i in range(1, 12)),
)  # fmt: skip


def config_seeds() -> list[bytes]:
    return [text.encode("utf-8", "surrogatepass") for text in CONFIGS]


def config(data: bytes) -> None:
    """The text of a config: parsed as the command line parses it, and the two objects built of it."""
    if not _parsers:
        _parsers.append(_fit_parser())
    text = data.decode("utf-8", "replace")
    with contextlib.redirect_stderr(io.StringIO()) as said:
        settings = told(lambda: _parsers[0].parse_string(text, defaults=False), SystemExit)
    assert said.getvalue().count("\n") <= 1 and len(said.getvalue()) < 2000
    for group, kind in (("model", PreferenceModule), ("data", PreferenceDataModule)):
        if settings is not None and settings.get(group) is not None:
            told(lambda group=group, kind=kind: built(settings, group, kind))


def built(settings: Any, group: str, kind: type) -> Any:
    check_groups(settings, {group: kind})
    return kind(**settings[group].as_dict())


def texts(data: bytes) -> None:
    """A text in which secrets are hidden: hidden once, they stay so."""
    hidden = redact(data.decode("utf-8", "replace"))
    assert redact(hidden) == hidden


def text_seeds() -> list[bytes]:
    return [
        b"https://me:pass@host",
        b"api_key: 'a1', token=a2345678",
        b"Authorization: Bearer a1b2c3d4e5f6",
        b"--password x",
    ]
