"""For how long something has been quiet, and when to ask after it again. Pure."""

from __future__ import annotations

__all__ = ["Quiet"]

PATIENCE_TICKS = 3  # what was sent just before a tick has then been quiet for two whole ones
LONGEST_PATIENCE_TICKS = 8 * PATIENCE_TICKS  # a peer that is frozen must not be buried in checks


class Quiet:
    """For how long a count has stood still, in ticks."""

    __slots__ = ("_mark", "_patience", "_ticks")

    def __init__(self) -> None:
        self._mark = 0
        self.heard()

    def heard(self) -> None:
        """A sign of life."""
        self._ticks = 0
        self._patience = PATIENCE_TICKS

    def tick(self, mark: int) -> bool:
        """Half a second passed and the count is ``mark``; True if it is time to check."""
        if mark != self._mark:
            self._mark = mark
            self.heard()
        self._ticks += 1
        if self._ticks < self._patience:
            return False
        self._ticks = 0
        self._patience = min(2 * self._patience, LONGEST_PATIENCE_TICKS)
        return True
