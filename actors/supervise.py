"""Process entry of the supervisor: what has to happen before, and so that, its actor can run.

Owns: the order of a start. The wardens are executed first, because their imports are the longest part of it: everything
this process needs itself, the bus first of all, is imported while they work.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from .boot import SUPERVISOR, Boot
from .processes import (
    RUN_VARIABLE,
    become_subreaper,
    live_by_tether,
    open_pidfd,
    reset_signals,
    set_process_name,
    watch_signals,
)
from .wardens import LIGHT, WARDEN_COMMAND, Warden

__all__ = ["main"]


def main(warden_command: Sequence[str] = WARDEN_COMMAND) -> NoReturn:
    """Be the supervisor: ``sys.argv`` holds the boot file, the tether's and the lock's descriptor."""
    _, boot_path, tether_fd, lock_fd = sys.argv
    reset_signals()
    become_subreaper()
    set_process_name(SUPERVISOR)
    boot = Boot.read(Path(boot_path))
    signals_fd = watch_signals((signal.SIGCHLD, signal.SIGTERM))

    def start_warden(preload: str) -> Warden:
        return Warden(preload, Path(boot_path), int(lock_fd), warden_command)

    # The light warden first, always, and before the tether may kill this process: it is the one that cleans up.
    wardens = {LIGHT: start_warden(LIGHT)}
    live_by_tether(int(tether_fd))
    for preload in sorted({spec.preload for spec in boot.children} - {LIGHT}):
        wardens[preload] = start_warden(preload)

    from ..bus import Node, NodeConfig  # late: see the module docstring
    from .journal import Journal
    from .logs import configure_logging
    from .process_nursery import ProcessNursery
    from .supervisor import SupervisorActor

    configure_logging(boot.log_level, SUPERVISOR)
    record = None if boot.record is None else Path(boot.record)
    config = NodeConfig(name=SUPERVISOR, incarnation=1, run_dir=Path(boot.run_dir), seed=boot.seed, record=record)
    fate_fds = (int(tether_fd), open_pidfd(boot.host_pid))
    journal = Journal(Path(boot.run_dir), os.environ.get(RUN_VARIABLE, ""), boot.host_pid)
    nursery = ProcessNursery(
        Path(boot.run_dir), wardens, start_warden, signals_fd, fate_fds, boot.stall_timeout_s, journal
    )
    node = Node(config, SupervisorActor(boot, nursery))
    node.expect(boot.expected_by(SUPERVISOR))
    node.run()
    os._exit(0)


if __name__ == "__main__":
    main()
