"""Ends asks whose deadline has passed, with one timer for all: nearly all asks are answered long before.

The timer is set for the earliest deadline there is. When it fires and that ask has been answered, it is set for the
earliest of those that are open by then, so an ask that is answered in time costs one comparison.
Owner: the exchange.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .timers import Timer

if TYPE_CHECKING:
    from .exchange import Exchange

__all__ = ["Deadlines"]

NEVER_NS = 2**64
LOOK_NS = 500
"""Time per open ask from one look to the next, which bounds what looking costs: 2 ms if 4096 are open."""


class Deadlines:
    """Looks after the deadlines of every open ask of one exchange."""

    def __init__(self, exchange: Exchange) -> None:
        self.next_ns = NEVER_NS
        """When it looks next. An ask with an earlier deadline must say so to ``look_at``."""
        self._exchange = exchange
        self._timer: Timer | None = None

    def look_at(self, when_ns: int) -> None:
        """Look at this time, which is before ``next_ns``."""
        if self._timer is not None:
            self._timer.cancel()
        self.next_ns = when_ns
        self._timer = self._exchange.timers.at(when_ns, self._look)

    def rest(self) -> None:
        """No ask that was sent is open: stop looking, unless others are."""
        if self._timer is not None and not any(ask.is_open for _, ask in self._exchange.peers.open_asks()):
            self._timer.cancel()
            self._timer, self.next_ns = None, NEVER_NS

    def _look(self) -> None:
        exchange = self._exchange
        self._timer, self.next_ns = None, NEVER_NS
        now_ns = exchange.clock.now_ns()
        asks = sorted((ask for _, ask in exchange.peers.open_asks() if ask.is_open), key=lambda ask: ask.deadline_ns)
        for ask in asks:
            if ask.deadline_ns > now_ns:
                break
            if ask.is_open:  # an earlier callback may have cancelled it
                exchange.expire(ask)
        earliest_ns = next((ask.deadline_ns for ask in asks if ask.is_open), NEVER_NS)
        next_ns = max(earliest_ns, now_ns + LOOK_NS * len(asks))
        if earliest_ns < NEVER_NS and next_ns < self.next_ns:  # a callback may have asked again
            self.look_at(next_ns)
