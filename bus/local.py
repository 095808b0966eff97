"""The same actors in one process, on a virtual clock, with a seeded order of events: how races are found.

Owns: every exchange in it, the channels between them, the clock. It plays transport and, unless one of the actors does,
directory (who is up, who is gone); what a message means is left to the exchanges. Each step draws one of the events
that could happen next: a record arrives, an actor handles a message, a timer fires, a notice about a peer is delivered.
Order is kept per sender, receiver and socket. Beyond that actors can be killed and frozen at any moment, and records
dropped, repeated and delayed (``LinkFaults``).
"""

from __future__ import annotations

import itertools
import random
from collections import Counter, deque
from collections.abc import Callable, Iterable
from functools import partial
from typing import ClassVar

from ..errors import BusError, DeadlineExceeded, MailboxFull
from .actor import Actor, Context
from .addresses import check_name
from .clock import NS_PER_S, VirtualClock
from .context import BoundContext
from .exchange import Exchange
from .link_faults import LinkFaults
from .ports import Codec
from .registry import type_of

__all__ = ["LocalSystem"]

FOR_EVER_S = 1e9
MAX_STEPS_PER_INSTANT = 1_000_000  # two actors that answer each other for ever would stop the clock

Channel = tuple[str, str, bool]  # sender, receiver, is control
Notice = tuple[Callable[[], bool], Callable[[], None]]  # may it be delivered yet, and what it does


class _ByReference:
    """Codec that passes the message object itself; the "bytes" are its number."""

    def __init__(self) -> None:
        self._messages: dict[int, object] = {}
        self._numbers = itertools.count(1)

    def encode(self, value: object) -> bytes:
        type_of(value)
        number = next(self._numbers)
        self._messages[number] = value
        return number.to_bytes(8, "little")

    def decode(self, type_id: int, body: bytes | memoryview) -> object:
        return self._messages.pop(int.from_bytes(body, "little"))


class _Port:
    """Puts records into the channel towards one life of one peer."""

    def __init__(self, system: LocalSystem, sender: str, receiver: str, incarnation: int) -> None:
        self._queues = [system.channel(sender, receiver, control) for control in (False, True)]
        self._incarnation = incarnation
        self._receiver = receiver
        self._is_open = True

    def put(self, control: bool, record: bytes, bound: int) -> None:
        queue = self._queues[control]
        if len(queue) >= bound:
            raise MailboxFull(f"{len(queue)} messages wait to be sent to {self._receiver}; at most {bound} may")
        if self._is_open:
            queue.append((self._incarnation, record))

    def close(self) -> None:
        self._is_open = False


class _Seat:
    """One life of one actor in the system: what drives its exchange."""

    def __init__(
        self,
        system: LocalSystem,
        name: str,
        incarnation: int,
        actor: Actor,
        connect: tuple[str, ...],
        codec: Codec | None,
        on_end: Callable[[str], None] | None,
    ) -> None:
        self.name = name
        self.incarnation = incarnation
        self.connect_to = connect
        self.on_end = on_end
        self.notices: deque[Notice] = deque()
        self.posted: deque[Callable[[], None]] = deque()
        self.is_alive = True
        self.thaws_ns = 0  # frozen until then, on the system's clock
        self._system = system
        self.exchange = Exchange(
            actor, self, name=name, incarnation=incarnation, clock=system.clock, seed=system.seed, codec=codec
        )
        self.context: Context = BoundContext(self.exchange, self)
        actor.ctx = self.context

    @property
    def is_frozen(self) -> bool:
        """Nothing happens here, as in a process that is stopped."""
        return self.thaws_ns > self._system.clock.now_ns()

    def make_link(self, name: str, incarnation: int) -> None:
        self._system.link(self, name, incarnation)

    def finish(self) -> None:
        self._system.stopped(self)

    def call_soon_threadsafe(self, callback: Callable[[], None]) -> None:
        if self.is_alive:
            self.posted.append(callback)

    def watch(self, fd: int, callback: Callable[[], None]) -> None:
        raise BusError(f"descriptor {fd} cannot be watched: the in-process system has no descriptors")

    def unwatch(self, fd: int) -> None:
        raise BusError(f"descriptor {fd} cannot be unwatched: the in-process system has no descriptors")

    def events(self) -> Iterable[Callable[[], object]]:
        """What could happen next at this seat."""
        if self.is_frozen:
            return
        if self.notices and self.notices[0][0]():
            yield self._notice
        if self.posted:
            yield self._run_posted
        due_ns = self.exchange.timers.next_due_ns()
        if due_ns is not None and due_ns <= self._system.clock.now_ns():
            yield self._fire
        if len(self.exchange.mailbox):
            yield self._serve

    def _notice(self) -> None:
        self.notices.popleft()[1]()

    def _run_posted(self) -> None:
        self.exchange.guard("call_soon_threadsafe", None, self.posted.popleft())

    def _fire(self) -> None:
        callback = self.exchange.timers.pop_due(self._system.clock.now_ns())
        assert callback is not None
        self.exchange.guard("timer", None, callback)

    def _serve(self) -> None:
        self._system.deliver_control(self)
        self.exchange.serve()


class LocalSystem:
    """Actors by name, on one virtual clock. Equal seed and equal actors give the same run, event by event.

    ``serialize=False`` passes messages by reference instead of through the codec. ``directory=False`` leaves it to an
    actor to say who is up and who is gone (``PeerUp``, ``PeerDown``): nobody else hears of an end. ``faults`` need the
    codec.
    """

    STOPPED: ClassVar[str] = "stopped"
    """The reason why an actor that stopped by itself is gone."""

    def __init__(
        self, seed: int, *, serialize: bool = True, directory: bool = True, faults: LinkFaults | None = None
    ) -> None:
        self.seed = seed
        self.clock = VirtualClock()
        self.counters: Counter[str] = Counter()
        self._random = random.Random(seed)  # noqa: S311 (repeatable on purpose)
        self._codec: Codec | None = None if serialize else _ByReference()
        self._is_directory = directory
        self._seats: dict[str, _Seat] = {}
        self._ends: deque[Notice] = deque()  # of lives, to be told to whoever asked when starting them
        self._lives: Counter[str] = Counter()
        self._channels: dict[Channel, deque[tuple[int, bytes]]] = {}
        self.faults = faults  # may be changed at any time
        self._held_ns: dict[Channel, int] = {}  # delayed channels, and until when

    def spawn(
        self,
        name: str,
        actor: Actor,
        connect: tuple[str, ...] = (),
        *,
        incarnation: int | None = None,
        on_end: Callable[[str], None] | None = None,
    ) -> Context:
        """Start an actor's next life and run its ``on_start``, whose exception is raised here.

        It is linked to each name in ``connect`` as soon as that is alive, and to each living actor that lists it;
        without the directory only to those in ``connect`` that are alive now. ``on_end`` is told the reason of this
        life's end, in an event of its own.
        """
        check_name(name)
        if name in self._seats:
            raise ValueError(f"{name} is alive already")
        self._lives[name] = self._lives[name] + 1 if incarnation is None else incarnation
        seat = self._seats[name] = _Seat(self, name, self._lives[name], actor, connect, self._codec, on_end)
        for other in connect:
            if other in self._seats:
                seat.exchange.peers.connect(other, self._seats[other].incarnation)
        for other_seat in self._seats.values():
            if self._is_directory and name in other_seat.connect_to:
                other_seat.notices.append((_always, self._connect_notice(other_seat, seat)))
        try:
            actor.on_start()
        except BaseException:
            self.kill(name, "failed to start")
            raise
        return seat.context

    def kill(self, name: str, reason: str) -> None:
        """End an actor's life at once. Its neighbours hear of it; its last messages arrive before that, or are late."""
        seat = self._end(name)
        if seat.on_end is not None:
            self._ends.append((_always, partial(seat.on_end, reason)))
        for other in self._neighbours(seat):
            other.notices.append((_always, self._down_notice(other, seat, reason)))

    def stopped(self, seat: _Seat) -> None:
        """A seat's actor stopped by itself: its last messages arrive before the notice."""
        self._end(seat.name)
        if seat.on_end is not None:
            self._ends.append((lambda: not self._has_words_of(seat.name), partial(seat.on_end, self.STOPPED)))
        for other in self._neighbours(seat):
            queues = [self.channel(seat.name, other.name, control) for control in (False, True)]
            other.notices.append((lambda queues=queues: not any(queues), self._down_notice(other, seat, self.STOPPED)))  # type: ignore[misc]

    def freeze(self, name: str, seconds: float) -> None:
        """Let an actor do nothing for so many virtual seconds, or until it is killed; what is sent to it waits."""
        self._seats[name].thaws_ns = self.clock.now_ns() + int(min(seconds, FOR_EVER_S) * NS_PER_S)

    def incarnation(self, name: str) -> int:
        """The incarnation of a living actor, or 0."""
        return self._seats[name].incarnation if name in self._seats else 0

    def run_until(self, predicate: Callable[[], bool], limit_s: float = 60.0) -> None:
        """Run events until ``predicate()`` holds.

        Raises ``DeadlineExceeded`` after ``limit_s`` virtual seconds, naming what is open.
        """
        limit_ns = self.clock.now_ns() + int(limit_s * NS_PER_S)
        steps = 0
        while not predicate():
            if self._step():
                steps += 1
                if steps > MAX_STEPS_PER_INSTANT:
                    raise DeadlineExceeded(f"{steps} events and virtual time stands still; open: {self._open_things()}")
                continue
            steps = 0
            due_ns = self._next_due_ns()
            if due_ns is not None and due_ns <= limit_ns:
                self.clock.advance_to(due_ns)
                continue
            self.clock.advance_to(limit_ns)
            if not predicate():
                raise DeadlineExceeded(f"{limit_s:g} virtual seconds passed; open: {self._open_things()}")
            return

    # Transport.

    def channel(self, sender: str, receiver: str, control: bool) -> deque[tuple[int, bytes]]:
        """Records on their way, each with the incarnation of the receiver it is meant for."""
        return self._channels.setdefault((sender, receiver, control), deque())

    def link(self, seat: _Seat, name: str, incarnation: int) -> None:
        """The seat's exchange wants a link: the other side hears of it, then both are up."""

        def up() -> None:
            other = self._seats.get(name)
            if (
                other is None
                or other.incarnation != incarnation
                or not seat.is_alive
                or other.exchange.peers.refusal(seat.name, seat.incarnation)
            ):
                return
            other.exchange.peers.up(seat.name, seat.incarnation, _Port(self, name, seat.name, seat.incarnation))
            seat.exchange.peers.up(name, incarnation, _Port(self, seat.name, name, incarnation))

        if name in self._seats:
            self._seats[name].notices.append((_always, up))

    def deliver_control(self, seat: _Seat) -> None:
        """Everything that waits on the seat's control channels arrives, as it does at the start of a node's turn."""
        for channel, queue in list(self._channels.items()):
            while queue and channel[2] and channel[1] == seat.name and seat.is_alive and not self._is_held(channel):
                self._deliver(*channel)

    def _is_held(self, channel: Channel) -> bool:
        """Nothing arrives there now: it is delayed, or its receiver frozen."""
        seat = self._seats.get(channel[1])
        return self._held_ns.get(channel, 0) > self.clock.now_ns() or (seat is not None and seat.is_frozen)

    def _deliver(self, sender: str, receiver: str, control: bool) -> None:
        queue = self._channels[sender, receiver, control]
        if self.faults is not None and self._befalls(self.faults, (sender, receiver, control)):
            return
        incarnation, record = queue.popleft()
        seat = self._seats.get(receiver)
        if seat is None or seat.incarnation != incarnation:
            self.counters["late_frames"] += 1
        else:
            seat.exchange.receive(sender, record, control=control)

    def _befalls(self, faults: LinkFaults, channel: Channel) -> bool:
        """Draw what goes wrong with the next record of a channel; True if it does not arrive now."""
        queue = self._channels[channel]
        drawn = self._random.random()
        if drawn < faults.drop:
            if faults.spares(*channel):
                return False
            queue.popleft()
            self.counters["dropped"] += 1
            return True
        drawn -= faults.drop
        if drawn < faults.duplicate:
            queue.append(queue[0])
            self.counters["duplicated"] += 1
            return False
        if drawn - faults.duplicate < faults.delay:
            delay_ns = int(self._random.random() * faults.longest_delay_s * NS_PER_S)
            self._held_ns[channel] = self.clock.now_ns() + delay_ns
            self.counters["delayed"] += 1
            return True
        return False

    def _step(self) -> bool:
        """Let one drawn event happen; False if none can."""
        events: list[Callable[[], object]] = [
            lambda channel=channel: self._deliver(*channel)  # type: ignore[misc]
            for channel, queue in self._channels.items()
            if queue and not self._is_held(channel)
        ]
        events.extend(lambda end=end: self._tell_end(end) for end in self._ends if end[0]())  # type: ignore[misc]
        for seat in self._seats.values():
            events.extend(seat.events())
        if not events:
            return False
        self._random.choice(events)()
        return True

    # Directory.

    def _end(self, name: str) -> _Seat:
        seat = self._seats.pop(name)
        seat.is_alive = False
        return seat

    def _tell_end(self, end: Notice) -> None:
        self._ends.remove(end)
        end[1]()

    def _has_words_of(self, name: str) -> bool:
        """Whether anything that an actor sent is about to arrive; it does not linger for what is delayed."""
        return any(
            queue and channel[0] == name and channel[1] in self._seats and not self._is_held(channel)
            for channel, queue in self._channels.items()
        )

    def _neighbours(self, seat: _Seat) -> list[_Seat]:
        """Living seats that have, or were promised, a link with this one; none if an actor is the directory."""
        if not self._is_directory:
            return []
        return [
            other
            for other in self._seats.values()
            if other.name in seat.exchange.peers.links
            or seat.name in other.exchange.peers.links
            or seat.name in other.connect_to
        ]

    def _connect_notice(self, seat: _Seat, to: _Seat) -> Callable[[], None]:
        return lambda: seat.exchange.peers.connect(to.name, to.incarnation) if to.is_alive else None

    def _down_notice(self, seat: _Seat, gone: _Seat, reason: str) -> Callable[[], None]:
        return lambda: seat.exchange.peers.down(gone.name, gone.incarnation, reason)

    # What is open.

    def _next_due_ns(self) -> int | None:
        now_ns = self.clock.now_ns()
        moments = [until_ns for until_ns in self._held_ns.values() if until_ns > now_ns]
        for seat in self._seats.values():
            due_ns = seat.exchange.timers.next_due_ns()
            if seat.is_frozen:
                moments.append(seat.thaws_ns)
            elif due_ns is not None:
                moments.append(due_ns)
        return min(moments, default=None)

    def _open_things(self) -> str:
        things = []
        for seat in self._seats.values():
            exchange = seat.exchange
            things += [
                f"{seat.name} waits for {link.peer} ({ask.what})"
                for link in exchange.peers.links.values()
                for ask in link.asks.values()
            ]
            if len(exchange.mailbox):
                things.append(f"{seat.name} has {len(exchange.mailbox)} messages to handle")
        return "; ".join(things) or "nothing"


def _always() -> bool:
    return True
