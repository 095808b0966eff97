"""The binding half of links: a node's two ROUTER sockets, and who is let in. Owner: the node's loop thread.

    c   control: every lane before WORK, cancels, handshakes          {run_dir}/{name}.{incarnation}.c
    d   data: the WORK lane and its answers                           {run_dir}/{name}.{incarnation}.d

A peer says HELLO on both sockets before anything else. It is let in if the kernel says that it runs under our user and
has the pid it claims, if the life it means is ours, if its name is expected here, if both sides understand each message
alike, and if that life of it may be linked. Both HELLOs of a link come from one process. A younger life takes the place
of an older one only when the older one's process has ended: nobody can be pushed out by a claim.
"""

from __future__ import annotations

import os
from collections import Counter, OrderedDict
from collections.abc import Set
from pathlib import Path
from typing import TYPE_CHECKING

import attrs
import zmq

from ..errors import BadFrame, BusError
from .addresses import check_run_dir, inbox_paths
from .envelope import Kind, split
from .identity import Caller, caller_of
from .lifecycle import Failure, Hello, Welcome
from .link import ANSWER_BOUND
from .registry import compare_schemas, decode
from .shortages import cannot_write
from .wire import NOBLOCK, Channel, Connection

if TYPE_CHECKING:
    from .node import Sockets

__all__ = ["Inbox"]

FRAMES_PER_TURN = 256  # of one socket, so that the others have their turn
RETIRED_ROUTES = 1024  # routes of ended links, remembered to tell their late frames from foreign ones
HALF_OPEN = 256  # peers that have said hello on one socket only


class _Door:
    """One ROUTER and the peers behind it."""

    def __init__(self, inbox: Inbox, sockets: Sockets, path: Path, control: bool) -> None:
        self._inbox = inbox
        self._exchange = sockets.exchange
        self.control = control
        self.is_open = True
        self.path = path
        self.routes: dict[bytes, str] = {}
        self.retired: OrderedDict[bytes, str] = OrderedDict()
        self.socket = sockets.open(zmq.ROUTER)
        self.socket.router_mandatory = True
        try:
            self.socket.bind(f"ipc://{path}")
        except zmq.ZMQError as error:
            raise cannot_write(path, error.errno) from error

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
                self._exchange.receive(peer, self.socket.recv(NOBLOCK), control=self.control)
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
        """Which of the two it is, for the log."""
        return "control" if self.control else "data"

    def _read_stranger(self, route: bytes) -> None:
        if not self.socket.get(zmq.RCVMORE):
            self._exchange.count("foreign_frames", socket=self.lane, error="a part too many")
            return
        part = self.socket.recv(NOBLOCK, copy=False)
        if route in self.retired:
            self._drop_rest()
            self._exchange.count("late_frames", socket=self.lane, peer=self.retired[route])
        elif self._drop_rest():
            caller = caller_of(part)
            pid = caller and caller.pid
            self._exchange.count("foreign_frames", socket=self.lane, pid=pid, error="a message of several parts")
        else:
            self._inbox.greet(self, route, part)

    def _drop_rest(self) -> bool:
        """Throw away further parts of the message being read; True if there were any."""
        had_more = False
        while self.socket.get(zmq.RCVMORE):
            self.socket.recv(NOBLOCK)
            had_more = True
        return had_more


@attrs.frozen
class _Half:
    """A peer that has said hello on one socket, well, and not yet on the other."""

    door: _Door
    route: bytes
    hello: Hello
    caller: Caller


class Inbox:
    """Both doors of one life of one node. Raises ``ConfigError`` for an unusable run directory or path."""

    def __init__(self, sockets: Sockets, run_dir: Path, expects: Set[str] | None = None) -> None:
        """expects: the names that may link to this node; None for any."""
        check_run_dir(run_dir)
        self._sockets = sockets
        self._exchange = sockets.exchange
        self._expects = expects
        control, data = inbox_paths(run_dir, self._exchange.name, self._exchange.incarnation)
        for path in (control, data):
            if path.exists():  # a second bind would silently steal the path from the first
                raise BusError(f"{path} exists: this incarnation of {self._exchange.name} has an inbox already")
        self._half: OrderedDict[tuple[str, int, int, bool], _Half] = OrderedDict()
        self._callers: dict[str, Caller] = {}  # who is behind each name that was let in
        self.doors = (_Door(self, sockets, data, False), _Door(self, sockets, control, True))
        for door in self.doors:
            sockets.add_reader(door.socket, door)

    def close(self) -> None:
        """Remove the socket files, after all sockets of the node are closed: libzmq leaves them behind."""
        for door in self.doors:
            door.path.unlink(missing_ok=True)

    def greet(self, door: _Door, route: bytes, part: zmq.Frame) -> None:
        """The first frame of an unknown route: let it in, refuse it with a reason, or count it as foreign."""
        exchange = self._exchange
        caller = caller_of(part)
        where = {"socket": door.lane, "pid": caller and caller.pid}
        try:
            ((envelope, body),) = split(part.bytes)
            if envelope.kind != Kind.HELLO:
                raise BadFrame(f"a {Kind(envelope.kind).name} before HELLO")
            hello = decode(envelope.type_id, body)
            if not isinstance(hello, Hello):
                raise BadFrame(f"a HELLO that carries {type(hello).__name__}")
        except (BadFrame, ValueError) as error:  # ValueError: not exactly one record
            exchange.count("foreign_frames", **where, error=str(error))
            return
        exchange.record("in", hello.name, hello.incarnation, envelope)
        reason = self._refusal(hello, caller)
        if reason or caller is None:
            exchange.count("refused_links", **where, peer=hello.name, life=hello.incarnation, reason=reason)
            self._refuse(door, route, hello, reason)
            return
        key = (hello.name, hello.incarnation, caller.pid)
        self._half[*key, door.control] = _Half(door, route, hello, caller)
        if (*key, not door.control) in self._half:
            self._let_in(hello, caller)
        elif len(self._half) > HALF_OPEN:
            self._drop_half()

    def _drop_half(self) -> None:
        """Too many are half open: refuse the oldest of the process that has most, so that a flood drowns itself."""
        most, _ = Counter(half.caller.pid for half in self._half.values()).most_common(1)[0]
        key = next(key for key, half in self._half.items() if half.caller.pid == most)
        half = self._half.pop(key)
        reason = f"{HALF_OPEN} links are half open, most of them by process {most}"
        peer, life = half.hello.name, half.hello.incarnation
        self._exchange.count("half_links_dropped", socket=half.door.lane, pid=most, peer=peer, life=life, reason=reason)
        self._refuse(half.door, half.route, half.hello, reason)

    def _refusal(self, hello: Hello, caller: Caller | None) -> str:
        """Why this peer may not come in, with the field; empty if it may."""
        exchange = self._exchange
        if caller is None:
            return "the kernel does not say who it is"
        if caller.uid != os.geteuid():
            return f"uid {caller.uid} is not ours"
        if caller.pid != hello.pid:
            return f"pid {hello.pid} in its hello, but the kernel says {caller.pid}"
        if (hello.to, hello.to_incarnation) != (exchange.name, exchange.incarnation):
            return f"it looks for incarnation {hello.to_incarnation} of {hello.to}"
        if self._expects is not None and hello.name not in self._expects:
            return f"nobody named {hello.name} is expected here"
        if conflict := compare_schemas(hello.schema):
            return f"schema: {conflict}"
        if taken := self._taken(hello, caller):
            return taken
        return exchange.peers.refusal(hello.name, hello.incarnation)

    def _taken(self, hello: Hello, caller: Caller) -> str:
        """Why a younger life may not replace the one that is linked; empty if it may, or if there is none."""
        link = self._exchange.peers.links.get(hello.name)
        if link is None or link.incarnation >= hello.incarnation:
            return ""
        holder = self._callers.get(hello.name)
        if holder is None:
            return f"{self._exchange.name} itself connects to {hello.name}"
        if holder.pid != caller.pid and holder.is_alive:
            return f"incarnation {link.incarnation} of {hello.name} is linked and lives, as process {holder.pid}"
        return ""

    def _refuse(self, door: _Door, route: bytes, hello: Hello, reason: str) -> None:
        failure = Failure("BusError", f"{self._exchange.name} refused the link: {reason}")
        channel = Channel(door.socket, route)
        channel.queue.append(self._exchange.handshake(Kind.REFUSE, failure, hello.name, hello.incarnation))
        try:
            channel.flush()
        except zmq.ZMQError:
            return  # it has gone already

    def _let_in(self, hello: Hello, caller: Caller) -> None:
        name, incarnation = hello.name, hello.incarnation
        routes = [self._half.pop((name, incarnation, caller.pid, door.control)).route for door in self.doors]
        self._callers[name] = caller
        for door, route in zip(self.doors, routes, strict=True):
            door.routes[route] = name

        def retire() -> None:
            for door, route in zip(self.doors, routes, strict=True):
                door.retire(route)
            if self._callers.get(name) is caller:
                del self._callers[name]

        data, control = (Channel(door.socket, route) for door, route in zip(self.doors, routes, strict=True))
        connection = Connection(name, control, data, mark_dirty=self._sockets.mark_dirty, on_close=retire)
        for is_control in (False, True):
            welcome = Welcome(name=self._exchange.name, incarnation=self._exchange.incarnation)
            connection.put(is_control, self._exchange.handshake(Kind.WELCOME, welcome, name, incarnation), ANSWER_BOUND)
        self._exchange.peers.up(name, incarnation, connection)
