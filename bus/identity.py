"""Who is at the other end of a socket: a process, by the kernel's word, or on tcp a node, by its key."""

from __future__ import annotations

from pathlib import Path

import attrs
import zmq

__all__ = ["Caller", "caller_of", "key_holder_of"]

STATE, STARTED = 0, 19  # fields of /proc/PID/stat behind the name in brackets, counted from 0


@attrs.frozen
class Caller:
    """A process as it was when its frame was read; ``started`` tells it from a later one with the same pid.

    Of another host's it is known only which node's key it has: ``name``, "" for a process of ours.
    """

    uid: int
    pid: int
    started: str  # clock ticks since boot; "" if it had ended already, or is in another pid namespace
    name: str = ""

    @property
    def who(self) -> str:
        """For the log."""
        return f"holder of the key of {self.name}" if self.name else f"process {self.pid}"

    @property
    def is_alive(self) -> bool:
        """It has not ended: neither gone, nor waiting to be reaped, nor followed by another process of its pid."""
        return bool(self.started) and _started(self.pid) == self.started


def caller_of(frame: zmq.Frame) -> Caller | None:
    """Who sent a frame that came through a local socket; None if the kernel does not say."""
    try:
        _, uid, _, pid = str(frame.get("Peer-Address")).split(":")
        return Caller(int(uid), int(pid), _started(int(pid)))
    except (zmq.ZMQError, ValueError):
        return None


def key_holder_of(frame: zmq.Frame) -> Caller | None:
    """Who sent a frame that came over tcp; None if no key was asked for."""
    try:
        return Caller(uid=-1, pid=0, started="", name=str(frame.get("User-Id")) or "")
    except zmq.ZMQError:
        return None


def _started(pid: int) -> str:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, UnicodeDecodeError):
        return ""
    return "" if fields[STATE] in "ZX" else fields[STARTED]
