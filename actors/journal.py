"""The journal of a run: which processes the supervisor owns, in a file that outlives it, for the next janitor.

Owns: the file ``journal`` in the run directory, one JSON object a line. Written by the supervisor's nursery alone. It
is needed only where everything else has failed, so a disk that takes no more of it costs nothing else.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import attrs
import msgspec

from .processes import start_time

__all__ = ["Journal", "Life", "Run", "read_journal"]

_NAME = "journal"


class Life(msgspec.Struct, frozen=True, tag="made", forbid_unknown_fields=True):
    """A process that was made. ``start``: its start time, which tells it from any other that ever has its pid."""

    name: str
    incarnation: int
    pid: int
    start: int


class _Reaped(msgspec.Struct, frozen=True, tag="reaped", forbid_unknown_fields=True):
    pid: int
    start: int


class _Begun(msgspec.Struct, frozen=True, tag="begun", forbid_unknown_fields=True):
    token: str
    owners: tuple[Life, ...]


@attrs.frozen
class Run:
    """What a journal says."""

    token: str  # every process of the run has it in its environment
    owners: tuple[Life, ...]  # host application and supervisor: while one of them lives, the run is theirs
    living: tuple[Life, ...]  # made, and not reaped


class Journal:
    """Appends to the journal of one run."""

    def __init__(self, run_dir: Path, token: str, host_pid: int) -> None:
        self._fd = -1
        self._starts: dict[int, int] = {}
        owners = [("host", host_pid), ("supervisor", os.getpid())]
        with contextlib.suppress(OSError):
            self._fd = os.open(run_dir / _NAME, os.O_CREAT | os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._write(_Begun(token, tuple(Life(name, 1, pid, start_time(pid) or 0) for name, pid in owners)))

    def made(self, name: str, incarnation: int, pid: int) -> None:
        """A process was made."""
        start = start_time(pid)
        if start is not None:  # else it has ended already
            self._starts[pid] = start
            self._write(Life(name, incarnation, pid, start))

    def reaped(self, pid: int) -> None:
        """A process ended, and its pid may become another's."""
        start = self._starts.pop(pid, None)
        if start is not None:
            self._write(_Reaped(pid, start))

    def _write(self, entry: Life | _Reaped | _Begun) -> None:
        with contextlib.suppress(OSError):  # see the module docstring
            os.write(self._fd, msgspec.json.encode(entry) + b"\n")


def read_journal(run_dir: Path) -> Run | None:
    """What the journal of a run directory says, as far as it is whole; None if there is none that can be read."""
    decoder = msgspec.json.Decoder(Life | _Reaped | _Begun)
    begun: _Begun | None = None
    living: dict[tuple[int, int], Life] = {}
    with contextlib.suppress(OSError, msgspec.DecodeError):  # it may end in the middle of a line
        for line in (run_dir / _NAME).read_bytes().splitlines():
            match decoder.decode(line):
                case _Begun() as entry:
                    begun = entry
                case Life() as entry:
                    living[entry.pid, entry.start] = entry
                case _Reaped(pid, start):
                    living.pop((pid, start), None)
    return None if begun is None else Run(begun.token, begun.owners, tuple(living.values()))
