"""The two ends of an ask: ``Ask`` at the asker, ``Call`` at the one asked. Each ends exactly once.

Owned by the exchange of their node; actors keep them to cancel, to answer, and to hear of a cancel.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..errors import BadFrame, ChipbusError
from .envelope import ERROR, REPLY, STREAM
from .lifecycle import failure_of
from .quiet import Quiet
from .registry import MessageType, type_of
from .timers import Timer

if TYPE_CHECKING:
    from .exchange import Exchange
    from .link import Link

__all__ = [
    "BROKEN", "CANCELLED", "CANCEL_REASONS", "EXPIRED", "HELD_BOUND", "STOPPED", "STREAM_WINDOW", "Ask", "Call",
]  # fmt: skip

STREAM_WINDOW = 64
"""Items of one stream that may be under way to its reader, or wait at it. It returns credit in halves of this."""
HELD_BOUND = 4096
"""Items of one stream that may wait for credit, after merging, before it ends because its reader is too slow."""

CANCEL_REASONS = ("its caller cancelled it", "its deadline passed", "its caller lost an item", "its caller stopped")
"""Why nobody waits for an answer any more; the index travels in a CANCEL."""
CANCELLED, EXPIRED, BROKEN, STOPPED = range(4)


class Ask:
    """A question under way. Made by ``Context.ask``."""

    __slots__ = (
        "_exchange", "began_ns", "correlation", "credited", "deadline_ns", "is_open", "is_sent", "link", "next_item",
        "on_error", "on_item", "on_reply", "quiet", "row", "trace_id",
    )  # fmt: skip

    def __init__(
        self,
        exchange: Exchange,
        row: MessageType,
        began_ns: int,
        deadline_ns: int,
        trace_id: bytes,
        on_reply: Callable[[Any], None],
        on_error: Callable[[ChipbusError], None],
        on_item: Callable[[Any], None] | None,
    ) -> None:
        self._exchange = exchange
        self.row = row  # of the message that was asked
        self.began_ns = began_ns  # by the bus's clock
        self.deadline_ns = deadline_ns  # absolute, the bus's clock
        self.trace_id = trace_id  # 16 bytes
        self.on_reply = on_reply
        self.on_error = on_error
        self.on_item = on_item
        self.is_open = True  # neither answered, failed nor cancelled
        self.link: Link | None = None
        self.correlation = 0
        self.next_item = 0
        self.credited = 0  # items the callee has been told that we have taken
        self.is_sent = False
        self.quiet: Quiet | None = None

    @property
    def what(self) -> str:
        """Name of the message that was asked."""
        return self.row.cls.__name__

    @property
    def lane(self) -> int:
        """Lane of the message that was asked."""
        return self.row.lane

    def cancel(self) -> None:
        """Give up: the callee is told, and no callback of this ask runs any more. Idempotent."""
        if self.is_open:
            self._exchange.give_up(self, CANCELLED)

    def end(self) -> None:
        """Close without calling anybody; for the exchange."""
        self.is_open = False
        if self.link is not None:
            self.link.asks.pop(self.correlation, None)


class Call:
    """A question to be answered. Answering one that is closed does nothing but count ``late_answers``."""

    __slots__ = (
        "_callbacks", "_cancel_reason", "_exchange", "_held", "_timer", "correlation", "credited", "deadline_ns",
        "lane", "link", "next_item", "sender", "trace_id",
    )  # fmt: skip

    def __init__(
        self, exchange: Exchange, link: Link, correlation: int, lane: int, deadline_ns: int, trace_id: bytes
    ) -> None:
        self._exchange = exchange
        self._callbacks: tuple[Callable[[str], None], ...] = ()
        self._cancel_reason: str | None = None
        self._timer: Timer | None = None
        self.link: Link | None = link  # None: ended
        self.sender = link.peer  # name of the asker
        self.correlation = correlation
        self.lane = lane
        self.deadline_ns = deadline_ns  # absolute, the bus's clock
        self.trace_id = trace_id  # 16 bytes
        self.next_item = 0  # items sent
        self.credited = 0  # of which the asker has taken
        self._held: deque[Any] | None = None  # items that wait for credit; None: there never were any

    @property
    def is_open(self) -> bool:
        """Neither answered nor cancelled."""
        return self.link is not None

    def item(self, message: Any) -> None:
        """Send one item of a stream; the asker sees items in this order, without gaps.

        While the asker is ``STREAM_WINDOW`` items behind, items wait here. Neighbours of one class that has
        ``merge(self, later)`` become the one item it returns, unless that is None. If more than ``HELD_BOUND`` wait,
        the asker gets ``Overloaded`` and the call is cancelled.
        """
        if self._held or self.next_item - self.credited >= STREAM_WINDOW:
            self._hold(message)
        elif self._exchange.answer(self, STREAM, message):
            self.next_item += 1

    def reply(self, message: Any) -> None:
        """Answer, behind all items, and close."""
        while self._held:
            self._send_held(self._held)
        self._exchange.answer(self, REPLY, message)
        self._close()

    def fail(self, error: ChipbusError) -> None:
        """Answer with an error, and close. It reaches the asker's ``on_error`` as the same class with the same text."""
        while self._held:
            try:
                self._send_held(self._held)
            except BadFrame:
                continue  # an item without a wire form; the answer is an error anyway
        self._exchange.answer(self, ERROR, failure_of(error))
        self._close()

    def credit(self, taken: int) -> None:
        """The asker has taken that many items, ever: send as many of those that wait. For the exchange."""
        if taken > self.next_item:
            raise BadFrame(f"credit for {taken} items, of which {self.next_item} were sent to {self.sender}")
        self.credited = max(taken, self.credited)
        while self._held and self.next_item - self.credited < STREAM_WINDOW:
            try:
                self._send_held(self._held)
            except BadFrame as error:
                self.fail(error)

    def _hold(self, message: Any) -> None:
        if self.link is None:
            self._exchange.count("late_answers")
            return
        held = self._held
        if held is None:
            held = self._held = deque()
        merge = type_of(message).merge
        if held and merge is not None and type(held[-1]) is type(message):
            merged = merge(held[-1], message)
            if merged is not None:
                held[-1] = merged
                return
        if len(held) >= HELD_BOUND:
            self._exchange.overrun(self, f"{self.sender} reads too slowly: {len(held)} items of a stream wait for it")
        else:
            held.append(message)

    def _send_held(self, held: deque[Any]) -> None:
        """Send the oldest item that waits. Raises ``BadFrame`` if it has no wire form; it is gone then."""
        if self._exchange.answer(self, STREAM, held.popleft()):
            self.next_item += 1

    def on_cancel(self, callback: Callable[[str], None]) -> None:
        """Call ``callback(reason)``, at most once, if nobody waits for the answer any more.

        That is: the caller cancelled, its process ended, or the deadline passed. If it has happened already, it
        runs soon.
        """
        if self._cancel_reason is not None:
            reason = self._cancel_reason
            self._exchange.soon(lambda: callback(reason))
        elif self.link is not None:
            self._callbacks += (callback,)
            if self._timer is None:  # the asker cancels at the deadline, but it may be stopped itself
                self._timer = self._exchange.timers.at(
                    self.deadline_ns, lambda: self.cancelled(CANCEL_REASONS[EXPIRED])
                )

    def cancelled(self, reason: str) -> None:
        """Close because nobody waits any more; for the exchange."""
        if self.link is None:
            return
        callbacks = self._callbacks
        self._cancel_reason = reason
        self._close()
        for callback in callbacks:
            self._exchange.guard("on_cancel", None, callback, reason)

    def _close(self) -> None:
        link, self.link = self.link, None
        self._callbacks = ()
        self._held = None
        if link is not None:
            link.calls.pop(self.correlation, None)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
