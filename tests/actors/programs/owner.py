"""A process that owns tethered children and does nothing else until it is killed. Prints its children's pids.

Arguments: one mode per child: "idle", "gil" (stuck in C, holding the GIL), "stopped" (SIGSTOP), or "shared" (all such
children arm one and the same pipe). With "--fork" first, an untethered forked copy of the owner stays behind.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from typing import NoReturn

from chipbus.actors.processes import Tether, close_inherited_fds, fork, live_by_tether, start_session


def child(mode: str, tether: Tether, said: int) -> NoReturn:
    close_inherited_fds((tether.read_fd, said))
    start_session()
    live_by_tether(tether.read_fd)
    os.write(said, f"{os.getpid()}\n".encode())
    if mode == "gil":
        ctypes.PyDLL(None).sleep(60)
    if mode == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    while True:
        signal.pause()


def main() -> None:
    modes = [mode for mode in sys.argv[1:] if mode != "--fork"]
    shared = Tether.make()
    tethers = []  # a tether that nobody holds is not closed in a forked copy
    for mode in modes:
        tether = shared if mode == "shared" else Tether.make_in_host()
        tethers.append(tether)
        fork(lambda mode=mode, tether=tether: child(mode, tether, 1))  # type: ignore[misc]
        if tether is not shared:
            tether.drop_read_end()
    if "--fork" in sys.argv and os.fork() == 0:
        os.write(1, f"copy {os.getpid()}\n".encode())
    while True:
        signal.pause()


main()
