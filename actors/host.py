"""The engine's end of the bus: one actor on a thread of the host application.

Owns: the requests this engine has on the bus, and the latest picture of the process tree. Thread: the bus thread.
"""

from __future__ import annotations

from collections.abc import Callable

import attrs

from ..bus import Actor, Ask, Progress, handles
from ..errors import Aborted, ChipbusError, PeerGone, RestartLimit, WorkerDied
from .messages.serving import Encoded, Generate, TextDelta, TextDone
from .messages.tree import (
    AllReplicaStatistics,
    ChildRecord,
    CloseReport,
    GroupLost,
    ReplicaStatistics,
    ReplicaStatisticsRequest,
    Shutdown,
    StartFailure,
    TreeChanged,
    TreeReady,
)
from .request import RequestState

__all__ = ["HostActor", "HostEvents"]

TOKENIZER = "tokenizer.0"
STATISTICS_TIMEOUT_S = 5.0


@attrs.frozen(kw_only=True)
class HostEvents:
    """What the engine wants to hear, on the bus thread."""

    on_bound: Callable[[], None]
    on_ready: Callable[[], None]
    on_dead: Callable[[ChipbusError], None]
    on_progress: Callable[[Progress], None]


@attrs.frozen(eq=False)
class _Request:
    """One completion under way."""

    ask: Ask
    state: RequestState


class HostActor(Actor):
    """Puts requests on the bus and their answers into ``RequestState``; keeps the tree snapshot."""

    def __init__(self, events: HostEvents) -> None:
        self._events = events
        self._requests: dict[str, _Request] = {}
        self._dead: ChipbusError | None = None
        self._statistics_pending = False
        self.tree: tuple[ChildRecord, ...] = ()  # replaced whole, so other threads may read it
        self.replicas: tuple[ReplicaStatistics, ...] = ()  # likewise
        self.requests_total = 0

    def on_start(self) -> None:
        """The inbox is bound: the supervisor may be started."""
        self._events.on_bound()

    # Requests.

    def submit(self, message: Generate, index: int, state: RequestState, timeout_s: float) -> None:
        """Send one completion's request; its answers go to ``state`` as completion ``index``."""
        if self._dead is not None:
            state.failed(self._dead)
            return
        self.requests_total += 1
        request_id = message.request_id

        def on_item(item: object) -> None:
            if isinstance(item, Encoded):
                state.encoded(item)
            elif isinstance(item, TextDelta):
                state.delta(index, item)

        def on_reply(reply: object) -> None:
            del self._requests[request_id]
            assert isinstance(reply, TextDone)
            state.done(index, reply)
            self.refresh_statistics(None)

        def on_error(error: ChipbusError) -> None:
            del self._requests[request_id]
            lost = WorkerDied(f"request {request_id} was lost: {error}") if isinstance(error, PeerGone) else error
            state.failed(self._dead or lost)
            self.refresh_statistics(None)

        ask = self.ctx.ask(
            TOKENIZER,
            message,
            timeout_s=timeout_s,
            on_item=on_item,
            on_reply=on_reply,
            on_error=on_error,
            trace_id=self.ctx.random.randbytes(16),
            wait_for_link=True,
        )
        self._requests[request_id] = _Request(ask, state)

    def abort(self, request_id: str) -> None:
        """Cancel a request; its pages are freed within a step. Unknown or ended ids are ignored."""
        request = self._requests.pop(request_id, None)
        if request is not None:
            request.ask.cancel()
            request.state.failed(Aborted(f"request {request_id} was aborted by its caller"))
            self.refresh_statistics(None)

    def fail_all(self, error: ChipbusError) -> None:
        """End every request with ``error``; later ones get it at once."""
        self._dead = error
        while self._requests:
            _, request = self._requests.popitem()
            request.ask.cancel()
            request.state.failed(error)

    # The tree.

    @handles(Progress)
    def _progress(self, message: Progress, _: object) -> None:
        self._events.on_progress(message)

    @handles(TreeChanged)
    def _tree_changed(self, message: TreeChanged, _: object) -> None:
        self.tree = message.children

    @handles(TreeReady)
    def _tree_ready(self, message: TreeReady, _: object) -> None:
        self._events.on_ready()

    @handles(StartFailure)
    def _start_failure(self, message: StartFailure, _: object) -> None:
        from .. import errors  # the class travels by name

        kind = getattr(errors, message.error, ChipbusError) if message.error in errors.__all__ else ChipbusError
        self._events.on_dead(kind(message.text))

    @handles(GroupLost)
    def _group_lost(self, message: GroupLost, _: object) -> None:
        self.ctx.log.error("group.lost", child=message.child, reason=message.text)
        is_replica = any(record.kind in ("replica", "chip") for record in self.tree if record.name == message.child)
        if not is_replica or not any(r.state != "gone" for r in self.tree if r.kind == "replica"):
            self._events.on_dead(RestartLimit(f"the engine cannot go on without {message.child}: {message.text}"))

    def refresh_statistics(self, on_done: Callable[[ChipbusError | None], None] | None) -> None:
        """Ask the replicas for their statistics; without ``on_done`` at most one such question is under way."""
        if on_done is None:
            if self._statistics_pending:
                return
            self._statistics_pending = True

        def on_reply(reply: object) -> None:
            assert isinstance(reply, AllReplicaStatistics)
            self.replicas = reply.replicas
            finish(None)

        def finish(error: ChipbusError | None) -> None:
            if on_done is None:
                self._statistics_pending = False
            else:
                on_done(error)

        self.ctx.ask(
            "supervisor", ReplicaStatisticsRequest(), timeout_s=STATISTICS_TIMEOUT_S, on_reply=on_reply, on_error=finish
        )

    def shut_down(self, budget_s: float, on_report: Callable[[CloseReport | ChipbusError], None]) -> None:
        """Ask the supervisor to stop everything within ``budget_s``."""

        def on_reply(reply: object) -> None:
            assert isinstance(reply, CloseReport)
            on_report(reply)

        self.ctx.ask("supervisor", Shutdown(budget_s), timeout_s=budget_s + 1, on_reply=on_reply, on_error=on_report)
