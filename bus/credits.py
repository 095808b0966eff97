"""Credits for work: how many tells and asks of the WORK lane may be under way to a peer, or wait at it. Pure.

One count stands for messages and bytes: each message costs its bytes, at least ``MESSAGE_COST``. Sender and receiver
only count up, from the beginning of the link, and each message carries the count with it. So a lost or repeated CREDIT
does no harm, what was lost on the way is given back with what came behind it, and nothing need be counted on arrival.
Credit is returned when the peer's actor takes a message out of its mailbox, in portions of half of all.
"""

from __future__ import annotations

from .envelope import HEADER_BYTES

__all__ = ["CREDIT_WAIT_S", "MESSAGE_COST", "WORK_CREDIT", "WORK_CREDIT_BYTES", "cost_of"]

WORK_CREDIT = 4096
"""Messages of work that one peer may have under way to another."""
WORK_CREDIT_BYTES = 8 * 2**20
"""The same in bytes; the last message may go over it, for else a large one could never be sent."""
MESSAGE_COST = WORK_CREDIT_BYTES // WORK_CREDIT
CREDIT_WAIT_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Bounds of what is counted of asks that wait for credit."""


def cost_of(body_bytes: int) -> int:
    """What a message with a body of that size costs."""
    size = HEADER_BYTES + body_bytes
    return size if size > MESSAGE_COST else MESSAGE_COST
