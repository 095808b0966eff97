"""One answer as server-sent events: begun late, so that an early failure has a status; kept alive while nothing comes.

Owns: what has been sent of one response. Nothing is queued: a reader that is behind holds up its own writer alone, and
what the engine makes meanwhile coalesces there.
"""

from __future__ import annotations

import asyncio

from starlette.types import Send

from .failures import Failure

__all__ = ["EventStream"]

KEEP_ALIVE_S = 15.0
"""Proxies commonly cut what was silent for 30 s or more."""
_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class EventStream:
    """The response to one request. ``close`` it, whatever happens."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._loop = asyncio.get_running_loop()
        self._turn = asyncio.Lock()  # between the answer and comments
        self._wrote_s = self._loop.time()
        self._timer = self._loop.call_later(KEEP_ALIVE_S, self._look)
        self._comment: asyncio.Task[None] | None = None
        self.has_begun = False

    async def write(self, events: bytes, *, is_last: bool = False) -> None:
        """Send events, when the reader has taken those before."""
        async with self._turn:
            if not self.has_begun:
                self.has_begun = True
                await self._send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
            await self._send({"type": "http.response.body", "body": events, "more_body": not is_last})
            self._wrote_s = self._loop.time()

    async def fail(self, failure: Failure) -> None:
        """One error event. The caller returns without a last word, so the connection ends in the middle."""
        await self.write(b"data: %s\n\n" % failure.body())

    def close(self) -> None:
        """No more comments."""
        self._timer.cancel()
        if self._comment is not None:
            self._comment.cancel()

    def _look(self) -> None:
        """Say something if nothing was said for a while."""
        quiet_s = self._loop.time() - self._wrote_s
        if quiet_s >= KEEP_ALIVE_S and not self._turn.locked():
            self._comment = self._loop.create_task(self.write(b": waiting\n\n"))
            quiet_s = 0.0
        self._timer = self._loop.call_later(max(KEEP_ALIVE_S - quiet_s, KEEP_ALIVE_S / 10), self._look)
