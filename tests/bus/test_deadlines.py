"""One timer for all deadlines: each ask ends when it is due, and nothing is left behind."""

from __future__ import annotations

from typing import Any

from bus_actors import Asker, Hold, Number, Server

from chipbus.bus import LocalSystem
from chipbus.bus.clock import NS_PER_S
from chipbus.bus.deadlines import LOOK_NS, NEVER_NS
from chipbus.errors import DeadlineExceeded


class Pair:
    def __init__(self) -> None:
        self.system = LocalSystem(0)
        self.server, self.asker = Server(), Asker()
        self.system.spawn("server", self.server)
        self.ctx = self.system.spawn("asker", self.asker, ("server",))
        self.system.run_until(lambda: "server" in self.ctx.peers())
        self.exchange: Any = self.system._seats["asker"].exchange
        self.ended: list[tuple[int, float]] = []

    def hold(self, number: int, timeout_s: float, **more: Any) -> Any:
        """Ask what is not answered; how it ends goes to ``ended``, with the milliseconds it took."""
        began_ns = self.system.clock.now_ns()

        def end(error: Any) -> None:
            assert type(error) is DeadlineExceeded
            self.ended.append((number, (self.system.clock.now_ns() - began_ns) / 1e6))

        to = more.pop("to", "server")
        return self.ctx.ask(to, Hold(), timeout_s=timeout_s, on_reply=print, on_error=end, **more)

    def idle(self) -> None:
        timers = [seat.exchange.timers for seat in self.system._seats.values()]
        self.system.run_until(lambda: self.system._step() is False and not any(map(len, timers)), limit_s=600)


def test_asks_end_in_the_order_of_their_deadlines_each_when_it_is_due() -> None:
    pair = Pair()
    for number, timeout_s in enumerate((5.0, 0.001, 2.0, 1.0, 2.0)):
        pair.hold(number, timeout_s)

    pair.idle()

    assert pair.ended == [(1, 1.0), (3, 1000.0), (2, 2000.0), (4, 2000.0), (0, 5000.0)]
    assert pair.exchange.deadlines.next_ns == NEVER_NS


def test_an_ask_that_waits_for_a_link_ends_at_its_deadline() -> None:
    pair = Pair()
    pair.hold(0, 3.0, to="absent", wait_for_link=True)
    pair.asker.ask("server", Number(1))

    pair.idle()

    assert pair.ended == [(0, 3000.0)]


def test_an_answered_ask_leaves_no_timer_behind() -> None:
    pair = Pair()
    began_ns = pair.system.clock.now_ns()
    pair.asker.ask("server", Number(1), timeout_s=300)

    pair.system.run_until(lambda: pair.asker.heard == [2] and not len(pair.exchange.timers))

    assert pair.system.clock.now_ns() - began_ns < 10 * NS_PER_S
    assert pair.exchange.deadlines.next_ns == NEVER_NS


def test_an_ask_with_an_earlier_deadline_is_looked_at_earlier() -> None:
    pair = Pair()
    answered = pair.hold(0, 1.0)
    pair.hold(1, 50.0)
    answered.cancel()
    pair.system.run_until(lambda: pair.system.clock.now_ns() > 3 * NS_PER_S)
    pair.hold(2, 0.5)

    pair.idle()

    assert pair.ended == [(2, 500.0), (1, 50_000.0)]


def test_what_a_late_ask_does_at_its_end_holds_for_the_others() -> None:
    pair = Pair()
    asks: list[Any] = []

    def end(_: Any) -> None:
        asks[1].cancel()
        pair.hold(2, 1.0)

    asks.append(pair.ctx.ask("server", Hold(), timeout_s=1, on_reply=print, on_error=end))
    asks.append(pair.hold(1, 1.0))

    pair.idle()

    assert pair.ended == [(2, 1000.0)]
    assert pair.asker.heard == []


def test_many_deadlines_close_together_are_looked_at_together() -> None:
    pair = Pair()
    count = 400
    for number in range(count):
        pair.hold(number, 1.0 + number * 1e-6)
    looks = []
    look_at = pair.exchange.deadlines.look_at
    pair.exchange.deadlines.look_at = lambda when_ns: (looks.append(when_ns), look_at(when_ns))

    pair.idle()

    assert [number for number, _ in pair.ended] == [*range(count)]
    late_ms = [took - 1000 - number * 1e-3 for number, took in pair.ended]
    assert max(late_ms) <= count * LOOK_NS / 1e6
    assert len(looks) < 20
