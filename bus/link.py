"""One peer as an actor's exchange sees it: identity, what is open with it, and the port its records leave by."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from ..errors import BadFrame, MailboxFull
from .credits import WORK_CREDIT_BYTES
from .envelope import ends_of, name_id
from .ports import Port
from .quiet import Quiet

if TYPE_CHECKING:
    from .conversation import Ask, Call

__all__ = ["ANSWER_BOUND", "OUT_BOUND", "Link", "Recent"]

OUT_BOUND = 4096
"""Records waiting to be sent to one peer on one socket, above which tells and asks are refused."""
ANSWER_BOUND = 16 * OUT_BOUND
"""The same for answers."""
RECENT = 4096


class Recent:
    """The last ``RECENT`` numbers put into it."""

    __slots__ = ("_numbers",)

    def __init__(self) -> None:
        self._numbers: dict[int, None] = {}  # oldest first

    def add(self, number: int) -> None:
        """Remember a number."""
        self._numbers[number] = None
        if len(self._numbers) > RECENT:
            del self._numbers[next(iter(self._numbers))]

    def __contains__(self, number: int) -> bool:
        return number in self._numbers


class Link:
    """State shared with one life of one peer. Pending until it has a port; then records wait in the backlog."""

    __slots__ = (
        "_backlog", "asks", "calls", "cancelled", "cancels", "ends_in", "ends_out", "given_up", "incarnation", "peer",
        "peer_id", "port", "quiet", "seen", "sequence", "waiting", "work_limit", "work_returned", "work_sent",
        "work_told",
    )  # fmt: skip

    def __init__(self, peer: str, incarnation: int, our_id: int, our_incarnation: int) -> None:
        """our_id: ``name_id`` of the node at this end."""
        self.peer = peer
        self.incarnation = incarnation
        self.peer_id = name_id(peer)
        self.ends_out = ends_of(our_id, self.peer_id, our_incarnation)  # in each record we send
        self.ends_in = ends_of(self.peer_id, our_id, incarnation)  # in each we receive
        self.port: Port | None = None
        self.sequence = 0  # of the last tell or ask sent
        self.seen = [0, 0]  # sequence of the last tell or ask received: data socket, control socket
        self.asks: dict[int, Ask] = {}  # ours, by correlation id
        self.calls: dict[int, Call] = {}  # theirs, by correlation id
        self.cancelled: set[int] = set()  # asks whose cancel (control socket) overtook them (data socket)
        self.cancels = Recent()  # asks of theirs whose cancel has arrived
        self.given_up = Recent()  # asks of ours that we ended, and whose answers are late
        self.work_sent = 0  # what our work has cost, ever
        self.work_returned = 0  # of which the peer has taken, as far as we have heard
        self.work_limit = WORK_CREDIT_BYTES  # what it may cost before more is returned
        self.work_told = 0  # how much of its work we have taken, as far as we have said
        self.quiet = Quiet()  # of our work
        self.waiting: deque[tuple[Ask, bytes]] = deque()  # asks without credit, with their bodies; oldest first
        self._backlog: list[tuple[bool, bytes]] = []

    def put(self, control: bool, record: bytes, bound: int) -> None:
        """Stand in for the port until the link is up: keep the record. Raises ``MailboxFull``."""
        if len(self._backlog) >= bound:
            raise MailboxFull(f"{len(self._backlog)} messages wait for the link to {self.peer}; at most {bound} may")
        self._backlog.append((control, record))

    def wait(self, ask: Ask, body: bytes, bound: int) -> None:
        """Keep an ask until there is credit for it. Raises ``MailboxFull``."""
        if len(self.waiting) >= bound:  # some may have been cancelled meanwhile
            self.waiting = deque(entry for entry in self.waiting if entry[0].is_open)
        if len(self.waiting) >= bound:
            raise MailboxFull(f"{len(self.waiting)} asks wait until {self.peer} takes more; at most {bound} may")
        self.waiting.append((ask, body))

    def credit(self, taken: int) -> bool:
        """The peer has taken that much of our work, ever; False if it is old news. Raises ``BadFrame``."""
        if taken > self.work_sent:
            raise BadFrame(f"credit for {taken} bytes of work by {self.peer}, which was sent {self.work_sent}")
        if taken <= self.work_returned:
            return False
        self.work_returned = taken
        self.work_limit = taken + WORK_CREDIT_BYTES
        return True

    @property
    def has_backlog(self) -> bool:
        """Records wait for the link to come up."""
        return bool(self._backlog)

    def open(self, port: Port) -> None:
        """The link is up: send the backlog."""
        self.port = port
        for control, record in self._backlog:
            port.put(control, record, ANSWER_BOUND)
        self._backlog.clear()

    def close(self) -> None:
        """Nothing is sent any more."""
        self._backlog.clear()
        self.waiting.clear()
        if self.port is not None:
            self.port.close()
