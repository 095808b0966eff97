"""What a tree of processes holds, seen from outside: processes, zombies, descriptors, sockets, memory files."""

from __future__ import annotations

import os
from pathlib import Path

import attrs
import psutil

from chipbus import Engine
from support import weight_files

__all__ = ["Holdings", "holdings", "strays"]

OF_A_CHILD = 2  # descriptors a warden keeps of each: pidfd, and the pipe of its last words
OUR_NAMES = ("tokenizer.", "router", "replica.", "chip.", "warden.", "importing.", "supervisor")


@attrs.frozen
class Holdings:
    """Equal before a fault and after its recovery, or something leaks."""

    processes: tuple[str, ...]  # names, living, below the host application
    zombies: int
    host_descriptors: int
    supervisor_descriptors: int
    warden_descriptors: tuple[int, ...]
    memory_files: int  # that the supervisor keeps
    run_directory: tuple[str, ...]  # names, without the number of the life
    shared_memory: tuple[str, ...]  # /dev/shm


def holdings(engine: Engine, run_dir: Path) -> Holdings:
    """What is held now."""
    below = psutil.Process().children(recursive=True)
    records = {record.pid: record.name for record in engine.tree()}
    living, zombies, wardens, supervisor = [], 0, [], (0, 0)
    for process in below:
        try:
            name = process.name()
            if process.status() == psutil.STATUS_ZOMBIE:
                zombies += 1
                continue
            living.append(records.get(process.pid, name))
            if name.startswith("warden."):
                own = _descriptors(process.pid) - OF_A_CHILD * len(process.children())
                wardens.append(own)  # children of a warden that was killed are no longer any warden's
            if records.get(process.pid) == "supervisor":
                supervisor = (_descriptors(process.pid), len(weight_files(process.pid)))
        except (psutil.NoSuchProcess, FileNotFoundError):
            continue
    return Holdings(
        processes=tuple(sorted(living)),
        zombies=zombies,
        host_descriptors=_descriptors(os.getpid()),
        supervisor_descriptors=supervisor[0],
        warden_descriptors=tuple(sorted(wardens)),
        memory_files=supervisor[1],
        run_directory=tuple(sorted(_nameless(path.name) for path in run_dir.iterdir())),
        shared_memory=tuple(sorted(path.name for path in Path("/dev/shm").iterdir())),
    )


def strays() -> list[str]:
    """Processes of some engine whose owners are gone: they belong to nobody below this process and to no init."""
    mine = {process.pid for process in psutil.Process().children(recursive=True)}
    found = []
    for process in psutil.process_iter(["name", "ppid"]):
        name = process.info["name"] or ""
        if process.pid not in mine and process.info["ppid"] in (0, 1) and name.startswith(OUR_NAMES):
            found.append(f"{name} ({process.pid})")
    return found


def _nameless(name: str) -> str:
    """Socket names carry the number of a life."""
    parts = name.split(".")
    return ".".join([*parts[:-2], "N", parts[-1]]) if parts[-1] in ("c", "d") else name


def _descriptors(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))
