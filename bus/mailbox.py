"""The bounded queue in front of one actor: one lane per priority, served strictly in order of priority."""

from __future__ import annotations

from collections import deque

from .conversation import Call
from .credits import WORK_CREDIT, cost_of
from .envelope import ASK, WORK, Envelope, Lane
from .link import Link

__all__ = ["LANE_BOUND", "READ_BOUND", "WORK_BOUND", "Letter", "Mailbox"]

LANE_BOUND = 4096
"""Messages waiting in a lane before WORK, above which asks and tells are turned away."""
READ_BOUND = 4 * WORK_CREDIT
"""Letters of work, from all peers together, above which no more are read: a net behind the credits of many peers."""
WORK_BOUND = 4 * READ_BOUND
"""The same, above which asks and tells are turned away: whoever comes here does not keep to credits."""


Letter = tuple[Link, Envelope, memoryview, Call | None]
"""A received record that waits for the actor, with the call of an ask. A bare tuple: it is made once per message."""


class Mailbox:
    """Letters by lane. Owner: the exchange."""

    def __init__(self) -> None:
        self._lanes: tuple[deque[Letter], ...] = tuple(deque() for _ in Lane)
        self._work = self._lanes[Lane.WORK]
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def offer(self, letter: Letter) -> bool:
        """Queue an ask or a tell; False if its lane is full."""
        flags = letter[1].flags
        lane = self._lanes[flags]
        if len(lane) >= (WORK_BOUND if flags == WORK else LANE_BOUND):
            return False
        lane.append(letter)
        self._count += 1
        return True

    def push(self, letter: Letter) -> None:
        """Queue an answer, which is never turned away: its number is bounded by asks and their windows."""
        self._lanes[letter[1].flags].append(letter)
        self._count += 1

    def pop(self, *, control_only: bool = False) -> Letter | None:
        """The oldest letter of the most urgent lane, or of the most urgent one before WORK."""
        if len(self._work) == self._count:  # nothing but work, mostly
            if control_only or not self._count:
                return None
            self._count -= 1
            return self._work.popleft()
        self._count -= 1
        return next(lane for lane in self._lanes if lane).popleft()

    def take_answers(self, link: Link) -> list[Letter]:
        """Remove and return the answers of one peer, oldest first in each lane."""
        taken = []
        for lane in self._lanes:
            answers: list[Letter] = []
            rest: list[Letter] = []
            for letter in lane:
                is_answer = letter[0] is link and letter[1].kind > ASK
                (answers if is_answer else rest).append(letter)
            if answers:
                lane.clear()
                lane.extend(rest)
                taken += answers
        self._count -= len(taken)
        return taken

    def work_before(self, link: Link) -> int | None:
        """What the work of one peer had cost before the oldest that waits here; None if none waits."""
        for owner, envelope, _, _ in self._work:
            if owner is link and envelope.kind <= ASK:
                return max(0, envelope.position - cost_of(envelope.body_bytes))
        return None

    @property
    def has_room(self) -> bool:
        """Another frame of work may be read."""
        return len(self._work) <= READ_BOUND
