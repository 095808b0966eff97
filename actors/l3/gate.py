"""What may start of a run before the runs that were accepted earlier have ended.

Owns nothing; looked at with each turn of the dispatcher. Thread: the bus loop.
"""

from __future__ import annotations

from collections.abc import Sequence

from .runs import SUB, BoundArgs, Run

__all__ = ["OPEN", "Gate"]


class Gate:
    """What the runs before one leave open to it: everything, only one chip, or nothing."""

    def __init__(self, earlier: Sequence[Run]) -> None:
        self.is_open = not earlier
        self.is_shut = False
        self._only: int | None = None
        self._host_is_written = False
        for run in earlier:
            busy = [worker for worker, count in run.in_flight.items() if count > 0]
            if not run.is_sealed or run.unsent or len(busy) > 1 or SUB in busy:
                self.is_shut = True
            elif busy:
                self.is_shut |= self._only not in (None, busy[0])
                self._only = busy[0]
            self._host_is_written |= run.writes_host

    def lets(self, worker: int) -> bool:
        """Whether tasks on this chip may start: it runs them in order, behind what earlier runs left there."""
        return self.is_open or self._only in (None, worker)

    def admits(self, bound: BoundArgs) -> bool:
        """Whether the values of these arguments are there: an earlier run may still write host arrays."""
        return not (self._host_is_written and (bound.reads_host or bound.uploads))


OPEN = Gate(())
"""Of the first run."""
