"""Something a caller asked of the bus thread: answered, or failed, once.

Owns the answer until it is read.
"""

from __future__ import annotations

from typing import Any

from ...errors import ChipbusError, DeadlineExceeded
from .latch import Latch
from .runs import Wait

__all__ = ["Question"]


class Question:
    """Something asked of the bus thread: answered, or failed, once."""

    def __init__(self, what: str, wait: Wait, timeout_s: float) -> None:
        self._what = what
        self._wait = wait
        self._timeout_s = timeout_s
        self.ended = Latch()
        self._reply: Any = None
        self._error: ChipbusError | None = None

    def answered(self, reply: Any) -> None:
        """The reply came. On the bus thread."""
        self._reply = reply
        self.ended.set()

    def failed(self, error: ChipbusError) -> None:
        """It will not come. On the bus thread."""
        if not self.ended.is_set():
            self._error = error
            self.ended.set()

    def answer(self) -> Any:
        """The reply, or its error, once it is there. ``DeadlineExceeded`` if it takes too long."""
        if not self._wait(self.ended, self._timeout_s):
            raise DeadlineExceeded(f"{self._what} did not end within {self._timeout_s:g} s")
        if self._error is not None:
            raise self._error
        return self._reply
