"""The engine's end of the bus: one actor on a thread of the host application.

Owns: the requests this engine has on the bus, and the latest picture of the process tree. Thread: the bus thread.
"""

from __future__ import annotations

from collections.abc import Callable

import attrs

from ..bus import Ask
from ..errors import Aborted, ChipbusError, PeerGone, WorkerDied
from .boot import SUPERVISOR
from .messages.serving import Encoded, Generate, TextDelta, TextDone
from .messages.tree import AllReplicaStatistics, GroupLost, ReplicaStatistics, ReplicaStatisticsRequest
from .request import RequestState
from .tree_actor import TreeActor

__all__ = ["HostActor"]

TOKENIZER = "tokenizer.0"
STATISTICS_TIMEOUT_S = 5.0


@attrs.frozen(eq=False)
class _Request:
    """One completion under way."""

    ask: Ask
    state: RequestState


class HostActor(TreeActor):
    """Puts requests on the bus and their answers into ``RequestState``."""

    def __init__(self) -> None:
        super().__init__()
        self._requests: dict[str, _Request] = {}
        self._dead: ChipbusError | None = None
        self._statistics_pending = False
        self.replicas: tuple[ReplicaStatistics, ...] = ()  # replaced whole, so other threads may read it
        self.requests_total = 0

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

    def is_fatal(self, lost: GroupLost) -> bool:
        """Tokenizer and router have no substitute; a replica has, as long as another one is left."""
        is_replica = any(record.kind in ("replica", "chip") for record in self.tree if record.name == lost.child)
        return not is_replica or not any(r.state != "gone" for r in self.tree if r.kind == "replica")

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
            SUPERVISOR, ReplicaStatisticsRequest(), timeout_s=STATISTICS_TIMEOUT_S, on_reply=on_reply, on_error=finish
        )
