"""The host application's end of a process tree: the supervisor's reports, kept for others to read.

Owns: the latest picture of the tree. Thread: the bus thread. Who asks the tree for work derives from ``TreeActor``.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable

import attrs

from ..bus import Actor, Ping, Pong, Progress, handles
from ..errors import ChipbusError, MailboxFull, PeerGone, RestartLimit
from .boot import SUPERVISOR
from .heartbeats import Heartbeats
from .messages.tree import (
    ChildRecord,
    CloseReport,
    GroupLost,
    Shutdown,
    StartFailure,
    TreeChanged,
    TreeReady,
)

__all__ = ["TreeActor", "TreeEvents"]


@attrs.frozen(kw_only=True)
class TreeEvents:
    """What the owner of a tree wants to hear, on the bus thread."""

    on_bound: Callable[[], None]
    on_ready: Callable[[], None]
    on_dead: Callable[[ChipbusError], None]
    on_progress: Callable[[Progress], None]
    on_stalled: Callable[[str], None] = lambda _: None
    """The supervisor has stopped or is stuck; told once, with the reason."""
    stall_timeout_s: float | None = None
    """After how long without an answer ``on_stalled`` is told; None: never."""


class TreeActor(Actor, ABC):
    """Listens to the supervisor. ``events`` is set by the tree's owner before the bus runs."""

    def __init__(self) -> None:
        self.events: TreeEvents | None = None
        self.tree: tuple[ChildRecord, ...] = ()  # replaced whole, so other threads may read it
        self._heartbeats: Heartbeats | None = None  # from the supervisor's first word on

    def on_start(self) -> None:
        """The inbox is bound: the supervisor may be started."""
        self._heard.on_bound()

    @abstractmethod
    def fail_all(self, error: ChipbusError) -> None:
        """End everything under way with ``error``; later work gets it at once."""

    @abstractmethod
    def is_fatal(self, lost: GroupLost) -> bool:
        """Whether nothing is of use any more without the children that were given up."""

    @property
    def _heard(self) -> TreeEvents:
        assert self.events is not None
        return self.events

    @handles(Progress)
    def _progress(self, message: Progress, _: object) -> None:
        self._heard.on_progress(message)

    @handles(TreeChanged)
    def _tree_changed(self, message: TreeChanged, _: object) -> None:
        self.tree = message.children
        timeout_s = self._heard.stall_timeout_s
        if self._heartbeats is None and timeout_s is not None:
            self._heartbeats = Heartbeats(timeout_s)
            self._beat()

    def _beat(self) -> None:
        """The same rule as for children, by their owner; it ends with the supervisor."""
        assert self._heartbeats is not None
        life = self.ctx.peers().get(SUPERVISOR)
        if life is None:
            return
        for stall in self._heartbeats.beat({SUPERVISOR: life}, self.ctx.clock.now_ns() / 1e9):
            self._heard.on_stalled(stall.reason)
            return
        with contextlib.suppress(PeerGone, MailboxFull):  # what it does not take it cannot answer
            self.ctx.tell(SUPERVISOR, Ping())
        self.ctx.after(self._heartbeats.interval_s, self._beat)

    @handles(Pong)
    def _pong(self, message: Pong, _: object) -> None:
        if self._heartbeats is not None and self.ctx.sender == SUPERVISOR:
            self._heartbeats.answered(SUPERVISOR, self.ctx.peers()[SUPERVISOR], message.progress)

    @handles(TreeReady)
    def _tree_ready(self, message: TreeReady, _: object) -> None:
        self._heard.on_ready()

    @handles(StartFailure)
    def _start_failure(self, message: StartFailure, _: object) -> None:
        from .. import errors  # the class travels by name

        kind = getattr(errors, message.error, ChipbusError) if message.error in errors.__all__ else ChipbusError
        self._heard.on_dead(kind(message.text))

    @handles(GroupLost)
    def _group_lost(self, message: GroupLost, _: object) -> None:
        self.ctx.log.error("group.lost", child=message.child, reason=message.text)
        if self.is_fatal(message):
            self._heard.on_dead(RestartLimit(f"nothing can go on without {message.child}: {message.text}"))

    def shut_down(self, budget_s: float, on_report: Callable[[CloseReport | ChipbusError], None]) -> None:
        """Ask the supervisor to stop everything within ``budget_s``."""

        def on_reply(reply: object) -> None:
            assert isinstance(reply, CloseReport)
            on_report(reply)

        self.ctx.ask(SUPERVISOR, Shutdown(budget_s), timeout_s=budget_s + 1, on_reply=on_reply, on_error=on_report)
