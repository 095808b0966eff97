"""The application: routes of several modules behind one door, which asks for the key and answers every error alike.

Owns: nothing. Each module with endpoints has a ``routes`` function; here they come together.
"""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Sequence

from starlette.exceptions import HTTPException
from starlette.routing import BaseRoute, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from . import about, completions
from .failures import Failure, Refused
from .http import send_failure, told
from .metrics import HttpResponses
from .service import Service

__all__ = ["make_app"]


def make_app(
    service: Service,
    api_key: str | None,
    more: Sequence[BaseRoute] = (),
    responses: HttpResponses | None = None,
    *,
    is_private: bool = False,
) -> ASGIApp:
    """The ASGI application of one engine, whose answers are counted in ``responses``.

    more: routes of other modules, for example ``metrics.routes(engine)``
    is_private: that only this host can reach it is all that protects it, so browsers must not be led to it by a name
    """
    routes = [*completions.routes(service), *about.routes(service), *more]
    return _Door(Router(routes, redirect_slashes=False), api_key, responses or HttpResponses(), is_private)


class _Door:
    """In front of all routes."""

    def __init__(self, router: Router, api_key: str | None, responses: HttpResponses, is_private: bool) -> None:
        self._router = router
        self._is_private = is_private
        self._responses = responses
        self._api_key = None if api_key is None else api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI; http only."""
        send = self._responses.counted(send)
        scope["app"] = self._router  # so that it raises what it would answer in its own shape
        try:
            if scope["path"] not in about.OPEN_PATHS:
                if self._api_key is not None:
                    self._check_key(scope, self._api_key)
                elif self._is_private:
                    _check_host(scope)
            await self._router(scope, receive, send)
        except HTTPException as error:
            await send_failure(send, _of_router(error, scope))
        except Exception as error:  # noqa: BLE001 (the last boundary: every ending becomes an answer)
            failure = told(error, scope["path"])
            try:
                await send_failure(send, failure)
            except RuntimeError:  # an answer has begun; the connection ends in the middle of it
                return

    def _check_key(self, scope: Scope, expected: bytes) -> None:
        """``Authorization: Bearer KEY``, compared in constant time."""
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        scheme, _, key = given.partition(b" ")
        if scheme.lower() != b"bearer" or not hmac.compare_digest(key.strip(), expected):
            what = "the API key is wrong" if given else "there is no API key"
            raise Refused(
                401,
                f"{what}; send Authorization: Bearer KEY",
                type="authentication_error",
                code="invalid_api_key",
                headers=((b"www-authenticate", b"Bearer"), (b"connection", b"close")),
            )


def _check_host(scope: Scope) -> None:
    """Raise ``Refused`` if the server was asked for by a name other than localhost.

    A web page may give its own name this host's address, and then talk to the server as if it were its own.
    """
    host = next((value for name, value in scope["headers"] if name == b"host"), b"").decode("latin-1")
    name = host.partition("]")[0].removeprefix("[") if host.startswith("[") else host.partition(":")[0]
    if name in ("", "localhost") or name.endswith(".localhost"):
        return
    try:
        ipaddress.ip_address(name)
    except ValueError:
        text = "without a key the server answers only to localhost and to addresses, not to another name of this host"
        raise Refused(403, text, code="wrong_host", headers=((b"connection", b"close"),)) from None


def _of_router(error: HTTPException, scope: Scope) -> Failure:
    """Nothing at this path, or nothing for this method."""
    allowed = (error.headers or {}).get("Allow", "")
    return Failure(
        status=error.status_code,
        type="invalid_request_error",
        code={404: "not_found", 405: "method_not_allowed"}.get(error.status_code),
        message=(
            f"{scope['method'][:20]} is not possible here; {allowed} is" if allowed else "there is nothing at this path"
        ),
        headers=((b"allow", allowed.encode()),) if allowed else (),
    )
