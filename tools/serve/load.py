"""Streaming requests to an OpenAI-compatible server, many at once, as cheaply as Python can: for benchmarks.

Owns: its connections, each kept for one request after another. Of an answer it reads as much as it needs to know: when
the first event came, when the last one did, how many tokens the server says it generated.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Sequence
from typing import cast

import attrs
import uvloop

from ...errors import WorkerError

__all__ = ["Answer", "LoadResult", "run_load"]

_EVENT = b"data: "
_TOKENS = re.compile(rb'"completion_tokens": ?(\d+)')
_REQUEST = "POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n"


@attrs.frozen
class Answer:
    """One streamed answer."""

    first_s: float  # from the request to the first event
    whole_s: float  # to the end
    tokens: int  # as the server's usage says


@attrs.frozen
class LoadResult:
    """All answers of one load, and how long they took together."""

    seconds: float
    answers: tuple[Answer, ...]

    @property
    def tokens(self) -> int:
        """Generated, over all answers."""
        return sum(answer.tokens for answer in self.answers)


def run_load(address: tuple[str, int], path: str, bodies: Sequence[bytes], concurrency: int) -> LoadResult:
    """Send every body, ``concurrency`` at once. Raises ``WorkerError`` for the first answer that is not as it should.

    bodies: JSON with ``"stream": true`` and ``"stream_options": {"include_usage": true}``.
    """
    return uvloop.run(_run(address, path, bodies, concurrency))


async def _run(address: tuple[str, int], path: str, bodies: Sequence[bytes], concurrency: int) -> LoadResult:
    host = f"{address[0]}:{address[1]}"
    requests = [_REQUEST.format(path=path, host=host, length=len(body)).encode() + body for body in bodies]
    left = iter(requests)
    loop = asyncio.get_running_loop()
    connections = [
        (await loop.create_connection(_Connection, *address))[1] for _ in range(min(concurrency, len(requests)))
    ]
    answers: list[Answer] = []

    async def serve(connection: _Connection) -> None:
        for request in left:
            answer = await connection.ask(request)
            answers.append(answer)

    began_s = time.perf_counter()
    try:
        await asyncio.gather(*map(serve, connections))
    finally:
        for connection in connections:
            connection.close()
    return LoadResult(time.perf_counter() - began_s, tuple(answers))


class _Connection(asyncio.Protocol):
    """One connection, one request at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._answer: asyncio.Future[Answer] | None = None
        self._received = bytearray()
        self._began_s = self._first_s = 0.0

    def ask(self, request: bytes) -> asyncio.Future[Answer]:
        """Send a request; its answer."""
        assert self._transport is not None
        self._answer = asyncio.get_running_loop().create_future()
        self._received.clear()
        self._first_s = 0.0
        self._began_s = time.perf_counter()
        self._transport.write(request)
        return self._answer

    def close(self) -> None:
        """Hang up."""
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's look the same and are of no common class

    def data_received(self, data: bytes) -> None:
        if self._answer is None or self._answer.done():
            return
        self._received += data
        if not self._first_s:
            if self._received.startswith(b"HTTP/1.1 200") and _EVENT in self._received:
                self._first_s = time.perf_counter()
            elif not self._received.startswith(b"HTTP/1.1 200"[: len(self._received)]):
                self._fail()
                return
        if self._received.endswith(b"\r\n0\r\n\r\n"):
            now_s = time.perf_counter()
            told = _TOKENS.findall(self._received)
            if not told or b"data: [DONE]" not in self._received:
                self._fail()
                return
            self._answer.set_result(Answer(self._first_s - self._began_s, now_s - self._began_s, int(told[-1])))

    def connection_lost(self, exc: Exception | None) -> None:
        if self._answer is not None and not self._answer.done():
            self._fail()

    def _fail(self) -> None:
        assert self._answer is not None
        said = bytes(self._received[-400:]).decode(errors="replace") or "nothing"
        self._answer.set_exception(
            WorkerError(f"the server broke off an answer, or refused it; its last words: {said}")
        )
