"""The supervisor's end of one warden: started, asked, listened to, and told to leave. Never blocks.

Owns: the warden's process, its socket, and the requests it has not answered.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from .messages.warden import (
    Exited,
    FromWarden,
    Leave,
    Ping,
    Pong,
    Preloaded,
    SpawnChild,
    Spawned,
    SpawnRefused,
    ToWarden,
)
from .processes import Process, Tether, arm_tether, receive_with_fds, send_with_fds, signal_group, spawn

__all__ = ["LIGHT", "WARDEN_COMMAND", "Warden", "warden_environment"]

LIGHT = "light"
"""The warden that outlives the supervisor and cleans up."""
WARDEN_COMMAND: tuple[str, ...] = (sys.executable, "-P", "-m", "chipbus.actors.warden")

Request = tuple[str, int]  # name, incarnation

_MATHS_ENV = {
    # Threads that a maths library starts at import would make forking unsafe; chip workers set their own number later.
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    # OpenMP threads that spin for each other while something else runs on their core lose a scheduler slice each time.
    # Measured on 2 cores: with this count a 0.6B model decodes as fast as with libgomp's own, and with one core busy a
    # step of the demo model takes 11 ms instead of 45 to 125.
    "GOMP_SPINCOUNT": "10000",
}

_MEMORY_ENV = {
    # glibc (from 2.35) then asks for huge pages for its heap, of which a warden that has imported torch has 90 MB. For
    # each the kernel copies and drops one entry instead of 512: a fork and a child's end take half as long (measured).
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}


def warden_environment() -> dict[str, str]:
    """What a warden is executed with: our environment and what its imports need. Tunables of the user's own win."""
    return {**_MEMORY_ENV, **os.environ, **_MATHS_ENV}


class Warden:
    """One warden process. Requests made before it has finished its imports wait here, where they can be withdrawn."""

    def __init__(self, preload: str, boot_path: Path, lock_fd: int, command: Sequence[str] = WARDEN_COMMAND) -> None:
        """Start the process. Raises ``OSError``."""
        self.preload = preload
        self.is_ready = False
        self.is_silent = False  # it closed its end: nothing more will come
        self.has_ended = False
        self._waiting: dict[Request, tuple[Tether, tuple[int, ...]]] = {}
        self._asked: set[Request] = set()
        self._link, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._link.setblocking(False)
        self._tether = Tether.make()
        pass_fds = (theirs.fileno(), self._tether.read_fd, lock_fd)
        arguments = ["serve", preload, str(boot_path), *map(str, pass_fds)]
        try:
            self.process: Process = spawn([*command, *arguments], pass_fds=pass_fds, env=warden_environment())
            # The light warden is not killed, but woken, in case somebody has stopped it: it has to clean up.
            arm_tether(self._tether.read_fd, self.process.pid, signal.SIGCONT if preload == LIGHT else signal.SIGKILL)
        except OSError:
            self._link.close()
            self._tether.cut()
            raise
        finally:
            theirs.close()
            self._tether.drop_read_end()

    @property
    def fd(self) -> int:
        """Readable when ``receive`` has something."""
        return self._link.fileno()

    def request(self, name: str, incarnation: int, tether: Tether, weights: tuple[int, ...] = ()) -> None:
        """Ask for a child; its tether's read end goes with the request. It is answered once, unless the warden dies.

        weights: the memory file of a child that keeps weights. It stays the caller's, open until the answer.
        """
        if self.is_ready:
            self._ask(name, incarnation, tether, weights)
        else:
            self._waiting[name, incarnation] = (tether, weights)

    def withdraw(self, name: str, incarnation: int) -> bool:
        """Take back a request that has not been sent. False if it has: then the child exists, or soon will."""
        waiting = self._waiting.pop((name, incarnation), None)
        if waiting is not None:
            waiting[0].drop_read_end()
        return waiting is not None

    def owes(self, name: str, incarnation: int) -> bool:
        """Whether the request was sent and has not been answered."""
        return (name, incarnation) in self._asked

    def receive(self) -> Iterator[tuple[FromWarden, int]]:
        """What the warden has said since: message, and the pidfd that came with a ``Spawned``, else -1."""
        while not self.is_silent:
            try:
                data, fds = receive_with_fds(self._link)
            except BlockingIOError:
                return
            if not data:
                self.is_silent = True
                return
            message = msgspec.msgpack.decode(data, type=FromWarden)
            match message:
                case Preloaded() if not message.error:
                    self._begin()
                case Spawned(name, incarnation) | SpawnRefused(name, incarnation):
                    self._asked.discard((name, incarnation))
                case Exited() | Preloaded() | Pong():
                    pass
            yield message, fds[0] if fds else -1

    def ping(self) -> None:
        """Ask for a ``Pong``."""
        with contextlib.suppress(OSError):  # a full socket: it has not read what it was asked before
            self._send(Ping())

    def leave(self) -> None:
        """Tell the warden to end; one that is still importing is killed, since nobody waits for it."""
        if self.has_ended:
            return
        try:
            if self.is_ready:
                self._send(Leave())
                return
        except OSError:
            pass
        self.kill()

    def kill(self) -> None:
        """SIGKILL."""
        if not self.has_ended:
            signal_group(self.process, signal.SIGKILL)

    def ended(self) -> list[Request]:
        """The process was reaped: give everything back. Requests that will never be answered."""
        self.has_ended = self.is_silent = True
        unanswered = [*self._waiting, *self._asked]
        for tether, _ in self._waiting.values():
            tether.drop_read_end()
        self._waiting.clear()
        self._asked.clear()
        self._link.close()
        self._tether.cut()
        os.close(self.process.pidfd)
        return unanswered

    def _begin(self) -> None:
        self.is_ready = True
        waiting, self._waiting = self._waiting, {}
        for (name, incarnation), (tether, weights) in waiting.items():
            self._ask(name, incarnation, tether, weights)

    def _ask(self, name: str, incarnation: int, tether: Tether, weights: tuple[int, ...]) -> None:
        self._asked.add((name, incarnation))
        # A full or broken socket means a warden that is stuck or dying. Its death answers what it owes.
        with contextlib.suppress(OSError):
            self._send(SpawnChild(name, incarnation), (tether.read_fd, *weights))
        tether.drop_read_end()

    def _send(self, message: ToWarden, fds: tuple[int, ...] = ()) -> None:
        send_with_fds(self._link, msgspec.msgpack.encode(message), fds)
