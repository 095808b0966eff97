"""All talk with one chip: what each of its lives is given first, commands, launches, and what its death means.

Owns: the state of one link to one chip worker, as the one who uses that chip sees it. Thread: the bus loop.

    absent ──peer_up──▶ preparing ──last Done──▶ ready ──deadline missed──▶ condemned
       ▲                    │                      │                            │
       └────────────────────┴─────peer_down────────┴────────────────────────────┘   what was in flight: ``WorkerLost``
"""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from ..bus import Context, Progress, error_of
from ..errors import (
    AnswerLost,
    ChipbusError,
    DeadlineExceeded,
    DeviceUnusable,
    MailboxFull,
    PeerGone,
    SchedulerTimeout,
    WorkerLost,
)
from .boot import SUPERVISOR
from .messages.launching import ChipReport, ChipReportRequest, Completion, Dispatch, Done, Launch, Launched
from .messages.tree import Condemn

__all__ = ["ChipLane", "LaneState", "Outcome"]

CONDEMN_AGAIN_S = 1.0
REPORT_TIMEOUT_S = 0.5  # for a chip's bus thread to say what its compute thread is at; a stopped process says nothing

Outcome = Completion | ChipbusError
"""How one dispatch ended."""


class LaneState(enum.Enum):
    """Of the chip, as its user sees it."""

    ABSENT = "absent"
    PREPARING = "preparing"
    READY = "ready"
    CONDEMNED = "condemned"


class ChipLane:
    """One chip. ``prepare`` returns the commands each of its lives begins with; ``on_ready`` follows their last reply.

    on_lost: the chip went, with everything resident on it. on_refused: a command of ``prepare`` failed, so this life
    never gets ready.
    """

    def __init__(
        self,
        ctx: Context,
        chip: str,
        *,
        depth: int,
        launch_timeout_s: float,
        command_timeout_s: float,
        prepare: Callable[[], Sequence[object]],
        on_ready: Callable[[], None],
        on_lost: Callable[[WorkerLost], None],
        on_refused: Callable[[ChipbusError], None],
        on_progress: Callable[[Progress], None] = lambda _: None,
    ) -> None:
        self.chip = chip
        self.state = LaneState.ABSENT
        self.incarnation = 0
        self.committed_bytes = 0  # as of the last command that ended
        self.is_uniform = False  # the same; see ``Chip.is_uniform``
        self.first_cause: ChipbusError | None = None  # why the chip takes no work; later errors are its fallout
        self._ctx = ctx
        self._depth = depth
        self._launch_timeout_s = launch_timeout_s
        self._command_timeout_s = command_timeout_s
        self._prepare = prepare
        self._on_ready = on_ready
        self._on_lost = on_lost
        self._on_refused = on_refused
        self._on_progress = on_progress
        self._in_flight: dict[int, Callable[[ChipbusError], None]] = {}
        self._launches = 0  # of those in flight
        self._numbers = 0

    @property
    def is_ready(self) -> bool:
        """Whether it takes launches."""
        return self.state is LaneState.READY

    @property
    def has_credit(self) -> bool:
        """Whether another launch message may go out now: at most ``depth`` are under way."""
        return self.is_ready and self._launches < self._depth

    # The life of the chip.

    def peer_up(self) -> None:
        """A (new) chip worker knows nothing yet. It runs commands in order: the last answer is all."""
        self.incarnation = self._ctx.peers()[self.chip]
        self.state = LaneState.PREPARING
        commands = list(self._prepare())
        missing = len(commands)

        def on_reply(_: object) -> None:
            nonlocal missing
            missing -= 1
            if not missing:
                ready()

        def ready() -> None:
            self.state, self.first_cause = LaneState.READY, None
            self._on_ready()

        def on_error(error: ChipbusError) -> None:
            if self.state is LaneState.PREPARING and not isinstance(error, WorkerLost):
                self.state, self.first_cause = LaneState.CONDEMNED, error
                self._on_refused(error)

        for command in commands:
            self.command(command, on_reply, on_error)
        if not commands:
            ready()

    def peer_down(self, reason: str) -> None:
        """It died, and everything resident on it went with it."""
        lost = WorkerLost(f"{self.chip} ended with {reason}; tensors resident on it are gone")
        if self.first_cause is not None:
            lost = WorkerLost(str(lost.caused_by(self.first_cause)))
        self.state, self.first_cause, self.committed_bytes = LaneState.ABSENT, lost, 0
        in_flight, self._in_flight, self._launches = self._in_flight, {}, 0
        for end in in_flight.values():
            end(lost)
        self._on_lost(lost)

    def _give_up(self, error: ChipbusError) -> None:
        """It does not come back by itself: have it killed and replaced."""
        if self.state is LaneState.CONDEMNED:
            return
        self.state, self.first_cause = LaneState.CONDEMNED, error
        self._ctx.log.error("chip.condemned", chip=self.chip, reason=error.args[0])
        self._condemn(Condemn(self.chip, self.incarnation, str(error).partition("\n")[0]))

    def _condemn(self, verdict: Condemn) -> None:
        """Say so until it is gone: the supervisor may have been told before it knew that this life is ready."""
        if self.state is not LaneState.CONDEMNED or self.incarnation != verdict.incarnation:
            return
        with contextlib.suppress(PeerGone, MailboxFull):
            self._ctx.tell(SUPERVISOR, verdict)
        self._ctx.after(CONDEMN_AGAIN_S, lambda: self._condemn(verdict))

    def unusable(self) -> DeviceUnusable:
        """Why no work is taken now."""
        error = DeviceUnusable(f"{self.chip} is {self.state.value}")
        return error if self.first_cause is None else DeviceUnusable(str(error.caused_by(self.first_cause)))

    # Work.

    def command(
        self,
        message: Any,
        on_reply: Callable[[Any], None],
        on_error: Callable[[ChipbusError], None],
    ) -> None:
        """Ask for a command, in order with launches. Its error comes to ``on_error``; the chip's death too."""
        if self.state in (LaneState.ABSENT, LaneState.CONDEMNED):
            self._ctx.after(0.0, partial(on_error, self.unusable()))
            return

        def replied(reply: Any) -> None:
            if isinstance(reply, Done):
                self.committed_bytes, self.is_uniform = reply.resident_bytes, reply.is_uniform
            on_reply(reply)

        # Commands run in order with launches, so one of them may have to wait for those.
        timeout_s = self._command_timeout_s + self._launches * self._launch_timeout_s
        self._ask(message, timeout_s, type(message).__name__, replied, on_error)

    def launch(
        self,
        dispatches: Sequence[Dispatch],
        after: Sequence[Sequence[int]],
        on_done: Callable[[Sequence[Outcome]], None],
        trace_id: bytes | None = None,
    ) -> None:
        """Run dispatches one after another, in one message; ``on_done`` gets one outcome for each.

        after: positions in ``dispatches`` that each one must not run without, see ``Launch``. Needs ``has_credit``.
        """
        assert self.has_credit, f"{self.chip} has {self._launches} launches in flight"
        self._launches += 1

        def replied(reply: Launched) -> None:
            self._launches -= 1
            on_done(_outcomes(reply, len(dispatches)))

        def failed(error: ChipbusError) -> None:
            self._launches = max(0, self._launches - 1)  # a death has taken all credits back already
            on_done([error] * len(dispatches))

        what = f"dispatches {dispatches[0].dispatch_id} to {dispatches[-1].dispatch_id}"
        message = Launch(tuple(dispatches), tuple(map(tuple, after)))
        self._ask(message, self._launches * self._launch_timeout_s, what, replied, failed, trace_id)

    def _ask(
        self,
        message: Any,
        timeout_s: float,
        what: str,
        on_reply: Callable[[Any], None],
        on_error: Callable[[ChipbusError], None],
        trace_id: bytes | None = None,
    ) -> None:
        """An ask that also ends when the chip goes; whatever comes first counts, and only that."""
        self._numbers = number = self._numbers + 1
        self._in_flight[number] = on_error

        def replied(reply: Any) -> None:
            if self._in_flight.pop(number, None) is not None:
                on_reply(reply)

        def failed(error: ChipbusError) -> None:
            if isinstance(error, AnswerLost):
                self._give_up(error)  # whether it was run, nobody knows: only a new life is in a known state
            if isinstance(error, PeerGone):
                return  # peer_down says it, for all of them
            if isinstance(error, DeadlineExceeded):
                self._expired(number, f"{what} did not end within {timeout_s:g} s")
            elif self._in_flight.pop(number, None) is not None:
                on_error(error)

        self._ctx.ask(
            self.chip,
            message,
            timeout_s=timeout_s,
            on_reply=replied,
            on_error=failed,
            on_item=self._item,
            trace_id=trace_id,
        )

    def _item(self, item: object) -> None:
        if isinstance(item, Progress):
            self._on_progress(item)

    def _expired(self, number: int, what: str) -> None:
        """Find out what the chip is at, then give it up. Everything else in flight ends with its death."""
        incarnation = self.incarnation

        def told(report: Any) -> None:
            assert isinstance(report, ChipReport)
            if report.running:
                give_up(f"sub-class S1, running-stalled: {report.running} for {report.running_s:.1f} s")
            else:
                give_up("sub-class unknown: nothing is running, so an answer was lost")

        def silent(_: ChipbusError) -> None:
            give_up("its process does not answer")

        def give_up(at: str) -> None:
            if self.incarnation != incarnation or number not in self._in_flight:
                return  # it died, or answered after all
            error = SchedulerTimeout(f"{self.chip}: {what}; {at}")
            self._give_up(error)
            self._in_flight.pop(number)(error)

        self._ctx.ask(self.chip, ChipReportRequest(), timeout_s=REPORT_TIMEOUT_S, on_reply=told, on_error=silent)


def _outcomes(reply: Launched, count: int) -> list[Outcome]:
    """One per dispatch, in order."""
    failures = {position: error_of(failure) for position, failure in reply.failures}
    completions = iter(reply.completions)
    return [failures[i] if i in failures else next(completions) for i in range(count)]
