"""What a client is told when something fails: status, type and code by error class, in OpenAI's shape. Pure.

Owns: nothing. Clients key on the status and then on ``code``, so both are a promise: docs/serving.md lists them.
"""

from __future__ import annotations

import attrs
import msgspec

from ...errors import (
    BadTarget,
    ChipbusError,
    ContextTooLong,
    DeadlineExceeded,
    EngineClosed,
    EngineDead,
    NotReady,
    Overloaded,
    PinOverloaded,
    RequestInvalid,
    RestartLimit,
    WorkerDied,
)

__all__ = ["Failure", "Refused", "failure_of", "rows"]

RETRY_AFTER_S = 1
"""Queues of a replica move on, and a replica that died is back, within about a second."""


@attrs.frozen(kw_only=True)
class Failure:
    """One answer that is an error."""

    status: int
    type: str
    message: str
    code: str | None = None
    param: str | None = None
    headers: tuple[tuple[bytes, bytes], ...] = ()

    def body(self) -> bytes:
        """``{"error": {"message", "type", "param", "code"}}`` as JSON."""
        return msgspec.json.encode(
            {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}
        )


class Refused(Exception):
    """Raised on the way to the engine, where no error class of ours says it: wrong key, path, method, body."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",  # noqa: A002 (its name in the answer)
        code: str | None = None,
        param: str | None = None,
        headers: tuple[tuple[bytes, bytes], ...] = (),
    ) -> None:
        super().__init__(message)
        self.failure = Failure(status=status, type=type, message=message, code=code, param=param, headers=headers)


def rows() -> list[tuple[str, str, str, str]]:
    """Every answer that is an error, for the page of the server: status, type, code, when."""
    seen = {answer: str(error.__doc__).partition(". ")[0].rstrip(".\n") for error, answer in reversed(_TABLE.items())}
    seen[_TABLE[ChipbusError]] = "Something of the server failed; its log says how"
    found = [(*answer, when) for answer, when in seen.items()] + list(_OF_THE_DOOR)
    return sorted((str(status), f"`{kind}`", f"`{code}`" if code else "–", when) for status, kind, code, when in found)


_INVALID = "invalid_request_error"
_OF_THE_DOOR = (
    (400, _INVALID, "bad_http", "The bytes are no HTTP request"),
    (401, "authentication_error", "invalid_api_key", "No key, or a wrong one"),
    (403, _INVALID, "wrong_host", "No key is set, and the server was asked for by a name other than localhost"),
    (404, _INVALID, "model_not_found", "A model that is not served"),
    (404, _INVALID, "not_found", "Nothing is at this path"),
    (405, _INVALID, "method_not_allowed", "Another method than this path has"),
    (408, _INVALID, "body_timeout", "The rest of the body did not come"),
    (413, _INVALID, "body_too_large", "The body is longer than `--max-body-bytes`"),
    (415, _INVALID, "unsupported_content_type", "The body is not `application/json`"),
    (431, _INVALID, "head_too_large", "Request line and headers are longer than 32 KiB"),
)
"""What is refused before the engine hears of it."""
_TABLE: dict[type[ChipbusError], tuple[int, str, str | None]] = {
    RequestInvalid: (400, _INVALID, None),
    BadTarget: (400, _INVALID, "bad_target"),
    ContextTooLong: (400, _INVALID, "context_length_exceeded"),
    Overloaded: (429, "rate_limit_error", "queue_full"),
    PinOverloaded: (429, "rate_limit_error", "pin_overloaded"),
    NotReady: (503, "server_error", "not_ready"),
    EngineClosed: (503, "server_error", "not_ready"),
    EngineDead: (503, "server_error", "not_ready"),
    RestartLimit: (503, "server_error", "not_ready"),
    DeadlineExceeded: (504, "timeout_error", "deadline_exceeded"),
    WorkerDied: (500, "server_error", "worker_died"),
    ChipbusError: (500, "server_error", "internal"),
}


def failure_of(error: BaseException, param: str | None = None) -> Failure:
    """The answer for an error; the most special class in the table decides.

    param: the field that is to blame for a wrong request whose error does not name one itself: the prompt's
    """
    if isinstance(error, Refused):
        return error.failure
    row = next((_TABLE[kind] for kind in type(error).__mro__ if kind in _TABLE), None)
    if row is None:  # a bug of ours: its text may hold anything
        return Failure(status=500, type="server_error", code="internal", message="the server failed; its log says how")
    status, kind, code = row
    named = getattr(error, "param", "") or (param if status == 400 and code != "bad_target" else None)
    return Failure(
        status=status,
        type=kind,
        code=code,
        param=named or None,
        message=" ".join(str(error).split()),
        headers=((b"retry-after", b"%d" % RETRY_AFTER_S),) if status in (429, 503) else (),
    )
