"""Real nodes on ipc sockets, each in a thread of its own."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bus_actors import Asker, Count, Hold, Number, Server, Sheet, Slow, Urgent

from chipbus.bus import Actor, Node, NodeConfig, PeerDown, PeerUp, Ping, Pong, Stop, read_ledger
from chipbus.bus.link import OUT_BOUND
from chipbus.errors import BadFrame, BusError, ConfigError, ContextTooLong, MailboxFull, PeerGone
from support import descriptors, eventually


def linked(nodes: Any, server: Server, asker: Asker) -> tuple[Any, Any]:
    """A server and an asker that is connected to it."""
    serving = nodes.start("server", server)
    asking = nodes.start("asker", asker, ("server", 1))
    eventually(lambda: asker.events == ["up server"] and "up asker" in server.events, "the link is up")
    return serving, asking


def test_asks_tells_and_streams_cross_the_sockets(nodes: Any) -> None:
    server, asker = Server(), Asker()
    _, asking = linked(nodes, server, asker)
    sheet = Sheet(text="x" * 10_000, data=bytes(3_000_000), tokens=bytes(400), flag=True)

    def talk() -> None:
        asker.ctx.tell("server", Number(7))
        asker.ask("server", Number(1))
        asker.ask("server", Count(3))
        asker.ask("server", sheet)
        asker.ask("server", Urgent(5))

    asking.do(talk)

    eventually(lambda: len(asker.heard) == 7, "all answers")
    assert [a for a in asker.heard if a != 6] == [2, 0, 1, 2, -1, sheet]
    assert server.seen in ([7, 1, 5], [5, 7, 1], [7, 5, 1])
    assert asker.ctx.counters() == {}


@pytest.mark.guarantee("B36")
def test_a_burst_beyond_every_queue_arrives_whole_and_in_order(nodes: Any) -> None:
    """Pressure goes back to the sender: what ``tell`` accepted is not lost at the receiver."""
    server, asker = Server(), Asker()
    _, asking = linked(nodes, server, asker)
    total = 30_000
    refused = []

    def burst(value: int = 0) -> None:
        while value < total:
            try:
                asker.ctx.tell("server", Number(value))
            except MailboxFull:
                refused.append(value)
                asker.ctx.after(0.0, lambda value=value: burst(value))  # type: ignore[misc]
                return
            value += 1

    asking.do(burst)

    eventually(lambda: len(server.seen) == total, "all numbers", within_s=30)
    assert server.seen == list(range(total))
    assert refused
    assert server.ctx.counters() == {}


@pytest.mark.guarantee("B43")
def test_a_stop_is_not_held_up_by_a_full_data_lane(nodes: Any) -> None:
    server, asker = Server(), Asker()
    serving, asking = linked(nodes, server, asker)
    release, entered = threading.Event(), threading.Event()
    server.block = lambda: (entered.set(), release.wait(10))
    asking.do(lambda: asker.ctx.tell("server", Slow()))
    assert entered.wait(10)

    def flood() -> None:
        with contextlib.suppress(MailboxFull):
            for value in range(OUT_BOUND + 1):
                asker.ctx.tell("server", Number(value))

    for _ in range(3):
        asking.do(flood)
    asking.do(lambda: asker.ctx.tell("server", Stop(0)))
    asking.do(lambda: None)  # the turn before has ended: the stop is sent
    release.set()

    serving.thread.join(10)
    assert not serving.thread.is_alive()
    assert "stop" in server.events
    assert len(server.seen) < 9000


def test_what_is_said_before_the_peer_has_bound_waits_for_it(nodes: Any) -> None:
    class Early(Asker):
        def on_start(self) -> None:
            self.ctx.tell("server", Number(1))
            self.ask("server", Number(2))

    server, early = Server(), Early()
    nodes.start("early", early, ("server", 1))
    nodes.start("server", server)

    eventually(lambda: early.heard == [3], "the answer")
    assert server.seen == [1, 2]


def test_peer_down_fails_asks_cancels_calls_and_fences_that_life(nodes: Any) -> None:
    server, asker, directory = Server(), Asker(), Actor()
    serving, asking = linked(nodes, server, asker)
    telling = nodes.start("directory", directory, ("server", 1), ("asker", 1))
    asking.do(lambda: asker.ask("server", Hold()))
    eventually(lambda: len(server.calls) == 1, "the call")
    eventually(lambda: dict(directory.ctx.peers()) == {"server": 1, "asker": 1}, "both links")

    telling.do(lambda: directory.ctx.tell("asker", PeerDown("server", 1, "signal 9 (SIGKILL)")))
    telling.do(lambda: directory.ctx.tell("server", PeerDown("asker", 1, "exit code 1")))

    eventually(lambda: asker.errors == [PeerGone], "the ask failed")
    eventually(lambda: server.cancels == ["asker is gone: exit code 1"], "the call was cancelled")
    assert asker.events == ["up server", "up directory", "down server: signal 9 (SIGKILL)"]
    telling.do(lambda: directory.ctx.tell("asker", PeerUp("server", 1)))
    asking.do(lambda: None)
    assert "server" not in asker.ctx.peers()
    serving.stop()

    again = Server()
    nodes.start("server", again, incarnation=2)
    telling.do(lambda: directory.ctx.tell("asker", PeerUp("server", 2)))
    eventually(lambda: asker.events[-1] == "up server", "the second life is linked")
    asking.do(lambda: asker.ask("server", Number(1)))
    eventually(lambda: asker.heard[-1] == 2, "its answer")


@pytest.mark.guarantee("B28")
def test_last_words_arrive_before_a_stopped_node_is_gone(nodes: Any) -> None:
    class Farewell(Server):
        def on_stop(self) -> None:
            for value in range(1000):
                self.ctx.tell("asker", Number(value, bytes(5000)))

    server, asker = Farewell(), Asker()
    serving, asking = linked(nodes, server, asker)

    asking.do(lambda: asker.ctx.tell("server", Stop(0)))

    serving.thread.join(10)
    assert not serving.thread.is_alive()
    eventually(lambda: len(asker.heard) == 1000, "the last words")
    assert asker.heard == list(range(1000))


def test_a_node_that_waits_for_a_link_that_never_comes_still_stops(nodes: Any) -> None:
    class Hopeful(Actor):
        def on_start(self) -> None:
            self.ctx.tell("nobody", Number(1))

    running = nodes.start("hopeful", Hopeful(), ("nobody", 1))
    eventually(lambda: (nodes.run_dir / "hopeful.1.d").exists(), "bound")
    began_s = time.monotonic()

    running.stop()

    assert time.monotonic() - began_s < 4


@pytest.mark.guarantee("B29")
def test_what_on_start_raises_ends_the_node_and_leaves_nothing(run_dir: Path) -> None:
    class Broken(Actor):
        def on_start(self) -> None:
            raise ContextTooLong("no")

    before = descriptors()
    with pytest.raises(ContextTooLong):
        Node(NodeConfig(name="broken", incarnation=1, run_dir=run_dir), Broken()).run()

    assert list(run_dir.iterdir()) == []
    assert descriptors() == before


def test_a_second_inbox_of_the_same_life_is_refused(nodes: Any) -> None:
    nodes.start("server", Server())
    eventually(lambda: (nodes.run_dir / "server.1.d").exists(), "bound")

    with pytest.raises(BusError, match="has an inbox already"):
        Node(NodeConfig(name="server", incarnation=1, run_dir=nodes.run_dir), Server()).run()

    asker = Asker()
    asking = nodes.start("asker", asker, ("server", 1))
    asking.do(lambda: asker.ask("server", Number(1)))
    eventually(lambda: asker.heard == [2], "the first one still answers")


@pytest.mark.guarantee("B5")
def test_a_node_refuses_an_open_run_directory_and_umask_does_not_matter(nodes: Any, tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    with pytest.raises(ConfigError, match="mode 0755"):
        Node(NodeConfig(name="server", incarnation=1, run_dir=tmp_path), Server())
    before = os.umask(0)
    try:
        linked(nodes, Server(), Asker())
    finally:
        os.umask(before)
    assert nodes.run_dir.stat().st_mode & 0o777 == 0o700


@pytest.mark.guarantee("B30")
def test_other_threads_can_wake_a_node_and_late_wakes_do_nothing(nodes: Any) -> None:
    actor = Actor()
    running = nodes.start("woken", actor)
    called: list[int] = []

    def post(start: int) -> None:
        for number in range(start, start + 500):
            actor.ctx.call_soon_threadsafe(lambda number=number: called.append(number))  # type: ignore[misc]

    threads = [threading.Thread(target=post, args=(start,)) for start in (0, 1000)]
    for thread in threads:
        thread.start()
    eventually(lambda: len(called) == 1000, "all calls")
    for thread in threads:
        thread.join()

    assert [n for n in called if n < 1000] == list(range(500))
    running.stop()
    actor.ctx.call_soon_threadsafe(lambda: called.append(-1))
    assert -1 not in called


def test_a_watched_descriptor_is_served_until_it_is_unwatched(nodes: Any) -> None:
    actor = Asker()
    running = nodes.start("watcher", actor)
    read_fd, write_fd = os.pipe()
    seen: list[bytes] = []
    running.do(lambda: actor.ctx.watch(read_fd, lambda: seen.append(os.read(read_fd, 1))))

    os.write(write_fd, b"ab")
    eventually(lambda: seen == [b"a", b"b"], "two bytes")
    running.do(lambda: actor.ctx.unwatch(read_fd))
    running.do(lambda: actor.ctx.unwatch(read_fd))
    os.write(write_fd, b"c")
    running.do(lambda: None)
    running.do(lambda: None)

    assert seen == [b"a", b"b"]
    os.close(read_fd)
    os.close(write_fd)


@pytest.mark.guarantee("B31")
def test_a_busy_descriptor_and_bursts_do_not_stall_messages(nodes: Any) -> None:
    """No wake-up is lost beside a descriptor that is always readable (pyzmq issue 2173)."""
    server, asker = Server(), Asker()
    serving, asking = linked(nodes, server, asker)
    read_fd, write_fd = os.pipe()
    os.write(write_fd, b"x")
    for running in (serving, asking):
        running.do(lambda running=running: running.actor.ctx.watch(read_fd, lambda: None))  # type: ignore[misc]
    slowest_s = 0.0
    for round_number in range(60):
        began_s, count = time.monotonic(), 1 + 37 * (round_number % 3)
        asking.do(lambda count=count: [asker.ask("server", Number(0)) for _ in range(count)])
        eventually(lambda count=count: len(asker.heard) == count, "answers")  # type: ignore[misc]
        slowest_s = max(slowest_s, time.monotonic() - began_s)
        asker.heard.clear()
    for running in (serving, asking):
        running.do(lambda running=running: running.actor.ctx.unwatch(read_fd))  # type: ignore[misc]
    os.close(read_fd)
    os.close(write_fd)

    assert slowest_s < 2.0  # a lost wake-up lasts for ever: there is no timer here


def test_timers_of_a_node_fire_and_pings_are_answered(nodes: Any) -> None:
    server, asker = Server(), Asker()
    _, asking = linked(nodes, server, asker)
    fired: list[float] = []
    began_s = time.monotonic()
    asking.do(lambda: asker.ctx.after(0.05, lambda: fired.append(time.monotonic() - began_s)))
    asking.do(lambda: asker.ask("server", Ping()))

    eventually(lambda: len(fired) == 1, "the timer")
    assert 0.05 <= fired[0] < 2
    eventually(lambda: asker.heard == [Pong(0)], "the pong")


@pytest.mark.guarantee("L1")
def test_a_recorded_node_writes_every_envelope_it_sends_and_receives(nodes: Any, tmp_path: Path) -> None:
    server, asker = Server(), Asker()
    serving = nodes.start("server", server, record=tmp_path)
    asking = nodes.start("asker", asker, ("server", 1), record=tmp_path)
    eventually(lambda: asker.events == ["up server"], "the link")
    asking.do(
        lambda: asker.ctx.ask(
            "server", Count(2), timeout_s=9, trace_id=b"\xab" * 16, on_reply=asker.heard.append, on_error=print
        )
    )
    eventually(lambda: len(asker.heard) == 1, "the reply")
    asking.stop()
    serving.stop()

    def told(name: str) -> list[tuple[str, str, str]]:
        ledger = read_ledger(tmp_path / f"{name}.1.ledger")
        entries = [entry for entry in ledger if entry.kind == "message"]
        assert not ledger.torn
        traced = [entry for entry in entries if entry.fields["trace_id"] == "ab" * 16]
        assert {entry.fields["correlation"] for entry in traced} == {1}
        assert all(entry.fields["deadline_ns"] > 0 for entry in traced if entry.fields["kind"] == "ASK")
        return [(entry.fields["direction"], entry.fields["kind"], entry.fields["type"]) for entry in traced]

    there = [("ASK", "Count"), ("STREAM", "Number"), ("STREAM", "Number"), ("REPLY", "Number")]
    assert told("asker") == [("out" if kind == "ASK" else "in", kind, name) for kind, name in there]
    assert told("server") == [("in" if kind == "ASK" else "out", kind, name) for kind, name in there]
    hellos = [e.fields["kind"] for e in read_ledger(tmp_path / "asker.1.ledger") if e.fields.get("type") == "Hello"]
    assert hellos == ["HELLO", "HELLO"]


def test_a_message_over_the_limit_is_refused_where_it_is_sent(nodes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chipbus.bus.registry.MAX_BODY_BYTES", 1000)
    server, asker = Server(), Asker()
    _, asking = linked(nodes, server, asker)
    errors: list[Exception] = []

    def talk() -> None:
        try:
            asker.ctx.tell("server", Number(1, bytes(1001)))
        except BadFrame as error:
            errors.append(error)
        asker.ask("server", Number(2))

    asking.do(talk)

    eventually(lambda: asker.heard == [3], "the next answer")
    assert "at most 1000 fit into a message" in str(errors[0])


def test_a_recording_that_cannot_be_made_is_refused_before_anything_runs(run_dir: Path, tmp_path: Path) -> None:
    make: Callable[[], Node] = lambda: Node(  # noqa: E731
        NodeConfig(name="server", incarnation=1, run_dir=run_dir, record=tmp_path), Server()
    )
    first = make()
    with pytest.raises(ConfigError, match="exists; record each run into a directory of its own"):
        make()
    assert first.ledger is not None
    first.ledger.close()
