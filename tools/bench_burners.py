"""Processes that keep every core busy while something else is measured.

Owns: the processes, until the block ends; if their owner is killed they end by themselves.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator

__all__ = ["burning"]

_BURNER = """
import os, sys, threading
os.nice(int(sys.argv[1]))
threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
print("burning", flush=True)
while True:
    sum(range(1000))
"""


@contextlib.contextmanager
def burning(nice: int) -> Iterator[None]:
    """One busy process per core this process may use, ``nice`` below its priority."""
    with contextlib.ExitStack() as stack:
        for _ in os.sched_getaffinity(0):
            command = [sys.executable, "-c", _BURNER, str(nice)]
            process = stack.enter_context(
                subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # noqa: S603 (ours)
            )
            stack.callback(process.kill)
            assert process.stdout is not None
            process.stdout.readline()
        yield
