"""What actors may rely on, in one process on virtual time: order, deadlines, cancels, streams, deaths, bounds."""

from __future__ import annotations

from typing import Any

import pytest
from bus_actors import Asker, Boom, Count, Hold, Note, Number, Server, Sheet, Slow, Urgent
from hypothesis import given, settings
from hypothesis import strategies as st

from chipbus.bus import Actor, Context, LocalSystem, Ping, Pong, Stop, handles
from chipbus.bus.credits import WORK_CREDIT
from chipbus.bus.link import OUT_BOUND
from chipbus.errors import (
    AnswerLost,
    BadFrame,
    BusError,
    ChipbusError,
    ContextTooLong,
    DeadlineExceeded,
    MailboxFull,
    Overloaded,
    PeerGone,
)

MODEST = settings(deadline=None, print_blob=True, max_examples=40)
SEEDS = st.integers(0, 2**32)
VERBS = ["ask", "hold", "count", "cancel", "kill", "spawn", "step"]
ACTIONS = st.lists(st.tuples(st.sampled_from(VERBS), st.integers(0, 9)), max_size=60)


class Pair:
    """An asker linked with a server."""

    def __init__(self, seed: int = 0, *, serialize: bool = True) -> None:
        self.system = LocalSystem(seed, serialize=serialize)
        self.server, self.asker = Server(), Asker()
        self.server_ctx: Context = self.system.spawn("server", self.server)
        self.ctx: Context = self.system.spawn("asker", self.asker, connect=("server",))
        self.run(lambda: "server" in self.ctx.peers())

    def run(self, until: Any, limit_s: float = 60.0) -> None:
        self.system.run_until(until, limit_s)

    def heard(self, count: int = 1) -> list[Any]:
        self.run(lambda: len(self.asker.heard) >= count)
        return self.asker.heard


@pytest.mark.guarantee("B10")
@MODEST
@given(SEEDS)
def test_messages_of_one_sender_arrive_in_order(seed: int) -> None:
    system = LocalSystem(seed)
    server = Server()
    system.spawn("server", server)
    askers = [Asker() for _ in range(3)]
    for index, asker in enumerate(askers):
        system.spawn(f"asker.{index}", asker, connect=("server",))
        for value in range(10):
            asker.ctx.tell("server", Number(100 * index + value))

    system.run_until(lambda: len(server.seen) == 30)

    for index in range(3):
        assert [v % 100 for v in server.seen if v // 100 == index] == list(range(10))


@pytest.mark.guarantee("B11")
def test_equal_seeds_give_equal_runs_and_other_seeds_other_orders() -> None:
    def order(seed: int) -> list[int]:
        system = LocalSystem(seed)
        server = Server()
        system.spawn("server", server)
        for index in range(4):
            ctx = system.spawn(f"asker.{index}", Asker(), connect=("server",))
            for value in range(5):
                ctx.tell("server", Number(100 * index + value))
        system.run_until(lambda: len(server.seen) == 20)
        return server.seen

    assert order(1) == order(1)
    assert len({tuple(order(seed)) for seed in range(8)}) > 1


@pytest.mark.parametrize("serialize", [True, False])
def test_an_ask_is_replied_to(serialize: bool) -> None:
    pair = Pair(serialize=serialize)
    sheet = Sheet(text="x", data=b"y", tokens=b"", flag=True)

    pair.asker.ask("server", Number(1))
    pair.asker.ask("server", sheet)

    assert pair.heard(2) == [2, sheet]
    assert (pair.asker.heard[1] is sheet) == (not serialize)


@pytest.mark.guarantee("B12")
@MODEST
@given(SEEDS, st.integers(0, 20))
def test_items_arrive_in_order_and_before_the_reply(seed: int, up_to: int) -> None:
    pair = Pair(seed)

    ask = pair.asker.ask("server", Count(up_to))
    pair.run(lambda: not ask.is_open)

    assert pair.asker.heard == [*range(up_to), -1]


@pytest.mark.guarantee("B13")
def test_an_ask_that_is_not_answered_in_time_fails_at_its_deadline_and_is_cancelled() -> None:
    pair = Pair()
    began_ns = pair.system.clock.now_ns()

    pair.asker.ask("server", Hold(), timeout_s=1.5)

    (error,) = pair.heard()
    assert type(error) is DeadlineExceeded
    assert str(error) == "Hold was not answered in time by server"
    assert pair.system.clock.now_ns() - began_ns == 1_500_000_000
    pair.run(lambda: pair.server.cancels == ["its deadline passed"])


@pytest.mark.guarantee("B14")
def test_work_whose_deadline_passed_before_it_starts_is_dropped() -> None:
    pair = Pair()
    pair.server.block = lambda: pair.system.clock.advance_to(pair.system.clock.now_ns() + 10**10)
    pair.ctx.tell("server", Slow())
    pair.asker.ask("server", Number(7), timeout_s=5)

    (error,) = pair.heard()
    pair.run(lambda: sum(pair.server_ctx.counters().values()) == 1)

    assert type(error) is DeadlineExceeded
    assert pair.server.seen == []
    assert set(pair.server_ctx.counters()) <= {"expired_before_start", "cancelled_before_start"}


@pytest.mark.guarantee("B15")
@MODEST
@given(SEEDS, st.integers(0, 30))
def test_a_cancelled_ask_is_never_heard_of_again_and_its_callee_hears_once(seed: int, steps: int) -> None:
    pair = Pair(seed)
    ask = pair.asker.ask("server", Hold())
    for _ in range(steps):
        pair.system._step()

    ask.cancel()
    ask.cancel()
    pair.run(lambda: pair.system._step() is False)

    assert not ask.is_open
    assert pair.asker.heard == []
    assert pair.server.cancels in (["its caller cancelled it"], [])
    assert len(pair.server.cancels) == len(pair.server.calls)
    assert not any(call.is_open for call in pair.server.calls)
    assert pair.server_ctx.counters().get("cancelled_before_start", 0) == 1 - len(pair.server.calls)
    link = pair.system._seats["server"].exchange.peers.links["asker"]
    assert (link.calls, link.cancelled) == ({}, set())


def test_answers_of_a_closed_call_do_nothing_but_count() -> None:
    pair = Pair()
    ask = pair.asker.ask("server", Hold())
    pair.run(lambda: len(pair.server.calls) == 1)
    ask.cancel()
    pair.run(lambda: pair.server.cancels != [])
    (call,) = pair.server.calls

    call.item(Number(1))
    call.reply(Number(2))
    call.fail(ChipbusError("x"))
    call.on_cancel(lambda reason: pair.server.cancels.append(f"late: {reason}"))
    pair.run(lambda: len(pair.server.cancels) == 2)

    assert pair.server_ctx.counters()["late_answers"] == 3
    assert pair.server.cancels == ["its caller cancelled it", "late: its caller cancelled it"]
    assert pair.asker.heard == []


def test_a_call_tells_who_asked_until_when_and_for_whom() -> None:
    pair = Pair()
    now_ns = pair.system.clock.now_ns()
    pair.ctx.ask("server", Hold(), timeout_s=3, trace_id=b"t" * 16, on_reply=print, on_error=print)
    pair.run(lambda: len(pair.server.calls) == 1)

    (call,) = pair.server.calls
    assert (call.sender, call.trace_id, call.deadline_ns) == ("asker", b"t" * 16, now_ns + 3_000_000_000)


@pytest.mark.guarantee("B16")
@MODEST
@given(SEEDS)
def test_a_dead_peers_asks_fail_and_its_calls_are_cancelled(seed: int) -> None:
    pair = Pair(seed)
    pair.asker.ask("server", Hold())
    pair.asker.ask("server", Hold())
    pair.run(lambda: len(pair.server.calls) == 2)
    pair.server_ctx.ask("asker", Note(), timeout_s=9, on_reply=print, on_error=print)

    pair.system.kill("server", "signal 9 (SIGKILL)")

    errors = pair.heard(2)
    assert [str(error) for error in errors] == ["server (incarnation 1) is gone: signal 9 (SIGKILL)"] * 2
    assert pair.asker.errors == [PeerGone, PeerGone]
    pair.run(lambda: pair.asker.events[-1] == "down server: signal 9 (SIGKILL)")
    assert pair.ctx.peers() == {}

    again = Pair(seed)
    again.asker.ask("server", Hold())
    again.run(lambda: len(again.server.calls) == 1)
    again.system.kill("asker", "exit code 1")
    again.run(lambda: again.server.cancels != [])
    assert again.server.cancels == ["asker is gone: exit code 1"]


@pytest.mark.guarantee("B17")
@MODEST
@given(SEEDS, st.integers(0, 12))
def test_late_frames_of_an_old_life_are_dropped_and_counted(seed: int, steps: int) -> None:
    pair = Pair(seed)
    for value in range(5):
        pair.ctx.tell("server", Number(value))
        pair.server_ctx.tell("asker", Number(value))
    for _ in range(steps):
        pair.system._step()
    pair.system.kill("server", "killed")

    second = Server()
    second_ctx = pair.system.spawn("server", second)
    pair.run(lambda: pair.ctx.peers() == {"server": 2})
    pair.ctx.tell("server", Number(99))
    pair.run(lambda: second.seen != [])
    pair.run(lambda: pair.system._step() is False)

    assert second_ctx.incarnation == 2
    assert second.seen == [99]
    late = pair.ctx.counters().get("late_frames", 0)
    assert len(pair.asker.heard) + late == 5
    assert pair.asker.heard == list(range(len(pair.asker.heard)))
    assert len(pair.server.seen) + pair.system.counters["late_frames"] + _in_mailbox(pair) >= 5


def _in_mailbox(pair: Pair) -> int:
    """Messages the dead server had received and not handled."""
    return len(pair.server_ctx._exchange.mailbox)  # type: ignore[attr-defined]


@pytest.mark.guarantee("B18")
def test_a_full_mailbox_turns_asks_away_and_drops_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sender is a faulty one: it does not keep to its credit."""
    monkeypatch.setattr("chipbus.bus.mailbox.WORK_BOUND", 20)
    monkeypatch.setattr("chipbus.bus.link.WORK_CREDIT_BYTES", 2**40)
    pair = Pair()
    for value in range(20):
        pair.ctx.tell("server", Number(value))
        pair.system._deliver("asker", "server", False)

    pair.ctx.tell("server", Number(-2))
    pair.asker.ask("server", Number(-3))
    pair.ctx.tell("server", Urgent(-4))
    for control in (False, False, True):
        pair.system._deliver("asker", "server", control)

    (error,) = pair.heard()
    assert type(error) is Overloaded
    assert str(error) == "the WORK mailbox of server is full"
    assert pair.server_ctx.counters() == {"dead_letters": 1, "overloaded_asks": 1}
    pair.run(lambda: len(pair.server.seen) == 21)
    assert -2 not in pair.server.seen


@pytest.mark.guarantee("B19")
def test_a_peer_that_takes_nothing_is_told_no_more_and_asks_wait_for_it_within_bounds() -> None:
    pair = Pair()
    for value in range(WORK_CREDIT):
        pair.ctx.tell("server", Number(value))
    with pytest.raises(MailboxFull, match="server has not taken the work that it was sent; at most 4096 messages"):
        pair.ctx.tell("server", Number(-1))
    pair.ctx.tell("server", Urgent(-2))

    for value in range(OUT_BOUND):
        pair.asker.ask("server", Number(value))
    refused = pair.asker.ask("server", Number(-3))
    pair.run(lambda: not refused.is_open)
    assert pair.asker.errors == [Overloaded]

    pair.run(lambda: len(pair.asker.heard) == 1 + OUT_BOUND)
    work = [value for value in pair.server.seen if value != -2]
    assert work == [*range(WORK_CREDIT), *range(OUT_BOUND)]


@pytest.mark.guarantee("B20")
@MODEST
@given(SEEDS)
def test_stop_overtakes_queued_work(seed: int) -> None:
    """Once the stop has been sent, no further message of work begins."""
    pair = Pair(seed)
    for value in range(200):
        pair.ctx.tell("server", Number(value))
    pair.run(lambda: len(pair.server.seen) == 3)

    pair.ctx.tell("server", Stop(0))
    pair.run(lambda: "stop" in pair.server.events)

    assert len(pair.server.seen) == 3


def test_lanes_are_served_by_priority() -> None:
    pair = Pair()
    pair.ctx.tell("server", Number(1))
    pair.ctx.tell("server", Urgent(2))
    for control in (False, True):
        pair.system._deliver("asker", "server", control)

    pair.run(lambda: len(pair.server.seen) == 2)

    assert pair.server.seen == [2, 1]


@pytest.mark.guarantee("B21")
def test_a_stopped_actor_answers_its_queue_with_peer_gone() -> None:
    pair = Pair()
    pair.asker.ask("server", Hold())
    pair.run(lambda: len(pair.server.calls) == 1)
    for _ in range(3):
        pair.asker.ask("server", Number(1))
    for _ in range(3):
        pair.system._deliver("asker", "server", False)

    pair.ctx.tell("server", Stop(0))

    assert len(pair.heard(4)) == 4
    assert pair.asker.errors == [PeerGone] * 4
    assert {str(error) for error in pair.asker.heard} == {"server stopped before it answered"}
    pair.run(lambda: pair.asker.events[-1] == "down server: stopped")
    assert pair.server.seen == []


def test_a_stopping_actor_hears_that_its_own_asks_end() -> None:
    pair = Pair()
    pair.asker.ask("server", Hold())
    pair.run(lambda: len(pair.server.calls) == 1)

    pair.ctx.stop()

    assert pair.asker.errors == [PeerGone]
    pair.run(lambda: pair.server.cancels != [])
    assert pair.server.cancels[0] in ("its caller stopped", "asker is gone: stopped")


@pytest.mark.guarantee("B22")
def test_a_held_stop_ends_when_the_actor_says_so_or_at_its_deadline() -> None:
    pair = Pair()
    pair.server.holds_stop = True
    pair.ctx.tell("server", Stop(0))
    pair.ctx.tell("server", Stop(0))
    pair.run(lambda: "stop" in pair.server.events)
    pair.asker.ask("server", Number(1))
    assert pair.heard() == [2]
    pair.server_ctx.stop()
    assert pair.system.incarnation("server") == 0
    assert pair.server.events.count("stop") == 1

    overdue = Pair()
    overdue.server.holds_stop = True
    now_ns = overdue.system.clock.now_ns()
    overdue.ctx.tell("server", Stop(now_ns + 10**9))
    overdue.run(lambda: overdue.system.incarnation("server") == 0)
    assert overdue.system.clock.now_ns() == now_ns + 10**9


@pytest.mark.guarantee("B23")
@pytest.mark.parametrize(("is_typed", "error", "text"), [
    (True, ContextTooLong, "7 tokens do not fit into 6"),
    (False, ChipbusError, "ZeroDivisionError('integer division or modulo by zero')"),
])  # fmt: skip
def test_an_exception_in_a_handler_fails_its_call_and_the_actor_lives_on(
    is_typed: bool, error: type, text: str
) -> None:
    pair = Pair()
    pair.asker.ask("server", Boom(is_typed))
    pair.ctx.tell("server", Boom(is_typed))
    pair.asker.ask("server", Number(1))

    assert pair.heard(2)[1] == 2
    assert (type(pair.asker.heard[0]), str(pair.asker.heard[0])) == (error, text)
    assert pair.server_ctx.counters() == {"handler_failures": 2}


def test_exceptions_in_callbacks_are_counted_and_the_actor_lives_on() -> None:
    pair = Pair()

    def boom(*_: object) -> None:
        raise RuntimeError("boom")

    pair.ctx.ask("server", Count(2), timeout_s=9, on_item=boom, on_reply=boom, on_error=boom)
    pair.ctx.after(0.5, boom)
    pair.ctx.call_soon_threadsafe(boom)
    pair.ctx.ask("nobody", Number(1), timeout_s=9, on_reply=boom, on_error=boom)

    pair.run(lambda: pair.ctx.counters().get("handler_failures") == 6)


def test_what_nobody_handles_is_refused_or_counted() -> None:
    pair = Pair()
    pair.asker.ask("server", Note())
    pair.ctx.tell("server", Note())

    (error,) = pair.heard()
    pair.run(lambda: pair.server_ctx.counters() == {"dead_letters": 2})

    assert type(error) is BusError
    assert str(error) == "server does not handle Note"


@pytest.mark.guarantee("B24")
def test_without_a_link_an_ask_fails_later_and_a_tell_at_once() -> None:
    pair = Pair()
    ask = pair.asker.ask("nobody", Number(1))

    assert ask.is_open
    assert pair.asker.heard == []
    assert pair.heard() == pair.asker.heard
    assert str(pair.asker.heard[0]) == "asker has no link to nobody"
    assert not ask.is_open
    with pytest.raises(PeerGone, match="asker has no link to nobody"):
        pair.ctx.tell("nobody", Number(1))


def test_an_ask_cancelled_before_its_error_was_delivered_is_not_heard_of() -> None:
    pair = Pair()
    pair.asker.ask("nobody", Number(1)).cancel()
    pair.asker.ask("server", Number(1))

    assert pair.heard() == [2]


def test_a_value_without_a_wire_form_fails_the_ask() -> None:
    pair = Pair()
    pair.asker.ask("server", Number(2**70))

    pair.heard()

    assert pair.asker.errors == [BadFrame]


@pytest.mark.guarantee("B25")
def test_messages_sent_before_the_link_is_up_wait_for_it() -> None:
    system = LocalSystem(0)
    server = Server()
    system.spawn("server", server)

    class Early(Asker):
        def on_start(self) -> None:
            self.ctx.tell("server", Number(1))
            self.ask("server", Number(2))

    early = Early()
    system.spawn("early", early, connect=("server",))
    system.run_until(lambda: early.heard == [3])

    assert server.seen == [1, 2]
    assert early.events == ["up server"]


@pytest.mark.guarantee("B26")
def test_a_ping_is_answered_by_the_node_with_the_actors_progress() -> None:
    pair = Pair()
    pongs: list[tuple[str, int]] = []

    class Watcher(Actor):
        @handles(Pong)
        def _pong(self, message: Pong, _: None) -> None:
            pongs.append((self.ctx.sender, message.progress))

    watcher = Watcher()
    pair.system.spawn("watcher", watcher, connect=("server",))
    pair.ctx.tell("server", Number(1))
    pair.run(lambda: pair.server.seen == [1])
    watcher.ctx.tell("server", Ping())
    pair.asker.ask("server", Ping())

    assert pair.heard() == [Pong(1)]
    pair.run(lambda: pongs == [("server", 1)])


def test_timers_fire_in_virtual_time_and_can_be_cancelled() -> None:
    pair = Pair()
    now_ns = pair.system.clock.now_ns
    began_ns, fired = now_ns(), []
    pair.ctx.after(2.0, lambda: fired.append(now_ns() - began_ns))
    pair.ctx.after(1.0, lambda: fired.append(now_ns() - began_ns))
    pair.ctx.after(1.5, lambda: fired.append(-1)).cancel()

    pair.run(lambda: len(fired) == 2)

    assert fired == [1_000_000_000, 2_000_000_000]


def test_descriptors_cannot_be_watched_in_one_process() -> None:
    pair = Pair()
    with pytest.raises(BusError, match="no descriptors"):
        pair.ctx.watch(0, lambda: None)
    with pytest.raises(BusError, match="no descriptors"):
        pair.ctx.unwatch(0)


def test_run_until_names_what_is_open_when_time_is_up() -> None:
    pair = Pair()
    pair.asker.ask("server", Hold(), timeout_s=100)
    began_ns = pair.system.clock.now_ns()

    with pytest.raises(DeadlineExceeded, match=r"5 virtual seconds passed; open: asker waits for server \(Hold\)"):
        pair.run(lambda: False, limit_s=5)

    assert pair.system.clock.now_ns() == began_ns + 5_000_000_000


def test_run_until_ends_when_virtual_time_stands_still(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chipbus.bus.local.MAX_STEPS_PER_INSTANT", 1000)
    pair = Pair()

    def again(_: object = None) -> None:
        pair.ctx.ask("server", Number(1), timeout_s=9, on_reply=again, on_error=print)

    again()

    with pytest.raises(DeadlineExceeded, match="virtual time stands still"):
        pair.run(lambda: False)


def test_names_are_taken_by_the_living_only() -> None:
    pair = Pair()
    with pytest.raises(ValueError, match="server is alive already"):
        pair.system.spawn("server", Server())
    pair.system.kill("server", "test")
    assert pair.system.spawn("server", Server()).incarnation == 2


def test_what_on_start_raises_is_raised_by_spawn_and_nobody_is_linked() -> None:
    class Broken(Actor):
        def on_start(self) -> None:
            raise ContextTooLong("no")

    pair = Pair()
    with pytest.raises(ContextTooLong):
        pair.system.spawn("broken", Broken(), connect=("server",))
    pair.run(lambda: pair.system._step() is False)

    assert pair.system.incarnation("broken") == 0
    assert "up broken" not in pair.server.events


@pytest.mark.guarantee("B27")
def test_random_numbers_come_from_seed_name_and_incarnation() -> None:
    def draw(seed: int, name: str, lives: int = 1) -> float:
        system = LocalSystem(seed)
        for _ in range(lives - 1):
            system.spawn(name, Server())
            system.kill(name, "test")
        return system.spawn(name, Server()).random.random()

    assert draw(1, "a") == draw(1, "a")
    assert len({draw(1, "a"), draw(2, "a"), draw(1, "b"), draw(1, "a", lives=2)}) == 4


@pytest.mark.guarantee("B33")
@MODEST
@given(SEEDS, ACTIONS)
def test_every_ask_ends_exactly_once_whatever_happens(seed: int, actions: list[tuple[str, int]]) -> None:
    """Random asks, cancels, deaths and restarts: afterwards nothing is open, and nothing was heard twice."""
    system = LocalSystem(seed)
    asker = Asker()
    system.spawn("asker", asker, connect=("server",))
    system.spawn("server", Server())
    ends: dict[int, list[str]] = {}
    asks, cancelled = [], set()

    def ask(message: object) -> None:
        number = len(asks)
        ends[number] = []
        asks.append(
            asker.ctx.ask(
                "server", message, timeout_s=5, on_reply=lambda _: ends[number].append("reply"),
                on_error=lambda _: ends[number].append("error"), on_item=lambda _: None,
            )
        )  # fmt: skip

    for action, number in actions:
        if action in ("ask", "hold", "count"):
            ask({"ask": Number(number), "hold": Hold(), "count": Count(number)}[action])
        elif action == "cancel" and asks:
            chosen = asks[number % len(asks)]
            if chosen.is_open:
                cancelled.add(number % len(asks))
            chosen.cancel()
        elif action == "kill" and system.incarnation("server"):
            system.kill("server", "test")
        elif action == "spawn" and not system.incarnation("server"):
            system.spawn("server", Server())
        for _ in range(number if action == "step" else 0):
            system._step()
    system.run_until(lambda: not any(ask.is_open for ask in asks), limit_s=6)
    system.run_until(lambda: system._step() is False)

    for number, heard in ends.items():
        assert len(heard) == (0 if number in cancelled else 1), (number, heard)
    system.run_until(lambda: len(system._seats["asker"].exchange.timers) == 0)
    for seat in system._seats.values():
        for link in seat.exchange.peers.links.values():
            assert (link.asks, link.calls, link.cancelled) == ({}, {}, set())


def test_a_call_whose_answer_finds_its_queue_full_is_cancelled_and_its_asker_finds_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pair = Pair()
    pair.asker.ask("server", Hold(), timeout_s=30)
    pair.run(lambda: len(pair.server.calls) == 1)
    (call,) = pair.server.calls

    with monkeypatch.context() as patched:
        patched.setattr("chipbus.bus.exchange.ANSWER_BOUND", 5)
        for value in range(7):
            call.item(Number(value))

    assert not call.is_open
    assert pair.server.cancels == ["5 messages wait to be sent to asker; at most 5 may"]
    assert pair.server_ctx.counters() == {"streams_overrun": 1, "late_answers": 1}
    assert [type(answer) for answer in pair.heard(6)] == [int] * 5 + [AnswerLost]


def test_a_call_ends_at_its_deadline_also_when_its_caller_cannot_say_so() -> None:
    pair = Pair()
    pair.asker.ask("server", Hold(), timeout_s=3)
    pair.run(lambda: len(pair.server.calls) == 1)
    pair.system._seats["asker"].exchange.timers.next_due_ns = lambda: None  # type: ignore[method-assign]

    pair.run(lambda: pair.server.cancels == ["its deadline passed"], limit_s=4)


def test_answers_received_before_a_peers_end_are_heard() -> None:
    pair = Pair()
    pair.asker.ask("server", Count(3))
    pair.run(lambda: len(pair.system._seats["server"].exchange.mailbox) == 1)
    pair.system._seats["server"]._serve()
    while pair.system.channel("server", "asker", False):
        pair.system._deliver("server", "asker", False)
    assert pair.asker.heard == []

    pair.ctx.peer_down("server", 1, "gone")

    assert pair.asker.heard == [0, 1, 2, -1]


def test_the_mailbox_counts_what_it_holds() -> None:
    pair = Pair()
    for value in range(3):
        pair.ctx.tell("server", Number(value))
        pair.asker.ask("server", Urgent(value))
    for control in (True, False) * 3:
        pair.system._deliver("asker", "server", control)
    mailbox = pair.system._seats["server"].exchange.mailbox

    assert len(mailbox) == 6
    assert mailbox.pop(control_only=True) is not None
    assert len(mailbox) == 5


def test_asks_that_wait_for_a_link_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chipbus.bus.peers.OUT_BOUND", 2)
    pair = Pair()

    def ask() -> Any:
        return pair.ctx.ask(
            "absent", Number(1), timeout_s=5, on_reply=print, on_error=pair.asker.heard.append, wait_for_link=True
        )

    first = [ask(), ask()]
    ask()
    assert pair.asker.heard == []
    pair.heard()
    assert pair.asker.errors == [PeerGone]
    first[0].cancel()
    assert ask().is_open
    pair.heard(3)
    assert pair.asker.errors == [PeerGone, DeadlineExceeded, DeadlineExceeded]


def test_what_waits_for_a_link_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chipbus.bus.exchange.OUT_BOUND", 2)
    refused = []

    class Early(Asker):
        def on_start(self) -> None:
            self.ctx.tell("server", Number(1))
            self.ctx.tell("server", Number(2))
            with pytest.raises(MailboxFull, match="2 messages wait for the link to server; at most 2"):
                self.ctx.tell("server", Number(3))
            refused.append(3)

    system = LocalSystem(0)
    server = Server()
    system.spawn("server", server)
    system.spawn("early", Early(), connect=("server",))
    system.run_until(lambda: server.seen == [1, 2])

    assert refused == [3]


def test_a_cancel_that_finds_its_queue_full_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair()
    ask = pair.asker.ask("server", Hold())
    monkeypatch.setattr("chipbus.bus.exchange.ANSWER_BOUND", 0)

    ask.cancel()

    assert pair.ctx.counters() == {"dead_letters": 1}
