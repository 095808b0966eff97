"""The small endpoints: what is served, whether it is well, and text to token ids and back.

Owns: nothing.
"""

from __future__ import annotations

from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from ...errors import RequestInvalid
from .fields import DETOKENIZE, TOKENIZE, parse
from .http import Json, body_of, send_json
from .service import Service

__all__ = ["OPEN_PATHS", "routes"]

OPEN_PATHS = frozenset({"/", "/health", "/ready", "/version"})
"""Answered without a key: whoever probes a server has none, and they tell nothing of what it serves. The status page
at ``/`` holds no data either, and asks for the key itself."""


def routes(service: Service) -> list[Route]:
    """``/v1/models``, ``/health``, ``/ready``, ``/version``, ``/tokenize``, ``/detokenize``."""
    about = _About(service)
    return [
        Route("/v1/models", Json(about.models), methods=["GET"]),
        Route("/v1/models/{model:path}", Json(about.model), methods=["GET"]),
        Route("/health", Json(about.health), methods=["GET"]),
        Route("/ready", Json(about.ready), methods=["GET"]),
        Route("/version", Json(about.version), methods=["GET"]),
        Route("/tokenize", Json(about.tokenize), methods=["POST"]),
        Route("/detokenize", Json(about.detokenize), methods=["POST"]),
    ]


class _About:
    def __init__(self, service: Service) -> None:
        self._service = service

    def _card(self) -> dict[str, str | int]:
        service = self._service
        return {
            "id": service.model,
            "object": "model",
            "created": service.created,
            "owned_by": "chipbus",
            "max_model_len": service.max_model_len,
        }

    async def models(self, scope: Scope, receive: Receive, send: Send) -> None:
        """A list of one."""
        await send_json(send, {"object": "list", "data": [self._card()]})

    async def model(self, scope: Scope, receive: Receive, send: Send) -> None:
        """That one, or 404."""
        self._service.check_model(scope["path_params"]["model"])
        await send_json(send, self._card())

    async def health(self, scope: Scope, receive: Receive, send: Send) -> None:
        """This process lives: it answers."""
        await send_json(send, {"status": "alive"})

    async def ready(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Whether a request would be taken."""
        self._service.check_ready()
        await send_json(send, {"status": "ready"})

    async def version(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Of chipbus."""
        await send_json(send, {"version": self._service.version})

    async def tokenize(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Ids of a text or of a conversation."""
        service = self._service
        given = parse(TOKENIZE, await body_of(scope, receive, service.max_body_bytes))
        service.check_model(given.get("model"))
        if len(given.keys() & {"prompt", "messages"}) != 1:
            raise RequestInvalid("one of prompt and messages must be given", param="prompt")
        ids = await service.engine.tokenize(given["prompt"] if "prompt" in given else given["messages"])
        await send_json(send, {"tokens": ids, "count": len(ids), "max_model_len": service.max_model_len})

    async def detokenize(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Text of ids."""
        service = self._service
        given = parse(DETOKENIZE, await body_of(scope, receive, service.max_body_bytes))
        service.check_model(given.get("model"))
        await send_json(send, {"prompt": await service.engine.detokenize(given["tokens"])})
