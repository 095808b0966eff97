"""What the router adds to the conversation a request is served in."""

from __future__ import annotations

import attrs

from ...bus import Lane, message

__all__ = ["Routed"]


@message(0x0208, lane=Lane.WORK)
@attrs.frozen(kw_only=True)
class Routed:
    """Which replica serves a ``Submit`` from here on. The router's first item of the stream."""

    replica: int
    dp_rank: int
