"""Bad rows that people can look at: the first of a run, in a file of one JSON object a line."""

import json
import logging
from collections.abc import Iterable
from pathlib import Path

from spl.data.encode import NUM_SAMPLES
from spl.secrets import without_secrets

log = logging.getLogger(__name__)


class Quarantine:
    """`quarantine.jsonl`: where a row stands, why it cannot be used, and its beginning.

    A run that goes on adds only rows that the file does not hold yet.

    Args:
        path: of the file; made with its first row.
        world: number of processes that write to it, each its part of the 100 rows.
    """

    def __init__(self, path: Path, world: int = 1) -> None:
        self.path = path
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
        self._known = {_where(line) for line in lines}
        self._room = max(NUM_SAMPLES // world, 1) - len(self._known) // world

    def add(self, samples: Iterable[dict[str, str]]) -> None:
        new = [sample for sample in samples if sample["where"] not in self._known][: max(self._room, 0)]
        if not new:
            return
        self._known |= {sample["where"] for sample in new}
        self._room -= len(new)
        text = "".join(json.dumps(without_secrets(sample), ensure_ascii=False) + "\n" for sample in new)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:  # at once, so that processes do not write into each other's lines
                file.write(text.encode(errors="backslashreplace"))
        except OSError as error:  # the rows are counted all the same
            log.warning("%s could not be written (%s); the run goes on.", self.path, error)


def _where(line: str) -> str:
    """Of a line, which a killed run may have left unfinished."""
    try:
        return str(json.loads(line)["where"])
    except (ValueError, KeyError, TypeError):
        return line
