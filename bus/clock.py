"""Time, as the bus sees it: everything that waits reads one ``Clock``, so a whole system can run on a virtual one.

Owns: nothing shared. A ``VirtualClock`` belongs to the system that advances it.
"""

from __future__ import annotations

import time
from typing import Protocol

__all__ = ["NS_PER_S", "Clock", "SystemClock", "VirtualClock"]

NS_PER_S = 1_000_000_000


class Clock(Protocol):
    """Monotonic time. Deadlines are absolute values of it, comparable between processes of one host."""

    def now_ns(self) -> int:
        """Nanoseconds since an arbitrary fixed point; never goes back."""
        ...


class SystemClock:
    """CLOCK_MONOTONIC, which all processes of a host share."""

    def now_ns(self) -> int:
        """Nanoseconds since boot."""
        return time.monotonic_ns()


class VirtualClock:
    """Time that moves only when told to. Starts at one second, so that 0 can mean "no deadline"."""

    def __init__(self) -> None:
        self._now_ns = NS_PER_S

    def now_ns(self) -> int:
        """Virtual nanoseconds."""
        return self._now_ns

    def advance_to(self, when_ns: int) -> None:
        """Move time forward to ``when_ns``; a time already passed changes nothing."""
        self._now_ns = max(self._now_ns, when_ns)
