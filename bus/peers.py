"""Who is linked with an actor, which lives of whom are over, and what ends with a peer.

Owns: the links of one exchange. Thread: the loop of its node.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import PeerGone
from .link import OUT_BOUND, Link
from .ports import Driver, Port

if TYPE_CHECKING:
    from .conversation import Ask
    from .exchange import Exchange

__all__ = ["Peers"]


class Peers:
    """Links by name, at most one life of a name at a time, never a life that is known to be over."""

    def __init__(self, exchange: Exchange, driver: Driver) -> None:
        self.links: dict[str, Link] = {}
        self._exchange = exchange
        self._driver = driver
        self._ended: dict[str, int] = {}  # highest incarnation of each name that is over
        self._parked: dict[str, list[tuple[Ask, Any]]] = {}  # asks that wait for a link, by name

    def connect(self, name: str, incarnation: int) -> None:
        """See ``Context.connect``. A life that is over, or linked already, is left alone."""
        if self.refusal(name, incarnation):
            return
        self.links[name] = self._link(name, incarnation)
        self._driver.make_link(name, incarnation)

    def _link(self, name: str, incarnation: int) -> Link:
        return Link(name, incarnation, self._exchange.id, self._exchange.incarnation)

    def refusal(self, name: str, incarnation: int) -> str:
        """Why this life of a peer may not be linked; empty if it may. A younger life replaces an older one."""
        if incarnation <= self._ended.get(name, 0):
            return f"incarnation {incarnation} of {name} is over"
        link = self.links.get(name)
        if link is not None and link.incarnation >= incarnation:
            return f"incarnation {link.incarnation} of {name} is linked already"
        if link is not None:
            self.down(name, link.incarnation, f"replaced by incarnation {incarnation}")
        return ""

    def up(self, name: str, incarnation: int, port: Port) -> None:
        """A transport to a peer works both ways."""
        link = self.links.setdefault(name, self._link(name, incarnation))
        link.open(port)
        for ask, message in self._parked.pop(name, ()):
            if ask.is_open:
                self._exchange.start(ask, name, message)
        self._exchange.guard("on_peer_up", None, self._exchange.actor.on_peer_up, name)

    def down(self, name: str, incarnation: int, reason: str) -> None:
        """See ``Context.peer_down``. Answers received before are handled before the rest fails.

        Tells received before keep their place in the mailbox; queued asks of the peer are dropped.
        """
        self._ended[name] = max(incarnation, self._ended.get(name, 0))
        link = self.links.get(name)
        if link is None or link.incarnation != incarnation:
            return
        del self.links[name]
        was_up = link.port is not None
        self._exchange.serve_answers(link)
        link.close()
        self.fail_asks(link, PeerGone(f"{name} (incarnation {incarnation}) is gone: {reason}"))
        for call in list(link.calls.values()):
            call.cancelled(f"{name} is gone: {reason}")
        if was_up:
            self._exchange.guard("on_peer_down", None, self._exchange.actor.on_peer_down, name, reason)

    def park(self, name: str, ask: Ask, message: Any) -> bool:
        """Keep an ask until there is a link to ``name``; False if as many wait already as may."""
        waiting = self._parked.setdefault(name, [])
        if len(waiting) >= OUT_BOUND:  # some may have been cancelled meanwhile
            waiting[:] = [entry for entry in waiting if entry[0].is_open]
        if len(waiting) >= OUT_BOUND:
            return False
        waiting.append((ask, message))
        return True

    def open_asks(self) -> list[tuple[str, Ask]]:
        """Everything asked and not answered, with whom it was asked of."""
        sent = [(link.peer, ask) for link in self.links.values() for ask in link.asks.values()]
        return sent + [(name, ask) for name, waiting in self._parked.items() for ask, _ in waiting]

    def fail_asks(self, link: Link, error: PeerGone) -> None:
        """End everything that was asked of a peer."""
        for ask in list(link.asks.values()):
            if ask.is_open:  # an earlier callback may have cancelled it
                ask.end()
                if not ask.is_sent:
                    self._exchange.waited(ask)
                self._exchange.guard("on_error", None, ask.on_error, error)
