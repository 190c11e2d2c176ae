"""One zygote for all faults."""

import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_runs import Lab

TOLD: list[str] = []


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    seed = int(os.environ.get("SPL_FAULT_SEED") or time.time())
    lab = Lab(tmp_path_factory.mktemp("faults"), random.Random(seed))
    yield lab
    TOLD.append(f"faults: seed {seed} (SPL_FAULT_SEED), {lab.kills} kills, {lab.close():.0f} CPU seconds of runs")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for line in TOLD:
        terminalreporter.write_line(line)


@pytest.fixture
def folder(lab: Lab, tmp_path: Path) -> Path:
    return tmp_path / "run"
