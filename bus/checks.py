"""Credits told, and finding what was lost: an ask of which nothing has been heard for a while is asked after.

A CHECK follows the ask on its own socket, so it arrives behind it. The callee's exchange answers by itself, behind all
that it has sent. What the answer should have been behind of and is not there is lost. A lost CHECK is sent again.
Owner: the exchange. One timer for all asks and links, which runs while something is open.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import AnswerLost, MailboxFull
from .clock import NS_PER_S
from .conversation import BROKEN
from .envelope import CHECK, CHECKED, CREDIT, NO_TRACE, UNKNOWN, WORK, Envelope
from .link import ANSWER_BOUND, OUT_BOUND
from .quiet import Quiet
from .timers import Timer

if TYPE_CHECKING:
    from .conversation import Ask
    from .exchange import Exchange
    from .link import Link

__all__ = ["CHECK_S", "Checks"]

CHECK_S = 1.0
"""Seconds without a sign after which an ask is checked, or up to half of it later."""
TICK_NS = int(CHECK_S * NS_PER_S) // 2


class Checks:
    """Ticks while an ask is open or work has been sent that was not returned."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self.timer: Timer | None = None

    def begin(self) -> None:
        """Something has been sent that is to be looked after."""
        exchange = self._exchange
        self.timer = exchange.timers.at(exchange.clock.now_ns() + TICK_NS, self._tick)

    def _tick(self) -> None:
        self.timer = None
        exchange = self._exchange
        if exchange.is_finished:
            return
        is_needed = False
        for link in exchange.peers.links.values():
            is_quiet = link.quiet.tick(link.work_sent)
            is_owed = link.work_sent > link.work_returned
            is_needed = is_needed or is_owed or bool(link.asks)
            if link.port is None:
                continue  # nothing has left yet
            if is_quiet and is_owed:
                self._ask_after_work(link)
            for ask in link.asks.values():
                if ask.is_sent and self._quiet_of(ask).tick(ask.next_item):
                    self._ask_after(link, ask)
        if is_needed:
            self.begin()
        else:
            exchange.deadlines.rest()

    def _quiet_of(self, ask: Ask) -> Quiet:
        """Made at the first tick that finds the ask open: most are answered long before."""
        if ask.quiet is None:
            ask.quiet = Quiet()
        return ask.quiet

    def _ask_after(self, link: Link, ask: Ask) -> None:
        self._send(link, CHECK, ask.lane, ask.correlation, ask.trace_id, ask.next_item, OUT_BOUND)

    def _ask_after_work(self, link: Link) -> None:
        """Have what was taken and not yet returned, or lost, returned: a peer returns by itself only large portions."""
        self._send(link, CHECK, WORK, 0, NO_TRACE, link.work_sent, OUT_BOUND)

    def accept(self, link: Link, envelope: Envelope) -> None:
        """A CHECK arrived."""
        correlation, position = envelope.correlation, envelope.position
        if not correlation:
            self.return_work(link, position)
            return
        link.cancelled.discard(correlation)  # its ask did not arrive before this, so it never will
        call = link.calls.get(correlation)
        if call is not None:
            call.credit(position)
        sent = UNKNOWN if call is None or not call.is_open else call.next_item
        self._send(link, CHECKED, envelope.lane, correlation, envelope.trace_id, sent, ANSWER_BOUND)

    def return_work(self, link: Link, arrived: int) -> None:
        """Tell a peer how much of its work has been taken, or is lost, up to what ``arrived`` last."""
        waits_from = self._exchange.mailbox.work_before(link)
        self.tell_taken(link, arrived if waits_from is None else waits_from)

    def tell_taken(self, link: Link, taken: int) -> None:
        """Tell a peer that ``taken`` of its work has been taken, ever. If it is not told, it asks when it needs it."""
        if link is self._exchange.peers.links.get(link.peer):
            link.work_told = taken
            self._send(link, CREDIT, WORK, 0, NO_TRACE, taken, ANSWER_BOUND, control=True)

    def credit_items(self, link: Link, ask: Ask) -> None:
        """Tell a callee how many items of its stream have been taken, if the ask is still open."""
        if ask.is_open:
            ask.credited = taken = ask.next_item
            self._send(link, CREDIT, ask.lane, ask.correlation, ask.trace_id, taken, ANSWER_BOUND, control=True)

    def conclude(self, link: Link, correlation: int, sent: int) -> None:
        """A CHECKED was taken out of the mailbox, after all answers that it was sent behind; ``sent``: its position."""
        exchange = self._exchange
        ask = link.asks.get(correlation)
        if ask is None:
            return  # answered, or given up, meanwhile
        if ask.deadline_ns <= exchange.clock.now_ns():
            exchange.expire(ask)
        elif sent <= ask.next_item:
            self._quiet_of(ask).heard()
        else:
            if sent == UNKNOWN:
                what = f"{link.peer} has no call for {ask.what} of {exchange.name}: the ask or its answer was lost"
                ask.end()
                link.given_up.add(ask.correlation)
            else:
                missing = f"items {ask.next_item} to {sent - 1}"
                what = f"{missing} of the answer to {ask.what} by {link.peer} were lost on the way to {exchange.name}"
                exchange.give_up(ask, BROKEN)
            exchange.count("lost_answers", peer=link.peer, error=what)
            exchange.guard("on_error", None, ask.on_error, AnswerLost(what))

    def _send(
        self,
        link: Link,
        kind: int,
        lane: int,
        correlation: int,
        trace_id: bytes,
        position: int,
        bound: int,
        *,
        control: bool = False,
    ) -> None:
        """What finds its queue full is not sent: it is made up for later."""
        try:
            self._exchange.send(link, kind, 0, lane, correlation, 0, trace_id, position, b"", bound, control=control)
        except MailboxFull:
            self._exchange.counters["dead_letters"] += 1
