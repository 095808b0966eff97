"""uvicorn as this server needs it: limits on what comes before a body, errors in OpenAI's shape, signals left alone.

Owns: the listening socket's connections, through uvicorn. What was not sent in full costs a connection and no more.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Generator
from contextlib import contextmanager

from starlette.types import ASGIApp
from uvicorn import Config, Server
from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from ...errors import ConfigError
from .failures import Failure

__all__ = ["MAX_HEAD_BYTES", "HttpServer", "listening_socket", "url_of"]

MAX_HEAD_BYTES = 32 * 1024
"""Request line and headers together."""
HEAD_TIMEOUT_S = 60.0
"""For the head of a connection's first request; later ones have uvicorn's keep-alive timeout."""
KEEP_ALIVE_S = 30
"""For the next request on a connection; longer than clients commonly keep one, so that they are the ones to end it."""
MAX_PIPELINED = 8
"""Requests of one connection that are read ahead of their turn."""
BACKLOG = 1024
LAST_WORDS_S = 1.0
"""For connections to take what was sent to them when the server ends."""


class _TooLong(Exception):
    """The head of a request is longer than MAX_HEAD_BYTES."""


class _Connection(HttpToolsProtocol):
    """One connection."""

    _head_bytes = 0  # of the parts that are whole
    _fed_bytes = 0  # of a head that is not whole yet; of a half header the parser tells nothing
    _is_in_head = True
    _patience: asyncio.TimerHandle | None = None
    _served: RequestResponseCycle | None = None  # uvicorn itself remembers only the request that came last

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._patience = self.loop.call_later(HEAD_TIMEOUT_S, self._give_up)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._served = cycle
        super()._start_asgi_task(cycle, app)

    def connection_lost(self, exc: Exception | None) -> None:
        self._lose_patience()
        if self._served is not None and not self._served.response_complete:
            self._served.disconnected = True
            self._served.message_event.set()
        super().connection_lost(exc)

    def _give_up(self) -> None:
        if not self.transport.is_closing():
            self.transport.close()

    def _lose_patience(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._is_in_head:
            self._fed_bytes += len(data)
            if self._fed_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
                self.send_400_response("")

    def on_message_begin(self) -> None:
        self._head_bytes = 0
        self._is_in_head = True
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value) + 4)
        super().on_header(name, value)

    def _count(self, num_bytes: int) -> None:
        self._head_bytes += num_bytes
        if self._head_bytes > MAX_HEAD_BYTES:
            raise _TooLong

    def on_headers_complete(self) -> None:
        self._is_in_head = False
        self._fed_bytes = 0
        self._lose_patience()
        super().on_headers_complete()
        if 0 < len(self.pipeline) <= MAX_PIPELINED:
            self.flow.resume_reading()  # uvicorn reads on when the request before is answered: it would miss the end

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP, or too much of it; the connection ends with it."""
        if max(self._head_bytes, self._fed_bytes) > MAX_HEAD_BYTES:
            text, code = f"the head of the request is longer than {MAX_HEAD_BYTES} bytes", "head_too_large"
            failure = Failure(status=431, type="invalid_request_error", code=code, message=text)
        else:
            text = "this is no HTTP request"
            failure = Failure(status=400, type="invalid_request_error", code="bad_http", message=text)
        body = failure.body()
        head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
        self.transport.write(STATUS_LINE[failure.status] + head + body)
        self.transport.close()


class HttpServer(Server):
    """uvicorn, on a socket that is bound already; signals are its caller's."""

    def __init__(self, app: ASGIApp) -> None:
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL + 1)  # the application tells what matters
        super().__init__(
            Config(
                app,
                http=_Connection,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                backlog=BACKLOG,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=LAST_WORDS_S,  # type: ignore[arg-type]
            )
        )

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """None."""
        yield


def listening_socket(host: str, port: int) -> socket.socket:
    """A TCP socket at that address that nobody else listens at. Raises ``ConfigError``."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"host {host!r} is no address to listen at: {error.strerror or error}") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen at {host} port {port}: {error.strerror or error}") from error
    return listener


def url_of(listener: socket.socket) -> str:
    """``http://HOST:PORT`` of a listening socket."""
    host, port, *_ = listener.getsockname()
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
