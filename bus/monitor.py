"""Hears what libzmq does with the connections below one socket, which it otherwise keeps to itself.

Owns: the monitor of one socket. Thread: the node's loop.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING

import zmq

from .wire import NOBLOCK

if TYPE_CHECKING:
    from .node import Sockets

__all__ = ["DOWN", "REFUSED", "UP", "SocketMonitor"]

UP, DOWN = int(zmq.EVENT_HANDSHAKE_SUCCEEDED), int(zmq.EVENT_DISCONNECTED)
REFUSED = int(zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL)
"""A handshake that failed before anybody was asked about a key."""
numbers = itertools.count()


class SocketMonitor:
    """Calls ``on_event(event, value)`` for each of ``events`` on ``socket``."""

    def __init__(
        self, sockets: Sockets, socket: zmq.Socket[bytes], events: int, on_event: Callable[[int, int], None]
    ) -> None:
        self._sockets = sockets
        self._socket = socket
        self._on_event = on_event
        self._is_open = True
        address = f"inproc://monitor-{next(numbers)}"
        socket.monitor(address, events)
        self._events = sockets.open(zmq.PAIR)
        self._events.connect(address)
        self._fd = self._events.fileno()  # polled as a plain descriptor: it costs the hot path nothing
        sockets.watch(self._fd, self._read)
        sockets.monitors.add(self)
        self._read()  # such a descriptor tells only of what comes after a read

    def close(self) -> None:
        """Stop listening; before ``socket`` is closed.

        libzmq's own thread writes events into the monitor, and waits for ever in one that has lost its reader: every
        connection of the process then stands still. So it is told first that nobody wants them.
        """
        self._is_open = False
        self._sockets.monitors.discard(self)
        self._socket.monitor(None, 0)
        self._sockets.unwatch(self._fd)
        self._sockets.drop(self._events)

    def _read(self) -> None:
        while self._is_open:
            try:
                fact, _ = self._events.recv_multipart(NOBLOCK)
            except zmq.Again:
                return
            self._on_event(int.from_bytes(fact[:2], "little"), int.from_bytes(fact[2:6], "little"))
