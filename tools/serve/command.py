"""``bus-run serve``: one engine behind HTTP, from its first line to its last. HTTP libraries are loaded when it runs.

Owns: the engine, the listening socket and the process's signals while it runs. stdout gets the base URL alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import socket
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import attrs

from ...actors.async_engine import AsyncEngine
from ...actors.logs import configure_logging
from ...actors.manifest import installed_version
from ...bus import Progress
from ...errors import ConfigError
from ...kernels.memory import available_bytes
from ..check import described
from ..console import EXIT_INTERRUPTED
from ..progress import ProgressView, progress_view
from ..settings import Resolved

if TYPE_CHECKING:
    from .service import Service

__all__ = ["UVICORN", "check_uvicorn", "serve"]

UVICORN = "0.54"
"""The version whose insides ``connections.py`` overrides; the extra says the same."""
SUMMARY_S = 10.0
LOOK_S = 0.5  # how soon the end of the engine is noticed


def serve(resolved: Resolved) -> None:
    """Serve until a signal has ended it in order, or the engine has died.

    Raises ``ConfigError`` before anything is started: no extra, or another uvicorn than its, a public address without a
    key, a port in use; then the engine's own errors.
    """
    resolved.server.check_exposure()
    try:
        import uvicorn
        import uvloop

        check_uvicorn(uvicorn.__version__)
        from .connections import listening_socket
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"bus-run serve needs the extra 'serve', pip install 'chipbus[serve]': there is no module {error.name!r}"
        ) from error
    configure_logging(resolved.config.log_level, "host")
    with (
        contextlib.closing(listening_socket(resolved.server.host, resolved.server.port)) as listener,
        progress_view() as view,
        _signals_as_they_were(),
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        runner.run(_Serving(resolved, listener, view).run())


def check_uvicorn(version: str) -> None:
    """Raise ``ConfigError`` if limits and ends of connections, which hang on uvicorn's insides, may not be kept."""
    if not version.startswith(f"{UVICORN}."):
        raise ConfigError(
            f"bus-run serve works with uvicorn {UVICORN}, and {version} is installed: pip install 'chipbus[serve]'"
        )


@contextlib.contextmanager
def _signals_as_they_were() -> Iterator[None]:
    """The loop forgets what was there before it."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Serving:
    """One run of the server."""

    def __init__(self, resolved: Resolved, listener: socket.socket, view: ProgressView) -> None:
        self._resolved = resolved
        self._listener = listener
        self._view = view
        self._stop = asyncio.Event()
        self._is_up = False

    async def run(self) -> None:
        """From start to end."""
        from . import metrics, state
        from .app import make_app
        from .connections import HttpServer
        from .service import Service

        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal)
        config, settings = self._resolved.config, self._resolved.server
        engine = AsyncEngine(on_progress=self._show, **attrs.asdict(config))
        name = settings.served_model_name or engine.plan.model_dir.name
        self._introduce(engine)
        service = Service(engine, name, settings.max_body_bytes)
        responses = metrics.HttpResponses()
        more = [*state.routes(engine), *metrics.routes(engine, responses)]
        is_private = not settings.insecure  # a key, if there is one, is asked for instead
        http = HttpServer(make_app(service, settings.api_key, more, responses, is_private=is_private))
        serving = asyncio.ensure_future(http.serve(sockets=[self._listener]))
        try:
            began_s = time.monotonic()
            if not await self._start(engine):
                self._view.say("stopped while it started")
                return
            try:
                gc.collect()
                gc.freeze()  # what the start made lives as long as the process: no collection need look at it again
                service.state = "serving"
                self._tell_ready(engine, name, time.monotonic() - began_s)
                await self._serve_until_stopped(engine, service, serving)
                if engine.death is not None:
                    raise engine.death
                await self._drain(service)
            finally:
                service.state = "draining"
                await engine.close()
        finally:
            http.should_exit = True
            await serving

    def _show(self, progress: Progress) -> None:
        """How far the start is. A later life of a process loads what it needs without a bar on the terminal."""
        if not self._is_up:
            self._view.show(progress)

    def _on_signal(self) -> None:
        """The first: end in order. The second: end. Every process of the engine dies with this one."""
        if self._stop.is_set():
            with self._view:  # gives the terminal back
                self._view.say("killed")
            os._exit(EXIT_INTERRUPTED)
        self._stop.set()

    def _introduce(self, engine: AsyncEngine) -> None:
        say = self._view.say
        say(f"chipbus {installed_version()}")
        for setting in (*self._resolved.settings, *self._resolved.server_settings):
            if setting.source != "default":
                say(f"  {setting.as_toml()}  ({setting.source})")
        say(described(engine.plan, available_bytes()))

    async def _start(self, engine: AsyncEngine) -> bool:
        """Whether it was started; False if a signal came first, and nothing is left of it."""
        start = asyncio.ensure_future(engine.__aenter__())
        stop = asyncio.ensure_future(self._stop.wait())
        try:
            await asyncio.wait({start, stop}, return_when=asyncio.FIRST_COMPLETED)
            if start.done():
                start.result()
                return True
            start.cancel()
            await asyncio.wait({start})
            return False
        finally:
            stop.cancel()

    def _tell_ready(self, engine: AsyncEngine, name: str, seconds: float) -> None:
        from .connections import url_of

        self._is_up = True
        self._view.say(f"run directory {engine.run_dir}")
        self._view.say(f"ready in {seconds:.1f} s, as model {name!r}; Ctrl-C ends it")
        self._view.result(f"{url_of(self._listener)}/v1")

    async def _serve_until_stopped(self, engine: AsyncEngine, service: Service, serving: asyncio.Future[None]) -> None:
        """Until a signal comes or the engine dies; one line every ten seconds if there was work."""
        said_s, served, tokens = time.monotonic(), 0, 0
        while not self._stop.is_set() and engine.death is None and not serving.done():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), LOOK_S)
            seconds = time.monotonic() - said_s
            if seconds < SUMMARY_S:
                continue
            if service.open or service.served > served:
                rate = (service.tokens - tokens) / seconds
                done = service.served - served
                self._view.say(f"{service.open} requests open, {done} ended, {rate:,.1f} tokens/s")
            said_s, served, tokens = time.monotonic(), service.served, service.tokens

    async def _drain(self, service: Service) -> None:
        """Let open requests end, for as long as they may."""
        service.state = "draining"
        timeout_s = self._resolved.server.drain_timeout_s
        if not service.open:
            self._view.say("stopped")
            return
        self._view.say(f"{service.open} open requests may end within {timeout_s:g} s; Ctrl-C again kills them")
        try:
            await asyncio.wait_for(service.idle(), timeout_s)
        except TimeoutError:
            self._view.say(f"stopped; {service.open} requests had not ended and were dropped")
        else:
            self._view.say("stopped; all requests ended")
