"""Where the log of a process below the host application goes: one line per event on the inherited stderr.

Owns: structlog's configuration in those processes. The host application's own is never touched.
"""

from __future__ import annotations

import contextlib
import os
import select
import sys
from typing import TextIO, cast

import structlog
from structlog.typing import EventDict, WrappedLogger

from ..bus.logs import tell_exception

__all__ = ["configure_logging"]

_ALWAYS_FITS_BYTES = 4096  # PIPE_BUF: a pipe that polls writable takes this much without blocking


def configure_logging(level: str, process: str) -> None:
    """Log events of at least ``level`` (debug, info, warning, error) as logfmt lines that name ``process``."""

    def add_process(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
        event["process"] = process
        return event

    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            tell_exception,
            add_process,
            _render,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(file=cast(TextIO, _StandardError())),
        cache_logger_on_first_use=False,  # a forked child configures again, under its own name
    )


_logfmt = structlog.processors.LogfmtRenderer(
    key_order=["timestamp", "level", "process", "event"], drop_missing=True, bool_as_flag=False
)


def _render(logger: WrappedLogger, name: str, event: EventDict) -> str:
    trace = event.pop("exception", None)
    line = _logfmt(logger, name, event)
    return line if trace is None else f"{line}\n{trace}"


class _StandardError:
    """Stderr that neither blocks nor fails: a supervisor must not stop because nobody reads its log."""

    def write(self, text: str) -> int:
        data = text.encode(errors="replace")
        poll = select.poll()
        poll.register(2, select.POLLOUT)
        with contextlib.suppress(OSError):  # closed, or its reader is gone
            while data and any(events & select.POLLOUT for _, events in poll.poll(0)):
                data = data[os.write(2, data[:_ALWAYS_FITS_BYTES]) :]
        return len(text)

    def flush(self) -> None:
        sys.stderr.flush()
