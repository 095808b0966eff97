"""Waiting for sockets and descriptors of one node. Thread: its loop.

``zmq_poll`` asks every socket twice for what it has, which costs a node 3 us per turn and link. A wait here is one
poll(2) over descriptors. But a socket's descriptor tells only of what came after the socket was last used: whoever
sends or receives takes in news that is then not told again. So each use is noted in ``used``, and before a wait those
sockets are asked.
"""

from __future__ import annotations

import select

import zmq

__all__ = ["Poll"]

IN = int(zmq.POLLIN)


class Poll:
    """Sockets and descriptors to read from."""

    def __init__(self) -> None:
        self.used: set[zmq.Socket[bytes]] = set()
        """Sockets that were sent to or received from since the last wait; whoever does so adds them."""
        self._poll = select.poll()
        self._sockets: dict[int, zmq.Socket[bytes]] = {}  # by descriptor

    def add_socket(self, socket: zmq.Socket[bytes]) -> None:
        """Wait for a socket, too."""
        self._sockets[socket.fileno()] = socket
        self._poll.register(socket.fileno(), select.POLLIN)
        self.used.add(socket)

    def remove_socket(self, socket: zmq.Socket[bytes]) -> None:
        """Forget a socket that is about to be closed."""
        self.used.discard(socket)
        self._poll.unregister(socket.fileno())
        del self._sockets[socket.fileno()]

    def add_descriptor(self, fd: int) -> None:
        """Wait for a descriptor, too."""
        self._poll.register(fd, select.POLLIN)

    def remove_descriptor(self, fd: int) -> None:
        """Forget a descriptor."""
        self._poll.unregister(fd)

    def wait(self, timeout_ms: int) -> tuple[list[zmq.Socket[bytes]], list[int]]:
        """The sockets and descriptors that can be read, once there are some or ``timeout_ms`` have passed.

        A socket among them may have nothing after all.
        """
        sockets: list[zmq.Socket[bytes]] = []
        if self.used:
            asked = [(socket, IN) for socket in self.used]
            sockets = [socket for socket, _ in zmq.zmq_poll(asked, 0)]  # type: ignore[misc] # the ones it was given
            self.used.clear()
        descriptors = []
        for fd, _ in self._poll.poll(0 if sockets else timeout_ms):
            socket = self._sockets.get(fd)
            if socket is None:
                descriptors.append(fd)
            elif socket not in sockets:
                sockets.append(socket)
        self.used.update(sockets)  # they are going to be read
        return sockets, descriptors
