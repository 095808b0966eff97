"""Records that come twice, and records that never come: in one process on virtual time, and over real sockets."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import attrs
import pytest
from bus_actors import Asker, Boom, Count, Hold, Number, Server, Urgent
from hypothesis import given, settings
from hypothesis import strategies as st

from chipbus.bus import Actor, Ask, Call, Lane, LocalSystem, handles, message
from chipbus.bus.checks import CHECK_S
from chipbus.bus.clock import NS_PER_S
from chipbus.bus.envelope import CANCEL, CHECK, CHECKED, Kind, envelope_of
from chipbus.errors import AnswerLost, ChipbusError, DeadlineExceeded
from support import eventually

MODEST = settings(deadline=None, print_blob=True, max_examples=40)
SEEDS = st.integers(0, 2**32)
SOON_S = 2 * CHECK_S


@message(0x7B21, lane=Lane.WORK)
@attrs.frozen
class Dawdle:
    """Asked: an item after each pause, then the reply."""

    pauses_s: tuple[float, ...]


class Dawdler(Server):
    @handles(Dawdle)
    def _dawdle(self, message: Dawdle, call: Call) -> None:
        pauses_s = list(message.pauses_s)

        def step() -> None:
            if pauses_s:
                call.item(Number(len(message.pauses_s) - len(pauses_s)))
                self.ctx.after(pauses_s.pop(0), step)
            else:
                call.reply(Number(-1))

        step()


class Lossy:
    """An asker linked with a server, and what may happen to a record on its way."""

    def __init__(self, seed: int = 0) -> None:
        self.system = LocalSystem(seed)
        self.server, self.asker = Dawdler(), Asker()
        self.server_ctx = self.system.spawn("server", self.server)
        self.ctx = self.system.spawn("asker", self.asker, connect=("server",))
        self.run(lambda: "server" in self.ctx.peers() and "asker" in self.server_ctx.peers())
        self._random = random.Random(seed)
        self._known: Counter[tuple[str, str, bool]] = Counter()
        self.lost: list[str] = []
        self.repeated: list[str] = []

    def run(self, until: Callable[[], bool], limit_s: float = 120.0) -> None:
        self.system.run_until(until, limit_s)

    def drop(self, sender: str, kind: int, *, control: bool = False, count: int = 1) -> None:
        """Lose the ``count`` records that were sent last, all of one kind."""
        receiver = "asker" if sender == "server" else "server"
        queue = self.system.channel(sender, receiver, control)
        for _ in range(count):
            assert envelope_of(queue.pop()[1]).kind == kind

    def idle(self) -> None:
        """Until nothing happens any more, now or later."""
        timers = [seat.exchange.timers for seat in self.system._seats.values()]
        self.run(lambda: self.system._step() is False and not any(map(len, timers)))

    def spoil(self, lose: float, repeat: float) -> None:
        """From now on records are lost, or come again at any later time."""
        deliver = self.system._deliver

        def spoiled(sender: str, receiver: str, control: bool) -> None:
            queue = self.system.channel(sender, receiver, control)
            name = Kind(envelope_of(queue[0][1]).kind).name
            if self._random.random() < lose:
                self.lost.append(name)
                queue.popleft()
                return
            if self._random.random() < repeat:
                self.repeated.append(name)
                queue.insert(self._random.randrange(1, len(queue) + 1), queue[0])
            deliver(sender, receiver, control)

        self.system._deliver = spoiled  # type: ignore[method-assign]

    def pending(self) -> list[Any]:
        links = [link for seat in self.system._seats.values() for link in seat.exchange.peers.links.values()]
        return [(link.asks, link.calls, link.cancelled, list(link.waiting)) for link in links]


NOTHING = [({}, {}, set(), [])] * 2


@pytest.mark.guarantee("B46")
@MODEST
@given(SEEDS)
def test_records_that_come_again_are_counted_and_change_nothing(seed: int) -> None:
    pair = Lossy(seed)
    pair.spoil(lose=0, repeat=0.4)
    for value in range(20):
        pair.ctx.tell("server", Number(value))
        pair.ctx.tell("server", Urgent(100 + value))
    asks = [pair.asker.ask("server", message) for message in (Count(9), Number(5), Boom(True), Count(70))]
    hold = pair.asker.ask("server", Hold())
    pair.run(lambda: len(pair.server.calls) == 1 and not any(ask.is_open for ask in asks))
    hold.cancel()
    pair.idle()

    assert [value for value in pair.server.seen if value < 100] == [*range(20), 5]
    assert [value for value in pair.server.seen if value >= 100] == [*range(100, 120)]
    values = [answer for answer in pair.asker.heard if isinstance(answer, int)]
    assert values == [*range(9), -1, 6, *range(70), -1]
    assert len(pair.asker.heard) == len(values) + 1
    assert pair.server.cancels == ["its caller cancelled it"]
    counted = Counter(pair.ctx.counters()) + Counter(pair.server_ctx.counters())
    harmless = {"CHECK", "CHECKED", "CREDIT"}
    assert counted["duplicates"] == sum(name not in harmless for name in pair.repeated)
    assert set(counted) <= {"duplicates", "handler_failures"}
    assert pair.pending() == NOTHING


def test_a_repeated_record_does_not_cost_the_rest_of_its_frame(nodes: Any, stranger: Callable[..., Any]) -> None:
    server = Server()
    nodes.start("server", server)
    peer = stranger("server")
    peer.hello()
    for socket in (peer.data, peer.control):
        peer.first_answer(socket)
    first = peer.record(Kind.TELL, Number(1), correlation=1, position=1)
    second = peer.record(Kind.TELL, Number(2), correlation=2, position=2)

    peer.data.send(first + first + second + first)

    eventually(lambda: server.seen == [1, 2] and dict(server.ctx.counters()) == {"duplicates": 2}, "each once")


def took_s(pair: Lossy, began_ns: int) -> float:
    return (pair.system.clock.now_ns() - began_ns) / NS_PER_S


@pytest.mark.guarantee("B47")
@pytest.mark.parametrize("lane", ["data", "control"])
@MODEST
@given(seed=SEEDS)
def test_an_ask_that_was_lost_or_whose_answer_was_ends_soon_with_answer_lost(lane: str, seed: int) -> None:
    control = lane == "control"
    question = Urgent(1) if control else Number(1)
    pair = Lossy(seed)
    began_ns = pair.system.clock.now_ns()

    pair.asker.ask("server", question, timeout_s=100)
    pair.drop("asker", Kind.ASK, control=control)
    pair.run(lambda: len(pair.asker.heard) == 1)

    assert pair.asker.errors == [AnswerLost]
    what = f"server has no call for {type(question).__name__} of asker: the ask or its answer was lost"
    assert str(pair.asker.heard[0]) == what
    assert took_s(pair, began_ns) <= SOON_S
    assert pair.server.seen == []

    began_ns = pair.system.clock.now_ns()
    pair.asker.ask("server", question, timeout_s=100)
    pair.run(lambda: pair.server.seen == [1])
    pair.drop("server", Kind.REPLY, control=control)
    pair.run(lambda: len(pair.asker.heard) == 2)

    assert str(pair.asker.heard[1]) == what
    assert took_s(pair, began_ns) <= SOON_S
    assert pair.ctx.counters() == {"lost_answers": 2}
    pair.idle()
    assert pair.pending() == NOTHING


@pytest.mark.guarantee("B48")
def test_lost_items_at_the_end_of_a_stream_are_missed_and_the_call_is_cancelled() -> None:
    pair = Lossy()
    pair.asker.ask("server", Hold(), timeout_s=100)
    pair.run(lambda: len(pair.server.calls) == 1)
    (call,) = pair.server.calls
    for value in range(5):
        call.item(Number(value))
    began_ns = pair.system.clock.now_ns()
    pair.drop("server", Kind.STREAM, count=2)

    pair.run(lambda: len(pair.asker.heard) == 4)

    assert pair.asker.heard[:3] == [0, 1, 2]
    assert str(pair.asker.heard[3]) == "items 3 to 4 of the answer to Hold by server were lost on the way to asker"
    assert pair.asker.errors[3] is AnswerLost
    assert took_s(pair, began_ns) <= SOON_S
    pair.run(lambda: pair.server.cancels == ["its caller lost an item"])
    assert not call.is_open


@pytest.mark.guarantee("B49")
@MODEST
@given(SEEDS, st.lists(st.lists(st.floats(0, 4), max_size=8), min_size=1, max_size=6), st.floats(0, 0.9))
def test_a_check_ends_no_ask_that_is_alive(seed: int, streams: list[list[float]], lose: float) -> None:
    """However slow the callee is, and however many checks are lost."""
    pair = Lossy(seed)
    deliver, draw = pair.system._deliver, random.Random(seed)

    def lossy(sender: str, receiver: str, control: bool) -> None:
        queue = pair.system.channel(sender, receiver, control)
        if envelope_of(queue[0][1]).kind in (CHECK, CHECKED) and draw.random() < lose:
            queue.popleft()
        else:
            deliver(sender, receiver, control)

    pair.system._deliver = lossy  # type: ignore[method-assign]
    ends: list[list[int]] = [[] for _ in streams]
    for heard, pauses_s in zip(ends, streams, strict=True):

        def hear(answer: Number, heard: list[int] = heard) -> None:
            heard.append(answer.value)

        pair.ctx.ask(
            "server", Dawdle(tuple(pauses_s)), timeout_s=1000, on_item=hear, on_reply=hear,
            on_error=pair.asker.heard.append,
        )  # fmt: skip

    pair.run(lambda: all(heard and heard[-1] == -1 for heard in ends) or bool(pair.asker.heard))

    assert pair.asker.heard == []
    assert ends == [[*range(len(pauses_s)), -1] for pauses_s in streams]
    assert set(pair.ctx.counters()) <= {"dead_letters"}


@pytest.mark.guarantee("B50")
def test_a_check_is_answered_by_the_exchange_while_its_actor_has_not_got_to_the_ask() -> None:
    """The server's actor handles nothing at all for ten seconds."""
    pair = Lossy()
    seat = pair.system._seats["server"]
    seat.exchange.serve = lambda **_: False  # type: ignore[method-assign]
    lost = pair.asker.ask("server", Number(1), timeout_s=100)
    pair.drop("asker", Kind.ASK)
    alive = [pair.asker.ask("server", Number(value), timeout_s=100) for value in range(5)]
    for _ in range(2, 50):
        pair.ctx.tell("server", Number(7))
    until_ns = pair.system.clock.now_ns() + 10 * NS_PER_S
    channels = [(a, b, c) for a, b in (("asker", "server"), ("server", "asker")) for c in (False, True)]
    while pair.system.clock.now_ns() < until_ns:
        for channel in channels:
            while pair.system.channel(*channel):
                pair.system._deliver(*channel)
        asking = pair.system._seats["asker"]
        while any(True for _ in asking.events()):
            next(iter(asking.events()))()
        pair.system.clock.advance_to(min(until_ns, pair.system._next_due_ns() or until_ns))

    assert not lost.is_open
    assert pair.asker.errors == [AnswerLost]
    assert all(ask.is_open for ask in alive)
    del seat.exchange.serve
    pair.run(lambda: pair.asker.heard[1:] == [1, 2, 3, 4, 5])


@pytest.mark.guarantee("B51")
@MODEST
@given(SEEDS, st.floats(0, 0.2), st.floats(0, 0.2))
def test_whatever_is_lost_or_repeated_every_ask_ends_once_and_long_before_its_deadline(
    seed: int, lose: float, repeat: float
) -> None:
    pair = Lossy(seed)
    ends: dict[int, list[str]] = {}
    items: dict[int, list[int]] = {}
    asks: list[Ask] = []
    pair.spoil(lose, repeat)
    began_ns = pair.system.clock.now_ns()
    for number in range(30):
        ends[number], items[number] = [], []

        def end(answer: Any, number: int = number) -> None:
            ends[number].append("reply" if isinstance(answer, Number) else type(answer).__name__)

        def item(answer: Number, number: int = number) -> None:
            items[number].append(answer.value)

        question = (Number(1), Urgent(1), Count(number), Dawdle((0.1,) * number))[number % 4]
        asks.append(
            pair.ctx.ask("server", question, timeout_s=3600, on_reply=end, on_error=end, on_item=item)
        )  # fmt: skip

    pair.run(lambda: not any(ask.is_open for ask in asks), limit_s=3000)

    assert {len(heard) for heard in ends.values()} == {1}
    assert all(heard == [*range(len(heard))] for heard in items.values())
    assert {error for heard in ends.values() for error in heard} <= {"reply", "AnswerLost"}
    assert took_s(pair, began_ns) < 100
    if not pair.lost:
        assert {error for heard in ends.values() for error in heard} == {"reply"}


def test_a_frozen_peer_is_not_buried_in_checks() -> None:
    pair = Lossy()
    pair.asker.ask("server", Hold(), timeout_s=600)
    queue = pair.system.channel("asker", "server", False)
    pair.system._deliver = lambda *_: None  # type: ignore[method-assign]
    asking = pair.system._seats["asker"]
    while not pair.asker.heard:
        pair.system.clock.advance_to(pair.system._next_due_ns() or 0)
        while (due_ns := asking.exchange.timers.next_due_ns()) and due_ns <= pair.system.clock.now_ns():
            asking._fire()

    assert pair.asker.errors == [DeadlineExceeded]
    checks = [envelope_of(record).correlation for _, record in queue if envelope_of(record).kind == CHECK]
    assert checks.count(1) < 60
    assert len(checks) < 120


def test_a_lost_answer_to_a_cancelled_ask_is_nobodys_business() -> None:
    pair = Lossy()
    ask = pair.asker.ask("server", Hold(), timeout_s=100)
    ask.cancel()
    pair.drop("asker", CANCEL, control=True)

    pair.idle()

    assert pair.asker.heard == []
    assert len(pair.server.calls) == 1
    assert pair.server.cancels == ["its deadline passed"]


def test_real_nodes_find_a_lost_ask_and_a_lost_answer(nodes: Any) -> None:
    """The records are lost in the asker's and the server's own out-queue, as if the sockets had dropped them."""

    class Lossy(Actor):
        def on_start(self) -> None:
            self.calls: list[Call] = []

        @handles(Hold)
        def _hold(self, _: Hold, call: Call) -> None:
            self.calls.append(call)

    server, asker = Lossy(), Asker()
    serving = nodes.start("server", server)
    asking = nodes.start("asker", asker, ("server", 1))
    eventually(lambda: asker.events == ["up server"], "the link")

    def lose_last(ctx: Any, peer: str) -> None:
        ctx._exchange.peers.links[peer].port._channels[False].queue.pop()

    def lose_ask() -> None:
        asker.ask("server", Hold(), timeout_s=60)
        lose_last(asker.ctx, "server")

    asking.do(lose_ask)
    eventually(lambda: len(asker.heard) == 1, "the lost ask")
    asking.do(lambda: asker.ask("server", Hold(), timeout_s=60))
    asking.do(lambda: asker.ask("server", Hold(), timeout_s=60))
    eventually(lambda: len(server.calls) == 2, "the calls")

    def lose_answer() -> None:
        server.calls[0].reply(Number(1))
        lose_last(server.ctx, "asker")

    serving.do(lose_answer)
    eventually(lambda: len(asker.heard) == 2, "the lost answer")
    serving.do(lambda: server.calls[1].reply(Number(2)))
    eventually(lambda: len(asker.heard) == 3, "the answer to the other one")

    assert asker.errors == [AnswerLost, AnswerLost, int]
    assert all(isinstance(error, ChipbusError) and "Hold of asker" in str(error) for error in asker.heard[:2])
