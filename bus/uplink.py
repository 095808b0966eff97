"""The connecting half of a link: two DEALER sockets to one life of one peer. Owner: the node's loop thread.

ZMQ_IMMEDIATE stays off: with it on, libzmq throws away what has arrived but was not read when the peer closes, which
loses the last words of a stopped node (measured, 4.3.5). What it protects from, messages that wait for a peer and reach
its successor, cannot happen here: the path contains the incarnation.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import zmq

from ..errors import BadFrame
from .addresses import check_run_dir, inbox_paths
from .curve import TcpPeer, secure_client
from .door import FRAMES_PER_TURN
from .envelope import HEADER, Kind, split
from .farclock import arrived
from .lifecycle import Failure, Hello
from .monitor import DOWN, UP, SocketMonitor
from .registry import decode, schema_table
from .wire import NOBLOCK, Channel

if TYPE_CHECKING:
    from .node import Sockets

__all__ = ["Uplink"]


class _End:
    """One DEALER: says HELLO, is welcomed, then passes frames on."""

    def __init__(self, uplink: Uplink, sockets: Sockets, place: Path | TcpPeer, control: bool) -> None:
        self._uplink = uplink
        self._exchange = sockets.exchange
        self._is_welcome = False
        self._was_up = False
        self._is_far = isinstance(place, TcpPeer)
        self.control = control
        self.is_open = True
        self.socket = sockets.open(zmq.DEALER)
        self.monitor = SocketMonitor(sockets, self.socket, UP | DOWN, self._on_event)
        if isinstance(place, TcpPeer):
            secure_client(self.socket, place)
            self.socket.connect(place.endpoint(control))
        else:
            self.socket.connect(f"ipc://{place}")
        sockets.add_reader(self.socket, self)
        self._say_hello()

    def read(self) -> None:
        """Take one frame, and more while they keep coming faster than they are handled."""
        for _ in range(FRAMES_PER_TURN):
            try:
                frame = self.socket.recv(NOBLOCK)
            except zmq.Again:
                return
            if self._is_far:
                frame = arrived(frame, self._exchange.clock)
            if not self._is_welcome:
                frame = self._read_welcome(frame)
            if frame:
                self._exchange.receive(self._uplink.name, frame, control=self.control)
            if not self.is_open or not self._exchange.wants_more(self.control):
                return

    def _on_event(self, event: int, _: int) -> None:
        """libzmq reconnects by itself, but to a binder that has forgotten the link: one that was up is broken."""
        if event == UP:
            self._was_up = True
        elif self._was_up:
            self._uplink.broken()

    def _say_hello(self) -> None:
        uplink, exchange = self._uplink, self._exchange
        hello = Hello(
            name=exchange.name, incarnation=exchange.incarnation, pid=os.getpid(), to=uplink.name,
            to_incarnation=uplink.incarnation, schema=schema_table(),
        )  # fmt: skip
        self.socket.send(exchange.handshake(Kind.HELLO, hello, uplink.name, uplink.incarnation), NOBLOCK)

    def _read_welcome(self, frame: bytes) -> bytes:
        """The first frame begins with WELCOME or REFUSE; returns what follows it."""
        try:
            envelope, body = next(split(frame))
            if envelope.kind == Kind.REFUSE:
                failure = decode(envelope.type_id, body)
                self._uplink.refused(failure.text if isinstance(failure, Failure) else repr(failure))
                return b""
            if envelope.kind != Kind.WELCOME:
                raise BadFrame(f"a {Kind(envelope.kind).name} before WELCOME")
        except BadFrame as error:
            self._exchange.count("bad_frames", peer=self._uplink.name, error=str(error))
            return b""
        self._exchange.record("in", self._uplink.name, self._uplink.incarnation, envelope)
        self._is_welcome = True
        self._uplink.welcomed()
        return frame[HEADER.size + envelope.body_bytes :]


class Uplink:
    """Connects at once. Up when the first WELCOME arrives: the binder sends it only after a HELLO on both sockets.

    Raises ``ConfigError`` for a run directory that others may enter: whoever listens there need not be our peer.
    """

    def __init__(
        self, sockets: Sockets, run_dir: Path, name: str, incarnation: int, far: TcpPeer | None = None
    ) -> None:
        """far: where the peer listens, if it is on another host."""
        self.name = name
        self.incarnation = incarnation
        self._exchange = sockets.exchange
        self._sockets = sockets
        self._is_up = False
        control: Path | TcpPeer
        data: Path | TcpPeer
        if far is None:
            check_run_dir(run_dir)
            control, data = inbox_paths(run_dir, name, incarnation)
        else:
            control = data = far
        self._ends = (_End(self, sockets, data, False), _End(self, sockets, control, True))
        channels = [Channel(end.socket, None, sockets.poll.used) for end in self._ends]
        self._connection = sockets.connection(name, channels[1], channels[0], self.close, is_far=far is not None)

    def welcomed(self) -> None:
        """The binder let us in."""
        if not self._is_up:
            self._is_up = True
            self._exchange.peers.up(self.name, self.incarnation, self._connection)

    def refused(self, text: str) -> None:
        """The binder did not let us in: whatever waits for it fails."""
        self._exchange.log.error("link.refused", peer=self.name, reason=text)
        self._exchange.peers.down(self.name, self.incarnation, text)
        self.close()

    def broken(self) -> None:
        """The connection of one socket has ended, which the binder cannot tell us, or has not."""
        if all(end.is_open for end in self._ends):
            self._sockets.broken(self.name, self.incarnation)

    def close(self) -> None:
        """Close both sockets. Idempotent."""
        for end in self._ends:
            if end.is_open:
                end.is_open = False
                end.monitor.close()
                self._sockets.close(end.socket)
