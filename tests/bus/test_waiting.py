"""Asks that wait for a link: the peer is being started, or restarted."""

from __future__ import annotations

import attrs
import pytest
from bus_actors import Number, Server

from chipbus.bus import Actor, Ask, LocalSystem
from chipbus.errors import ChipbusError, DeadlineExceeded, PeerGone


@attrs.define
class Heard:
    """What came back for one ask."""

    ask: Ask | None = None
    replies: list[object] = attrs.field(factory=list)
    errors: list[ChipbusError] = attrs.field(factory=list)


class Waiter(Actor):
    """Binds; asks a server that may not be there yet."""

    def ask_server(self, value: int, *, timeout_s: float = 5.0) -> Heard:
        heard = Heard()
        heard.ask = self.ctx.ask(
            "server",
            Number(value),
            timeout_s=timeout_s,
            on_reply=heard.replies.append,
            on_error=heard.errors.append,
            wait_for_link=True,
        )
        return heard


@pytest.mark.guarantee("B45")
def test_an_ask_that_waits_for_a_link_is_sent_when_it_comes_up_and_fails_at_its_deadline_if_none_does() -> None:
    system = LocalSystem(seed=1)
    waiter, server = Waiter(), Server()
    system.spawn("waiter", waiter)
    hurried, patient, cancelled = waiter.ask_server(1, timeout_s=1.0), waiter.ask_server(2), waiter.ask_server(3)
    assert cancelled.ask is not None
    cancelled.ask.cancel()

    system.run_until(lambda: bool(hurried.errors))
    assert isinstance(hurried.errors[0], DeadlineExceeded)
    assert "no link" in str(hurried.errors[0])
    system.spawn("server", server, connect=("waiter",))
    system.run_until(lambda: bool(patient.replies))

    assert patient.replies == [Number(3)]
    assert server.seen == [2]
    assert (cancelled.replies, cancelled.errors) == ([], [])


def test_an_ask_that_waits_outlives_the_peers_death_only_if_it_was_not_sent() -> None:
    system = LocalSystem(seed=2)
    waiter = Waiter()
    system.spawn("waiter", waiter)
    system.spawn("server", Server(), connect=("waiter",))
    system.run_until(lambda: "server" in waiter.ctx.peers())
    sent = waiter.ask_server(1)
    system.kill("server", "signal 9 (SIGKILL)")
    system.run_until(lambda: bool(sent.errors) or bool(sent.replies))
    waiting = waiter.ask_server(5)
    system.spawn("server", Server(), connect=("waiter",))
    system.run_until(lambda: bool(waiting.replies))

    assert all(isinstance(error, PeerGone) for error in sent.errors)
    assert waiting.replies == [Number(6)]


def test_a_node_that_stops_ends_what_waits() -> None:
    system = LocalSystem(seed=3)
    waiter = Waiter()
    system.spawn("waiter", waiter)
    waiting = waiter.ask_server(1)

    waiter.ctx.stop()
    system.run_until(lambda: bool(waiting.errors))

    assert isinstance(waiting.errors[0], PeerGone)
