"""What is too long, and what there is too little of: refused by name and number, never a crash, never a silence."""

from __future__ import annotations

import errno
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
from bus_actors import Asker, Hold, Number, Server

from chipbus.bus import Node, NodeConfig
from chipbus.bus.envelope import MAX_BODY_BYTES, Kind
from chipbus.bus.shortages import require_descriptors
from chipbus.errors import BadFrame, ConfigError, PeerGone, StartFailed
from support import descriptors, eventually


@pytest.fixture
def short_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sockets take frames of up to 10,000 bytes, and broken links end after a tenth of a second."""
    monkeypatch.setattr("chipbus.bus.node.MAX_FRAME_BYTES", 10_000)
    monkeypatch.setattr("chipbus.bus.node.BROKEN_NS", 100_000_000)


@pytest.mark.guarantee("B64")
@pytest.mark.usefixtures("short_frames")
def test_a_frame_that_is_too_long_never_reaches_python_and_ends_its_link_at_both_ends(
    nodes: Any, caplog: pytest.LogCaptureFixture
) -> None:
    server, asker = Server(), Asker()
    serving, asking = nodes.start("server", server), nodes.start("asker", asker, ("server", 1))
    asking.do(lambda: asker.ask("server", Hold()))
    eventually(lambda: len(server.calls) == 1, "the call")

    asking.do(lambda: asker.ask("server", Number(1, bytes(20_000))))

    eventually(lambda: asker.errors == [PeerGone, PeerGone], "both asks failed, long before their deadline")
    reason = "its connection broke: it closed it, or a frame was over 10000 bytes"
    assert {str(error) for error in asker.heard} == {f"server (incarnation 1) is gone: {reason}"}
    assert asker.ctx.counters() == {"broken_links": 1}
    assert asker.events == ["up server", f"down server: {reason}"]
    serving.do(lambda: server.ctx.tell("asker", Number(2)))
    eventually(
        lambda: server.cancels == [f"asker is gone: {reason}"], "the other end noticed when it had to say something"
    )
    assert server.ctx.counters()["broken_links"] == 1
    assert server.ctx.counters().keys() <= {"broken_links", "dead_letters"}
    assert server.seen == []
    said = [r.getMessage() for r in caplog.records if "counter='broken_links'" in r.getMessage()]
    assert ["peer='server' life=1" in text or "peer='asker' life=1" in text for text in said] == [True, True]


@pytest.mark.usefixtures("short_frames")
def test_a_frame_of_a_stranger_that_is_too_long_never_reaches_python(nodes: Any, stranger: Callable[..., Any]) -> None:
    server = Server()
    nodes.start("server", server)
    peer = stranger("server")
    peer.data.send(peer.record(Kind.TELL, Number(1, bytes(20_000)), correlation=1))

    def is_heard() -> bool:
        peer.data.send(b"junk")  # what was sent before libzmq has connected again is lost with the long frame
        return server.ctx.counters().get("foreign_frames", 0) > 0

    eventually(is_heard, "a short frame on the next connection")
    assert set(server.ctx.counters()) == {"foreign_frames"}
    assert server.events == ["start"]


@pytest.mark.guarantee("B65")
def test_a_message_over_the_limit_is_refused_where_it_is_sent_with_its_size_and_the_limit(nodes: Any) -> None:
    server, asker = Server(), Asker()
    nodes.start("server", server)
    asking = nodes.start("asker", asker, ("server", 1))
    long = Number(1, bytes(MAX_BODY_BYTES))
    told: list[BadFrame] = []

    def talk() -> None:
        asker.ask("server", long)
        try:
            asker.ctx.tell("server", long)
        except BadFrame as error:
            told.append(error)
        asker.ask("server", Number(1))

    asking.do(talk)

    eventually(lambda: len(asker.heard) == 2, "an error and an answer")
    size = len(msgspec.msgpack.encode(long))
    refused = f"Number has {size} bytes, and at most {MAX_BODY_BYTES} fit into a message; send it in parts"
    assert sorted(map(str, asker.heard)) == sorted(["2", refused])
    assert [str(error) for error in told] == [refused]


NO_DESCRIPTORS = """
import os, resource, sys
from pathlib import Path
from chipbus.bus import Actor, Node, NodeConfig
from chipbus.errors import StartFailed

node = Node(NodeConfig(name="a", incarnation=1, run_dir=Path(sys.argv[1])), Actor())
resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + int(sys.argv[2]), 4096))
try:
    node.run()
except StartFailed as error:
    print(error)
"""


@pytest.mark.guarantee("B66")
@pytest.mark.parametrize("spare", range(0, 10, 3))
def test_a_node_without_file_descriptors_fails_by_the_limits_name(run_dir: Path, spare: int) -> None:
    """In a process of its own, where libzmq would abort that process."""
    done = subprocess.run(
        [sys.executable, "-c", NO_DESCRIPTORS, str(run_dir), str(spare)],
        capture_output=True, text=True, timeout=30, check=True,
    )  # fmt: skip

    assert done.stderr == ""
    assert done.stdout.startswith("the bus of a needs 12 more file descriptors. Too many open files: RLIMIT_NOFILE is ")
    assert done.stdout.endswith("raise it, for example with ulimit -n\n")
    assert list(run_dir.iterdir()) == []


def test_a_link_without_file_descriptors_fails_what_waits_for_it(nodes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asker = Asker()
    asking = nodes.start("asker", asker)
    eventually(lambda: (nodes.run_dir / "asker.1.c").exists(), "the asker runs")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    def connect() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors() - 1, hard))
        try:
            asker.ctx.connect("server", 1)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        asker.ask("server", Number(1))

    asking.do(connect)

    eventually(lambda: asker.errors == [PeerGone], "the ask failed")
    assert "cannot connect to it: a link from asker to server needs 8 more file descriptors" in str(asker.heard[0])


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE])
def test_libzmqs_own_words_for_it_are_translated(run_dir: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """The failure is made up here: what asks first whether there are enough leaves no way to have it for real."""

    def refuse(*_: object) -> None:
        raise zmq.ZMQError(number)

    monkeypatch.setattr(zmq.Context, "socket", refuse)
    node = Node(NodeConfig(name="a", incarnation=1, run_dir=run_dir), Asker())

    with pytest.raises(StartFailed, match=r"a cannot open a socket: .*RLIMIT_NOFILE is"):
        node.run()


@pytest.mark.guarantee("B67")
@pytest.mark.parametrize(("number", "what"), [(errno.ENOSPC, "No space left"), (errno.EDQUOT, "quota exceeded")])
def test_an_inbox_on_a_full_disk_is_refused_with_its_path_and_what_to_do(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, number: int, what: str
) -> None:
    """The failure is made up here; tests of whole engines fill a real disk where this machine allows mounting one."""

    def refuse(*_: object) -> None:
        raise zmq.ZMQError(number)

    monkeypatch.setattr(zmq.Socket, "bind", refuse)
    node = Node(NodeConfig(name="a", incarnation=1, run_dir=run_dir), Asker())

    with pytest.raises(
        ConfigError, match=rf"{run_dir}/a\.1\.d cannot be made: .*{what}.*: free some, or name"
    ) as caught:
        node.run()
    assert not isinstance(caught.value, StartFailed)


def test_descriptors_that_were_asked_for_are_given_back() -> None:
    before = descriptors()

    require_descriptors(20, "this test")

    assert descriptors() == before
