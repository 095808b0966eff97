"""One listening socket of an inbox: frames of peers that were let in go on, everybody else is brought to the inbox.

Owner: the node's loop thread.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING

import zmq

from ..errors import ConfigError
from .curve import TcpInbox, secure_server
from .farclock import arrived
from .identity import Caller, caller_of, key_holder_of
from .monitor import REFUSED, SocketMonitor
from .shortages import cannot_write, explain
from .wire import NOBLOCK

if TYPE_CHECKING:
    from .inbox import Inbox
    from .node import Sockets

__all__ = ["FRAMES_PER_TURN", "Door"]

FRAMES_PER_TURN = 256  # of one socket, so that the others have their turn
RETIRED_ROUTES = 1024  # routes of ended links, remembered to tell their late frames from foreign ones


class Door:
    """One ROUTER and the peers behind it. ``place``: a path on this host, or where it listens for others."""

    def __init__(self, inbox: Inbox, sockets: Sockets, place: Path | TcpInbox, control: bool) -> None:
        self._inbox = inbox
        self._exchange = sockets.exchange
        self.control = control
        self.is_open = True
        self.is_far = isinstance(place, TcpInbox)
        self.routes: dict[bytes, str] = {}
        self.retired: OrderedDict[bytes, str] = OrderedDict()
        self.socket = sockets.open(zmq.ROUTER)
        self.socket.router_mandatory = True
        if isinstance(place, TcpInbox):
            self._listen(sockets, place)
            return
        try:
            self.socket.bind(f"ipc://{place}")
        except zmq.ZMQError as error:
            raise cannot_write(place, error.errno) from error

    def _listen(self, sockets: Sockets, place: TcpInbox) -> None:
        secure_server(self.socket, place)
        SocketMonitor(sockets, self.socket, REFUSED, self._handshake_failed)
        try:
            self.socket.bind(place.endpoint(self.control))
        except zmq.ZMQError as error:
            raise ConfigError(f"cannot listen at {place.address}: {explain(error.errno)}") from error

    def _handshake_failed(self, event: int, value: int) -> None:
        """Somebody without encryption, with a wrong key of ours, or who is no ZeroMQ at all."""
        self._exchange.count("refused_handshakes", socket=self.lane, zmq_event=hex(event), zmq_value=hex(value))

    def caller_of(self, part: zmq.Frame) -> Caller | None:
        """Who sent it; None if nobody says."""
        return key_holder_of(part) if self.is_far else caller_of(part)

    def read(self) -> None:
        """Take one frame, and more while they keep coming faster than they are handled.

        Our peers send one part, so the hot path does not ask for more; a part too many is read as an unknown route
        without a frame, and dropped there.
        """
        for _ in range(FRAMES_PER_TURN):
            try:
                route = self.socket.recv(NOBLOCK)
            except zmq.Again:
                return
            peer = self.routes.get(route)
            if peer is None:
                self._read_stranger(route)
            else:
                frame = self.socket.recv(NOBLOCK)
                if self.is_far:
                    frame = arrived(frame, self._exchange.clock)
                self._exchange.receive(peer, frame, control=self.control)
            if not self._exchange.wants_more(self.control):
                return

    def retire(self, route: bytes) -> None:
        """Frames of this route are late from now on."""
        peer = self.routes.pop(route, None)
        if peer is not None:
            self.retired[route] = peer
            if len(self.retired) > RETIRED_ROUTES:
                self.retired.popitem(last=False)

    @property
    def lane(self) -> str:
        """Which of the two, or four, it is, for the log."""
        return ("tcp " if self.is_far else "") + ("control" if self.control else "data")

    def _read_stranger(self, route: bytes) -> None:
        if not self.socket.get(zmq.RCVMORE):
            self._exchange.count("foreign_frames", socket=self.lane, error="a part too many")
            return
        part = self.socket.recv(NOBLOCK, copy=False)
        if route in self.retired:
            self._drop_rest()
            self._exchange.count("late_frames", socket=self.lane, peer=self.retired[route])
        elif self._drop_rest():
            caller = self.caller_of(part)
            sender = caller and caller.who
            self._exchange.count("foreign_frames", socket=self.lane, sender=sender, error="a message of several parts")
        else:
            self._inbox.greet(self, route, part)

    def _drop_rest(self) -> bool:
        """Throw away further parts of the message being read; True if there were any."""
        had_more = False
        while self.socket.get(zmq.RCVMORE):
            self.socket.recv(NOBLOCK)
            had_more = True
        return had_more
