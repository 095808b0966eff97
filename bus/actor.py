"""What an actor is and what it may do: one plain class, one handler per message type, one ``Context``.

All hooks, handlers and callbacks of an actor run on its node's loop thread, one at a time; none may block.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol, TypeVar

from ..errors import ChipbusError
from .clock import Clock
from .conversation import Ask
from .ledger import LedgerWriter
from .lifecycle import NodeReport, Ready
from .timers import Timer

__all__ = ["Actor", "Context", "handles"]

H = TypeVar("H", bound=Callable[..., Any])


class Context(Protocol):
    """An actor's end of the bus. Only ``call_soon_threadsafe`` may be called from another thread."""

    name: str
    incarnation: int
    clock: Clock
    random: random.Random
    """Seeded from the run's seed, the name and the incarnation."""
    log: Any
    """structlog logger, bound to the actor's name and incarnation."""
    ledger: LedgerWriter | None
    """Where the run is recorded; None when it is not."""

    @property
    def sender(self) -> str:
        """Who sent the message being handled; empty outside a handler."""
        ...

    @property
    def sender_incarnation(self) -> int:
        """Which life of the sender; it may be over by now, and the next one have begun."""
        ...

    def tell(self, to: str, message: Any) -> None:
        """Send without an answer. Raises ``PeerGone`` without a link to ``to``, ``MailboxFull`` without credit for it.

        Credit is for work alone: ``to`` has not taken the 4096 messages, or 8 MiB, that it was sent before.
        """
        ...

    def tell_ready(self, to: str, ready: Ready) -> None:
        """Tell ``to`` that this actor can serve, now and in every answer to a ``Ping``: should one be lost, no harm."""
        ...

    def ask(
        self,
        to: str,
        message: Any,
        *,
        timeout_s: float,
        on_reply: Callable[[Any], None],
        on_error: Callable[[ChipbusError], None],
        on_item: Callable[[Any], None] | None = None,
        trace_id: bytes | None = None,
        wait_for_link: bool = False,
    ) -> Ask:
        """Send and be answered: any number of ``on_item``, then exactly one ``on_reply`` or ``on_error``.

        No callback runs before this returns, none after ``Ask.cancel()``. Errors: the callee's own, ``PeerGone`` (no
        link, or the peer ended), ``AnswerLost`` (the ask or its answer was lost on the way), ``DeadlineExceeded`` after
        ``timeout_s``, ``Overloaded`` (a queue on the way is full, or we take items too slowly), ``BadFrame`` (an answer
        that is no message). Without credit for more work the ask waits for it inside its deadline.
        ``trace_id``: 16 bytes; drawn if not given.
        ``wait_for_link``: with no link to ``to``, wait for one inside the deadline: it is being started, or restarted.
        """
        ...

    def after(self, delay_s: float, callback: Callable[[], None]) -> Timer:
        """Run ``callback`` once, ``delay_s`` seconds from now or a little later."""
        ...

    def call_soon_threadsafe(self, callback: Callable[[], None]) -> None:
        """Run ``callback`` on the loop thread. From any thread; after the node ended it does nothing."""
        ...

    def watch(self, fd: int, callback: Callable[[], None]) -> None:
        """Run ``callback`` in every loop turn in which ``fd`` is readable; a pidfd stays so until it is unwatched."""
        ...

    def unwatch(self, fd: int) -> None:
        """Forget ``fd``; do this before closing it. Unknown descriptors are ignored."""
        ...

    def connect(self, name: str, incarnation: int) -> None:
        """Link to a node that has bound its inbox. Messages sent from now on wait for the link."""
        ...

    def peer_down(self, name: str, incarnation: int, reason: str) -> None:
        """That life of a peer has ended: fail open asks to it, cancel open calls from it, close the link."""
        ...

    def peers(self) -> Mapping[str, int]:
        """Linked names and their incarnations."""
        ...

    def report(self) -> NodeReport:
        """What this node is at."""
        ...

    def counters(self) -> Mapping[str, int]:
        """Events since the start, by name: ``late_frames``, ``bad_frames``, ``foreign_frames``, ``dead_letters``, …"""
        ...

    def hold_stop(self) -> None:
        """Inside ``on_stop``: go on running until ``stop()`` is called, or the stop's deadline passes."""
        ...

    def stop(self) -> None:
        """End this node: answer its queue with ``PeerGone``, flush what it sent, leave the loop."""
        ...


class Actor:
    """Base of every actor. ``ctx`` is set before ``on_start``.

    An exception in a handler fails the call it handled, is logged as ``actor.handler_failed`` and counted; the actor
    goes on living. In ``on_start`` it ends the node and is raised from ``Node.run``. ``SystemExit`` and ``MemoryError``
    in any handler or callback end the process at once with code 70: the supervisor holds the truth about lives.
    """

    ctx: Context
    _handlers: ClassVar[dict[type, str]] = {}

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        own = {kind: name for name, value in vars(cls).items() for kind in getattr(value, "_handled_types", ())}
        cls._handlers = {**cls._handlers, **own}

    def on_start(self) -> None:
        """The inbox is bound and the first links are being made."""

    def on_stop(self) -> None:
        """A polite stop began. The node ends when this returns, unless it called ``ctx.hold_stop()``."""

    def on_peer_up(self, name: str) -> None:
        """A link to ``name`` came up, for the first time or again."""

    def on_peer_down(self, name: str, reason: str) -> None:
        """The peer ended. Its asks and calls have been closed already."""

    def progress(self) -> int:
        """A counter that moves while the actor works; carried by every ``Pong``."""
        return 0

    def is_busy(self) -> bool:
        """Whether another thread of the actor has work, so that ``progress`` has to move; carried by every ``Pong``."""
        return False

    def obeys(self, sender: str) -> bool:
        """Whether ``sender`` may stop this node and tell it who is up or gone. Anybody linked may ask how it is."""
        return True

    def handler_names(self) -> Mapping[type, str]:
        """Message type to method name, as declared with ``handles``."""
        return self._handlers


def handles(message_type: type) -> Callable[[H], H]:
    """Method decorator: this method handles that message type, as ``def f(self, message, call)``.

    ``call`` is a ``Call`` for an ask and None for a tell.
    """

    def decorate(method: H) -> H:
        method._handled_types = (*getattr(method, "_handled_types", ()), message_type)  # type: ignore[attr-defined]
        return method

    return decorate
