"""The bounded queue in front of one actor: one lane per priority, served strictly in order of priority."""

from __future__ import annotations

from collections import deque

from .conversation import Call
from .credits import WORK_CREDIT, cost_of
from .envelope import ASK, WORK, Envelope, Lane
from .link import Link

__all__ = ["LANE_BOUND", "READ_BOUND", "WORK_BOUND", "Letter", "Mailbox", "letter_of"]

LANE_BOUND = 4096
"""Messages waiting in a lane before WORK, above which asks and tells are turned away."""
READ_BOUND = 4 * WORK_CREDIT
"""Letters of work, from all peers together, above which no more are read: a net behind the credits of many peers."""
WORK_BOUND = 4 * READ_BOUND
"""The same, above which asks and tells are turned away: whoever comes here does not keep to credits."""


Letter = tuple[Link, int, int, int, int, int, bytes | memoryview, Call | None]
"""A received record that waits for the actor: link, kind, type id, lane, correlation, position, body; the call of an
ask. A bare tuple: it is made once per message."""


def letter_of(link: Link, envelope: Envelope, body: memoryview, call: Call | None) -> Letter:
    """A record as a letter."""
    return (
        link, envelope.kind, envelope.type_id, envelope.flags, envelope.correlation, envelope.position, body, call,
    )  # fmt: skip


class Mailbox:
    """Letters by lane. Owner: the exchange."""

    def __init__(self) -> None:
        self._lanes: tuple[deque[Letter], ...] = tuple(deque() for _ in Lane)
        self._urgent = 0  # letters in lanes before WORK
        self.work = self._lanes[Lane.WORK]  # the exchange puts plain letters in here by itself

    def __len__(self) -> int:
        return len(self.work) + self._urgent

    def depths(self) -> dict[str, int]:
        """Letters that wait, by name of the lane."""
        return {lane.name.lower(): len(self._lanes[lane]) for lane in Lane}

    def offer(self, letter: Letter) -> bool:
        """Queue an ask or a tell; False if its lane is full."""
        lane = letter[3]
        if len(self._lanes[lane]) >= (WORK_BOUND if lane == WORK else LANE_BOUND):
            return False
        self.push(letter)
        return True

    def push(self, letter: Letter) -> None:
        """Queue an answer, which is never turned away: its number is bounded by asks and their windows."""
        lane = letter[3]
        self._lanes[lane].append(letter)
        self._urgent += lane < WORK

    def pop(self, control_only: bool = False) -> Letter | None:
        """The oldest letter of the most urgent lane, or of the most urgent one before WORK."""
        if self._urgent:
            self._urgent -= 1
            return next(lane for lane in self._lanes if lane).popleft()
        return self.work.popleft() if self.work and not control_only else None

    def take_answers(self, link: Link) -> list[Letter]:
        """Remove and return the answers of one peer, oldest first in each lane."""
        taken = []
        for lane in self._lanes:
            answers: list[Letter] = []
            rest: list[Letter] = []
            for letter in lane:
                is_answer = letter[0] is link and letter[1] > ASK
                (answers if is_answer else rest).append(letter)
            if answers:
                lane.clear()
                lane.extend(rest)
                taken += answers
        self._urgent -= sum(letter[3] < WORK for letter in taken)
        return taken

    def work_before(self, link: Link) -> int | None:
        """What the work of one peer had cost before the oldest that waits here; None if none waits."""
        for owner, kind, _, _, _, position, body, _ in self.work:
            if owner is link and kind <= ASK:
                return max(0, position - cost_of(len(body)))
        return None

    @property
    def has_room(self) -> bool:
        """Another frame of work may be read."""
        return len(self.work) <= READ_BOUND

    def has_room_for(self, records: int) -> bool:
        """So many records of work would all be taken."""
        return len(self.work) + records <= WORK_BOUND
