"""Deadlines between hosts. In an envelope a deadline is a moment of CLOCK_MONOTONIC, which each host counts for itself.

On a tcp link it travels as the time that is left, which the receiver adds to its own clock. What the way takes is then
not counted; the asker's own timer does.
"""

from __future__ import annotations

from typing import Any

from ..errors import BadFrame
from .clock import Clock
from .envelope import record_at
from .wire import Connection

__all__ = ["FarConnection", "arrived"]

AT = slice(16, 24)  # of the deadline in a header


class FarConnection(Connection):
    """A connection to another host: of each record's deadline it sends what is left."""

    __slots__ = ("_clock",)

    def __init__(self, *arguments: Any, clock: Clock, **further: Any) -> None:
        super().__init__(*arguments, **further)
        self._clock = clock

    def put(self, control: bool, record: bytes, bound: int) -> None:
        """See ``Connection``."""
        deadline_ns = int.from_bytes(record[AT], "little")
        if deadline_ns:
            left_ns = max(1, deadline_ns - self._clock.now_ns())  # 0 would mean that there is none
            record = record[: AT.start] + left_ns.to_bytes(8, "little") + record[AT.stop :]
        super().put(control, record, bound)


def arrived(frame: bytes, clock: Clock) -> bytes:
    """A frame from another host with deadlines of our clock. What is no record stays as it is, for others to find."""
    shifted = bytearray(frame)
    view, offset, now_ns = memoryview(frame), 0, clock.now_ns()
    try:
        while offset < len(frame):
            begin = offset
            envelope, _, offset = record_at(view, offset)
            if envelope.deadline_ns:
                deadline_ns = min(envelope.deadline_ns + now_ns, 2**64 - 1)
                shifted[begin + AT.start : begin + AT.stop] = deadline_ns.to_bytes(8, "little")
    except BadFrame:
        pass
    return bytes(shifted)
