"""Who is let into an inbox, and that nothing a foreign or faulty peer sends does harm."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from typing import Any

import pytest
import zmq
from bus_actors import Asker, Boom, Count, Hold, Note, Number, Server, Urgent
from bus_strangers import Speaker

from chipbus.bus.envelope import Kind, Lane
from chipbus.bus.lifecycle import Failure, Welcome
from chipbus.bus.registry import decode, schema_table, type_of
from chipbus.errors import AnswerLost
from support import eventually

WORK = {"deadline_ns": 2**62}


def let_in(stranger: Any) -> None:
    """Say hello and take both welcomes."""
    stranger.hello()
    for socket in (stranger.data, stranger.control):
        envelope, body = stranger.first_answer(socket)
        assert envelope.kind == Kind.WELCOME
        assert isinstance(decode(envelope.type_id, body), Welcome)


def counts(server: Server, **expected: int) -> None:
    eventually(lambda: dict(server.ctx.counters()) == expected, f"{expected}, not {server.ctx.counters()}")


def still_answers(nodes: Any) -> None:
    asker = Asker()
    asking = nodes.start("prober", asker, ("server", 1))
    asking.do(lambda: asker.ask("server", Number(41)))
    eventually(lambda: asker.heard == [42], "an answer to somebody else")


@pytest.mark.guarantee("B6")
def test_a_peer_that_says_hello_on_both_sockets_is_welcomed(nodes: Any, stranger: Callable[..., Any]) -> None:
    server = Server()
    nodes.start("server", server)
    peer = stranger("server")

    let_in(peer)
    peer.data.send(peer.record(Kind.ASK, Number(1), correlation=1, **WORK))

    envelope, body = peer.first_answer(peer.data)
    assert (envelope.kind, envelope.correlation, decode(envelope.type_id, body)) == (Kind.REPLY, 1, Number(2))
    assert server.events == ["start", "up stranger"]


@pytest.mark.guarantee("B7")
@pytest.mark.parametrize(
    ("claim", "reason"),
    [
        ({"schema": schema_table()[:2] + bytes(8)}, "schema: Hello (0x0101) has other fields there"),
        ({"schema": b"x"}, "schema: a schema table of 1 bytes, no multiple of 10"),
        ({"pid": 1}, f"pid 1 in its hello, but the kernel says {os.getpid()}"),
        ({"to": "router"}, "it looks for incarnation 1 of router"),
        ({"to_incarnation": 2}, "it looks for incarnation 2 of server"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_wrong_hello_is_refused_with_the_field(
    nodes: Any, stranger: Callable[..., Any], claim: dict[str, Any], reason: str
) -> None:
    server = Server()
    nodes.start("server", server)
    peer = stranger("server")

    peer.hello(**claim)

    for socket in (peer.data, peer.control):
        envelope, body = peer.first_answer(socket)
        assert envelope.kind == Kind.REFUSE
        assert decode(envelope.type_id, body) == Failure("BusError", f"server refused the link: {reason}")
    counts(server, refused_links=2)
    assert server.events == ["start"]
    still_answers(nodes)


@pytest.mark.guarantee("B8")
def test_one_life_is_linked_once_and_a_younger_life_replaces_an_older(nodes: Any, stranger: Callable[..., Any]) -> None:
    server = Server()
    nodes.start("server", server)
    first, twin, younger, older = (stranger("server") for _ in range(4))
    let_in(first)

    twin.hello()
    envelope, body = twin.first_answer(twin.data)
    assert "incarnation 1 of stranger is linked already" in decode(envelope.type_id, body).text

    younger.hello(incarnation=2)
    assert younger.first_answer(younger.control)[0].kind == Kind.WELCOME
    eventually(lambda: server.events[-2:] == ["down stranger: replaced by incarnation 2", "up stranger"], "replaced")

    older.hello()
    envelope, body = older.first_answer(older.data)
    assert "incarnation 1 of stranger is over" in decode(envelope.type_id, body).text

    first.data.send(first.record(Kind.TELL, Number(1), correlation=1))
    younger.data.send(younger.record(Kind.TELL, Number(2), correlation=1))
    younger.data.send(younger.record(Kind.TELL, Number(3), correlation=2, incarnation=2))
    eventually(lambda: server.seen == [3], "the young one's message")
    eventually(lambda: server.ctx.counters()["late_frames"] == 2, "those of the other, on a connection of its own")


def test_our_own_refused_link_fails_what_waits_for_it(nodes: Any) -> None:

    class Early(Asker):
        def on_start(self) -> None:
            self.ask("server", Number(1))

    server, asker = Server(), Early()
    nodes.start("server", server)
    first = nodes.start("asker", Asker(), ("server", 1))
    eventually(lambda: "up asker" in server.events, "the first life")
    first.stop()

    nodes.start("asker", asker, ("server", 1))

    eventually(lambda: len(asker.heard) == 1, "an error")
    assert "server refused the link: incarnation 1 of asker is linked already" in str(asker.heard[0])
    assert asker.events == []


def bad_records(peer: Any) -> list[bytes]:
    """Records of a linked peer, each wrong in its own way."""
    number = type_of(Number(1)).type_id
    ask = {"correlation": 10, **WORK}
    return [
        peer.record(Kind.TELL, Number(1), correlation=1, destination=5),
        peer.record(Kind.TELL, Number(1), correlation=2, type_id=0x7BFF),
        peer.record(Kind.TELL, Number(1), correlation=3, flags=Lane.CHILD),
        peer.record(Kind.TELL, Urgent(1), correlation=4),
        peer.record(Kind.HELLO, Number(1), correlation=5),
        peer.record(Kind.TELL, None, correlation=6, type_id=number),
        peer.record(Kind.TELL, Number("x"), correlation=7),  # type: ignore[arg-type]
        peer.record(Kind.TELL, Number(1), correlation=8) + b"left over",
        b"\x02" + peer.record(Kind.TELL, Number(1), correlation=9)[1:],
        peer.record(Kind.ASK, Number(1), **{**ask, "deadline_ns": 0}),
        peer.record(Kind.CREDIT, None, correlation=0, position=1),
        b"",
    ]


@pytest.mark.guarantee("B35")
def test_faulty_records_of_a_linked_peer_are_counted_and_asks_among_them_answered(
    nodes: Any, stranger: Callable[..., Any]
) -> None:
    server = Server()
    nodes.start("server", server)
    peer = stranger("server")
    let_in(peer)

    records = bad_records(peer)
    for record in records:
        peer.data.send(record)
    peer.data.send_multipart([peer.record(Kind.TELL, Number(2), correlation=11), b"second part"])
    peer.data.send(peer.record(Kind.ASK, Number(1), correlation=12, type_id=0x7BFF, **WORK))
    peer.data.send(peer.record(Kind.REPLY, Number(1), correlation=13))
    peer.data.send(peer.record(Kind.CANCEL, None, correlation=13))
    peer.data.send(peer.record(Kind.ASK, Number(20), correlation=14, **WORK))

    answers = {}
    while 14 not in answers:
        envelope, body = peer.first_answer(peer.data)
        answers[envelope.correlation] = decode(envelope.type_id, body)
    assert answers[14] == Number(21)
    assert answers[10] == Failure("BadFrame", "Number from stranger asks without a deadline")
    assert answers[12] == Failure("BadFrame", "unknown message type id 0x7bff")
    counts(server, bad_frames=len(records) + 1, late_frames=1, foreign_frames=1)
    assert server.seen == [1, 2, 20]  # 1 and 2 were whole, before left-over bytes and before a second part
    still_answers(nodes)


@pytest.mark.guarantee("B9")
def test_foreign_bytes_are_counted_and_never_a_crash(nodes: Any, stranger: Callable[..., Any]) -> None:
    server = Server()
    nodes.start("server", server)
    peer = stranger("server")
    draw = random.Random(5)
    good = peer.record(Kind.TELL, Number(1), correlation=1)
    frames: list[list[bytes]] = [[b""], [good], [good, good], [b"", b"", b""], [good[:-1]]]
    frames += [[draw.randbytes(draw.randrange(200)) for _ in range(draw.randrange(1, 3))] for _ in range(200)]
    frames += [[peer.record(Kind.HELLO, Number(1))], [peer.record(Kind.HELLO, None, type_id=0x0101)]]

    for parts in frames:
        for socket in (peer.data, peer.control):
            socket.send_multipart(parts)

    counts(server, foreign_frames=2 * len(frames))
    still_answers(nodes)


@pytest.mark.guarantee("B34")
def test_flipped_bits_on_a_link_never_crash_the_node(nodes: Any, stranger: Callable[..., Any]) -> None:
    server = Server()
    nodes.start("server", server)
    peer = stranger("server")
    let_in(peer)
    draw = random.Random(6)
    messages = [Number(1), Count(2), Hold(), Boom(True), Note()]
    for correlation in range(1, 400):
        kind = draw.choice([kind for kind in Kind if kind not in (Kind.HELLO, Kind.WELCOME, Kind.REFUSE)])
        record = bytearray(peer.record(kind, draw.choice(messages), correlation=correlation, **WORK))
        for _ in range(draw.randrange(1, 4)):
            record[draw.randrange(len(record))] ^= 1 << draw.randrange(8)
        draw.choice([peer.data, peer.control]).send(bytes(record))

    still_answers(nodes)


def test_other_socket_types_are_foreign(nodes: Any, stranger: Callable[..., Any]) -> None:
    server = Server()
    nodes.start("server", server)
    peer = stranger("server")
    request = peer.context.socket(zmq.REQ)
    request.connect(f"ipc://{nodes.run_dir}/server.1.d")

    request.send(b"hello?")

    counts(server, foreign_frames=1)
    request.close()


def test_an_oversized_frame_ends_its_own_connection_only(
    nodes: Any, stranger: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("chipbus.bus.node.MAX_FRAME_BYTES", 10_000)
    server = Server()
    nodes.start("server", server)
    peer = stranger("server")
    let_in(peer)

    peer.data.send(peer.record(Kind.TELL, Number(1, bytes(20_000)), correlation=1))

    still_answers(nodes)
    assert server.seen == [41]


@pytest.mark.guarantee("B37")
@pytest.mark.parametrize("positions", [(0, 2), (1,), (0, 0, 2)])
def test_a_gap_in_a_stream_fails_the_ask_and_cancels_the_call(
    nodes: Any, stranger: Callable[..., Any], positions: tuple[int, ...]
) -> None:
    """A faulty callee: the asker is a node, the callee speaks by hand."""
    asker = Asker()
    asking = nodes.start("asker", asker)
    peer = stranger("asker")
    let_in(peer)
    asking.do(lambda: asker.ask("stranger", Count(9)))
    question, _ = peer.first_answer(peer.data)

    for position in positions:
        peer.data.send(peer.record(Kind.STREAM, Number(5), correlation=question.correlation, position=position))

    eventually(lambda: asker.errors and asker.errors[-1] is AnswerLost, "the error")
    assert "of the answer to Count by stranger is missing" in str(asker.heard[-1])
    cancel, _ = peer.first_answer(peer.control)
    assert (cancel.kind, cancel.correlation) == (Kind.CANCEL, question.correlation)


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        (f"localhost:{os.geteuid() + 1}:0:{os.getpid()}", f"uid {os.geteuid() + 1} is not ours"),
        ("", "the kernel does not say who it is"),
    ],
    ids=["another", "unknown"],
)
def test_a_peer_of_another_user_is_refused(
    nodes: Any, stranger: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, address: str, reason: str
) -> None:
    """Another user cannot even connect to a socket in a directory of ours, so the kernel's answer is made up here."""
    monkeypatch.setattr(zmq.Frame, "get", lambda *_: address)
    server = Server()
    nodes.start("server", server)
    peer = stranger("server")

    peer.hello()

    envelope, body = peer.first_answer(peer.data)
    assert decode(envelope.type_id, body) == Failure("BusError", f"server refused the link: {reason}")
    assert server.events == ["start"]


def test_a_peer_that_says_hello_on_one_socket_only_is_not_linked(nodes: Any, stranger: Callable[..., Any]) -> None:
    server = Server()
    nodes.start("server", server)
    halves = [stranger("server", name=f"half.{number}") for number in range(2)]
    for half in halves:
        half.hello(only=half.data)
        half.data.send(half.record(Kind.TELL, Number(1), correlation=1))

    counts(server, foreign_frames=2)
    assert server.events == ["start"]
    still_answers(nodes)


@pytest.mark.parametrize("first_words", [b"junk", b""])
def test_a_binder_that_talks_before_it_welcomes_is_counted(nodes: Any, first_words: bytes) -> None:
    """A faulty binder, by hand: the asker is a node."""
    context = zmq.Context()
    doors = [context.socket(zmq.ROUTER) for _ in range(2)]
    for door, suffix in zip(doors, "dc", strict=True):
        door.rcvtimeo = 10_000
        door.bind(f"ipc://{nodes.run_dir}/server.1.{suffix}")
    asker = Asker()
    asking = nodes.start("asker", asker, ("server", 1))
    speaker = Speaker("server", to="asker")
    for door in doors:
        route, _ = door.recv_multipart()
        door.send_multipart([route, first_words])
        door.send_multipart([route, speaker.record(Kind.TELL, Number(1), correlation=1)])
        welcome = speaker.record(Kind.WELCOME, Welcome(name="server", incarnation=1))
        behind = speaker.record(Kind.TELL, Number(2), correlation=1) if door is doors[0] else b""
        door.send_multipart([route, welcome + behind])

    eventually(lambda: asker.heard == [2] and asker.events == ["up server"], "the message behind the welcome")
    eventually(lambda: asker.ctx.counters() == {"bad_frames": 4}, "what came before the welcomes is counted")
    asking.stop()
    context.destroy(linger=0)
    for suffix in "cd":
        (nodes.run_dir / f"server.1.{suffix}").unlink()
