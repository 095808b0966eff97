"""The engine's end of the bus: one actor on a thread of the host application.

Owns: the requests this engine has on the bus, the latest picture of the process tree, and what there is to report of
both. Thread: the bus thread.
"""

from __future__ import annotations

from collections.abc import Callable

import attrs

from ..bus import Ask, count_tokens, handles, pack_tokens
from ..errors import Aborted, BadFrame, ChipbusError, PeerGone, WorkerDied
from .attempts import Attempts
from .boot import SUPERVISOR, TOKENIZER
from .messages.routing import Routed
from .messages.serving import Detokenize, Detokenized, Encoded, Generate, TextDelta, TextDone, Tokenize
from .messages.tree import (
    AllReplicaStatistics,
    CloseReport,
    Drain,
    Drained,
    GroupLost,
    ReplicaStatistics,
    ReplicaStatisticsRequest,
    TreeChanged,
)
from .meter import OpenRequest
from .reporter import Reporter
from .request import RequestState
from .tree_actor import TreeActor

__all__ = ["HostActor"]

STATISTICS_TIMEOUT_S = 5.0
LOOK_AGAIN_S = 0.05


@attrs.define(eq=False)
class _Request:
    """One completion under way."""

    message: Generate
    index: int  # of the completion in ``state``
    state: RequestState
    deadline_ns: int
    attempts: Attempts  # on lives of the tokenizer
    trace_id: bytes
    measured: OpenRequest
    ask: Ask | None = None

    def withdraw(self) -> None:
        """Nothing more is heard of it."""
        if self.ask is not None:
            self.ask.cancel()


@attrs.frozen(eq=False)
class _Question:
    """One question about text under way."""

    message: Tokenize | Detokenize
    deadline_ns: int
    attempts: Attempts  # on lives of the tokenizer
    on_done: Callable[[Encoded | Detokenized | ChipbusError], None]


class HostActor(TreeActor):
    """Puts requests on the bus and their answers into ``RequestState``."""

    def __init__(self, max_request_restarts: int) -> None:
        super().__init__()
        self._max_request_restarts = max_request_restarts
        self._requests: dict[str, _Request] = {}
        self._questions: set[_Question] = set()
        self._dead: ChipbusError | None = None
        self._look_is_due = False
        self.replicas: tuple[ReplicaStatistics, ...] = ()  # replaced whole, so other threads may read it
        self.reporter = Reporter()

    def on_start(self) -> None:
        """The inbox is bound: count from here."""
        self.reporter.open(self.ctx)
        super().on_start()

    @handles(TreeChanged)
    def _tree_changed(self, message: TreeChanged, call: object) -> None:
        super()._tree_changed(message, call)
        self.reporter.saw_tree(message.children)

    @handles(GroupLost)
    def _group_lost(self, message: GroupLost, call: object) -> None:
        self.reporter.log.add("lost", message.child, message.text)
        super()._group_lost(message, call)

    # Requests.

    def submit(self, message: Generate, index: int, state: RequestState, timeout_s: float) -> None:
        """Send one completion's request; its answers go to ``state`` as completion ``index``."""
        if self._dead is not None:
            state.failed(self._dead)
            return
        if state.is_over:  # another of the prompt's completions has failed meanwhile
            return
        now_ns = self.ctx.clock.now_ns()
        deadline_ns = now_ns + int(timeout_s * 1e9)
        attempts = Attempts(self._max_request_restarts)
        measured = self.reporter.begin(message.request_id, now_ns)
        request = _Request(message, index, state, deadline_ns, attempts, self.ctx.random.randbytes(16), measured)
        self._requests[message.request_id] = request
        self._send(request)

    def _send(self, request: _Request) -> None:
        """Ask the tokenizer, which may be starting just now, for what has not come yet."""
        message = attrs.evolve(
            request.message,
            generated=pack_tokens(request.state.token_ids(request.index)),
            attempt=request.attempts.number,
        )
        request.ask = self.ctx.ask(
            TOKENIZER,
            message,
            timeout_s=max(request.deadline_ns - self.ctx.clock.now_ns(), 1) / 1e9,
            on_item=lambda item: self._item(request, item),
            on_reply=lambda reply: self._done(request, reply),
            on_error=lambda error: self._failed(request, error),
            trace_id=request.trace_id,
            wait_for_link=True,
        )

    def _item(self, request: _Request, item: object) -> None:
        if isinstance(item, Encoded):
            if request.attempts.number == 1:
                ids = item.prompt_token_ids  # a later life need not render and encode once more
                request.message = attrs.evolve(request.message, prompt=None, turns=(), prompt_token_ids=ids)
            self.reporter.meter.encoded(request.measured, count_tokens(item.prompt_token_ids), self.ctx.clock.now_ns())
            request.state.encoded(item)
        elif isinstance(item, TextDelta):
            try:
                request.state.delta(request.index, item)
            except BadFrame as error:
                request.withdraw()
                self._failed(request, error)
            else:
                self.reporter.delta(request.measured, count_tokens(item.token_ids), self.ctx.clock.now_ns())
        elif isinstance(item, Routed):
            request.measured.replica = item.replica

    def _done(self, request: _Request, reply: object) -> None:
        assert isinstance(reply, TextDone)
        del self._requests[request.message.request_id]
        self.reporter.finish(request.measured, reply)
        request.state.done(request.index, reply)
        self._look_again()

    def _failed(self, request: _Request, error: ChipbusError) -> None:
        """The request failed further down, or the tokenizer died: its next life goes on where this one was."""
        if isinstance(error, PeerGone) and self._dead is None:
            if request.attempts.lost(len(request.state.token_ids(request.index))):
                self.reporter.retry(request.measured, request.attempts.number, error)
                self._send(request)
                return
            error = WorkerDied(request.attempts.spent(error))
        self._end_prompt(request.state.request_id, self._dead or error)

    # Questions about text.

    def ask_about_text(
        self,
        message: Tokenize | Detokenize,
        timeout_s: float,
        on_done: Callable[[Encoded | Detokenized | ChipbusError], None],
    ) -> None:
        """Ask the tokenizer; ``on_done`` is called once, with the answer or the error."""
        if self._dead is not None:
            on_done(self._dead)
            return
        deadline_ns = self.ctx.clock.now_ns() + int(timeout_s * 1e9)
        question = _Question(message, deadline_ns, Attempts(self._max_request_restarts), on_done)
        self._questions.add(question)
        self._put(question)

    def _put(self, question: _Question) -> None:
        def on_reply(reply: object) -> None:
            assert isinstance(reply, Encoded | Detokenized)
            self._answer(question, reply)

        def on_error(error: ChipbusError) -> None:
            if not isinstance(error, PeerGone):
                self._answer(question, error)
            elif self._dead is None and question.attempts.lost(0):
                self._put(question)
            else:
                self._answer(question, self._dead or WorkerDied(question.attempts.spent(error)))

        self.ctx.ask(
            TOKENIZER,
            question.message,
            timeout_s=max(question.deadline_ns - self.ctx.clock.now_ns(), 1) / 1e9,
            on_reply=on_reply,
            on_error=on_error,
            wait_for_link=True,
        )

    def _answer(self, question: _Question, answer: Encoded | Detokenized | ChipbusError) -> None:
        if question in self._questions:
            self._questions.remove(question)
            question.on_done(answer)

    # What concerns all.

    def drain(self, message: Drain, on_done: Callable[[Drained | ChipbusError], None]) -> None:
        """Pass a drain on to the supervisor."""

        def on_reply(reply: object) -> None:
            assert isinstance(reply, Drained)
            on_done(reply)

        timeout_s = message.timeout_s + STATISTICS_TIMEOUT_S
        self.ctx.ask(SUPERVISOR, message, timeout_s=timeout_s, on_reply=on_reply, on_error=on_done)

    def abort(self, request_id: str) -> None:
        """Cancel a prompt's completions; their pages are freed within a step. Unknown or ended ids are ignored."""
        self._end_prompt(request_id, Aborted(f"request {request_id} was aborted by its caller"))

    def _end_prompt(self, prompt_id: str, error: ChipbusError) -> None:
        """A prompt fails whole: what one of its completions does not get, the others need not get either."""
        for request in [r for r in self._requests.values() if r.state.request_id == prompt_id]:
            del self._requests[request.message.request_id]
            request.withdraw()
            self._end(request, error)
            self._look_again()

    def _end(self, request: _Request, error: ChipbusError) -> None:
        self.reporter.fail(request.measured, error)
        request.state.failed(error)

    def fail_all(self, error: ChipbusError) -> None:
        """End every request with ``error``; later ones get it at once."""
        self._dead = error
        while self._requests:
            _, request = self._requests.popitem()
            request.withdraw()
            self._end(request, error)
        for question in list(self._questions):
            self._answer(question, error)
        self.reporter.end()

    def is_fatal(self, lost: GroupLost) -> bool:
        """Tokenizer and router have no substitute; a replica has, as long as another one is left."""
        is_replica = any(record.kind in ("replica", "chip") for record in self.tree if record.name == lost.child)
        return not is_replica or not any(r.state != "gone" for r in self.tree if r.kind == "replica")

    def shut_down(self, budget_s: float, on_report: Callable[[CloseReport | ChipbusError], None]) -> None:
        """As ``TreeActor.shut_down``; a recorded run gets its last report then."""

        def close(outcome: CloseReport | ChipbusError) -> None:
            self.reporter.close()
            on_report(outcome)

        super().shut_down(budget_s, close)

    def refresh_statistics(self, on_done: Callable[[ChipbusError | None], None]) -> None:
        """Ask the replicas for their statistics; ``on_done`` is called when ``replicas`` holds the answers."""

        def on_reply(reply: object) -> None:
            assert isinstance(reply, AllReplicaStatistics)
            self.replicas = reply.replicas
            self.reporter.saw_replicas(reply.replicas)
            on_done(None)

        self.ctx.ask(
            SUPERVISOR, ReplicaStatisticsRequest(), timeout_s=STATISTICS_TIMEOUT_S, on_reply=on_reply, on_error=on_done
        )

    def _look_again(self) -> None:
        """A request has ended: refresh the statistics a little later, once for all that end until then."""
        if not self._look_is_due:
            self._look_is_due = True
            self.ctx.after(LOOK_AGAIN_S, self._look)

    def _look(self) -> None:
        self._look_is_due = False
        self.refresh_statistics(lambda _: None)
