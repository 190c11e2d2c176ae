"""The clock on the monitors' hooks: what a hook calls is counted once."""

from types import SimpleNamespace
from typing import Any

import monitors
import pytest


def test_a_hook_within_a_hook_counts_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """On a clock of our own: outer runs 10 s, of which the two inner calls take 3 s each; CPU seconds are half."""
    now = [0.0]

    def clock() -> Any:
        start = now[0]
        return SimpleNamespace(read=lambda: (now[0] - start, (now[0] - start) / 2))

    def inner() -> None:
        now[0] += 3

    def outer() -> None:
        now[0] += 4
        timed_inner()
        timed_inner()

    monkeypatch.setattr(monitors, "Clock", clock)
    timed_inner = monitors.timed("inner", inner)
    monitors.timed("outer", outer)()
    assert dict(monitors.spent) == {"outer": [4, 2], "inner": [6, 3]}
    assert dict(monitors.calls) == {"outer": 1, "inner": 2}
    monitors.report((110.0, 55.0))
    lines = {line.split("  ")[0]: line.split() for line in capsys.readouterr().out.splitlines() if line}
    assert lines["all monitors"][-1] == "10.00%"
    assert lines["inner"][-1] == "6.00%"
