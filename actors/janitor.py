"""The last resort: ends what a dead run has left running, by its journal, and touches nothing else.

Owns: nothing. Tethers end every process with its owner; where they could not (a kernel that does not take them, a
process that could not be killed then), the run directory stays locked although nobody owns the run any more.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

from .journal import Life, read_journal
from .processes import RUN_VARIABLE, Process, environment_of, open_pidfd, signal_process, start_time, wait_dead

__all__ = ["end_orphans"]

_KILLED_S = 1.0  # for a process to be gone after SIGKILL


def end_orphans(run_dir: Path) -> bool:
    """Kill what is left of the run of that directory, if host application and supervisor are gone for good.

    Only processes that its journal names as made and not reaped, that have the start time written there, and the run's
    token in their environment. Whether the run was found to be nobody's.
    """
    run = read_journal(run_dir)
    if run is None or not run.token or any(start_time(owner.pid) == owner.start for owner in run.owners):
        return False
    for life in run.living:
        _end(life, run.token)
    return True


def _end(life: Life, token: str) -> None:
    try:
        pidfd = open_pidfd(life.pid)
    except OSError:
        return
    try:  # looked at only now: the descriptor is this process's, whoever has its number later
        if start_time(life.pid) == life.start and environment_of(life.pid).get(RUN_VARIABLE) == token:
            signal_process(Process(life.pid, pidfd), signal.SIGKILL)
            wait_dead(pidfd, _KILLED_S)
    finally:
        os.close(pidfd)
