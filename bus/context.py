"""The ``Context`` every actor gets: its exchange's verbs, plus what only the loop that drives it can do."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

from .clock import NS_PER_S, Clock
from .exchange import Exchange
from .ledger import LedgerWriter
from .ports import Driver
from .timers import Timer

__all__ = ["BoundContext"]


class BoundContext:
    """Implements ``actor.Context``, whose docstrings hold."""

    def __init__(self, exchange: Exchange, loop: Driver) -> None:
        self.name: str = exchange.name
        self.incarnation: int = exchange.incarnation
        self.clock: Clock = exchange.clock
        self.random: random.Random = exchange.random
        self.log: Any = exchange.log
        self.ledger: LedgerWriter | None = exchange.ledger
        self.tell = exchange.tell
        self.tell_ready = exchange.lifespan.tell_ready
        self.ask = exchange.ask
        self.call_soon_threadsafe = loop.call_soon_threadsafe
        self.watch = loop.watch
        self.unwatch = loop.unwatch
        self.connect = exchange.peers.connect
        self.peer_down = exchange.peers.down
        self.hold_stop = exchange.lifespan.hold
        self.stop = exchange.lifespan.finish
        self.report = exchange.lifespan.report
        self._exchange = exchange

    @property
    def sender(self) -> str:
        return self._exchange.sender

    @property
    def sender_incarnation(self) -> int:
        return self._exchange.sender_incarnation

    def after(self, delay_s: float, callback: Callable[[], None]) -> Timer:
        exchange = self._exchange
        due_ns = exchange.clock.now_ns() + int(max(0.0, delay_s) * NS_PER_S)
        return exchange.timers.at(due_ns, callback)

    def peers(self) -> Mapping[str, int]:
        return {link.peer: link.incarnation for link in self._exchange.peers.links.values() if link.port is not None}

    def counters(self) -> Mapping[str, int]:
        return dict(self._exchange.counters)
