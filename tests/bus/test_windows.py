"""Streams and readers that are slower than they are: windows, items that merge, and the bound."""

from __future__ import annotations

import itertools
import threading
from typing import Any

import attrs
import pytest
from bus_actors import Asker, Hold, Number, Server
from hypothesis import given, settings
from hypothesis import strategies as st

from chipbus.bus import Actor, Call, Lane, LocalSystem, handles, message
from chipbus.bus.conversation import STREAM_WINDOW
from chipbus.bus.envelope import CREDIT, envelope_of
from chipbus.errors import BadFrame, Overloaded, PeerGone
from support import eventually

MODEST = settings(deadline=None, print_blob=True, max_examples=40)
SEEDS = st.integers(0, 2**32)


@message(0x7B31, lane=Lane.WORK)
@attrs.frozen
class Text:
    """Pieces of text are one piece, unless it would be longer than ``MOST``."""

    text: str

    def merge(self, later: Text) -> Text | None:
        return Text(self.text + later.text) if len(self.text + later.text) <= MOST else None


@message(0x7B32, lane=Lane.WORK)
@attrs.frozen
class Flood:
    """Asked: answered by that many numbers at once."""

    count: int


MOST = 1000


class Flooder(Server):
    @handles(Flood)
    def _flood(self, message: Flood, call: Call) -> None:
        self.calls.append(call)
        call.on_cancel(self.cancels.append)
        for value in range(message.count):
            call.item(Number(value))
        call.reply(Number(-1))


class Reader:
    """An asker that holds one stream of a server open, and takes an item only when the test says so."""

    def __init__(self, seed: int = 0) -> None:
        self.system = LocalSystem(seed)
        self.server, self.asker = Flooder(), Asker()
        self.server_ctx = self.system.spawn("server", self.server)
        self.ctx = self.system.spawn("asker", self.asker, connect=("server",))
        self.system.run_until(lambda: "server" in self.ctx.peers())
        self.ask = self.asker.ask("server", Hold(), timeout_s=1000)
        self.system.run_until(lambda: len(self.server.calls) == 1)
        (self.call,) = self.server.calls
        self.under_way = self.system.channel("server", "asker", False)

    def settle(self) -> None:
        """Everything is taken that the server has sent, and what it sends then."""
        self.system.run_until(lambda: self.system._step() is False)


@pytest.mark.guarantee("B52")
@MODEST
@given(SEEDS, st.integers(1, 400))
def test_no_more_than_a_window_of_items_is_under_way_to_a_reader_and_all_arrive_in_order(seed: int, count: int) -> None:
    pair = Reader(seed)
    most = 0
    for value in range(count):
        pair.call.item(Number(value))
        most = max(most, len(pair.under_way))
    assert most == min(count, STREAM_WINDOW)

    for _ in range(10 * count):
        pair.system._step()
        under_way = len(pair.under_way) + len(pair.system._seats["asker"].exchange.mailbox)
        assert under_way <= STREAM_WINDOW
    pair.settle()

    assert pair.asker.heard == [*range(count)]
    pair.call.reply(Number(-1))
    pair.settle()
    assert pair.asker.heard == [*range(count), -1]


@MODEST
@given(SEEDS, st.integers(0, 400), st.booleans())
def test_the_end_of_an_answer_is_sent_behind_the_items_that_wait(seed: int, count: int, is_reply: bool) -> None:
    pair = Reader(seed)
    for value in range(count):
        pair.call.item(Number(value))

    if is_reply:
        pair.call.reply(Number(-1))
    else:
        pair.call.fail(PeerGone("over"))
    pair.settle()

    assert pair.asker.heard[:-1] == [*range(count)]
    assert pair.asker.errors[-1] is (int if is_reply else PeerGone)
    assert pair.server_ctx.counters() == {}
    assert pair.ctx.counters() == {}


@pytest.mark.guarantee("B53")
@MODEST
@given(SEEDS, st.lists(st.text(max_size=300), max_size=300))
def test_items_that_wait_for_a_slow_reader_become_one_where_their_class_says_how(seed: int, texts: list[str]) -> None:
    pair = Reader(seed)
    for value in range(STREAM_WINDOW):
        pair.call.item(Number(value))
    for text in texts:
        pair.call.item(Text(text))
    pair.call.item(Number(7))
    pair.call.item(Number(8))
    held = list(pair.call._held or ())

    pair.settle()

    heard = pair.asker.heard[STREAM_WINDOW:]
    assert heard == [item.value if isinstance(item, Number) else item for item in held]
    assert heard[-2:] == [7, 8]  # numbers do not merge
    merged = heard[:-2]
    assert "".join(item.text for item in merged) == "".join(texts)
    assert all(len(item.text) <= MOST for item in merged)
    assert all(len(a.text + b.text) > MOST for a, b in itertools.pairwise(merged))


@pytest.mark.guarantee("B54")
def test_a_stream_whose_reader_is_too_slow_ends_on_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chipbus.bus.conversation.HELD_BOUND", 5)
    pair = Reader()

    for value in range(STREAM_WINDOW + 7):
        pair.call.item(Number(value))

    assert not pair.call.is_open
    reason = "asker reads too slowly: 5 items of a stream wait for it"
    assert pair.server.cancels == [reason]
    assert pair.server_ctx.counters() == {"streams_overrun": 1, "late_answers": 1}
    pair.settle()
    assert pair.asker.heard[:-1] == [*range(STREAM_WINDOW)]
    assert pair.asker.errors[-1] is Overloaded
    assert str(pair.asker.heard[-1]) == reason


def test_an_item_that_waits_and_has_no_wire_form_ends_the_answer() -> None:
    for end in ("credit", "reply", "fail"):
        pair = Reader()
        for value in range(STREAM_WINDOW):
            pair.call.item(Number(value))
        for value in (64, 2**70, 65):
            pair.call.item(Number(value))
        if end == "reply":
            with pytest.raises(BadFrame):
                pair.call.reply(Number(-1))
            pair.call.reply(Number(-1))
        elif end == "fail":
            pair.call.fail(PeerGone("over"))
        pair.settle()

        assert pair.asker.heard[:-1] == [*range(66)], end
        assert pair.asker.errors[-1] is {"credit": BadFrame, "reply": int, "fail": PeerGone}[end]
        assert not pair.call.is_open


def test_a_cancelled_stream_forgets_what_waits_and_late_credit_does_nothing() -> None:
    pair = Reader()
    for value in range(STREAM_WINDOW + 20):
        pair.call.item(Number(value))
    pair.ask.cancel()
    pair.settle()

    pair.call.item(Number(1))

    assert pair.asker.heard == []
    assert pair.call._held is None
    assert pair.server_ctx.counters() == {"late_answers": 1}
    assert pair.ctx.counters() == {"late_frames": STREAM_WINDOW}


def test_credit_that_comes_late_takes_nothing_back() -> None:
    pair = Reader()
    for value in range(STREAM_WINDOW):
        pair.call.item(Number(value))
    pair.settle()

    pair.call.credit(1)
    for value in range(STREAM_WINDOW):
        pair.call.item(Number(value))

    assert len(pair.under_way) == STREAM_WINDOW


def test_lost_credit_is_made_up_for_by_a_check() -> None:
    pair = Reader()
    deliver, lost = pair.system._deliver, []

    def lossy(sender: str, receiver: str, control: bool) -> None:
        queue = pair.system.channel(sender, receiver, control)
        if envelope_of(queue[0][1]).kind == CREDIT and len(lost) < 2:
            lost.append(queue.popleft())
        else:
            deliver(sender, receiver, control)

    pair.system._deliver = lossy  # type: ignore[method-assign]
    for value in range(STREAM_WINDOW + 20):
        pair.call.item(Number(value))

    pair.settle()
    assert (len(lost), len(pair.asker.heard)) == (2, STREAM_WINDOW)
    pair.system.run_until(lambda: len(pair.asker.heard) == STREAM_WINDOW + 20, limit_s=2)

    assert pair.asker.heard == [*range(STREAM_WINDOW + 20)]


def test_a_slow_reader_across_sockets_gets_everything_and_little_is_under_way(nodes: Any) -> None:
    """The reader stands still in an item until the server has said all it has to say."""
    release, entered = threading.Event(), threading.Event()

    class Standing(Actor):
        def __init__(self) -> None:
            self.heard: list[int] = []
            self.most = 0

        def begin(self) -> None:
            self.ctx.ask("server", Hold(), timeout_s=60, on_reply=self.hear, on_error=print, on_item=self.hear)

        def hear(self, answer: Number) -> None:
            if not self.heard:
                entered.set()
                assert release.wait(10)
            self.heard.append(answer.value)
            self.most = max(self.most, len(self.ctx._exchange.mailbox))  # type: ignore[attr-defined]

    server, reader = Server(), Standing()
    serving = nodes.start("server", server)
    asking = nodes.start("reader", reader, ("server", 1))
    eventually(lambda: "up reader" in server.events, "the link")
    asking.do(reader.begin)
    eventually(lambda: len(server.calls) == 1, "the call")
    (call,) = server.calls
    serving.do(lambda: call.item(Number(0)))
    assert entered.wait(10)

    for begin in range(1, 4001, 400):
        serving.do(lambda begin=begin: [call.item(Number(v)) for v in range(begin, begin + 400)])
    assert call.next_item == STREAM_WINDOW
    release.set()
    eventually(lambda: len(reader.heard) == 4001, "all items")
    serving.do(lambda: call.reply(Number(-1)))
    eventually(lambda: len(reader.heard) == 4002, "the reply")

    assert reader.heard == [*range(4001), -1]
    assert reader.most <= STREAM_WINDOW
