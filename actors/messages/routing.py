"""What the router adds to the conversation a request is served in, and what it is told about replicas."""

from __future__ import annotations

import attrs

from ...bus import Lane, message

__all__ = ["Routed", "Withheld", "Withhold"]


@message(0x0208, lane=Lane.WORK)
@attrs.frozen(kw_only=True)
class Routed:
    """Which replica serves a ``Submit`` from here on. The router's first item of the stream."""

    replica: int
    dp_rank: int
    chosen_by: str = ""  # "pin": the request itself; "session": where its session is; "load": the fewest pending tokens


@message(0x0209, lane=Lane.CHILD)
@attrs.frozen(kw_only=True)
class Withhold:
    """Supervisor asks router: send nothing new to this life of a replica core, which is to end.

    Reply: ``Withheld``, when nothing is there any more; at the deadline what is there goes to another replica, and the
    ask ends with ``DeadlineExceeded``.
    """

    replica: str  # its node name
    incarnation: int


@message(0x020A, lane=Lane.CHILD)
@attrs.frozen
class Withheld:
    """The router's reply: no request is at that replica."""
