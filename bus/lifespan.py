"""What a node does by itself, whatever its actor: follow the directory, answer pings, say what it is at, stop.

Owns: whether the stop began and is held, and what the actor said when it was ready. Thread: the loop of its node.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..errors import BusError, PeerGone
from .clock import NS_PER_S
from .conversation import STOPPED, Call
from .lifecycle import NodeReport, NodeReportRequest, PeerDown, PeerUp, Ping, Pong, Ready, Stop
from .ports import Driver

if TYPE_CHECKING:
    from .exchange import Exchange

__all__ = ["Lifespan"]


class Lifespan:
    """Handles the lifecycle messages and ends an exchange."""

    def __init__(self, exchange: Exchange, driver: Driver) -> None:
        self._exchange = exchange
        self._driver = driver
        self._is_stopping = False
        self._is_held = False
        self._ready: Ready | None = None
        self._began_ns = exchange.clock.now_ns()

    def handlers(self) -> dict[type, Callable[[Any, Call | None], None]]:
        """Handlers by message type; an actor cannot replace them."""
        peers = self._exchange.peers
        return {
            PeerUp: self._if_obeyed(lambda message: peers.connect(message.name, message.incarnation)),
            PeerDown: self._if_obeyed(lambda message: peers.down(message.name, message.incarnation, message.reason)),
            Stop: self._if_obeyed(lambda message: self.begin_stop(message.deadline_ns)),
            Ping: self._ping,
            NodeReportRequest: self._answer_report,
        }

    def _if_obeyed(self, carry_out: Callable[[Any], None]) -> Callable[[Any, Call | None], None]:
        """A handler that does it only for those whom the actor obeys, and counts the others."""
        exchange = self._exchange

        def handler(message: Any, call: Call | None) -> None:
            if exchange.actor.obeys(exchange.sender):
                carry_out(message)
                return
            what = type(message).__name__
            exchange.count("refused_commands", peer=exchange.sender, message=what)
            if call is not None:
                call.fail(BusError(f"{exchange.name} takes no {what} from {exchange.sender}"))

        return handler

    def report(self) -> NodeReport:
        """See ``Context.report``."""
        exchange = self._exchange
        ledger = exchange.ledger
        now_ns = exchange.clock.now_ns()
        asks = [(peer, ask) for peer, ask in exchange.peers.open_asks() if ask.is_open]
        peer, oldest = min(asks, key=lambda entry: entry[1].began_ns, default=("", None))
        return NodeReport(
            age_s=(now_ns - self._began_ns) / NS_PER_S,
            mailbox=len(exchange.mailbox),
            open_asks=len(asks),
            waits_for="" if oldest is None else oldest.what,
            waits_on=peer,
            waits_s=0.0 if oldest is None else (now_ns - oldest.began_ns) / NS_PER_S,
            progress=exchange.actor.progress(),
            is_busy=exchange.actor.is_busy(),
            lanes=tuple(exchange.mailbox.depths().items()),
            counters=tuple(exchange.counters.items()),
            ledger_bytes=0 if ledger is None else ledger.written_bytes,
            ledger_failures=0 if ledger is None else ledger.failures,
            credit_waits=exchange.credit_waits.read(),
        )

    def _answer_report(self, _: NodeReportRequest, call: Call | None) -> None:
        if call is not None:
            call.reply(self.report())

    def begin_stop(self, deadline_ns: int) -> None:
        """A polite stop: ask the actor, then finish unless it holds."""
        if self._is_stopping:
            return
        self._is_stopping = True
        if deadline_ns:
            self._exchange.timers.at(deadline_ns, self.finish)
        self._exchange.guard("on_stop", None, self._exchange.actor.on_stop)
        if not self._is_held:
            self.finish()

    def tell_ready(self, to: str, ready: Ready) -> None:
        """See ``Context.tell_ready``."""
        self._ready = ready
        self._exchange.tell(to, ready)

    def hold(self) -> None:
        """See ``Context.hold_stop``."""
        self._is_held = True

    def finish(self) -> None:
        """Answer everything that is open, then let the driver leave its loop. Idempotent."""
        exchange = self._exchange
        if exchange.is_finished:
            return
        for link in list(exchange.peers.links.values()):
            for call in list(link.calls.values()):
                call.fail(PeerGone(f"{exchange.name} stopped before it answered"))
        exchange.is_finished = True
        for peer, ask in exchange.peers.open_asks():
            if ask.is_open:  # an earlier callback may have cancelled it
                exchange.give_up(ask, STOPPED)
                gone = PeerGone(f"{exchange.name} stopped before {peer} answered")
                exchange.guard("on_error", None, ask.on_error, gone)
        self._driver.finish()

    def _ping(self, message: Ping, call: Call | None) -> None:
        peers = self._exchange.peers
        if (message.up or message.ended) and not self._exchange.actor.obeys(self._exchange.sender):
            self._exchange.count("refused_commands", peer=self._exchange.sender, message="Ping")
            message = Ping()
        for name, incarnation in message.ended:
            link = peers.links.get(name)
            if link is not None and link.incarnation <= incarnation:
                peers.down(name, link.incarnation, "it has ended")
            peers.down(name, incarnation, "it has ended")  # it may not come up later, either
        for name, incarnation in message.up:
            peers.connect(name, incarnation)
        actor = self._exchange.actor
        pong = Pong(actor.progress(), actor.is_busy(), self._ready)
        if call is not None:
            call.reply(pong)
        else:
            self._exchange.tell(self._exchange.sender, pong)
