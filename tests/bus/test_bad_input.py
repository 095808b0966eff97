"""Each kind of bad input at one node: the counter it is counted under, the line it is logged with, what is answered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
import pytest
from bus_actors import Hold, Number, Server

from chipbus.bus.envelope import Kind
from chipbus.bus.lifecycle import Failure
from chipbus.bus.registry import decode
from support import eventually

FAR_NS = 2**62


@attrs.frozen
class Case:
    """What a linked peer sends, and what becomes of it."""

    name: str
    send: Callable[[Any], bytes]
    counter: str
    logged: tuple[str, ...]  # in the line
    answer: Failure | None = None


def ask(peer: Any, **fields: Any) -> bytes:
    record: bytes = peer.record(Kind.ASK, Number(1), **{"correlation": 1, "deadline_ns": FAR_NS, **fields})
    return record


def tell(peer: Any, **fields: Any) -> bytes:
    record: bytes = peer.record(Kind.TELL, Number(1), **{"correlation": 1, **fields})
    return record


CASES = [
    Case(
        "unknown kind", lambda peer: tell(peer)[:1] + b"\x63" + tell(peer)[2:],
        "bad_frames", ("peer='stranger'", "unknown envelope kind 99 at byte 0"),
    ),
    Case(
        "unknown version", lambda peer: b"\x02" + tell(peer)[1:],
        "bad_frames", ("peer='stranger'", "envelope version 2 at byte 0; this is version 1"),
    ),
    Case(
        "unknown message type", lambda peer: ask(peer, type_id=0x7BFF),
        "bad_frames", ("peer='stranger'", "unknown message type id 0x7bff"),
        Failure("BadFrame", "unknown message type id 0x7bff"),
    ),
    Case(
        "wrong field", lambda peer: peer.record(Kind.ASK, Number("one"), correlation=1, deadline_ns=FAR_NS),
        "bad_frames", ("peer='stranger'", "Number cannot be decoded: Expected `int`, got `str`"),
        Failure("BadFrame", "Number cannot be decoded: Expected `int`, got `str` - at `$.value`"),
    ),
    Case(
        "truncated frame", lambda peer: tell(peer)[:-1],
        "bad_frames", ("peer='stranger'", "a body of 18 bytes at byte 64 of a frame of 81"),
    ),
    Case(
        "left-over bytes", lambda peer: tell(peer) + b"more",
        "bad_frames", ("peer='stranger'", "4 left-over bytes at byte 82"),
    ),
    Case(
        "wrong sender", lambda peer: tell(peer, source=12345),
        "late_frames", ("peer='stranger'", "from_incarnation=1"),
    ),
    Case(
        "stale incarnation", lambda peer: tell(peer, incarnation=7),
        "late_frames", ("peer='stranger'", "from_incarnation=7"),
    ),
    Case(
        "wrong receiver", lambda peer: tell(peer, destination=12345),
        "bad_frames", ("a record from stranger is for another node",),
    ),
    Case(
        "expired deadline", lambda peer: ask(peer, deadline_ns=1),
        "expired_before_start", ("peer='stranger'", "the deadline passed before server could start"),
        Failure("DeadlineExceeded", "the deadline passed before server could start"),
    ),
    Case(
        "answer to nothing", lambda peer: peer.record(Kind.REPLY, Number(1), correlation=9),
        "late_frames", ("peer='stranger'", "kind='REPLY'"),
    ),
    Case(
        "message nobody handles",
        lambda peer: peer.record(Kind.ASK, Failure("a", "b"), correlation=1, deadline_ns=FAR_NS),
        "dead_letters", ("peer='stranger'", "server does not handle Failure"),
        Failure("BusError", "server does not handle Failure"),
    ),
]  # fmt: skip


@pytest.mark.guarantee("B70")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_each_kind_of_bad_input_is_counted_logged_and_answered_where_it_was_an_ask(
    nodes: Any, stranger: Callable[..., Any], caplog: pytest.LogCaptureFixture, case: Case
) -> None:
    server = Server()
    nodes.start("server", server)
    peer = stranger("server")
    peer.hello()
    assert peer.first_answer(peer.data)[0].kind == Kind.WELCOME

    peer.data.send(case.send(peer))

    eventually(lambda: dict(server.ctx.counters()) == {case.counter: 1}, f"{case.counter}: {server.ctx.counters()}")
    eventually(lambda: "event='bus.counted'" in caplog.text, "it is logged")  # a moment after it was counted
    (line,) = [r.getMessage() for r in caplog.records if "event='bus.counted'" in r.getMessage()]
    for part in (f"counter='{case.counter}' total=1", *case.logged):
        assert part in line
    if case.answer is not None:
        envelope, body = peer.first_answer(peer.data)
        assert (envelope.kind, decode(envelope.type_id, body)) == (Kind.ERROR, case.answer)
    peer.data.send(peer.record(Kind.ASK, Hold(), correlation=10, deadline_ns=FAR_NS))
    eventually(lambda: len(server.calls) == 1, "the link works on")
