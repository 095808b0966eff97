"""A hostile process of the same user: what it sends is counted, said and answered, and real peers notice nothing."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from bus_actors import Asker, Number, Server

from chipbus.bus import Node, NodeConfig
from chipbus.bus.envelope import Kind
from chipbus.bus.identity import Caller
from chipbus.bus.registry import decode
from chipbus.errors import ConfigError, PeerGone
from support import eventually

PROGRAMS = Path(__file__).parent / "programs"
HALF_OPEN = 256
FLOOD = 1500


class Program:
    """One of the programs beside this file, in a process that ends with its input."""

    def __init__(self, name: str, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(PROGRAMS / name), *arguments],
            env={**os.environ, "PYTHONPATH": str(PROGRAMS.parents[1])},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    @property
    def pid(self) -> int:
        return self.process.pid

    def line(self) -> str:
        """The next line it prints."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def asks(self, number: int) -> str:
        """What the friend is answered when it asks the server."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{number}\n")
        self.process.stdin.flush()
        return self.line()

    def end(self) -> None:
        self.process.communicate(timeout=20)
        assert self.process.returncode == 0


@pytest.fixture
def program(nodes: Any) -> Iterator[Callable[..., Program]]:
    made: list[Program] = []

    def make(name: str, *arguments: str) -> Program:
        eventually(lambda: (nodes.run_dir / "server.1.c").exists(), "the inbox is bound")
        made.append(Program(name, str(nodes.run_dir), *arguments))
        return made[-1]

    yield make
    for one in made:
        if one.process.returncode is None:
            one.process.communicate(timeout=20)
    for path in nodes.run_dir.glob("friend.*"):  # of one that was killed
        path.unlink()


@pytest.fixture
def befriend(program: Callable[..., Program]) -> Callable[[], Program]:
    """A real peer, linked with the server."""

    def make() -> Program:
        friend = program("friend.py")
        assert friend.line() == "up"
        return friend

    return make


def counted(caplog: pytest.LogCaptureFixture, counter: str) -> list[str]:
    return [r.getMessage() for r in caplog.records if f"counter='{counter}'" in r.getMessage()]


@pytest.mark.guarantee("B60")
@pytest.mark.parametrize(
    ("attack", "counter", "number", "answer", "said"),
    [
        ("junk", "foreign_frames", 1000, None, "error="),
        ("several_parts", "foreign_frames", 100, None, "error='a message of several parts'"),
        ("forged_pid", "refused_links", 2, "pid {parent} in its hello, but the kernel says {pid}", "reason="),
        ("name_of_a_living_peer", "refused_links", 2, "incarnation 1 of friend is linked already", "life=1"),
        (
            "younger_life_of_a_living_peer", "refused_links", 2,
            "incarnation 1 of friend is linked and lives, as process {friend}", "life=7",
        ),
        ("name_that_is_not_expected", "refused_links", 2, "nobody named nobody is expected here", "peer='nobody'"),
        ("other_senders", "late_frames", 20, None, "from_incarnation="),
        (
            "half_open_hellos", "half_links_dropped", FLOOD - HALF_OPEN,
            f"{HALF_OPEN} links are half open, most of them by process {{pid}}", "reason=",
        ),
    ],
)  # fmt: skip
def test_a_hostile_process_is_counted_named_and_answered_while_real_peers_are_served(
    nodes: Any,
    program: Callable[..., Program],
    befriend: Callable[[], Program],
    caplog: pytest.LogCaptureFixture,
    attack: str,
    counter: str,
    number: int,
    answer: str | None,
    said: str,
) -> None:
    server = Server()
    nodes.start("server", server, expects=frozenset({"friend", "stranger", *(f"half.{n}" for n in range(FLOOD))}))
    friend = befriend()

    hostile = program("hostile.py", "server", attack)
    eventually(lambda: server.ctx.counters().get(counter, 0) >= 1, "the attack has begun")
    assert friend.asks(1) == "2"  # while it goes on
    reasons = json.loads(hostile.line())

    eventually(lambda: dict(server.ctx.counters()) == {counter: number}, f"{counter}, not {server.ctx.counters()}")
    pids = {"pid": hostile.pid, "parent": os.getpid(), "friend": friend.pid}
    expected = None if answer is None else "server refused the link: " + answer.format(**pids)
    assert set(reasons) == (set() if expected is None else {expected})
    assert len(reasons) == (0 if expected is None else number)
    first = counted(caplog, counter)[0]
    assert said in first
    if counter != "late_frames":
        assert f"sender='process {hostile.pid}'" in first
        assert re.search("socket='(data|control)'", first)
    assert friend.asks(1) == "2"
    assert 666 not in server.seen
    hostile.end()
    assert friend.asks(1) == "2"


@pytest.mark.guarantee("B61")
def test_the_two_hellos_of_a_link_come_from_one_process(
    nodes: Any, stranger: Callable[..., Any], program: Callable[..., Program]
) -> None:
    server = Server()
    nodes.start("server", server)
    peer = stranger("server", name="slow")
    hostile = program("hostile.py", "server", "other_half_of_a_peers_hello")
    eventually(lambda: server.ctx.counters().get("foreign_frames") == 1, "the other half was said")

    peer.hello(only=peer.data)
    peer.data.send(peer.record(Kind.TELL, Number(1), correlation=1))
    eventually(lambda: server.ctx.counters().get("foreign_frames") == 2, "not linked, with another's control socket")
    assert server.events == ["start"]
    peer.hello(only=peer.control)

    assert peer.first_answer(peer.control)[0].kind == Kind.WELCOME
    assert json.loads(hostile.line()) == []
    hostile.end()


@pytest.mark.guarantee("B62")
def test_a_younger_life_replaces_one_whose_process_has_ended(
    nodes: Any, stranger: Callable[..., Any], befriend: Callable[[], Program]
) -> None:
    server = Server()
    nodes.start("server", server)
    friend = befriend()
    friend.process.kill()
    os.waitid(os.P_PID, friend.pid, os.WEXITED | os.WNOWAIT)  # a zombie from here on: ended all the same

    peer = stranger("server", name="friend")
    peer.hello(incarnation=2)

    assert peer.first_answer(peer.data)[0].kind == Kind.WELCOME
    eventually(lambda: server.events[-1] == "up friend", "it is linked")
    assert server.events[-2:] == ["down friend: replaced by incarnation 2", "up friend"]


def test_a_peer_we_connect_to_ourselves_is_not_replaced_by_a_claim(nodes: Any, stranger: Callable[..., Any]) -> None:
    server, asker = Server(), Asker()
    nodes.start("server", server)
    nodes.start("asker", asker, ("server", 1))
    eventually(lambda: asker.events == ["up server"], "the link")
    peer = stranger("asker", name="server")

    peer.hello(incarnation=2)

    envelope, body = peer.first_answer(peer.data)
    assert envelope.kind == Kind.REFUSE
    assert "asker itself connects to server" in decode(envelope.type_id, body).text
    assert asker.events == ["up server"]


@pytest.mark.guarantee("B63")
def test_a_node_does_not_connect_through_a_run_directory_others_may_enter(
    nodes: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """At bind, before a run, and at a connect later: its owner, its mode, and that it is no link."""
    server, asker = Server(), Asker()
    nodes.start("server", server)
    asking = nodes.start("asker", asker)
    asking.do(lambda: None)
    eventually(lambda: server.events == ["start"], "both run")
    nodes.run_dir.chmod(0o711)

    def connect() -> None:
        asker.ctx.connect("server", 1)
        asker.ask("server", Number(1))

    asking.do(connect)
    eventually(lambda: asker.errors == [PeerGone], "the ask failed")
    nodes.run_dir.chmod(0o700)
    assert "mode 0711; it must be ours, mode 0700" in str(asker.heard[0])
    assert any("event='link.failed'" in r.getMessage() for r in caplog.records)
    assert server.events == ["start"]

    link = nodes.run_dir / "link"
    link.symlink_to(nodes.run_dir)
    with pytest.raises(ConfigError, match="is no directory"):
        Node(NodeConfig(name="a", incarnation=1, run_dir=link), Asker())
    link.unlink()


def test_a_process_is_alive_until_it_has_ended_and_another_of_its_pid_is_not_it() -> None:
    started = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]

    assert Caller(os.geteuid(), os.getpid(), started).is_alive
    assert not Caller(os.geteuid(), os.getpid(), "1").is_alive
    assert not Caller(os.geteuid(), os.getpid(), "").is_alive
