"""The binding half of links: a node's two ROUTER sockets, and who is let in. Owner: the node's loop thread.

    c   control: every lane before WORK, cancels, handshakes          {run_dir}/{name}.{incarnation}.c
    d   data: the WORK lane and its answers                           {run_dir}/{name}.{incarnation}.d

A peer says HELLO on both sockets before anything else. It is let in if the kernel says that it runs under our user and
has the pid it claims, if the life it means is ours, if its name is expected here, if both sides understand each message
alike, and if that life of it may be linked. Both HELLOs of a link come from one process. A younger life takes the place
of an older one only when the older one's process has ended: nobody can be pushed out by a claim.

A node may listen for other hosts, too, on a second pair of sockets over tcp. There a key stands for uid and pid.
"""

from __future__ import annotations

import os
from collections import Counter, OrderedDict
from collections.abc import Set
from pathlib import Path
from typing import TYPE_CHECKING

import attrs
import zmq

from ..errors import BadFrame, BusError, ChipbusError
from .addresses import check_run_dir, inbox_paths
from .curve import KeyDesk, TcpInbox
from .door import Door
from .envelope import Kind, split
from .identity import Caller
from .lifecycle import Failure, Hello, Welcome
from .link import ANSWER_BOUND
from .registry import compare_schemas, decode
from .wire import Channel

if TYPE_CHECKING:
    from .node import Sockets

__all__ = ["Inbox"]

GUESTS = "guest.*"
"""In place of a name that is expected: any process of our user, under the name ``guest.PID``."""
HALF_OPEN = 256  # peers that have said hello on one socket only


@attrs.frozen
class _Half:
    """A peer that has said hello on one socket, well, and not yet on the other."""

    door: Door
    route: bytes
    hello: Hello
    caller: Caller


class Inbox:
    """All doors of one life of one node. Raises ``ConfigError`` for an unusable run directory or path."""

    def __init__(
        self, sockets: Sockets, run_dir: Path, expects: Set[str] | None = None, tcp: TcpInbox | None = None
    ) -> None:
        """expects: the names that may link to this node on this host; None for any. tcp: for other hosts, too."""
        check_run_dir(run_dir)
        self._sockets = sockets
        self._exchange = sockets.exchange
        self._expects = expects
        control, data = inbox_paths(run_dir, self._exchange.name, self._exchange.incarnation)
        for path in (control, data):
            if path.exists():  # a second bind would silently steal the path from the first
                raise BusError(f"{path} exists: this incarnation of {self._exchange.name} has an inbox already")
        self._half: OrderedDict[tuple[str, int, str, bool], _Half] = OrderedDict()
        self._callers: dict[str, Caller] = {}  # who is behind each name that was let in
        self._paths = (control, data)
        try:
            places: list[Path | TcpInbox] = [data, control]
            if tcp is not None:
                KeyDesk(sockets, tcp)
                places += [tcp, tcp]
            for place, is_control in zip(places, (False, True, False, True), strict=False):
                door = Door(self, sockets, place, is_control)
                sockets.add_reader(door.socket, door)
        except ChipbusError:
            self.close()
            raise

    def close(self) -> None:
        """Remove the socket files, after all sockets of the node are closed: libzmq leaves them behind."""
        for path in self._paths:
            path.unlink(missing_ok=True)

    def greet(self, door: Door, route: bytes, part: zmq.Frame) -> None:
        """The first frame of an unknown route: let it in, refuse it with a reason, or count it as foreign."""
        exchange = self._exchange
        caller = door.caller_of(part)
        sender = None if caller is None else caller.who
        try:
            ((envelope, body),) = split(part.bytes)
            if envelope.kind != Kind.HELLO:
                raise BadFrame(f"a {Kind(envelope.kind).name} before HELLO")
            hello = decode(envelope.type_id, body)
            if not isinstance(hello, Hello):
                raise BadFrame(f"a HELLO that carries {type(hello).__name__}")
        except (BadFrame, ValueError) as error:  # ValueError: not exactly one record
            exchange.count("foreign_frames", socket=door.lane, sender=sender, error=str(error))
            return
        exchange.record("in", hello.name, hello.incarnation, envelope)
        reason = self._refusal(hello, caller)
        if reason or caller is None:
            peer, life = hello.name, hello.incarnation
            exchange.count("refused_links", socket=door.lane, sender=sender, peer=peer, life=life, reason=reason)
            self._refuse(door, route, hello, reason)
            return
        key = (hello.name, hello.incarnation, caller.who)
        self._half[*key, door.control] = _Half(door, route, hello, caller)
        if (*key, not door.control) in self._half:
            self._let_in(hello, caller)
        elif len(self._half) > HALF_OPEN:
            self._drop_half()

    def _drop_half(self) -> None:
        """Too many are half open: refuse the oldest of the process that has most, so that a flood drowns itself."""
        most, _ = Counter(half.caller.who for half in self._half.values()).most_common(1)[0]
        key = next(key for key, half in self._half.items() if half.caller.who == most)
        half = self._half.pop(key)
        reason = f"{HALF_OPEN} links are half open, most of them by {most}"
        socket, peer, life = half.door.lane, half.hello.name, half.hello.incarnation
        self._exchange.count("half_links_dropped", socket=socket, sender=most, peer=peer, life=life, reason=reason)
        self._refuse(half.door, half.route, half.hello, reason)

    def _refusal(self, hello: Hello, caller: Caller | None) -> str:
        """Why this peer may not come in, with the field; empty if it may."""
        exchange = self._exchange
        if caller is None:
            return "the kernel does not say who it is"
        if wrong := self._impostor(hello, caller):
            return wrong
        if (hello.to, hello.to_incarnation) != (exchange.name, exchange.incarnation):
            return f"it looks for incarnation {hello.to_incarnation} of {hello.to}"
        if conflict := compare_schemas(hello.schema):
            return f"schema: {conflict}"
        if taken := self._taken(hello, caller):
            return taken
        return exchange.peers.refusal(hello.name, hello.incarnation)

    def _impostor(self, hello: Hello, caller: Caller) -> str:
        """What shows that it is not who it says, or nobody we wait for; empty if nothing does."""
        if caller.name:
            return "" if caller.name == hello.name else f"it says {hello.name} with the key of {caller.name}"
        if caller.uid != os.geteuid():
            return f"uid {caller.uid} is not ours"
        if caller.pid != hello.pid:
            return f"pid {hello.pid} in its hello, but the kernel says {caller.pid}"
        is_guest = hello.name == f"guest.{caller.pid}"
        if self._expects is not None and not (hello.name in self._expects or (is_guest and GUESTS in self._expects)):
            return f"nobody named {hello.name} is expected here"
        return ""

    def _taken(self, hello: Hello, caller: Caller) -> str:
        """Why a younger life may not replace the one that is linked; empty if it may, or if there is none."""
        link = self._exchange.peers.links.get(hello.name)
        if link is None or link.incarnation >= hello.incarnation:
            return ""
        holder = self._callers.get(hello.name)
        if holder is None:
            return f"{self._exchange.name} itself connects to {hello.name}"
        if holder.who != caller.who and holder.is_alive:
            return f"incarnation {link.incarnation} of {hello.name} is linked and lives, as {holder.who}"
        return ""

    def _refuse(self, door: Door, route: bytes, hello: Hello, reason: str) -> None:
        failure = Failure("BusError", f"{self._exchange.name} refused the link: {reason}")
        channel = Channel(door.socket, route, self._sockets.poll.used)
        channel.queue.append(self._exchange.handshake(Kind.REFUSE, failure, hello.name, hello.incarnation))
        try:
            channel.flush()
        except zmq.ZMQError:
            return  # it has gone already

    def _let_in(self, hello: Hello, caller: Caller) -> None:
        name, incarnation = hello.name, hello.incarnation
        halves = [self._half.pop((name, incarnation, caller.who, control)) for control in (False, True)]
        self._callers[name] = caller
        for half in halves:
            half.door.routes[half.route] = name

        def retire() -> None:
            for half in halves:
                half.door.retire(half.route)
            if self._callers.get(name) is caller:
                del self._callers[name]

        data, control = (Channel(half.door.socket, half.route, self._sockets.poll.used) for half in halves)
        connection = self._sockets.connection(name, control, data, retire, is_far=bool(caller.name))
        for is_control in (False, True):
            welcome = Welcome(name=self._exchange.name, incarnation=self._exchange.incarnation)
            connection.put(is_control, self._exchange.handshake(Kind.WELCOME, welcome, name, incarnation), ANSWER_BOUND)
        self._exchange.peers.up(name, incarnation, connection)
