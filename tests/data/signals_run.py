"""A stream's worker and the helpers of it are sent every signal that a run stops for: `python signals_run.py FOLDER`.

Prints the rows of 40 batches, how many processes were signalled, and how many of the helpers have ended.
"""

import json
import os
import sys
from itertools import islice
from multiprocessing import active_children, forkserver, resource_tracker
from pathlib import Path
from typing import Any

from test_streaming import stream

from spl.callbacks.interrupt import STOPPING
from spl.models import load_tokenizer

if __name__ == "__main__":
    loader = iter(stream(Path(sys.argv[1]), load_tokenizer("tiny"), batch_size=2, num_workers=1).train_dataloader())
    seen = [next(loader)]
    parent: Any = forkserver._forkserver  # type: ignore[attr-defined]
    tracker: Any = resource_tracker._resource_tracker
    helpers = [parent._forkserver_pid, tracker._pid]
    signalled = [*helpers, *(worker.pid for worker in active_children())]
    for signum in STOPPING:
        for process in signalled:
            os.kill(process, signum)
    seen += islice(loader, 39)
    loader.close()
    assert not active_children()
    ended = sum(os.waitpid(process, os.WNOHANG) != (0, 0) for process in helpers)
    print(json.dumps({"rows": [batch.rows for batch in seen], "signalled": len(signalled), "ended": ended}))  # noqa: T201
