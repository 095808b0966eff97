"""What all endpoints share: the engine, what it serves as, and whether new requests may come in.

Owns: the requests that are open, how many there have been, and whether new ones are taken. Thread: the event loop.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager

import attrs
import msgspec

from ...actors.async_engine import AsyncEngine
from ...actors.manifest import installed_version
from ...errors import NotReady
from .answers import Answer
from .failures import Refused

__all__ = ["Service"]

_SAYS_NOTHING_OF_RESULTS = ("run_dir", "record", "log_level")


class Service:
    """One engine behind HTTP."""

    def __init__(self, engine: AsyncEngine, model: str, max_body_bytes: int) -> None:
        self.engine = engine
        self.model = model
        self.max_body_bytes = max_body_bytes
        self.created = int(time.time())
        self.run = secrets.token_hex(4)
        """In every id, which is so not given out again by the next server."""
        self.version = installed_version()
        self.fingerprint = f"{self.version}-{_digest(engine)}"
        self.state = "starting"  # then serving, then draining
        self.served = 0
        self._open: set[Answer] = set()
        self._tokens = 0  # of answers that are over
        self._is_idle = asyncio.Event()
        self._is_idle.set()

    @property
    def max_model_len(self) -> int:
        """Longest context in tokens."""
        return self.engine.plan.max_model_len

    @property
    def is_ready(self) -> bool:
        """A replica core takes requests, and the server does. A chip that restarts below it is waited for."""
        return self.state == "serving" and any(
            record.kind == "replica" and record.state == "ready" for record in self.engine.tree()
        )

    def check_model(self, name: str | None) -> None:
        """Raise ``Refused`` for a model that is not served."""
        if name is not None and name != self.model:
            text = f"there is no model {name[:100]!r} here; it is {self.model!r}"
            raise Refused(404, text, code="model_not_found", param="model")

    def check_ready(self) -> None:
        """Raise ``NotReady`` while no request may come in."""
        if not self.is_ready:
            why = {"starting": "the server is starting", "draining": "the server is being stopped"}
            raise NotReady(f"{why.get(self.state, 'no replica is ready')}; try again a little later, or elsewhere")

    @contextmanager
    def admitted(self, answer: Answer) -> Iterator[None]:
        """Hold a request open; raises ``NotReady`` while none may come in."""
        self.check_ready()
        self._open.add(answer)
        self._is_idle.clear()
        try:
            yield
        finally:
            self._open.discard(answer)
            self.served += 1
            self._tokens += answer.completion_tokens
            if not self._open:
                self._is_idle.set()

    @property
    def open(self) -> int:
        """Requests that are being served."""
        return len(self._open)

    @property
    def tokens(self) -> int:
        """Tokens told to clients so far."""
        return self._tokens + sum(answer.completion_tokens for answer in self._open)

    async def idle(self) -> None:
        """Return when no request is open."""
        await self._is_idle.wait()


def _digest(engine: AsyncEngine) -> str:
    """Of the model and of every setting that results may depend on."""
    config = attrs.asdict(engine.plan.config, filter=lambda field, _: field.name not in _SAYS_NOTHING_OF_RESULTS)
    text = msgspec.json.encode([engine.plan.spec.fingerprint, sorted(config.items())])
    return hashlib.sha256(text).hexdigest()[:12]
