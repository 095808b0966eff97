"""Timers of one node: a heap ordered by due time, then by creation.

Owns: callbacks not yet due. Thread: the node's loop.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable

__all__ = ["Timer", "TimerQueue"]

COMPACT_ABOVE = (
    256  # asks cancel nearly all their timers, long before they are due: without compaction the heap only grows
)


class Timer:
    """One callback at one time. ``cancel`` is idempotent and may come after the callback ran."""

    __slots__ = ("_queue", "callback", "due_ns")

    def __init__(self, queue: TimerQueue, due_ns: int, callback: Callable[[], None]) -> None:
        self._queue: TimerQueue | None = queue
        self.due_ns = due_ns
        self.callback = callback

    def cancel(self) -> None:
        """Make sure the callback does not run from now on."""
        queue, self._queue = self._queue, None
        if queue is not None:
            queue.forget()

    @property
    def is_pending(self) -> bool:
        """Neither run nor cancelled."""
        return self._queue is not None

    def take(self) -> Callable[[], None]:
        """The callback, which its queue is about to run."""
        self._queue = None
        return self.callback


class TimerQueue:
    """Pending timers. ``pop_due`` gives callbacks one at a time, so that a callback may add or cancel others."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, Timer]] = []
        self._made = 0
        self._cancelled = 0

    def __len__(self) -> int:
        return len(self._heap) - self._cancelled

    def at(self, due_ns: int, callback: Callable[[], None]) -> Timer:
        """Run ``callback`` once the clock shows ``due_ns`` or later."""
        timer = Timer(self, due_ns, callback)
        self._made += 1
        heapq.heappush(self._heap, (due_ns, self._made, timer))
        return timer

    def next_due_ns(self) -> int | None:
        """When the next timer is due; None without timers."""
        heap = self._heap
        while heap and not heap[0][2].is_pending:
            heapq.heappop(heap)
            self._cancelled -= 1
        return heap[0][0] if heap else None

    def pop_due(self, now_ns: int) -> Callable[[], None] | None:
        """Take the callback that is due first, or None if none is due."""
        due_ns = self.next_due_ns()
        if due_ns is None or due_ns > now_ns:
            return None
        return heapq.heappop(self._heap)[2].take()

    def forget(self) -> None:
        """One pending timer was cancelled; called by ``Timer.cancel`` alone."""
        self._cancelled += 1
        if self._cancelled > COMPACT_ABOVE and self._cancelled > len(self._heap) // 2:
            self._heap = [entry for entry in self._heap if entry[2].is_pending]
            heapq.heapify(self._heap)
            self._cancelled = 0
