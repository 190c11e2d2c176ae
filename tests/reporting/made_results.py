"""Results files as the programs write them, of numbers drawn here, for a report to be drawn from."""

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from spl.intervals import bootstrap
from spl.results import Record, header, write

ARMS = [("base", "t 1"), *(("dpo", f"t {t}") for t in ("1", "1.1", "1.2", "1.5")), ("dpo", "top_p 0.9")]
ARMS += [("dpo", "min_p 0.1"), *((f"spl {r}", "t 1") for r in ("1.2", "2", "4"))]
HOSTILE = (
    '<img src=x onerror="document.title=\'hurt\'"></script><script>document.title="hurt"</script>{{ 7*7 }} & "quoted"'
)
QUESTION = "Should the town build a new library or a new park?"


def make_all(folder: Path, prompts: int = 12, replies: int = 4) -> list[Path]:
    """One file of each program, and one of samples for every arm."""
    paths = [make_samples(folder, policy, setting, prompts, replies) for policy, setting in ARMS]
    makers = {
        "diversity-quality": diversity_quality,
        "best-of-n": best_of_n,
        "calibration": calibration,
        "opinions": opinions,
    }
    for name, make in makers.items():
        records = list(make(np.random.default_rng(7), prompts))
        write(folder / f"{name}.jsonl", header(name, {"seed": 0}, seed=0), records)
        paths.append(folder / f"{name}.jsonl")
    return paths


def make_samples(folder: Path, policy: str, setting: str, prompts: int, replies: int) -> Path:
    path = folder / f"samples-{policy}-{setting}.jsonl".replace(" ", "-")
    first = header("sample", {"num_samples": replies}, seed=0, policy=policy, setting=setting, train_seed=None)
    records: list[Record] = []
    for p in range(prompts):
        asked = HOSTILE if p == 1 else f"Write a short story about a doctor, number {p}."
        records.append({"kind": "prompt", "item": f"p{p}", "messages": [{"role": "user", "content": asked}]})
        for k in range(replies):
            text = (
                HOSTILE if p == 1 else f"{policy} at {setting} tells story {k} of prompt {p}.\n\nDr. Ada smiled. " * 3
            )
            record = {"kind": "sample", "item": f"p{p}", "index": k, "text": text, "num_tokens": 30 + k}
            records.append(record | {"finish": "length" if k == 3 else "stop", "logp": -40.5 - k})
    write(path, first, records)
    return path


def level(policy: str, setting: str) -> float:
    """How diverse an arm is made, from 0 to 1."""
    if policy == "base":
        return 0.75
    if policy == "dpo":
        return 0.2 + 0.9 * (float(setting.split()[-1]) - 1 if setting.startswith("t ") else -0.1)
    return 0.1 + 0.1 * float(policy.split()[-1])


def of_arm(
    policy: str, setting: str, values: dict[str, np.ndarray[Any, Any]], group: str | None = None
) -> Iterator[Record]:
    """Records of items and estimates, the latter of the former."""
    place = {"policy": policy, "setting": setting, "train_seed": None, "group": group}
    for p in range(len(next(iter(values.values())))):
        given = {name: float(of[p]) for name, of in values.items()}
        yield {"kind": "item", **place, "item": f"p{p}", "values": given}
    for name, of in values.items():
        yield {"kind": "estimate", **place, "name": name, **bootstrap(of)._asdict()}


def diversity_quality(draw: np.random.Generator, prompts: int) -> Iterator[Record]:
    yield {"kind": "note", "text": "The replies of all policies were compared at 4 a prompt, the smallest number."}
    hard = draw.normal(0, 0.05, prompts)
    for policy, setting in ARMS:
        much = level(policy, setting)
        bonus = 0.35 if policy.startswith("spl") else 0.0
        values = {
            "cosine_distance": 0.2 + 0.4 * much + hard + draw.normal(0, 0.02, prompts),
            "self_bleu": 0.5 - 0.4 * much + draw.normal(0, 0.02, prompts),
            "reward": 1.2 - 1.5 * much**2 + bonus + 3 * hard + draw.normal(0, 0.1, prompts),
            "win_rate": np.clip(0.6 - 0.5 * much + bonus / 3 + draw.normal(0, 0.05, prompts), 0, 1),
            "sequence_entropy_per_token": 0.8 + 1.6 * much + draw.normal(0, 0.1, prompts),
            "length": 60 + 70 * much + draw.normal(0, 9, prompts),
            "ended": np.clip(0.95 - 0.4 * much + draw.normal(0, 0.05, prompts), 0, 1),
        }
        yield from of_arm(policy, setting, values)
    yield from fronts()


def fronts() -> Iterator[Record]:
    """What the evaluation tells of families."""
    pair = {"setting": "", "train_seed": None, "group": "cosine_distance / reward"}
    for name, x, y in (
        ("spl", [0.22, 0.31, 0.42], [1.5, 1.4, 1.1]),
        ("dpo + temperature", [0.22, 0.31, 0.42], [1.1, 1.0, 0.6]),
    ):
        curve = {"name": "front", "x": [*x, 0.5], "y": [*y, None], "low": [v - 0.1 for v in y] + [None]}
        names = {"x_name": "cosine_distance", "y_name": "reward", "weight": None}
        yield {"kind": "curve", "policy": name, **pair, **curve, "high": [v + 0.1 for v in y] + [None], **names}
    against = {"kind": "estimate", "policy": "spl", "rival": "dpo + temperature", "num": 12, **pair}
    yield against | {"name": "hypervolume_difference", "value": 0.21, "low": 0.12, "high": 0.3, "greater": 0.99}
    yield against | {"name": "front_gap", "value": 0.4, "low": 0.31, "high": 0.5}


def best_of_n(draw: np.random.Generator, prompts: int) -> Iterator[Record]:
    ks = [2**k for k in range(8)]
    for (policy, setting), group in product(ARMS[:4] + ARMS[7:], ("easy", "medium", "hard")):
        p = {"easy": 0.4, "medium": 0.08, "hard": 0.006}[group] * (1 + 0.5 * level(policy, setting))
        y = [1 - (1 - p) ** k for k in ks]
        curve = {
            "name": "pass@k",
            "group": group,
            "x": ks,
            "y": y,
            "weight": None,
            "x_name": "samples",
            "y_name": "solved",
        }
        band = {"low": [max(0, v - 0.06) for v in y], "high": [min(1, v + 0.06) for v in y]}
        yield {"kind": "curve", "policy": policy, "setting": setting, **curve, **band}
        yield from of_arm(policy, setting, {"pass@128": draw.uniform(0.9 * y[-1], y[-1], prompts)}, group)


def calibration(draw: np.random.Generator, prompts: int) -> Iterator[Record]:
    for policy, group, setting in product(
        ("base", "dpo", "spl 1.2", "spl 4"), ("mmlu", "truthfulqa"), ("t 1", "t fitted")
    ):
        sure = 0.0 if setting == "t fitted" else {"base": 0.04, "dpo": 0.2, "spl 1.2": 0.12, "spl 4": -0.05}[policy]
        x = np.linspace(0.3, 0.97, 10)
        y = np.clip(x - sure + draw.normal(0, 0.02, 10), 0, 1)
        place = {"kind": "curve", "policy": policy, "setting": setting, "group": group}
        curve = {"name": "reliability", "x": list(x), "y": list(y), "weight": [30, 40, 60, 55, 50, 48, 40, 45, 60, 72]}
        names = {"x_name": "confidence", "y_name": "share right"}
        yield place | curve | names | {"low": list(y - 0.1), "high": list(y + 0.1)}
        risks = {"name": "risk_coverage", "x": [k / 20 for k in range(1, 21)], "y": [0.1 + 0.02 * k for k in range(20)]}
        names = {"x_name": "coverage", "y_name": "share wrong"}
        yield place | risks | names | {"low": None, "high": None, "weight": None}
        yield from of_arm(policy, setting, {"brier": draw.normal(0.5 + sure, 0.1, prompts)}, group)
        ece = {"name": "ece", "value": abs(sure) + 0.02, "low": abs(sure), "high": abs(sure) + 0.05, "num": prompts}
        yield {"kind": "estimate", "policy": policy, "setting": setting, "group": group, **ece}
        ideal = {"name": "ece_if_calibrated", "value": 0.03, "low": 0.02, "high": 0.05, "num": prompts}
        yield {"kind": "estimate", "policy": policy, "setting": setting, "group": group, **ideal}


def opinions(draw: np.random.Generator, prompts: int) -> Iterator[Record]:
    for policy in ("base", "dpo", "spl 4"):
        for p in range(3):
            sharp = {"base": 1, "dpo": 4, "spl 4": 1.3}[policy]
            shares = np.array([0.45, 0.35, 0.2]) ** sharp
            asked = QUESTION if p == 0 else f"Question {p} of the survey, asked of everyone in the country?"
            options = {"options": ["A library", "A park", "Neither of the two"], "people": [0.45, 0.35, 0.2]}
            record = {"kind": "shares", "policy": policy, "item": f"q{p}", "question": asked, **options}
            yield record | {"model": list(shares / shares.sum()), "mass": 0.93}
        for k, group in enumerate(("survey", "Chile", "Kenya", "Norway")):
            agreement = {"one_minus_jsd": draw.normal(0.8 - 0.03 * k, 0.05, prompts)}
            whole = {"total_variation": draw.normal(0.2, 0.05, prompts)} if group == "survey" else {}
            yield from of_arm(policy, "t 1", agreement | whole, group)
        for k, axis in enumerate(("economic", "social")):
            place = {"kind": "estimate", "policy": policy, "setting": "t 1", "group": axis, "name": "position"}
            yield place | {
                "value": 0.3 * k - 0.1 * sharp,
                "low": 0.3 * k - 0.1 * sharp - 0.2,
                "high": 0.3 * k,
                "num": 8,
            }


def make_run(folder: Path, name: str) -> Path:
    """A run folder as `spl fit` leaves it."""
    run = folder / name
    run.mkdir(parents=True)
    lines = ["epoch,step,train/loss,val/entropy,val/length,val/loss"]
    lines += [f"0,{k},{0.7 - 0.01 * k},,," for k in range(20)]
    lines += [f",{k},,{160 - 3 * k},{60 - k},{0.69 - 0.005 * k}" for k in (0, 10, 19)]
    (run / "metrics.csv").write_text("\n".join(lines) + "\n")
    (run / "summary.json").write_text('{"finished": true, "steps": 20, "seconds": 12.5, "start": {}, "end": {}}')
    return run
