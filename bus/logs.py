"""Where log events go: where the application sent them, else to the standard library's logger ``chipbus``.

Owns nothing. structlog's own default prints to standard output, which belongs to the host application.
"""

from __future__ import annotations

import logging
from typing import Any

import structlog

__all__ = ["get_logger"]


def get_logger() -> Any:
    """A structlog logger; ask when there is something to log, so that a configuration made meanwhile counts."""
    if structlog.is_configured():
        return structlog.get_logger()
    return structlog.wrap_logger(
        logging.getLogger("chipbus"),
        processors=[
            structlog.stdlib.filter_by_level,
            structlog.processors.format_exc_info,
            structlog.processors.KeyValueRenderer(key_order=["event"]),
        ],
        wrapper_class=structlog.stdlib.BoundLogger,
    )
