"""Messages and small actors for tests of the bus, in one process and in several."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs

from chipbus.bus import Actor, Ask, Call, Lane, TokenIds, handles, message
from chipbus.errors import ChipbusError, ContextTooLong

__all__ = ["Asker", "Boom", "Count", "Deep", "Hold", "Note", "Number", "Server", "Sheet", "Slow", "Urgent"]


@message(0x7B01, lane=Lane.WORK)
@attrs.frozen
class Number:
    """Told: remembered. Asked: answered by the next number."""

    value: int
    padding: bytes = b""


@message(0x7B02, lane=Lane.WORK)
@attrs.frozen
class Count:
    """Asked: answered by a stream of ``up_to`` numbers."""

    up_to: int


@message(0x7B03, lane=Lane.WORK)
@attrs.frozen
class Hold:
    """Asked: never answered."""


@message(0x7B04, lane=Lane.WORK)
@attrs.frozen
class Boom:
    """The handler raises: ``ContextTooLong`` if ``is_typed``, else ``ZeroDivisionError``."""

    is_typed: bool


@message(0x7B05, lane=Lane.HEALTH)
@attrs.frozen
class Urgent:
    """Like ``Number``, on the control socket."""

    value: int


@message(0x7B06, lane=Lane.WORK)
@attrs.frozen
class Note:
    """Nobody handles it."""


@attrs.frozen
class Deep:
    """A part of ``Sheet``."""

    numbers: tuple[int, ...]
    rate: float


@message(0x7B07, lane=Lane.WORK)
@attrs.frozen(kw_only=True)
class Sheet:
    """Every kind of field a message may have."""

    text: str
    data: bytes
    tokens: TokenIds
    flag: bool
    maybe: int | None = None
    choice: int | str = 0
    parts: tuple[Deep, ...] = ()
    lane: Lane = Lane.WORK


@message(0x7B08, lane=Lane.WORK)
@attrs.frozen
class Slow:
    """Asked: the handler calls ``Server.block`` first."""


class Server(Actor):
    """Answers, and remembers what it was told and what happened."""

    def __init__(self) -> None:
        self.seen: list[int] = []
        self.calls: list[Call] = []
        self.cancels: list[str] = []
        self.events: list[str] = []
        self.holds_stop = False
        self.block: Callable[[], Any] = lambda: None

    def on_start(self) -> None:
        self.events.append("start")

    def on_stop(self) -> None:
        self.events.append("stop")
        if self.holds_stop:
            self.ctx.hold_stop()

    def on_peer_up(self, name: str) -> None:
        self.events.append(f"up {name}")

    def on_peer_down(self, name: str, reason: str) -> None:
        self.events.append(f"down {name}: {reason}")

    def progress(self) -> int:
        return len(self.seen)

    @handles(Number)
    @handles(Urgent)
    def _number(self, message: Number | Urgent, call: Call | None) -> None:
        self.seen.append(message.value)
        if call is not None:
            call.reply(Number(message.value + 1))

    @handles(Count)
    def _count(self, message: Count, call: Call) -> None:
        for value in range(message.up_to):
            call.item(Number(value))
        call.reply(Number(-1))

    @handles(Hold)
    def _hold(self, _: Hold, call: Call) -> None:
        self.calls.append(call)
        call.on_cancel(self.cancels.append)

    @handles(Boom)
    def _boom(self, message: Boom, call: Call | None) -> None:
        if message.is_typed:
            raise ContextTooLong("7 tokens do not fit into 6")
        _ = 1 // 0

    @handles(Slow)
    def _slow(self, _: Slow, call: Call | None) -> None:
        self.block()
        if call is not None:
            call.reply(Number(0))

    @handles(Sheet)
    def _sheet(self, message: Sheet, call: Call) -> None:
        call.reply(message)


class Asker(Actor):
    """Asks as told by the test; answers, items and errors in the order in which they came."""

    def __init__(self) -> None:
        self.heard: list[Any] = []
        self.events: list[str] = []

    def on_peer_up(self, name: str) -> None:
        self.events.append(f"up {name}")

    def on_peer_down(self, name: str, reason: str) -> None:
        self.events.append(f"down {name}: {reason}")

    @handles(Number)
    def _number(self, message: Number, _: Call | None) -> None:
        self.heard.append(message.value)

    def ask(self, to: str, message: object, timeout_s: float = 20.0) -> Ask:
        """Numbers are heard as ints, everything else as it is."""

        def hear(answer: Any) -> None:
            self.heard.append(answer.value if isinstance(answer, Number) else answer)

        return self.ctx.ask(to, message, timeout_s=timeout_s, on_reply=hear, on_error=self._fail, on_item=hear)

    def _fail(self, error: ChipbusError) -> None:
        self.heard.append(error)

    @property
    def errors(self) -> list[type]:
        """Classes of what was heard, for tests of errors."""
        return [type(answer) for answer in self.heard]
