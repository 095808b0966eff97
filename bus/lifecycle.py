"""What nodes say to each other about themselves: hello, who is up, who is gone, stop, health, start-up progress."""

from __future__ import annotations

from typing import Annotated

import attrs
import msgspec

from .. import errors
from ..errors import ChipbusError
from .envelope import Lane
from .histogram import UNOBSERVED, Histogram
from .registry import message

__all__ = [
    "Failure", "Hello", "NodeReport", "NodeReportRequest", "PeerDown", "PeerUp", "Ping", "Pong", "Progress", "Ready",
    "Stop", "Welcome", "error_of", "failure_of",
]  # fmt: skip

Name = Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
Incarnation = Annotated[int, msgspec.Meta(ge=1, lt=2**32)]


@message(0x0101, lane=Lane.CHILD)
@attrs.frozen(kw_only=True)
class Hello:
    """First record on each socket of a new link, from the connecting side; the binder checks every field."""

    name: Name
    incarnation: Incarnation
    pid: Annotated[int, msgspec.Meta(ge=1, lt=2**31)]  # must be the pid the kernel reports for the connection
    to: Name
    to_incarnation: Incarnation
    schema: Annotated[bytes, msgspec.Meta(max_length=10 * 2**16)]  # registry.schema_table()


@message(0x0102, lane=Lane.CHILD)
@attrs.frozen(kw_only=True)
class Welcome:
    """The binder's answer to ``Hello`` on both sockets: the link is up."""

    name: Name
    incarnation: Incarnation


@message(0x0103, lane=Lane.CHILD)
@attrs.frozen
class PeerUp:
    """Supervisor to a child: ``name`` is up, connect to it."""

    name: Name
    incarnation: Incarnation


@message(0x0104, lane=Lane.CHILD)
@attrs.frozen
class PeerDown:
    """Supervisor to a child: ``name`` has ended; everything open with it ends now."""

    name: Name
    incarnation: Incarnation
    reason: str  # "signal 9 (SIGKILL)", "exit code 1"


@message(0x0105, lane=Lane.STOP)
@attrs.frozen
class Stop:
    """End politely. A stop still held at ``deadline_ns`` (CLOCK_MONOTONIC; 0: none) is carried out all the same."""

    deadline_ns: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


@message(0x0106, lane=Lane.CHILD)
@attrs.frozen
class Ready:
    """A child tells the supervisor that it can serve, ``seconds`` after its actor started."""

    seconds: float
    detail: str = ""


@message(0x0107, lane=Lane.CHILD)
@attrs.frozen
class Progress:
    """A long phase moves on: ``done`` of ``total`` ``unit`` ("bytes", "tokens")."""

    phase: str
    done: float
    total: float
    unit: str


@message(0x0108, lane=Lane.HEALTH)
@attrs.frozen
class Ping:
    """Are you alive? As an ask it is replied to, as a tell it is answered by a tell. Answered by the node itself.

    From the directory it says again what ``PeerUp`` and ``PeerDown`` have said, so that a lost one is made good.
    """

    up: tuple[tuple[Name, Incarnation], ...] = ()  # the peers to be connected to
    ended: tuple[tuple[Name, Incarnation], ...] = ()  # of each neighbour, the last life that is over


@message(0x0109, lane=Lane.HEALTH)
@attrs.frozen
class Pong:
    """Alive; ``progress`` and ``is_busy`` are the actor's: a stuck compute thread is busy with an unchanged number."""

    progress: int
    is_busy: bool = False
    ready: Ready | None = None  # what the actor last said of itself by ``Context.tell_ready``, once it has


@message(0x0110, lane=Lane.HEALTH)
@attrs.frozen
class NodeReportRequest:
    """What are you at? Reply: ``NodeReport``, by the node itself."""


@message(0x0111, lane=Lane.HEALTH)
@attrs.frozen(kw_only=True)
class NodeReport:
    """What one node is at. Times in seconds."""

    age_s: float  # since it was made
    mailbox: int  # messages that wait for its actor
    open_asks: int  # questions of its own that are not answered
    waits_for: str = ""  # message type of the oldest of them
    waits_on: str = ""  # whom it was asked of
    waits_s: float = 0.0  # since when
    progress: int = 0
    is_busy: bool = False
    lanes: tuple[tuple[str, int], ...] = ()  # ``mailbox`` by lane: "kill", "stop", "child", "health", "work"
    counters: tuple[tuple[str, int], ...] = ()  # as ``Context.counters``
    ledger_bytes: int = 0  # written to its ledger
    ledger_failures: int = 0  # writes that were refused; nothing is recorded after one
    credit_waits: Histogram = UNOBSERVED  # seconds that asks waited for credit, of those that had to


@message(0x010A, lane=Lane.WORK)
@attrs.frozen
class Failure:
    """An error on the wire: class name in ``chipbus.errors`` and the sentence."""

    error: str
    text: str


def failure_of(error: ChipbusError) -> Failure:
    """The wire form of an error; a class outside ``chipbus.errors`` travels as its nearest ancestor there."""
    known = next(cls for cls in type(error).__mro__ if cls.__name__ in errors.__all__)
    return Failure(known.__name__, str(error))


def error_of(failure: Failure) -> ChipbusError:
    """The error a ``Failure`` stands for; an unknown class name gives ``ChipbusError``."""
    cls = getattr(errors, failure.error) if failure.error in errors.__all__ else ChipbusError
    error: ChipbusError = cls(failure.text)
    return error
