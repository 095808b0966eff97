"""The status page's routes: the page itself, what it shows as JSON, and events as they happen.

Owns: nothing; each open ``/events`` has one iterator over the engine's events, closed with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncGenerator

import msgspec
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from ...actors.async_engine import AsyncEngine
from ...actors.report import Event
from .page import live_page, policy

__all__ = ["routes"]

KEEP_ALIVE_S = 15.0  # without an event a comment is sent, so that proxies do not cut and a lost reader is noticed

_HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}


def routes(engine: AsyncEngine) -> list[Route]:
    """``/``, ``/state.json`` and ``/events`` of one running engine. Errors of the engine are left to the application.

    The page holds no data and asks for the server's key itself, so ``/`` may be served without one.
    """
    run = secrets.token_hex(4)  # numbers of events begin at 1 again with the next engine: an id names the run as well

    async def page(_: Request) -> Response:
        return Response(live_page(), headers={**_HEADERS, "Content-Security-Policy": _policy()}, media_type="text/html")

    async def state(_: Request) -> Response:
        return Response(msgspec.json.encode(await engine.report()), headers=_HEADERS, media_type="application/json")

    async def events(request: Request) -> Response:
        after = _number(request.headers.get("last-event-id", ""), run)
        headers = {**_HEADERS, "X-Accel-Buffering": "no"}
        return StreamingResponse(_sent(engine.events(after), run), headers=headers, media_type="text/event-stream")

    return [Route("/", page), Route("/state.json", state), Route("/events", events)]


def _policy() -> str:
    return f"{policy()}; frame-ancestors 'none'"  # which a page cannot say of itself


def _number(event_id: str, run: str) -> int:
    """The event that was heard last; 0 if the id is of another run, or none of ours."""
    of_run, _, number = event_id.partition(".")
    is_ours = of_run == run and number.isascii() and number.isdecimal() and len(number) < 19
    return int(number) if is_ours else 0


async def _sent(events: AsyncGenerator[Event, None], run: str) -> AsyncGenerator[bytes, None]:
    """Server-sent events, and comments while there are none, until the engine's events end or the reader leaves."""
    arriving: asyncio.Task[Event] | None = None
    try:
        yield b": events of this engine, oldest first\n\n"
        while True:
            arriving = arriving or asyncio.ensure_future(anext(events))
            await asyncio.wait([arriving], timeout=KEEP_ALIVE_S)
            if not arriving.done():
                yield b": nothing new\n\n"
                continue
            try:
                event = arriving.result()
            except StopAsyncIteration:
                return
            arriving = None
            yield f"id: {run}.{event.number}\ndata: ".encode() + msgspec.json.encode(event) + b"\n\n"
    finally:
        if arriving is not None:
            arriving.cancel()
            with contextlib.suppress(asyncio.CancelledError, StopAsyncIteration):
                await arriving
        await events.aclose()
