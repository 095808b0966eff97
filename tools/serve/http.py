"""What every endpoint does with ASGI: read a body within its limit, answer, and notice that the client left.

Owns: nothing. No Request and Response objects: they cost more than what these endpoints do.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
from starlette.types import Message, Receive, Scope, Send

from ...bus import get_logger
from .failures import Failure, Refused, failure_of

__all__ = ["CallerLeft", "Json", "body_of", "cancelled_if_caller_leaves", "send_failure", "send_json", "told"]

BODY_TIMEOUT_S = 60.0
"""For the rest of a body once its head has come: a sender that stopped must not be waited for."""

JSON_TYPE = (b"content-type", b"application/json")
Handler = Callable[[Scope, Receive, Send], Awaitable[None]]


class CallerLeft(Exception):
    """The client closed its connection: there is nobody to answer."""


async def send_json(send: Send, value: Any, status: int = 200) -> None:
    """Answer with ``value`` as JSON."""
    await _send_whole(send, status, msgspec.json.encode(value), (JSON_TYPE,))


async def send_failure(send: Send, failure: Failure) -> None:
    """Answer with an error."""
    await _send_whole(send, failure.status, failure.body(), (JSON_TYPE, *failure.headers))


async def _send_whole(send: Send, status: int, body: bytes, headers: tuple[tuple[bytes, bytes], ...]) -> None:
    length = (b"content-length", b"%d" % len(body))
    await send({"type": "http.response.start", "status": status, "headers": [*headers, length]})
    await send({"type": "http.response.body", "body": body})


async def body_of(scope: Scope, receive: Receive, most_bytes: int) -> bytes:
    """The body of a JSON request.

    Raises ``Refused`` if it is no JSON by its own word, too long, whether it says so or is found to be, or does not
    come; ``CallerLeft``.
    """
    length, kind = 0, b""
    for name, value in scope["headers"]:
        if name == b"content-length":
            length = int(value)  # the parser has checked it
        elif name == b"content-type":
            kind = value
    if kind.partition(b";")[0].strip().lower() != b"application/json":
        raise Refused(415, "the content type must be application/json", code="unsupported_content_type", headers=_CLOSE)
    if length > most_bytes:
        raise _too_long(most_bytes)
    message = await receive()
    if not message.get("more_body"):
        return _part(message, 0, most_bytes)
    parts = [_part(message, 0, most_bytes)]
    size = len(parts[0])
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            while message.get("more_body"):
                message = await receive()
                parts.append(_part(message, size, most_bytes))
                size += len(parts[-1])
    except TimeoutError:
        text = f"the body did not come within {BODY_TIMEOUT_S:g} s"
        raise Refused(408, text, code="body_timeout", headers=_CLOSE) from None
    return b"".join(parts)


_CLOSE = ((b"connection", b"close"),)
"""What comes of the body is not read, so nothing can follow it."""


def _part(message: Message, size: int, most_bytes: int) -> bytes:
    if message["type"] == "http.disconnect":
        raise CallerLeft
    body: bytes = message.get("body", b"")
    if size + len(body) > most_bytes:
        raise _too_long(most_bytes)
    return body


def _too_long(most_bytes: int) -> Refused:
    return Refused(413, f"the body is longer than {most_bytes} bytes", code="body_too_large", headers=_CLOSE)


@asynccontextmanager
async def cancelled_if_caller_leaves(receive: Receive) -> AsyncIterator[None]:
    """Cancel what is in the block when the client closes its connection; raises ``CallerLeft`` then.

    The body must have been read. Leave the block before the last word is sent: after it ``receive`` says the same.
    """
    task = asyncio.current_task()
    assert task is not None
    has_left = False

    async def watch() -> None:
        nonlocal has_left
        while (await receive())["type"] != "http.disconnect":
            pass
        has_left = True
        task.cancel()

    watcher = asyncio.ensure_future(watch())
    try:
        yield
    except asyncio.CancelledError:
        if not has_left or task.uncancel():  # somebody else cancelled, too
            raise
        raise CallerLeft from None
    finally:
        watcher.cancel()


class Json:
    """An endpoint: ``handle`` answers, and whatever it raises is answered in OpenAI's shape.

    blamed: the field that holds the prompt, for errors about its length
    """

    def __init__(self, handle: Handler, *, blamed: str | None = None) -> None:
        self._handle = handle
        self._blamed = blamed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        try:
            await self._handle(scope, receive, send)
        except CallerLeft:
            pass
        except Exception as error:  # noqa: BLE001 (the last boundary: every ending becomes an answer)
            await send_failure(send, told(error, scope["path"], self._blamed))


def told(error: Exception, where: str, param: str | None = None) -> Failure:
    """The answer for an error; one that is a bug of ours is logged with its trace."""
    failure = failure_of(error, param)
    if failure.code == "internal":
        get_logger().error("http.failed", path=where, exc_info=error)
    return failure
