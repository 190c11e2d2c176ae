"""Preloaded by the process that workers are forked from, and imported by nothing else: it leaves signals to the run.

A scheduler sends them to every process of a job. Without its parent a worker counts as dead.
"""

import signal

for _signum in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(_signum, signal.SIG_IGN)
