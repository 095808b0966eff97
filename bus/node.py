"""One actor on real sockets: the poll loop of one process, or of one thread of a host application.

Owns: the ZeroMQ context and all sockets, watched descriptors, the wake-up descriptor, the ledger. Thread: the one that
calls ``run``. A turn: read control, handle control, watched descriptors, timers, read data, handle messages, send all.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import attrs
import zmq

from ..errors import ChipbusError, StartFailed
from .actor import Actor
from .addresses import check_run_dir, inbox_paths
from .clock import Clock, SystemClock
from .context import BoundContext
from .curve import TcpInbox, TcpPeer
from .envelope import MAX_FRAME_BYTES
from .exchange import Exchange
from .farclock import FarConnection
from .inbox import Inbox
from .ledger import LedgerWriter
from .monitor import SocketMonitor
from .poll import Poll
from .ports import Driver
from .shortages import explain, require_descriptors
from .uplink import Uplink
from .wire import Channel, Connection

__all__ = ["Node", "NodeConfig", "Sockets"]

HIGH_WATER = 1024  # frames; a net behind the bounded queues
SERVE_NS = 500_000  # work handled in one turn before sockets are looked at again, which bounds how long a stop waits
LONGEST_POLL_MS = 3_600_000  # a deadline from elsewhere may be further away than poll can count
RETRY_MS = 1  # until a socket that would not take a frame is tried again
FLUSH_NS = 500_000_000  # for a stopped node to hand its last words to its sockets
DESCRIPTORS = 12  # a node without links opens fewer
TCP_DESCRIPTORS = 10  # two more listening sockets with their monitors, and the desk for keys
UPLINK_DESCRIPTORS = 8  # two sockets, their monitors at both ends, two connections
BROKEN_NS = 3_000_000_000  # for the directory to say how a peer ended whose connection broke
LINGER_MS = 500  # and for those to hand them to the kernel; only a peer that does not read costs this


@attrs.frozen(kw_only=True)
class NodeConfig:
    """Who a node is and where it lives."""

    name: str
    incarnation: int  # n-th life of this name, from 1
    run_dir: Path  # ours, mode 0700, on this host
    seed: int = 0
    record: Path | None = None  # directory for the ledger
    tcp: TcpInbox | None = None  # to listen for nodes of other hosts, too


class Reader(Protocol):
    """What a readable socket is handed to."""

    control: bool
    is_open: bool

    def read(self) -> None: ...


class Sockets:
    """The sockets of one node: made with the same options, polled together, closed together."""

    def __init__(self, exchange: Exchange, driver: Driver) -> None:
        self.exchange = exchange
        self.watch, self.unwatch = driver.watch, driver.unwatch
        self.poll = Poll()
        self.readers: dict[zmq.Socket[bytes], Reader] = {}
        self._open: set[zmq.Socket[bytes]] = set()
        self._broken: set[tuple[str, int]] = set()
        self.monitors: set[SocketMonitor] = set()
        self.dirty: list[Connection] = []
        self._context = zmq.Context(io_threads=1)
        self._context.linger = 0

    def open(self, kind: int) -> zmq.Socket[bytes]:
        """A socket that never blocks and keeps nothing after its end. Raises ``StartFailed`` without descriptors."""
        try:
            socket = self._context.socket(kind)
        except zmq.ZMQError as error:
            raise StartFailed(f"{self.exchange.name} cannot open a socket: {explain(error.errno)}") from error
        self._open.add(socket)
        socket.sndtimeo = 0
        socket.sndhwm = socket.rcvhwm = HIGH_WATER
        socket.maxmsgsize = MAX_FRAME_BYTES
        socket.handshake_ivl = 2000
        return socket

    def add_reader(self, socket: zmq.Socket[bytes], reader: Reader) -> None:
        """Poll a socket for its reader."""
        self.readers[socket] = reader
        self.poll.add_socket(socket)

    def mark_dirty(self, connection: Connection) -> None:
        """Flush this connection at the end of the turn."""
        self.dirty.append(connection)

    def connection(
        self, peer: str, control: Channel, data: Channel, on_close: Callable[[], None], *, is_far: bool
    ) -> Connection:
        """Both channels to one peer, on this host or a far one."""
        if is_far:
            clock = self.exchange.clock
            return FarConnection(peer, control, data, mark_dirty=self.mark_dirty, on_close=on_close, clock=clock)
        return Connection(peer, control, data, mark_dirty=self.mark_dirty, on_close=on_close)

    def flush(self) -> None:
        """Send what the turn put into connections; those whose sockets are full stay for the next turn."""
        if not self.dirty:
            return
        dirty, self.dirty = self.dirty, []
        for connection in dirty:
            try:
                if not connection.flush():
                    self.dirty.append(connection)
            except zmq.ZMQError as error:  # the peer is gone
                self.exchange.count("dead_letters", connection.clear(), peer=connection.peer, error=str(error))
                link = self.exchange.peers.links.get(connection.peer)
                if link is not None and link.port is connection:
                    self.broken(link.peer, link.incarnation)

    def broken(self, peer: str, incarnation: int) -> None:
        """The connection below a link has ended; so does the link, unless the directory says first how its peer did."""

        def give_up() -> None:
            self._broken.discard((peer, incarnation))
            link = self.exchange.peers.links.get(peer)
            if link is not None and link.incarnation == incarnation:
                reason = f"its connection broke: it closed it, or a frame was over {MAX_FRAME_BYTES} bytes"
                self.exchange.count("broken_links", peer=peer, life=incarnation, reason=reason)
                self.exchange.peers.down(peer, incarnation, reason)

        if (peer, incarnation) not in self._broken:
            self._broken.add((peer, incarnation))
            self.exchange.timers.at(self.exchange.clock.now_ns() + BROKEN_NS, give_up)

    def close(self, socket: zmq.Socket[bytes]) -> None:
        """Close one socket that has a reader, dropping what it has not sent."""
        self.poll.remove_socket(socket)
        del self.readers[socket]
        self.drop(socket)

    def drop(self, socket: zmq.Socket[bytes]) -> None:
        """Close one socket that nobody polls, dropping what it has not sent."""
        self._open.discard(socket)
        socket.close(linger=0)

    def close_all(self, linger_ms: int) -> None:
        """Close everything, giving last words ``linger_ms`` to leave."""
        for monitor in list(self.monitors):
            monitor.close()
        for socket in self._open:
            socket.close(linger=linger_ms)
        self._open.clear()
        self.readers.clear()
        self._context.term()


class Node:
    """Runs one actor until it stops. Raises ``ConfigError`` for an unusable run directory, name or record directory."""

    def __init__(self, config: NodeConfig, actor: Actor, clock: Clock | None = None) -> None:
        check_run_dir(config.run_dir)
        inbox_paths(config.run_dir, config.name, config.incarnation)
        self._config = config
        self._actor = actor
        self._clock = clock or SystemClock()
        self.ledger: LedgerWriter | None = None
        if config.record is not None:
            meta = {"seed": config.seed, "pid": os.getpid()}
            self.ledger = LedgerWriter(config.record, config.name, config.incarnation, meta)
        self._exchange = Exchange(
            actor,
            self,
            name=config.name,
            incarnation=config.incarnation,
            clock=self._clock,
            seed=config.seed,
            ledger=self.ledger,
        )
        actor.ctx = BoundContext(self._exchange, self)
        self._sockets: Sockets | None = None
        self._expects: frozenset[str] | None = None
        self._far: dict[str, TcpPeer] = {}
        self._first_links: list[tuple[str, int]] = []
        self._watches: dict[int, Callable[[], None]] = {}
        self._post_lock = threading.Lock()
        self._posted: list[Callable[[], None]] = []
        self._wake_fd = -1
        self._is_over = False
        self._flush_until_ns = 0

    def connect(self, name: str, incarnation: int, far: TcpPeer | None = None) -> None:
        """Link to a node that has bound its inbox; before ``run``, so that the actor may send to it from the start.

        far: where the node listens if it is on another host; that holds for its later lives, too.
        """
        if far is not None:
            self._far[name] = far
        self._exchange.peers.connect(name, incarnation)

    def expect(self, names: frozenset[str]) -> None:
        """Let only nodes of these names link to the inbox; before ``run``. Without it, any of our user's may."""
        self._expects = names

    def run(self) -> None:
        """Bind the inbox, start the actor, loop until it stops. Sockets and descriptors are always closed. Any thread.

        Raises what ``on_start`` raises, ``BusError`` if this life of the name has an inbox already, ``ConfigError`` if
        the inbox cannot be bound, and ``StartFailed`` without enough file descriptors.
        """
        linger_ms = 0
        inbox = None
        needed = DESCRIPTORS + (TCP_DESCRIPTORS if self._config.tcp is not None else 0)
        require_descriptors(needed, f"the bus of {self._config.name}")
        sockets = self._sockets = Sockets(self._exchange, self)
        try:
            inbox = Inbox(sockets, self._config.run_dir, self._expects, self._config.tcp)
            self._open_wake()
            for name, incarnation in self._first_links:
                self._uplink(sockets, name, incarnation)
            self._actor.on_start()
            while not self._exchange.is_finished:
                self._turn(sockets)
            while self._has_last_words(sockets):
                self._turn(sockets)
            linger_ms = LINGER_MS
        finally:
            self._close(sockets, linger_ms)
            if inbox is not None:
                inbox.close()

    # What the exchange and the context need.

    def make_link(self, name: str, incarnation: int) -> None:
        """Connect to a peer; before ``run``, note it."""
        if self._sockets is None:
            self._first_links.append((name, incarnation))
            return
        try:
            self._uplink(self._sockets, name, incarnation)
        except ChipbusError as error:
            reason = f"cannot connect to it: {error}"
            self._exchange.log.error("link.failed", peer=name, life=incarnation, reason=str(error))
            self._exchange.soon(lambda: self._exchange.peers.down(name, incarnation, reason))

    def _uplink(self, sockets: Sockets, name: str, incarnation: int) -> None:
        require_descriptors(UPLINK_DESCRIPTORS, f"a link from {self._config.name} to {name}")
        Uplink(sockets, self._config.run_dir, name, incarnation, self._far.get(name))

    def finish(self) -> None:
        """The actor has stopped."""
        self._flush_until_ns = self._clock.now_ns() + FLUSH_NS

    def call_soon_threadsafe(self, callback: Callable[[], None]) -> None:
        """See ``Context``."""
        with self._post_lock:
            if self._is_over:
                return
            self._posted.append(callback)
            if len(self._posted) == 1 and self._wake_fd >= 0:
                os.eventfd_write(self._wake_fd, 1)

    def watch(self, fd: int, callback: Callable[[], None]) -> None:
        """See ``Context``."""
        assert self._sockets is not None, "descriptors are watched by a running node"
        self._watches[fd] = callback
        self._sockets.poll.add_descriptor(fd)

    def unwatch(self, fd: int) -> None:
        """See ``Context``."""
        if self._watches.pop(fd, None) is not None and self._sockets is not None:
            self._sockets.poll.remove_descriptor(fd)

    # The loop.

    def _turn(self, sockets: Sockets) -> None:
        exchange = self._exchange
        data: list[Reader] = []
        readable, descriptors = sockets.poll.wait(self._timeout_ms(sockets))
        for socket in readable:
            if (reader := sockets.readers.get(socket)) is None:
                continue  # closed by what an earlier socket had to say
            if reader.control:
                reader.read()
            else:
                data.append(reader)
        while len(exchange.mailbox) and exchange.serve(control_only=True):
            pass
        for fd in descriptors:
            if not exchange.is_finished and (callback := self._watches.get(fd)):
                exchange.guard("watch", None, callback)
        now_ns = self._clock.now_ns()
        while not exchange.is_finished and (due := exchange.timers.pop_due(now_ns)):
            exchange.guard("timer", None, due)
        for reader in data:
            if reader.is_open and exchange.mailbox.has_room:
                reader.read()
        self._serve(exchange)
        if self.ledger is not None:
            self.ledger.flush()  # first: what others have been told is on record, whenever we are killed
        sockets.flush()

    def _serve(self, exchange: Exchange) -> None:
        """Handle what waits, for about ``SERVE_NS``: long enough to join answers, short enough to see a stop."""
        if not exchange.serve() or not len(exchange.mailbox):
            return
        until_ns = time.monotonic_ns() + SERVE_NS
        while exchange.serve() and time.monotonic_ns() < until_ns:
            pass

    def _timeout_ms(self, sockets: Sockets) -> int:
        exchange = self._exchange
        if exchange.is_finished:
            return RETRY_MS
        if len(exchange.mailbox):
            return 0
        due_ns = exchange.timers.next_due_ns()
        longest_ms = RETRY_MS if sockets.dirty else LONGEST_POLL_MS
        if due_ns is None:
            return longest_ms
        return min(longest_ms, max(0, -((self._clock.now_ns() - due_ns) // 1_000_000)))

    def _has_last_words(self, sockets: Sockets) -> bool:
        """Something the actor said before it stopped still waits for a socket, or for a link to come up."""
        if self._clock.now_ns() >= self._flush_until_ns:
            return False
        return bool(sockets.dirty) or any(link.has_backlog for link in self._exchange.peers.links.values())

    # Waking and closing.

    def _open_wake(self) -> None:
        with self._post_lock:
            self._wake_fd = os.eventfd(1, os.EFD_NONBLOCK | os.EFD_CLOEXEC)  # 1: something may have been posted already
        self.watch(self._wake_fd, self._run_posted)

    def _run_posted(self) -> None:
        with self._post_lock:
            os.eventfd_read(self._wake_fd)
            posted, self._posted = self._posted, []
        for callback in posted:
            if self._exchange.is_finished:
                return
            self._exchange.guard("call_soon_threadsafe", None, callback)

    def _close(self, sockets: Sockets, linger_ms: int) -> None:
        with self._post_lock:
            self._is_over = True
            self._posted.clear()
            wake_fd, self._wake_fd = self._wake_fd, -1
        self._watches.clear()
        sockets.close_all(linger_ms)
        if wake_fd >= 0:
            os.close(wake_fd)
        if self.ledger is not None:
            self.ledger.close()
