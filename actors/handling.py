"""Where and when one request wants to be served. Pure data; travels inside ``Generate`` and ``Submit``."""

from __future__ import annotations

from typing import Any

import attrs

from ..errors import BadTarget, RequestInvalid
from .unicode_text import check_unicode

__all__ = ["ANYHOW", "Handling", "pinned_replica"]

MAX_SESSION_CHARS = 256


def _check_priority(value: Any) -> None:
    if type(value) is not int or not -(2**31) <= value < 2**31:
        raise RequestInvalid(f"priority is {value!r}; it must be an integer in [-2^31, 2^31)", param="priority")


def _check_session(value: Any) -> None:
    if not isinstance(value, str) or len(value) > MAX_SESSION_CHARS:
        what = f"{len(value)} characters long" if isinstance(value, str) else repr(value)
        rule = f"it must be text of at most {MAX_SESSION_CHARS} characters"
        raise RequestInvalid(f"session is {what}; {rule}", param="session")
    check_unicode(value, "session", param="session")


def _check_number(name: str, value: Any) -> None:
    if value is not None and (type(value) is not int or not 0 <= value < 2**31):  # True is no rank
        raise BadTarget(f"{name} is {value!r}; it must be an integer of at least 0", param=name)


@attrs.frozen(kw_only=True)
class Handling:
    """Where and when a request is served. Checked when made; raises ``RequestInvalid``, ``BadTarget`` for a pin."""

    priority: int = 0
    """Lower goes first, as in vLLM; equal ones in order of arrival."""
    session: str = ""
    """Requests of one session go to the replica that served the one before, while that is no worse than others."""
    replica: int | None = None
    """Serve it there and nowhere else. None: the router chooses; 0 is a replica."""
    dp_rank: int | None = None
    """Global data-parallel rank to serve it at. None: the router chooses; 0 is a rank."""

    def __attrs_post_init__(self) -> None:
        # It is made in every process a request passes, and mostly asks for nothing. Each validator would be a call.
        priority, session = self.priority, self.session
        if self.replica is None and self.dp_rank is None and session == "" and priority == 0 and type(priority) is int:
            return
        _check_priority(priority)
        _check_session(session)
        _check_number("replica", self.replica)
        _check_number("dp_rank", self.dp_rank)


ANYHOW = Handling()
"""Nothing asked for."""


def pinned_replica(handling: Handling, num_replicas: int) -> int | None:
    """Number of the replica that must serve it; None: the router chooses.

    Each replica holds one data-parallel rank: its own number. Raises ``BadTarget`` if there is no such replica or rank,
    or if the two contradict each other.
    """
    for name in ("replica", "dp_rank"):
        number = getattr(handling, name)
        if number is not None and number >= num_replicas:
            raise BadTarget(f"{name} {number} is outside [0, {num_replicas})", param=name)
    replica, dp_rank = handling.replica, handling.dp_rank
    if replica is not None and dp_rank is not None and replica != dp_rank:
        raise BadTarget(
            f"replica {replica} holds dp_rank {replica}, not {dp_rank}; give one of the two", param="dp_rank"
        )
    return dp_rank if replica is None else replica
