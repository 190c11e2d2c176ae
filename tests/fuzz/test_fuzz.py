"""At least 100,000 inputs a run on what reads rows, files, configs, checkpoints and texts; none may end in a crash."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest


@pytest.mark.skipif(not find_spec("atheris"), reason="atheris has wheels for Linux on x86-64 alone")
def test_no_input_ends_in_anything_but_our_errors(capsys: pytest.CaptureFixture[str]) -> None:
    script = str(Path(__file__).with_name("fuzz.py"))
    ended = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=900, env=os.environ)
    with capsys.disabled():
        print(f"\n{ended.stdout[-8000:]}")  # noqa: T201 -- the seeds, with which a failure can be had again
    assert ended.returncode == 0, ended.stderr[-4000:]
    found = re.search(r"total: (\d+) inputs", ended.stdout)
    assert found and int(found[1]) >= 100_000
