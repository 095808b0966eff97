"""Records into frames, frames into sockets: the sending half of a link. Owner: the node's loop thread.

All records of one turn for one peer and one socket leave as one frame, which is what makes small messages cheap.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import zmq

from ..errors import MailboxFull

__all__ = ["NOBLOCK", "Channel", "Connection"]

# Plain ints: arithmetic on pyzmq's flag enums costs a microsecond each time.
NOBLOCK = int(zmq.NOBLOCK)
SEND_MORE = int(zmq.SNDMORE) | NOBLOCK

FRAME_RECORDS = 512  # at most half of what a mailbox keeps room for
FRAME_BYTES = 2**20  # above this a record travels alone


class Channel:
    """The out-queue towards one peer on one socket."""

    __slots__ = ("_frame", "_route", "_socket", "_used", "queue")

    def __init__(self, socket: zmq.Socket[bytes], route: bytes | None, used: set[zmq.Socket[bytes]]) -> None:
        """route: routing id on a ROUTER, None on a DEALER. used: see ``Poll``."""
        self._socket = socket
        self._used = used
        self._route = route
        self.queue: deque[bytes] = deque()  # records, oldest first
        self._frame = b""  # joined, but the socket would not take it yet

    def flush(self) -> bool:
        """Hand all to the socket; False if it would not take everything now. ``ZMQError`` if the peer is gone."""
        self._used.add(self._socket)
        while self._frame or self.queue:
            frame = self._frame or self._join()
            try:
                if self._route is not None:
                    self._socket.send(self._route, SEND_MORE)
                self._socket.send(frame, NOBLOCK)
            except zmq.Again:
                self._frame = frame
                return False
            self._frame = b""
        return True

    @property
    def is_waiting(self) -> bool:
        """Something waits to be sent."""
        return bool(self.queue or self._frame)

    def clear(self) -> int:
        """Drop what waits; how many records that were."""
        dropped = len(self.queue) + bool(self._frame)
        self.queue.clear()
        self._frame = b""
        return dropped

    def _join(self) -> bytes:
        queue = self.queue
        if len(queue) == 1:
            return queue.popleft()
        records = [queue.popleft() for _ in range(min(len(queue), FRAME_RECORDS))]
        size = sum(map(len, records))
        while size > FRAME_BYTES and len(records) > 1:
            queue.appendleft(records.pop())
            size -= len(queue[0])
        return b"".join(records)


class Connection:
    """Both channels to one peer: the ``Port`` its link sends through."""

    __slots__ = ("_channels", "_is_dirty", "_is_open", "_mark_dirty", "_on_close", "_queues", "peer")

    def __init__(
        self,
        peer: str,
        control: Channel,
        data: Channel,
        *,
        mark_dirty: Callable[[Connection], None],
        on_close: Callable[[], None],
    ) -> None:
        self.peer = peer
        self._channels = (data, control)
        self._queues = (data.queue, control.queue)
        self._mark_dirty = mark_dirty
        self._on_close = on_close
        self._is_dirty = False
        self._is_open = True

    def put(self, control: bool, record: bytes, bound: int) -> None:
        """Queue a record for the end of the turn. Raises ``MailboxFull``."""
        queue = self._queues[control]
        if len(queue) >= bound:
            raise MailboxFull(f"{len(queue)} messages wait to be sent to {self.peer}; at most {bound} may")
        if self._is_open:
            queue.append(record)
            if not self._is_dirty:
                self._is_dirty = True
                self._mark_dirty(self)

    def flush(self) -> bool:
        """Send what waits, control first; False if some of it must wait. Raises ``ZMQError`` if the peer is gone."""
        data, control = self._channels
        is_done = (not control.is_waiting or control.flush()) and (not data.is_waiting or data.flush())
        self._is_dirty = not is_done
        return is_done

    def clear(self) -> int:
        """Drop what waits; how many records that were."""
        self._is_dirty = False
        return sum(channel.clear() for channel in self._channels)

    def close(self) -> None:
        """Drop what waits and give back routes or sockets. Idempotent."""
        if self._is_open:
            self._is_open = False
            self.clear()
            self._on_close()
