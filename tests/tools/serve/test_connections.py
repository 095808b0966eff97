"""What clients do to a server over a real socket: they leave, do not read, send half, too much or nonsense; and a
replica that dies meanwhile. Afterwards nothing is held for any of them.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from http_server import RunningServer, events_of, joined, running_server
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chipbus.actors.sampling import SamplingParams
from chipbus.tools.serve import connections, http
from chipbus.tools.serve.fields import CHAT, COMPLETIONS, DETOKENIZE, TOKENIZE, Where
from support import comes_true

TEXT = "/v1/completions"
HELLO = [{"role": "user", "content": "replica"}]
MAX_BODY = 50_000


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with running_server(
        chip="null",
        data_parallel_size=2,
        log_level="error",
        max_num_seqs=4,
        max_waiting=2,
        max_body_bytes=MAX_BODY,
        send_buffer=65536,
    ) as server:
        yield server


def post_bytes(path: str, body: bytes, *headers: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "host: localhost", "content-type: application/json", *headers]
    if not any(header.startswith(("content-length", "transfer-encoding")) for header in headers):
        lines.append(f"content-length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode() + body


def everything(connection: socket.socket) -> bytes:
    """What comes until the other side ends."""
    found = b""
    try:
        while part := connection.recv(65536):
            found += part
    except ConnectionResetError:
        pass
    return found


@pytest.mark.guarantee("H7")
@pytest.mark.parametrize("is_stream", [True, False])
@pytest.mark.parametrize("prompt", ["a", ["a", "b", "c"]])
def test_a_client_that_leaves_aborts_what_it_asked_for(server: RunningServer, prompt: Any, is_stream: bool) -> None:
    body = {"prompt": prompt, "max_tokens": 2000, "ignore_eos": True, "stream": is_stream}
    before = server.statistics()

    with server.raw() as connection:
        connection.sendall(post_bytes(TEXT, json.dumps(body).encode()))
        assert comes_true(lambda: server.statistics().running > 0, 20)
        if is_stream:
            assert connection.recv(100)

    assert server.comes_to_rest()
    made = server.statistics().tokens_generated - before.tokens_generated
    assert made < 2000 * (1 if prompt == "a" else 3), "it was aborted, and did not just end"


@pytest.mark.parametrize("is_stream", [True, False])
def test_one_that_leaves_with_another_request_sent_ahead_aborts_it_too(server: RunningServer, is_stream: bool) -> None:
    body = {"prompt": "a", "max_tokens": 2000, "ignore_eos": True, "stream": is_stream}
    before = server.statistics()

    with server.raw() as connection:
        connection.sendall(2 * post_bytes(TEXT, json.dumps(body).encode()))
        assert comes_true(lambda: server.statistics().running > 0, 20)

    assert server.comes_to_rest()
    assert server.statistics().tokens_generated - before.tokens_generated < 2000


@pytest.mark.slow
@pytest.mark.guarantee("H8")
def test_a_reader_that_does_not_read_holds_up_nobody_and_little_is_kept_for_it(server: RunningServer) -> None:
    body = {"prompt": ["a"] * 2, "max_tokens": 1000, "ignore_eos": True, "stream": True, "logprobs": 20}
    with server.raw() as lazy:
        lazy.sendall(post_bytes(TEXT, json.dumps(body).encode()))

        assert comes_true(lambda: server.service.open == 1, 20)
        answer = server.post(TEXT, prompt="b", max_tokens=20)
        assert answer.json()["usage"]["completion_tokens"] == 20
        # The engine ends it, and has its pages back, though nobody has read a word of it.
        assert comes_true(lambda: server.statistics().running == 0, 30)
        statistics = server.statistics()
        assert (statistics.pages_free, server.service.open) == (statistics.pages_total, 1)

        whole = everything_of_stream(lazy)
    choices = joined(events_of(whole.decode()))
    [expected] = server.generate("a", SamplingParams(max_tokens=1000, ignore_eos=True))
    assert {choice["text"] for choice in choices.values()} == {expected.outputs[0].text}
    assert len(events_of(whole.decode())) < 2 * 900, "what came while it did not read is in fewer, larger chunks"
    assert server.comes_to_rest()


def everything_of_stream(connection: socket.socket) -> bytes:
    """The body of a chunked answer."""
    found = bytearray()
    while not found.endswith(b"\r\n0\r\n\r\n"):
        found += connection.recv(1 << 20)
    parts, at = [], found.index(b"\r\n\r\n") + 4
    while at < len(found):
        begin = found.index(b"\r\n", at) + 2
        at = begin + int(found[at:begin], 16) + 2
        parts.append(found[begin : at - 2])
    return b"".join(parts)


@pytest.mark.guarantee("H9")
def test_a_full_queue_is_told_at_once_and_those_in_it_are_served(server: RunningServer) -> None:
    body = {"max_tokens": 300, "ignore_eos": True}
    for pin, code in (({}, "queue_full"), ({"replica": 1}, "pin_overloaded")):
        answer = server.post(TEXT, prompt=["a"] * 40, **body, **pin)
        assert answer.status_code == 429, answer.text
        assert answer.json()["error"]["type"] == "rate_limit_error"
        assert answer.json()["error"]["code"] == code
        assert answer.headers["retry-after"] == "1"
        assert server.comes_to_rest(), "the others of the same request were aborted"
    assert server.post(TEXT, prompt=["a"] * 2, max_tokens=3).status_code == 200


@pytest.mark.guarantee("H10")
@pytest.mark.slow
def test_a_killed_replica_costs_a_stream_no_token(server: RunningServer) -> None:
    [expected] = server.generate("chip", SamplingParams(max_tokens=500, ignore_eos=True))
    body = {"prompt": "chip", "max_tokens": 500, "ignore_eos": True, "stream": True}

    with server.client.stream("POST", TEXT, json=body) as answer:
        parts = answer.iter_text()
        text = next(parts)
        for record in server.engine.tree():
            if record.kind == "replica":
                os.kill(record.pid, signal.SIGKILL)
        text += "".join(parts)

    events = events_of(text)
    assert events[-1] == "[DONE]"
    [choice] = joined(events).values()
    assert (choice["text"], choice["finish_reason"]) == (expected.outputs[0].text, "length")
    assert events[-2]["choices"][0]["chipbus"]["attempt"] > 1
    assert comes_true(lambda: server.client.get("/ready").status_code == 200, 30)
    assert server.comes_to_rest()


@pytest.fixture(scope="module")
def strict() -> Iterator[RunningServer]:
    """A server that gives a request two seconds, and gives it up at the first death."""
    with running_server(
        chip="null", log_level="error", request_timeout_s=2.0, max_request_restarts=0, max_restarts=100
    ) as server:
        yield server


def struck(server: RunningServer, number: int, *, is_stream: bool) -> bytes:
    """All that a client is told whose request's chip gets this signal."""
    body = {"prompt": "chip", "max_tokens": 2000, "ignore_eos": True, "stream": is_stream}
    assert comes_true(lambda: all(record.state == "ready" for record in server.engine.tree()), 20)
    chip = next(record.pid for record in server.engine.tree() if record.kind == "chip")
    with server.raw() as connection:
        connection.sendall(post_bytes(TEXT, json.dumps(body).encode(), "connection: close"))
        assert comes_true(lambda: server.statistics().running == 1, 20)
        if is_stream:
            assert connection.recv(10, socket.MSG_PEEK)
        os.kill(chip, number)
        try:
            return everything(connection)
        finally:
            if number == signal.SIGSTOP:
                os.kill(chip, signal.SIGCONT)


@pytest.mark.parametrize(
    ("number", "status", "code"),
    [(signal.SIGKILL, 500, "worker_died"), (signal.SIGSTOP, 504, "deadline_exceeded")],
)
def test_what_fails_is_told_with_its_status_if_nothing_of_it_was_sent(
    strict: RunningServer, number: int, status: int, code: str
) -> None:
    shown = struck(strict, number, is_stream=False)

    assert shown.startswith(b"HTTP/1.1 %d " % status)
    assert b'"code":"%s"' % code.encode() in shown
    assert strict.comes_to_rest()


@pytest.mark.guarantee("H11")
@pytest.mark.parametrize(
    ("number", "kind", "code"),
    [(signal.SIGKILL, "server_error", "worker_died"), (signal.SIGSTOP, "timeout_error", "deadline_exceeded")],
)
def test_a_stream_that_fails_ends_with_one_error_event_and_no_done(
    strict: RunningServer, number: int, kind: str, code: str
) -> None:
    shown = struck(strict, number, is_stream=True)

    assert shown.startswith(b"HTTP/1.1 200 ")
    assert shown.count(b'"error"') == 1
    assert b'"code":"%s"' % code.encode() in shown
    assert b'"type":"%s"' % kind.encode() in shown
    assert b"[DONE]" not in shown
    assert b'"finish_reason":"' not in shown
    assert not shown.endswith(b"0\r\n\r\n"), "the connection ends in the middle"
    assert strict.comes_to_rest()


@pytest.mark.guarantee("H12")
@pytest.mark.parametrize("how", ["length", "chunked"])
def test_a_body_over_the_limit_is_refused_before_or_while_it_is_read(server: RunningServer, how: str) -> None:
    with server.raw() as connection:
        if how == "length":  # nothing of it is sent
            connection.sendall(post_bytes(TEXT, b"", f"content-length: {MAX_BODY + 1}"))
        else:
            connection.sendall(post_bytes(TEXT, b"", "transfer-encoding: chunked"))
            piece = b"a" * 10_000
            for _ in range(6):
                connection.sendall(b"%x\r\n%s\r\n" % (len(piece), piece))
        shown = everything(connection)

    assert shown.startswith(b"HTTP/1.1 413 ")
    assert b'"code":"body_too_large"' in shown
    filler = "a" * (MAX_BODY - len(json.dumps({"prompt": ""})))
    exact = json.dumps({"prompt": filler}).encode()
    assert len(exact) == MAX_BODY
    answer = server.client.post(TEXT, content=exact, headers={"content-type": "application/json"})
    assert answer.json()["error"]["code"] == "context_length_exceeded", "a body of just that length is read"


@pytest.mark.guarantee("H13")
def test_a_head_over_the_limit_is_refused(server: RunningServer) -> None:
    limit = connections.MAX_HEAD_BYTES
    for head in (
        b"GET /health HTTP/1.1\r\nx: " + b"a" * (limit + 10) + b"\r\n\r\n",
        b"GET /health HTTP/1.1\r\nx: " + b"a" * (4 * limit),  # and never an end
        b"GET /" + b"a" * (4 * limit),
        b"GET /health HTTP/1.1\r\n" + b"x: y\r\n" * limit,
    ):
        with server.raw() as connection:
            connection.sendall(head)
            shown = everything(connection)
        assert shown.startswith(b"HTTP/1.1 431 "), shown[:100]
        assert b'"code":"head_too_large"' in shown
    fits = server.client.get("/health", headers={"x": "a" * (limit - 1000)})
    assert fits.status_code == 200


def test_what_is_no_http_is_told_so_and_the_server_goes_on(server: RunningServer) -> None:
    negative = b"POST /v1/completions HTTP/1.1\r\ncontent-length: -5\r\n\r\n"
    for nonsense in (b"\x16\x03\x01\x02\x00", b"GET\r\n\r\n", b"hello\r\n\r\n", negative):
        with server.raw() as connection:
            connection.sendall(nonsense)
            shown = everything(connection)
        assert shown.startswith(b"HTTP/1.1 400 "), (nonsense, shown)
        assert b'"code":"bad_http"' in shown
    assert server.client.get("/health").status_code == 200


def test_a_request_with_changed_bytes_is_answered_or_ended(server: RunningServer) -> None:
    whole = post_bytes(TEXT, json.dumps({"prompt": "a", "max_tokens": 2}).encode())
    draw = random.Random(7)
    starts: set[bytes] = set()
    for _ in range(150):
        changed = bytearray(whole)
        for _ in range(draw.randint(1, 4)):
            changed[draw.randrange(len(changed))] = draw.randrange(256)
        with server.raw() as connection:
            connection.sendall(changed)
            connection.shutdown(socket.SHUT_WR)
            starts.add(everything(connection)[:12])

    assert starts <= {b""} | {b"HTTP/1.1 %d" % status for status in (200, 400, 403, 404, 405, 408, 413, 415, 431)}
    assert b"HTTP/1.1 400" in starts
    assert server.post(TEXT, prompt="a", max_tokens=2).status_code == 200
    assert server.comes_to_rest()


@pytest.mark.guarantee("H14")
def test_half_a_request_holds_nothing_and_nobody(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = post_bytes(TEXT, json.dumps({"prompt": "a", "max_tokens": 3}).encode())
    halves = []
    for cut in (1, 20, whole.index(b"\r\n\r\n") + 2, whole.index(b"\r\n\r\n") + 6, len(whole) - 1):
        connection = server.raw()
        connection.sendall(whole[:cut])
        halves.append(connection)
    assert server.post(TEXT, prompt="a", max_tokens=3).status_code == 200
    assert server.comes_to_rest()

    halves[-1].sendall(whole[-1:])
    halves[0].sendall(whole[1:])
    for connection in (halves[-1], halves[0]):
        assert connection.recv(12) == b"HTTP/1.1 200"
    for connection in halves:
        connection.close()

    monkeypatch.setattr(http, "BODY_TIMEOUT_S", 0.05)
    monkeypatch.setattr(connections, "HEAD_TIMEOUT_S", 0.05)
    with server.raw() as connection:
        connection.sendall(whole[:-1])
        assert b'"code":"body_timeout"' in everything(connection)
    with server.raw() as connection:
        connection.sendall(whole[:10])
        assert everything(connection) == b""
    assert server.comes_to_rest()


def test_requests_that_follow_on_one_connection_are_answered_in_order(server: RunningServer) -> None:
    with server.raw() as connection:
        for name in ("version", "health", "ready"):
            connection.sendall(f"GET /{name} HTTP/1.1\r\nhost: x\r\n\r\n".encode())
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        shown = everything(connection)

    assert [line for line in (b'"version"', b'"alive"', b'"ready"') if line in shown] == [
        b'"version"', b'"alive"', b'"ready"'
    ]  # fmt: skip
    assert shown.index(b'"version"') < shown.index(b'"alive"') < shown.index(b'"ready"')


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**65), 2**65) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)  # fmt: skip
LIKELY: dict[str, Any] = {
    "prompt": st.text(max_size=20) | st.lists(st.text(max_size=5) | st.integers(0, 1100), max_size=3),
    "messages": st.lists(st.fixed_dictionaries({"role": st.sampled_from(["user", "system", "assistant"]),
                                                "content": st.text(max_size=20)}), max_size=3),
    "model": st.just("demo"),
    "max_tokens": st.integers(-1, 20), "max_completion_tokens": st.integers(-1, 20),
    "n": st.integers(0, 3), "stream": st.booleans(), "logprobs": st.integers(-1, 21) | st.booleans(),
    "temperature": st.floats(-1, 3), "top_p": st.floats(-1, 2), "stop": st.text(max_size=3),
    "dp_rank": st.integers(-1, 3), "replica": st.integers(-1, 3), "tokens": st.lists(st.integers(-1, 1100), max_size=9),
    "stream_options": st.fixed_dictionaries({"include_usage": st.booleans()}),
}  # fmt: skip


@st.composite
def requests(draw: st.DrawFn) -> tuple[str, bytes]:
    """An endpoint, and a body made from its own table: right values, wrong ones, fields of others, or just bytes."""
    tables = {"/v1/chat/completions": CHAT, TEXT: COMPLETIONS, "/tokenize": TOKENIZE, "/detokenize": DETOKENIZE}
    path = draw(st.sampled_from(sorted(tables)))
    if draw(st.integers(0, 9)) == 0:
        return path, draw(st.binary(max_size=60))
    table = tables[path]
    names = draw(st.lists(st.sampled_from(sorted(table)), max_size=4, unique=True))
    names += [field.name for field in table.values() if field.is_needed and draw(st.integers(0, 9))]
    body = {"max_tokens": 2} if "max_tokens" in table else {}
    for name in names:
        is_wrong = draw(st.integers(0, 4)) == 0
        neutral = st.none() if table[name].where is Where.NEUTRAL else JSON
        body[name] = draw(JSON if is_wrong else LIKELY.get(name, neutral))
    if draw(st.integers(0, 9)) == 0:
        body[draw(st.text(max_size=12))] = draw(JSON)
    return path, json.dumps(body).encode()


@pytest.mark.slow
@pytest.mark.guarantee("H15")
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(requests())
def test_no_body_makes_the_server_fail_hang_or_keep_anything(server: RunningServer, drawn: tuple[str, bytes]) -> None:
    path, body = drawn
    answer = server.client.post(path, content=body, headers={"content-type": "application/json"})

    assert answer.status_code in (200, 400, 404, 429), answer.text
    if answer.status_code != 200:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    elif answer.headers["content-type"].startswith("text/event-stream"):
        assert events_of(answer.text)[-1] == "[DONE]"
    assert server.service.open == 0 or server.comes_to_rest()


def test_after_all_that_nothing_is_held(server: RunningServer) -> None:
    assert server.comes_to_rest()
    assert comes_true(lambda: len(server._http.server_state.tasks) == 0, 10)
