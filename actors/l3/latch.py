"""Something threads wait for, lighter than ``threading.Event``: a run makes two, and most are never waited for.

Owns one lock, which is held until the latch is set: who waits takes it and gives it back.
"""

from __future__ import annotations

import threading

__all__ = ["Latch"]


class Latch:
    """Set by one thread at a time; any number of threads wait."""

    __slots__ = ("_is_set", "_lock")

    def __init__(self) -> None:
        self._is_set = False
        self._lock = threading.Lock()
        self._lock.acquire()

    def is_set(self) -> bool:
        """Whether waiting would end at once."""
        return self._is_set

    def set(self) -> None:
        """Let everybody go who waits, or will."""
        if not self._is_set:
            self._is_set = True
            self._lock.release()

    def clear(self) -> None:
        """Have those wait who come from now on. Not while another thread may set it."""
        if self._is_set:
            self._is_set = False
            self._lock.acquire()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait at most ``timeout_s`` (None: for ever); whether it is set."""
        if self._is_set:
            return True
        if not self._lock.acquire(timeout=-1 if timeout_s is None else max(0.0, timeout_s)):
            return False
        self._lock.release()
        return True
