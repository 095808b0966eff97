"""Notices that libzmq closed a connection that had been up: the only sign of a frame that was too long.

Owns: one monitor per connecting socket. Thread: the node's loop. libzmq reconnects by itself, but to a binder that has
forgotten the link, so a connection that broke means a link that is over.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING

import zmq

from .wire import NOBLOCK

if TYPE_CHECKING:
    from .node import Sockets

__all__ = ["BreakWatch"]

UP, DOWN = int(zmq.EVENT_HANDSHAKE_SUCCEEDED), int(zmq.EVENT_DISCONNECTED)
numbers = itertools.count()


class BreakWatch:
    """Calls ``on_break`` when the connection of ``socket`` ends after it was up; before that, libzmq tries again."""

    def __init__(self, sockets: Sockets, socket: zmq.Socket[bytes], on_break: Callable[[], None]) -> None:
        self._sockets = sockets
        self._on_break = on_break
        self._was_up = False
        address = f"inproc://breaks-{next(numbers)}"
        socket.monitor(address, UP | DOWN)
        self._events = sockets.open(zmq.PAIR)
        self._events.connect(address)
        self._fd: int = self._events.get(zmq.FD)  # polled as a plain descriptor: it costs the hot path nothing
        sockets.watch(self._fd, self._read)
        self._read()  # such a descriptor tells only of what comes after a read

    def close(self) -> None:
        """Stop listening."""
        self._sockets.unwatch(self._fd)
        self._sockets.drop(self._events)

    def _read(self) -> None:
        while True:
            try:
                fact, _ = self._events.recv_multipart(NOBLOCK)
            except zmq.Again:
                return
            event = int.from_bytes(fact[:2], "little")
            if event == UP:
                self._was_up = True
            elif event == DOWN and self._was_up:
                self._on_break()
                return
