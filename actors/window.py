"""What came in the last minute, of something that only grows. Pure: who counts says what time it is.

Owns: what the total was at the end of each five seconds of the last minute. A difference of two totals is all there is
to a sliding window, so counting itself costs nothing more.
"""

from __future__ import annotations

from collections import deque
from typing import Generic, TypeVar

__all__ = ["SLOT_NS", "WINDOW_NS", "Window"]

T = TypeVar("T")

SLOT_NS = 5_000_000_000
WINDOW_NS = 60_000_000_000


class Window(Generic[T]):
    """``mark`` whenever ``next_ns`` has come, before what happens then is counted; ``since`` for where it begins."""

    def __init__(self, now_ns: int, total: T) -> None:
        self._marks = deque([(now_ns, total)], maxlen=WINDOW_NS // SLOT_NS + 2)
        self.next_ns = now_ns + SLOT_NS

    def mark(self, now_ns: int, total: T) -> None:
        """Nothing was counted since ``next_ns``, so ``total`` is what it was then, and at every mark that was missed.

        Does nothing before ``next_ns``.
        """
        missed = (now_ns - self.next_ns) // SLOT_NS
        self.next_ns += max(0, missed - WINDOW_NS // SLOT_NS - 1) * SLOT_NS  # those before would only be pushed out
        while self.next_ns <= now_ns:
            self._marks.append((self.next_ns, total))
            self.next_ns += SLOT_NS

    def since(self, now_ns: int) -> tuple[int, T]:
        """When the window that ends ``now_ns`` begins, and the total then; 60 to 65 s ago, or at the beginning.

        The window includes what was counted at the very moment it begins.
        """
        first = self._marks[0]
        return next((mark for mark in reversed(self._marks) if mark[0] <= now_ns - WINDOW_NS), first)
