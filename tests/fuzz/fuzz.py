"""Coverage-guided fuzzing of everything that reads what others wrote.

    python tests/fuzz/fuzz.py [--seed N] [--scale S] [TARGET ...]

Each target runs in a process of its own, for a fixed number of inputs. An input that makes anything but an error of
ours, takes more than 10 seconds or more than 3 GB, ends it; the input is shown, as Python writes it.
"""

import argparse
import os
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["spl"], enable_loader_override=False):
    import targets

RUNS = {"rows": 80_000, "choices": 40_000, "opinions": 20_000, "files": 15_000}
RUNS |= {"checkpoint": 6_000, "config": 8_000, "texts": 5_000}
STRUCTURED = ("rows", "choices", "opinions")


def fuzz(name: str, seed: int, runs: int, folder: Path) -> None:
    """Never returns: libFuzzer ends the process."""
    target = getattr(targets, name)

    def one(data: bytes) -> None:
        try:
            target(atheris.FuzzedDataProvider(data) if name in STRUCTURED else data)
        except BaseException:
            print(f"input: {data!r}", file=sys.stderr, flush=True)  # noqa: T201
            raise

    seeds = {"files": targets.file_seeds, "checkpoint": targets.checkpoint_seeds, "config": targets.config_seeds}
    corpus = folder / f"{name}-corpus"
    corpus.mkdir()
    for number, content in enumerate({**seeds, "texts": targets.text_seeds}.get(name, list)()):
        (corpus / str(number)).write_bytes(content)
    options = [f"-runs={runs}", f"-seed={seed}", "-max_len=8192", "-timeout=10", "-rss_limit_mb=3000"]
    options += [f"-artifact_prefix={folder}/{name}-", "-len_control=0", "-print_final_stats=1"]
    atheris.Setup([sys.argv[0], *options, str(corpus)], one)
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("targets", nargs="*", default=[])
    parser.add_argument("--seed", type=int, default=int(os.environ.get("SPL_FUZZ_SEED", time.time() // 86400)))
    parser.add_argument("--scale", type=float, default=1.0)
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="spl-fuzz-"))
    total, failed = 0, []
    for name in given.targets or RUNS:
        log = folder / f"{name}.log"
        start = sum(os.times()[2:4])
        child = os.fork()
        if not child:
            with log.open("wb") as file:
                for stream in (1, 2):
                    os.dup2(file.fileno(), stream)
            fuzz(name, given.seed, round(RUNS[name] * given.scale), folder)
        _, status = os.waitpid(child, 0)
        said = log.read_text(errors="replace")
        done = re.search(r"stat::number_of_executed_units:\s*(\d+)", said)
        count = int(done[1]) if done else 0
        total += count
        seconds = sum(os.times()[2:4]) - start
        print(f"{name}: {count:,} inputs, seed {given.seed}, {seconds:.0f} processor seconds, status {status}")  # noqa: T201
        if status:
            failed.append(name)
            print(said[-6000:])  # noqa: T201
    shutil.rmtree(folder)
    shutil.rmtree(targets.FOLDER)
    print(f"total: {total} inputs, failed: {failed}")  # noqa: T201
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
