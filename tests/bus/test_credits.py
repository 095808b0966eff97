"""Credits for work: never more than the receiver takes, never lost, all back when everything is quiet."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from bus_actors import Asker, Count, Hold, Number, Server, Slow, Urgent
from hypothesis import given, settings
from hypothesis import strategies as st

from chipbus.bus import Context, LocalSystem
from chipbus.bus.credits import CREDIT_WAIT_S, MESSAGE_COST, WORK_CREDIT, WORK_CREDIT_BYTES, cost_of
from chipbus.bus.envelope import ASK, CHECK, CREDIT, TELL, envelope_of
from chipbus.bus.link import Link
from chipbus.errors import BadFrame, DeadlineExceeded, MailboxFull, PeerGone
from support import eventually

MODEST = settings(deadline=None, print_blob=True, max_examples=40)
SEEDS = st.integers(0, 2**32)
VERBS = ["ask", "hold", "count", "tell", "brief", "cancel", "kill", "spawn", "step"]
ACTIONS = st.lists(st.tuples(st.sampled_from(VERBS), st.integers(0, 9)), max_size=60)
FEW = 8


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """A credit of eight messages."""
    set_credit(monkeypatch, FEW)


def set_credit(monkeypatch: pytest.MonkeyPatch, messages: int) -> None:
    monkeypatch.setattr("chipbus.bus.link.WORK_CREDIT_BYTES", messages * MESSAGE_COST)
    monkeypatch.setattr("chipbus.bus.exchange.HALF_CREDIT", messages * MESSAGE_COST // 2)


class Pair:
    """An asker linked with a server."""

    def __init__(self, seed: int = 0) -> None:
        self.system = LocalSystem(seed)
        self.server, self.asker = Server(), Asker()
        self.server_ctx: Context = self.system.spawn("server", self.server)
        self.ctx: Context = self.system.spawn("asker", self.asker, connect=("server",))
        self.run(lambda: "server" in self.ctx.peers())
        self.link: Link = self.links("asker")["server"]

    def links(self, name: str) -> dict[str, Any]:
        return self.system._seats[name].exchange.peers.links

    def run(self, until: Callable[[], bool], limit_s: float = 60.0) -> None:
        self.system.run_until(until, limit_s)

    def settle(self) -> None:
        """Until nothing happens any more at this instant."""
        self.run(lambda: self.system._step() is False)


def idle(system: LocalSystem) -> None:
    """Until nothing happens any more, now or later."""
    timers = [seat.exchange.timers for seat in system._seats.values()]
    system.run_until(lambda: system._step() is False and not any(map(len, timers)), limit_s=600)


def check_all_is_back(system: LocalSystem) -> None:
    """All credit of every link is where it was at first, and nothing is pending on either side of it."""
    for seat in system._seats.values():
        for name, link in seat.exchange.peers.links.items():
            there = system._seats[name].exchange.peers.links[seat.name]
            assert link.work_sent == link.work_returned == there.work_told
            assert link.work_limit == link.work_sent + Link("", 1, 0, 1).work_limit
            assert (link.asks, link.calls, link.cancelled, list(link.waiting)) == ({}, {}, set(), [])
        assert len(seat.exchange.mailbox) == 0
        assert len(seat.exchange.timers) == 0


class Turmoil:
    """An asker and a server whose lives end and begin; each ask must end once."""

    def __init__(self, seed: int) -> None:
        self.system = LocalSystem(seed)
        self.asker = Asker()
        self.system.spawn("asker", self.asker, connect=("server",))
        self.system.spawn("server", Server())
        self.ends: list[int] = []
        self.asks: list[Any] = []
        self.cancelled: set[int] = set()

    def ask(self, message: object, timeout_s: float) -> None:
        number = len(self.asks)
        self.ends.append(0)

        def end(_: object) -> None:
            self.ends[number] += 1

        self.asks.append(
            self.asker.ctx.ask(
                "server", message, timeout_s=timeout_s, on_reply=end, on_error=end, on_item=lambda _: None
            )
        )  # fmt: skip

    def act(self, verb: str, number: int) -> None:
        alive = self.system.incarnation("server")
        if verb in ("ask", "hold", "count", "brief"):
            message = {"ask": Number(number), "hold": Hold(), "count": Count(20 * number), "brief": Hold()}[verb]
            self.ask(message, 0.001 if verb == "brief" else 5)
        elif verb == "tell":
            for value in range(number):
                try:
                    self.asker.ctx.tell("server", Number(value, bytes(value)))
                except (MailboxFull, PeerGone):
                    break
        elif verb == "cancel" and self.asks:
            chosen = number % len(self.asks)
            if self.asks[-1 - chosen].is_open:
                self.cancelled.add(len(self.asks) - 1 - chosen)
            self.asks[-1 - chosen].cancel()
        elif verb == "kill" and alive:
            self.system.kill("server", "test")
        elif verb == "spawn" and not alive:
            self.system.spawn("server", Server())
        for _ in range(number if verb == "step" else 0):
            self.system._step()

    def end(self) -> None:
        if not self.system.incarnation("server"):
            self.system.spawn("server", Server())
        idle(self.system)
        for number, heard in enumerate(self.ends):
            assert heard == (0 if number in self.cancelled else 1), number
        check_all_is_back(self.system)


@pytest.mark.guarantee("B55")
@pytest.mark.usefixtures("few")
@MODEST
@given(SEEDS, ACTIONS)
def test_after_any_asks_cancels_deadlines_and_deaths_all_credit_is_back_and_nothing_is_pending(
    seed: int, actions: list[tuple[str, int]]
) -> None:
    turmoil = Turmoil(seed)
    for verb, number in actions:
        turmoil.act(verb, number)
    turmoil.end()


@pytest.mark.slow
@pytest.mark.parametrize("credit", [FEW, WORK_CREDIT])
def test_ten_thousand_asks_leave_no_credit_behind(credit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    set_credit(monkeypatch, credit)
    turmoil, draw = Turmoil(7), random.Random(7)
    verbs = ["ask"] * 6 + ["count", "brief", "hold", "cancel", "cancel", "tell", "step", "step", "step", "step"]
    while len(turmoil.asks) < 10_000:
        turmoil.act("kill" if draw.random() < 0.002 else draw.choice(verbs), draw.randrange(10))
        turmoil.act("spawn" if draw.random() < 0.05 else "step", 5)
    turmoil.end()


@pytest.mark.guarantee("B56")
@pytest.mark.usefixtures("few")
@MODEST
@given(SEEDS, st.integers(1, 60), st.integers(0, 60))
def test_no_more_work_is_under_way_to_a_peer_than_it_has_given_credit_for(seed: int, asks: int, tells: int) -> None:
    """Answers and control lanes need no credit, and what waits for it keeps its order."""
    pair = Pair(seed)
    channel = pair.system.channel("asker", "server", False)
    told = 0
    for value in range(tells):
        try:
            pair.ctx.tell("server", Number(value))
            told += 1
        except MailboxFull:
            assert value == told == FEW
            break
    for value in range(asks):
        pair.asker.ask("server", Number(100 + value))
    pair.ctx.tell("server", Urgent(-1))

    mailbox = pair.system._seats["server"].exchange.mailbox
    while len(pair.asker.heard) < asks:
        assert len(channel) + len(mailbox) <= FEW + 1
        pair.system._step()
    pair.settle()

    assert pair.asker.heard == [*range(101, 101 + asks)]
    assert [value for value in pair.server.seen if value >= 0] == [*range(told), *range(100, 100 + asks)]
    assert pair.server_ctx.counters() == {}


@pytest.mark.guarantee("B57")
@pytest.mark.usefixtures("few")
def test_an_ask_that_ends_while_it_waits_for_credit_is_never_sent() -> None:
    pair = Pair()
    for value in range(FEW):
        pair.ctx.tell("server", Number(value))
    cancelled = pair.asker.ask("server", Number(100))
    late = pair.asker.ask("server", Number(101), timeout_s=0.2)
    patient = pair.asker.ask("server", Number(102))
    cancelled.cancel()
    assert not pair.system.channel("asker", "server", True)  # nor is a cancel
    serve = pair.system._seats["server"].exchange.serve
    pair.system._seats["server"].exchange.serve = lambda **_: False  # type: ignore[method-assign]
    pair.system.clock.advance_to(pair.system.clock.now_ns() + 10**9)
    asking = pair.system._seats["asker"]
    while late.is_open:
        asking._fire()

    assert pair.asker.errors == [DeadlineExceeded]
    text = "Number was not answered in time and never sent: server did not take what it was sent before"
    assert str(pair.asker.heard[0]) == text
    pair.system._seats["server"].exchange.serve = serve  # type: ignore[method-assign]
    pair.run(lambda: not patient.is_open)
    idle(pair.system)
    assert pair.server.seen == [*range(FEW), 102]
    assert pair.server_ctx.counters() == {}
    check_all_is_back(pair.system)


@pytest.mark.usefixtures("few")
def test_what_waits_in_a_mailbox_is_not_returned_when_the_sender_asks() -> None:
    pair = Pair()
    for value in range(FEW):
        pair.ctx.tell("server", Number(value))
    server, asking = pair.system._seats["server"], pair.system._seats["asker"]
    channel, back = pair.system.channel("asker", "server", False), pair.system.channel("server", "asker", True)

    def check() -> None:
        while not any(envelope_of(record).kind == CHECK for _, record in channel):
            pair.system.clock.advance_to(asking.exchange.timers.next_due_ns() or 0)
            asking._fire()
        while channel:
            pair.system._deliver("asker", "server", False)
        while back:
            pair.system._deliver("server", "asker", True)

    check()
    assert pair.link.work_returned == 0
    server.exchange.serve()
    check()
    assert pair.link.work_returned == MESSAGE_COST


@pytest.mark.usefixtures("few")
def test_when_a_peer_is_gone_asks_that_waited_for_credit_end_and_the_next_life_has_it_all() -> None:
    pair = Pair()
    for value in range(FEW):
        pair.ctx.tell("server", Number(value))
    waiting = [pair.asker.ask("server", Number(value)) for value in range(3)]

    pair.system.kill("server", "test")
    pair.run(lambda: not any(ask.is_open for ask in waiting))

    assert pair.asker.errors == [PeerGone] * 3
    second = Server()
    pair.system.spawn("server", second)
    pair.run(lambda: pair.ctx.peers() == {"server": 2})
    for value in range(FEW):
        pair.ctx.tell("server", Number(value))
    pair.run(lambda: second.seen == [*range(FEW)])


@pytest.mark.guarantee("B58")
@pytest.mark.usefixtures("few")
@MODEST
@given(SEEDS, st.floats(0, 0.6))
def test_credit_comes_back_also_for_work_that_was_lost_and_when_credit_itself_was(seed: int, lose: float) -> None:
    pair = Pair(seed)
    deliver, draw = pair.system._deliver, random.Random(seed)
    is_lossy = True

    def lossy(sender: str, receiver: str, control: bool) -> None:
        queue = pair.system.channel(sender, receiver, control)
        if is_lossy and envelope_of(queue[0][1]).kind in (TELL, CREDIT) and draw.random() < lose:
            queue.popleft()
        else:
            deliver(sender, receiver, control)

    pair.system._deliver = lossy  # type: ignore[method-assign]
    told = 0
    for _ in range(4 * FEW):
        try:
            pair.ctx.tell("server", Number(told, bytes(told)))
            told += 1
        except MailboxFull:
            pair.run(lambda: pair.link.work_sent < pair.link.work_limit, limit_s=600)
    is_lossy = False
    idle(pair.system)

    assert pair.server.seen == sorted(set(pair.server.seen))
    check_all_is_back(pair.system)


def test_large_messages_are_bounded_by_their_bytes_and_one_may_exceed_it() -> None:
    pair = Pair()
    piece = WORK_CREDIT_BYTES // 4
    for value in range(4):
        pair.ctx.tell("server", Number(value, bytes(piece)))
    with pytest.raises(
        MailboxFull, match="server has not taken the work that it was sent; at most 4096 messages or 8388608 bytes of"
    ):
        pair.ctx.tell("server", Number(4))
    pair.settle()
    assert len(pair.server.seen) == 4

    pair.ctx.tell("server", Number(5, bytes(2 * WORK_CREDIT_BYTES)))
    with pytest.raises(MailboxFull):
        pair.ctx.tell("server", Number(6))
    idle(pair.system)

    assert pair.server.seen == [0, 1, 2, 3, 5]
    check_all_is_back(pair.system)


def test_credit_for_more_than_was_sent_is_refused_and_old_credit_is_no_news() -> None:
    link = Link("server", 1, 0, 1)
    link.work_sent = 20_000
    with pytest.raises(BadFrame, match="credit for 20001 bytes of work by server, which was sent 20000"):
        link.credit(20_001)

    assert link.credit(10_000)
    assert not link.credit(10_000)
    assert not link.credit(5_000)
    assert (link.work_returned, link.work_limit) == (10_000, 10_000 + WORK_CREDIT_BYTES)


def test_a_message_costs_its_bytes_and_a_small_one_its_share() -> None:
    assert cost_of(0) == cost_of(1000) == WORK_CREDIT_BYTES // WORK_CREDIT
    assert cost_of(10_000) == 10_064


@pytest.mark.usefixtures("few")
@MODEST
@given(SEEDS)
def test_work_that_is_refused_on_arrival_gives_its_credit_back(seed: int) -> None:
    """The server knows none of these messages, and takes none of them out of its mailbox."""
    pair = Pair(seed)
    unknown = (0x7BFA).to_bytes(2, "little")
    port = pair.link.port
    put = port.put

    def disguise(control: bool, record: bytes, bound: int) -> None:
        put(control, record[:2] + unknown + record[4:] if record[1] == ASK else record, bound)

    port.put = disguise
    asks = 5 * FEW
    for value in range(asks):
        pair.asker.ask("server", Number(value))
    pair.settle()

    assert pair.asker.errors == [BadFrame] * asks
    idle(pair.system)
    check_all_is_back(pair.system)


def test_a_slow_server_across_sockets_is_sent_what_it_can_take_and_asks_wait(nodes: Any) -> None:
    server, asker = Server(), Asker()
    nodes.start("server", server)
    asking = nodes.start("asker", asker, ("server", 1))
    eventually(lambda: asker.events == ["up server"] and "up asker" in server.events, "the link")
    pauses = iter([True] * 50)
    server.block = lambda: next(pauses, None)
    total = 2 * WORK_CREDIT - 10
    most = [0]

    def burst() -> None:
        for value in range(total):
            asker.ask("server", Number(value) if value % 100 else Slow(), timeout_s=60)
        link = asker.ctx._exchange.peers.links["server"]  # type: ignore[attr-defined]
        most[0] = (link.work_sent - link.work_returned) // MESSAGE_COST

    asking.do(burst)
    eventually(lambda: len(asker.heard) == total, "all answers", within_s=30)

    assert most == [WORK_CREDIT]
    assert set(asker.errors) == {int}
    assert dict(asker.ctx.counters()) == dict(server.ctx.counters()) == {}
    link = asker.ctx._exchange.peers.links["server"]  # type: ignore[attr-defined]
    eventually(lambda: link.work_returned == total * MESSAGE_COST, "all credit is back")


@pytest.mark.guarantee("M25")
@pytest.mark.usefixtures("few")
def test_each_ask_that_finds_no_credit_is_one_wait_until_it_is_sent_or_ends() -> None:
    pair = Pair()
    server, asking = pair.system._seats["server"], pair.system._seats["asker"]

    def waits() -> tuple[int, float]:
        seen = pair.ctx.report().credit_waits
        assert seen.bounds == CREDIT_WAIT_S
        return sum(seen.counts), seen.total

    def pass_time(seconds: int) -> None:
        pair.system.clock.advance_to(pair.system.clock.now_ns() + seconds * 10**9)

    answered = [pair.asker.ask("server", Number(value)) for value in range(FEW)]
    cancelled, late, patient, lost = (pair.asker.ask("server", Number(100), timeout_s=t) for t in (60, 4, 60, 60))
    assert waits() == (0, 0.0), "none has ended its wait, and those with credit had none"
    pass_time(2)
    cancelled.cancel()
    assert waits() == (1, 2.0)
    serve, server.exchange.serve = server.exchange.serve, lambda **_: False  # type: ignore[method-assign]
    pass_time(3)
    while late.is_open:
        asking._fire()
    assert waits() == (2, 7.0)
    server.exchange.serve = serve  # type: ignore[method-assign]
    pair.run(lambda: not any(ask.is_open for ask in (*answered, patient, lost)))
    assert waits() == (4, pytest.approx(17.0, abs=1.0)), "two were sent, and an answer ends no wait"
    idle(pair.system)
    for value in range(FEW):
        pair.ctx.tell("server", Number(value))
    gone = pair.asker.ask("server", Number(7))
    pass_time(5)
    pair.system.kill("server", "test")
    pair.run(lambda: not gone.is_open)

    assert waits() == (5, pytest.approx(22.0, abs=1.0))
