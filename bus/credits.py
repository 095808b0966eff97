"""Credits for work: how many tells and asks of the WORK lane may be on their way to a peer, or wait at it. Pure.

Both sides only count up, so that a lost or repeated CREDIT does no harm, and work carries its number, so that what was
lost on the way is seen and given back. A credit is returned when the peer's actor takes the message out of its mailbox,
in portions of half the credit. Owner: the link, whose end is theirs.
"""

from __future__ import annotations

from collections import deque

from ..errors import BadFrame

__all__ = ["WORK_CREDIT", "WORK_CREDIT_BYTES", "Sent", "Taken"]

WORK_CREDIT = 4096
"""Messages of work that one peer may have under way to another."""
WORK_CREDIT_BYTES = 8 * 2**20
"""The same in bytes; the last message may go over it, for else a large one could never be sent."""


class Sent:
    """The sender's side."""

    __slots__ = ("_sizes", "count", "limit", "returned", "waiting_bytes")

    def __init__(self) -> None:
        self.count = 0  # messages sent, ever
        self.returned = 0  # of which the peer has taken, as far as we have heard
        self.limit = WORK_CREDIT
        self.waiting_bytes = 0
        self._sizes: deque[int] = deque()  # of what was sent and not returned

    @property
    def is_open(self) -> bool:
        """There is credit for another message."""
        return self.count < self.limit and self.waiting_bytes < WORK_CREDIT_BYTES

    def add(self, size: int) -> None:
        """A message of ``size`` bytes was sent."""
        self.count += 1
        self.waiting_bytes += size
        self._sizes.append(size)

    def credit(self, taken: int) -> bool:
        """The peer says how many it has taken, ever; False if that is old news. ``BadFrame``: more than were sent."""
        if taken > self.count:
            raise BadFrame(f"credit for {taken} messages of work, of which {self.count} were sent")
        if taken <= self.returned:
            return False
        for _ in range(taken - self.returned):
            self.waiting_bytes -= self._sizes.popleft()
        self.returned = taken
        self.limit = taken + WORK_CREDIT
        return True


class Taken:
    """The receiver's side."""

    __slots__ = ("_bytes", "arrived", "told", "waiting")

    def __init__(self) -> None:
        self.arrived = 0  # number of the last message that arrived; those before it have arrived or are lost
        self.waiting = 0  # of which the actor has not taken
        self.told = 0  # what the last CREDIT said
        self._bytes = 0  # taken since then

    @property
    def total(self) -> int:
        """How many need not be waited for any more: taken, refused, or lost."""
        return self.arrived - self.waiting

    def arrive(self, number: int) -> None:
        """A message arrived. A number that cannot be is taken for the next one."""
        arrived = self.arrived
        self.arrived = number if arrived < number <= arrived + WORK_CREDIT else arrived + 1
        self.waiting += 1

    def take(self, size: int) -> bool:
        """A message was taken, or refused; True if it is time to say so."""
        self.waiting = waiting = self.waiting - 1
        self._bytes += size
        return self.arrived - waiting - self.told >= WORK_CREDIT // 2 or self._bytes >= WORK_CREDIT_BYTES // 2

    def settle(self, sent: int) -> None:
        """The peer says how many it has sent, ever, before this: what has not arrived is lost."""
        if self.arrived < sent <= self.arrived + WORK_CREDIT:
            self.arrived = sent

    def tell(self) -> int:
        """What the CREDIT being sent now says."""
        self.told, self._bytes = self.total, 0
        return self.told
