"""Where log events go: where the application sent them, else to the standard library's logger ``chipbus``.

Owns nothing. structlog's own default prints to standard output, which belongs to the host application.

What a request says is nobody's business but its caller's. So an exception is logged as its class and the lines it came
through, without values of variables, and its text only where we know who wrote it: the text of a ``KeyError`` may be a
prompt.
"""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Iterator
from typing import Any

import structlog
from structlog.typing import EventDict, WrappedLogger

from ..errors import ChipbusError, RequestError

__all__ = ["get_logger", "safe_name", "tell_exception"]

SAFE = (ChipbusError, OSError, ImportError, MemoryError, ZeroDivisionError)
"""Their texts are our own, or name files, modules and sizes. Not a ``RequestError``, which tells the caller of his own
values, nor a bare ``ChipbusError``, which stands for whatever a handler raised."""


def get_logger() -> Any:
    """A structlog logger; ask when there is something to log, so that a configuration made meanwhile counts."""
    if structlog.is_configured():
        config = structlog.get_config()
        return structlog.wrap_logger(
            config["logger_factory"](),
            processors=[tell_exception, *config["processors"]],
            wrapper_class=config["wrapper_class"],
            context_class=config["context_class"],
        )
    return structlog.wrap_logger(
        logging.getLogger("chipbus"),
        processors=[
            structlog.stdlib.filter_by_level,
            tell_exception,
            structlog.processors.KeyValueRenderer(key_order=["event"]),
        ],
        wrapper_class=structlog.stdlib.BoundLogger,
    )


def tell_exception(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    """structlog processor: ``exc_info`` becomes the text ``exception``, and ``error`` is told in the same way."""
    given = event.pop("exc_info", None)
    error = _exception_of(given)
    if error is None:
        return event
    event["exception"] = "\n".join(_chain(error))
    if "error" in event:
        event["error"] = safe_name(error)
    return event


def _exception_of(given: object) -> BaseException | None:
    if isinstance(given, BaseException):
        return given
    if isinstance(given, tuple):
        return given[1] if len(given) == 3 and isinstance(given[1], BaseException) else None
    return sys.exception() if given else None


def _chain(error: BaseException) -> Iterator[str]:
    """What led to it first, as Python prints it."""
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if cause is not None:
        yield from _chain(cause)
        yield "which led to:"
    yield "Traceback (most recent call last):"
    yield "".join(traceback.format_tb(error.__traceback__)).rstrip("\n")
    yield safe_name(error)


def safe_name(error: BaseException) -> str:
    """The class of an error, with its text only where that cannot be of a request."""
    kind = type(error).__name__
    is_safe = isinstance(error, SAFE) and not isinstance(error, RequestError) and type(error) is not ChipbusError
    return f"{kind}: {error}" if is_safe else f"{kind} (its text may be of a request and is not logged)"
