"""Processes that a benchmark kills or kills the children of: ``python -m chipbus.tools.bench_owner HOW``.

Owns: what it starts, until its stdin ends or it is killed.

    own null | own cpu    an engine of two replicas; prints its run directory once it is ready
    own lock              a tree of eight whose four chips hold their interpreter's lock
    fork light | torch    forks a process that has imported what a warden has, for each line of stdin, kills it, and
                          prints how many ns it took until it was reaped
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import time
from typing import NoReturn

from ..actors.processes import count_threads, fork, signal_group, start_session, try_reap, wait_dead
from ..errors import WorkerError
from .bench_actors import WARDENS

__all__ = ["main"]

_DOWN_S = 10.0
_LIGHT, _CHIPS = 2, 4  # with supervisor and warden: eight processes
_SETTLE_S = 0.5  # until each chip that is to hold its lock does


def _own(what: str) -> None:
    if what == "lock":
        from .bench_tree import SmallTree, resident

        light = (resident(f"light.{number}") for number in range(_LIGHT))
        chips = (resident(f"chip.{number}", holds_lock=True) for number in range(_CHIPS))
        tree = SmallTree(*light, *chips)
        time.sleep(_SETTLE_S)
        print(tree.run_dir, flush=True)
        sys.stdin.read()
        tree.close()
    else:
        from ..actors.engine import Engine

        with Engine("demo", chip=what, data_parallel_size=2, log_level="error") as engine:
            print(engine.run_dir, flush=True)
            sys.stdin.read()


def _fork(preload: str) -> None:
    for module in WARDENS[preload]:
        importlib.import_module(module)
    if count_threads() != 1:
        raise WorkerError(f"what warden {preload} imports has started a thread; no process can be forked")
    print("ready", flush=True)
    while sys.stdin.readline():
        print(_death_ns(), flush=True)


def _death_ns() -> int:
    read_fd, write_fd = os.pipe()

    def child() -> NoReturn:
        start_session()
        os.write(write_fd, b"!")
        while True:
            signal.pause()

    process = fork(child)
    os.read(read_fd, 1)
    os.close(read_fd)
    os.close(write_fd)
    began_ns = time.monotonic_ns()
    signal_group(process, signal.SIGKILL)
    wait_dead(process.pidfd, _DOWN_S)
    try_reap(process)
    took_ns = time.monotonic_ns() - began_ns
    os.close(process.pidfd)
    return took_ns


def main(how: str, what: str) -> None:
    """Be one of them."""
    if how == "own":
        _own(what)
    else:
        _fork(what)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
