"""A status page to look at: a real engine behind its routes on a real socket, and reports made by hand."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, Self, TypeVar

import attrs
import uvicorn
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from chipbus import AsyncEngine
from chipbus.actors.messages.launching import ChipReport
from chipbus.actors.messages.tree import ChildRecord, ProcessReport, ProgramStatistics, ReplicaStatistics
from chipbus.actors.report import EngineReport, Event, Latencies, RequestRow
from chipbus.bus import Histogram, NodeReport
from chipbus.tools.serve.state import routes
from chipbus.topology.rings import RingUse

__all__ = ["NOW", "Site", "hand_made_report"]

NOW = 1_764_390_000.0
T = TypeVar("T")


class Site:
    """One engine and its page, in a thread of its own. ``with``; ``key``, ``is_deaf`` and ``asked`` are the door's."""

    def __init__(self, **settings: Any) -> None:
        self.key = ""  # what everything but the page itself asks for; "" is nothing
        self.is_deaf = False  # nothing is answered
        self.asked: list[str] = []  # paths, in order
        self._settings = settings
        self._is_up = threading.Event()
        self._socket = socket.create_server(("127.0.0.1", 0))
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name="site")
        self._failure: BaseException | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._socket.getsockname()[1]}/"

    def begin(self, work: Callable[[AsyncEngine], Coroutine[Any, Any, T]]) -> Future[T]:
        """Have something done with the engine, on its own loop."""
        return asyncio.run_coroutine_threadsafe(work(self.engine), self._loop)

    def pid(self, name: str) -> int:
        return next(record.pid for record in self.engine.tree() if record.name == name)

    def end(self) -> None:
        """Close the engine, then the server. Idempotent."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(30)
        assert not self._thread.is_alive(), "the server does not end"

    def __enter__(self) -> Self:
        self._thread.start()
        self._is_up.wait(30)
        assert self._is_up.is_set(), "the site does not start"
        if self._failure is not None:
            raise self._failure
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        try:
            async with AsyncEngine("demo", chip="null", **self._settings) as self.engine:
                app = Starlette(routes=routes(self.engine))
                config = uvicorn.Config(self._door(app), log_level="warning", ws="none", lifespan="off")
                server = uvicorn.Server(config)
                serving = asyncio.ensure_future(server.serve(sockets=[self._socket]))
                self._is_up.set()
                await self._stop.wait()
                await self.engine.close()
                server.should_exit = True
                await serving
        except BaseException as error:
            self._failure = error
            self._is_up.set()
            raise
        finally:
            self._socket.close()

    def _door(self, app: ASGIApp) -> ASGIApp:
        async def door(scope: Scope, receive: Receive, send: Send) -> None:
            self.asked.append(scope["path"])
            given = dict(scope["headers"]).get(b"authorization", b"").decode()
            if self.is_deaf:
                await PlainTextResponse("deaf", 503)(scope, receive, send)
            elif self.key and scope["path"] != "/" and given != f"Bearer {self.key}":
                headers = {"WWW-Authenticate": 'Basic realm="chipbus"'}
                await PlainTextResponse("no", 401, headers)(scope, receive, send)
            else:
                await app(scope, receive, send)

        return door


def _node(**facts: Any) -> NodeReport:
    return NodeReport(**{"age_s": 192.3, "mailbox": 0, "open_asks": 0, **facts})


def _record(name: str, kind: str, parent: str, **facts: Any) -> ChildRecord:
    usual = {
        "name": name,
        "kind": kind,
        "pid": 4711,
        "parent": parent,
        "state": "ready",
        "incarnation": 1,
        "restarts": 0,
    }
    return ChildRecord(**{**usual, **facts})


def _histogram(*counts: int) -> Histogram:
    return Histogram((0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5), counts, 3.0)


def hand_made_report(evil: str = "") -> EngineReport:
    """Two replicas, one of them down, with something in every panel. ``evil`` is in every text that data can bring."""
    nothing = _histogram(*[0] * 8)
    latencies = Latencies(
        time_to_first_token=_histogram(0, 2, 9, 20, 4, 1, 0, 0), inter_token=nothing,
        per_output_token=_histogram(3, 22, 9, 0, 0, 0, 0, 2), e2e=nothing,
        queued=nothing, prefill=nothing, decode=nothing,
    )  # fmt: skip
    waits = {"waits_for": f"Generate{evil}", "waits_on": f"tokenizer.0{evil}", "waits_s": 2.31, "open_asks": 3}
    rings = (RingUse(tasks=300, heap_bytes=4096), RingUse(), RingUse(tasks=1), RingUse(tasks=2, dep_entries=70))
    chip = ChipReport(2**20, "", 0.0, f"null{evil}", ((f"decode{evil}", 0.25), ("prefill", 0.004)), rings)
    processes = (
        ProcessReport(_record("host", "host", ""), _node(**waits)),
        ProcessReport(_record("supervisor", "supervisor", ""), _node()),
        ProcessReport(
            _record("router", "router", "supervisor", incarnation=2, restarts=1, last_exit=f"signal 9{evil}"),
            _node(mailbox=12, lanes=(("work", 12),)),
        ),
        ProcessReport(_record("replica.0", "replica", "supervisor"), _node(is_busy=True)),
        ProcessReport(_record("chip.0.0", "chip", "replica.0"), _node(), chip),
        ProcessReport(_record(f"replica.1{evil}", "replica", "supervisor", state="backoff", pid=0), None),
        ProcessReport(_record("chip.1.0", "chip", f"replica.1{evil}", state="backoff", pid=0), None),
    )
    programs = (ProgramStatistics("prefill", 12, 4096, 2 * 10**9), ProgramStatistics(f"decode{evil}", 9, 99, 10**9))
    replica = ReplicaStatistics(
        replica=0, pages_total=128, pages_free=90, pages_cached=40, running=3, waiting=1, steps=1200, programs=programs,
        tokens_generated=12345, prompt_tokens=4096, step_ns=10**10, device_ns=3 * 10**9, preemptions=1,
        prefix_queries=4096, prefix_hits=2048,
    )  # fmt: skip
    row = RequestRow(
        request_id="req-7", replica=0, state="running", prompt_tokens=612, output_tokens=88, ttft_s=0.212, age_s=3.4,
        attempt=2,
    )  # fmt: skip
    waiting = attrs.evolve(row, request_id=f"req-8{evil}", replica=None, state="waiting", output_tokens=0, ttft_s=None)
    events = (
        Event(number=1, at_unix_s=NOW - 60, kind="started", subject="router", text="life 1"),
        Event(number=2, at_unix_s=NOW - 13, kind="exit", subject=f"router{evil}", text=f"signal 9{evil}"),
        Event(number=3, at_unix_s=NOW - 12, kind=f"retried{evil}", subject="req-7", text="attempt 2, after PeerGone"),
    )
    return EngineReport(
        at_unix_s=NOW, started_unix_s=NOW - 4000, version=f"0.1.0{evil}", model=f"demo{evil}", chip=f"null{evil}",
        run_dir=f"/run/chipbus-1{evil}", record=f"/records/one{evil}",
        config={"data_parallel_size": 2, "tensor_parallel_size": 1, "model": f"demo{evil}", "max_model_len": None},
        is_ready=True, is_closed=True, processes=processes, replicas=(replica,), totals=(), restarts=(), exits=1,
        requests_total=140, retries_total=2, finished={f"stop{evil}": 100}, failed={"Overloaded": 4, f"No{evil}": 1},
        prompt_tokens=50000, output_tokens=12345, latencies=latencies, recent=latencies, recent_s=60.0,
        recent_prompt_tokens=3210, recent_output_tokens=7440, open=(row, waiting), open_total=2, events=events,
    )  # fmt: skip
