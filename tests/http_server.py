"""A server over a whole engine, on a thread of this process, for tests that speak to it over a real socket."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import httpx
import uvloop

from chipbus.actors.async_engine import AsyncEngine
from chipbus.actors.outputs import RequestOutput, Statistics
from chipbus.tools.serve import metrics, state
from chipbus.tools.serve.app import make_app
from chipbus.tools.serve.connections import HttpServer, listening_socket, url_of
from chipbus.tools.serve.service import Service
from support import comes_true

T = TypeVar("T")


class RunningServer:
    """An engine, its server, and the loop both live in."""

    def __init__(
        self, settings: Mapping[str, Any], api_key: str | None, max_body_bytes: int, send_buffer: int | None
    ) -> None:
        self._send_buffer = send_buffer
        self._settings, self._api_key, self._max_body_bytes = settings, api_key, max_body_bytes
        self._is_up = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="http server")
        self._thread.start()
        self._is_up.wait()
        if self._failure is not None:
            self._thread.join()
            raise self._failure
        self.client = httpx.Client(base_url=self.url, timeout=30, headers=self.headers)

    @property
    def headers(self) -> dict[str, str]:
        return {} if self._api_key is None else {"authorization": f"Bearer {self._api_key}"}

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            try:
                runner.run(self._serve())
            except BaseException as error:  # noqa: BLE001 (the test that waits for it raises it
                self._failure = error
            finally:
                self._is_up.set()

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        listener = listening_socket("127.0.0.1", 0)
        self.url = url_of(listener)
        if self._send_buffer is not None:  # of every connection: they inherit it
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self._send_buffer)
        async with AsyncEngine(**self._settings) as self.engine:
            self.service = Service(self.engine, "demo", self._max_body_bytes)
            self.service.state = "serving"
            responses = metrics.HttpResponses()
            more = [*state.routes(self.engine), *metrics.routes(self.engine, responses)]
            self._http = HttpServer(make_app(self.service, self._api_key, more, responses, is_private=True))
            serving = asyncio.ensure_future(self._http.serve(sockets=[listener]))
            while not self._http.started:
                await asyncio.sleep(0)
            self._is_up.set()
            await serving

    def close(self) -> None:
        self.client.close()
        self._http.should_exit = True
        self._thread.join(30)
        assert not self._thread.is_alive()
        if self._failure is not None:
            raise self._failure

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """In the server's loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    def generate(self, *arguments: Any) -> list[RequestOutput]:
        """Of the engine itself, without HTTP."""
        return self.run(self.engine.generate(*arguments))

    def statistics(self) -> Statistics:
        """As they are now, asked of the replicas."""
        return self.engine._runtime.fetch_statistics()

    def post(self, path: str, **fields: Any) -> httpx.Response:
        return self.client.post(path, json=fields)

    def raw(self) -> socket.socket:
        """A connection of one's own."""
        port = int(self.url.rsplit(":", 1)[1])
        connection = socket.create_connection(("127.0.0.1", port), timeout=30)
        connection.settimeout(30)
        return connection

    def holds_nothing(self) -> bool:
        """No request is open, and every page is free."""
        statistics = self.statistics()
        return (
            self.service.open == 0
            and statistics.pages_free == statistics.pages_total
            and statistics.running == statistics.waiting == 0
        )

    def comes_to_rest(self) -> bool:
        return comes_true(self.holds_nothing, 20)


@contextmanager
def running_server(
    *, api_key: str | None = None, max_body_bytes: int = 2**20, send_buffer: int | None = None, **settings: Any
) -> Iterator[RunningServer]:
    server = RunningServer(settings, api_key, max_body_bytes, send_buffer)
    try:
        yield server
    finally:
        server.close()


def events_of(text: str) -> list[Any]:
    """What a stream of server-sent events says: objects, and "[DONE]" as it is; comments are left out."""
    found: list[Any] = []
    for event in text.split("\n\n"):
        if event.startswith("data: "):
            data = event.removeprefix("data: ")
            found.append(data if data == "[DONE]" else json.loads(data))
        else:
            assert not event or event.startswith(":"), event
    return found


def joined(events: Sequence[Any]) -> dict[int, dict[str, Any]]:
    """Chunks of a stream as the choices of one whole answer, by index."""
    choices: dict[int, dict[str, Any]] = {}
    for event in events:
        if event == "[DONE]":
            continue
        for part in event["choices"]:
            choice = choices.setdefault(part["index"], {"text": "", "logprobs": None, "finish_reason": None})
            assert choice["finish_reason"] is None, "nothing comes after the end of a choice"
            choice["text"] += part["delta"].get("content", "") if "delta" in part else part["text"]
            if part["logprobs"] is not None:
                rows = choice["logprobs"] or {}
                added = {key: value for key, value in part["logprobs"].items() if value is not None}
                choice["logprobs"] = {key: [*rows.get(key, []), *value] for key, value in added.items()}
            choice["finish_reason"] = part["finish_reason"]
            choice["stop_reason"] = part.get("stop_reason")
    return choices


def whole(choice: Mapping[str, Any]) -> dict[str, Any]:
    """A choice of a whole answer in the form of ``joined``."""
    rows = choice["logprobs"]
    return {
        "text": choice["message"]["content"] if "message" in choice else choice["text"],
        "logprobs": rows and {key: value for key, value in rows.items() if value is not None},
        "finish_reason": choice["finish_reason"],
        "stop_reason": choice["stop_reason"],
    }
