"""What share of the last minute a chip ran each of its programs.

Owns: the time of one chip by program. The thread that computes says when a dispatch begins and ends; any other may ask.
What it says is one assignment, so only who looks takes a lock, and who marks the window, once in five seconds.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping

from .window import Window

__all__ = ["BusyTime"]


_Ended = Mapping[str, int]
"""Nanoseconds of dispatches that have ended, by program. Never changed, only replaced."""


class BusyTime:
    """Time is told, in nanoseconds of one clock. At most one dispatch runs at a time."""

    def __init__(self, now_ns: int) -> None:
        self._at: tuple[_Ended, str, int] = ({}, "", 0)  # what runs, "" for nothing, and since when
        self._window: Window[_Ended] = Window(now_ns, {})
        self._lock = threading.Lock()

    def begin(self, program: str, now_ns: int) -> None:
        """A dispatch of that program begins."""
        self._mark(now_ns)
        self._at = (self._at[0], program, now_ns)

    def end(self, now_ns: int) -> None:
        """It has ended, in whatever way."""
        self._mark(now_ns)
        self._at = (_until(now_ns, *self._at), "", 0)

    def shares(self, now_ns: int) -> tuple[tuple[str, float], ...]:
        """Per program that was ever run: its share of the last 60 to 65 s, or of all time since the beginning.

        What has run so far of a dispatch counts. All together they are at most 1.
        """
        self._mark(now_ns)
        with self._lock:
            began_ns, before = self._window.since(now_ns)
        so_far = _until(now_ns, *self._at)
        seen_ns = max(1, now_ns - began_ns)
        return tuple((program, (ns - before.get(program, 0)) / seen_ns) for program, ns in sorted(so_far.items()))

    def _mark(self, now_ns: int) -> None:
        """Mark each slot that is over with what had been done by its end."""
        if now_ns < self._window.next_ns:
            return
        with self._lock:
            while self._window.next_ns <= now_ns:
                at = self._at
                due_ns = self._window.next_ns if at[1] else now_ns
                self._window.mark(due_ns, _until(due_ns, *at))


def _until(at_ns: int, ended: _Ended, program: str, since_ns: int) -> _Ended:
    return {**ended, program: ended.get(program, 0) + max(0, at_ns - since_ns)} if program else ended
