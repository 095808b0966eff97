"""A running process tree, seen from the host application: started, asked, closed. Both engine facades stand on it.

Owns: the bus thread, the supervisor's handle, the run directory's name. Everything else belongs to the supervisor.
"""

from __future__ import annotations

import itertools
import os
import random
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import attrs

from ..bus import Node, NodeConfig, Progress, get_logger, pack_tokens
from ..errors import ChipbusError, EngineClosed, EngineDead, RequestInvalid, StartFailed
from .boot import SUPERVISOR
from .host import HostActor, HostEvents
from .manifest import write_manifest
from .messages.serving import ChatTurn, Generate
from .messages.tree import ChildRecord, CloseReport
from .outputs import Statistics
from .plan import EnginePlan
from .processes import SupervisorHandle, spawn_supervisor
from .request import RequestState
from .rundir import RunDirectory
from .sampling import SamplingParams

__all__ = ["Prompt", "Runtime"]

FAILED_START_S = 3.0  # for a supervisor to stop what it had started
LAST_WORDS_S = 0.2  # for what an ended process sent to be read
KILLED_S = 1.0  # for a process to be gone after SIGKILL
Prompt = str | Sequence[int] | Sequence[ChatTurn]


class Runtime:
    """One process tree. Made by ``start``; thread-safe; ``close`` is idempotent."""

    def __init__(self, plan: EnginePlan, on_progress: Callable[[Progress], None] | None) -> None:
        self.plan = plan
        self._pid = os.getpid()
        self._seeds = random.Random(plan.config.seed)  # noqa: S311 (repeatable on purpose)
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._bound = threading.Event()
        self._settled = threading.Event()  # ready, or dead
        self._death: ChipbusError | None = None
        self._closing = False
        self._report: CloseReport | None = None
        self._closed = threading.Event()
        self._supervisor: SupervisorHandle | None = None
        self._run_dir = RunDirectory.create()
        self._host = HostActor(
            HostEvents(
                on_bound=self._bound.set,
                on_ready=self._settled.set,
                on_dead=self._died,
                on_progress=on_progress or (lambda _: None),
            )
        )
        config = NodeConfig(
            name="host", incarnation=1, run_dir=self._run_dir.path, seed=plan.config.seed, record=plan.config.record
        )
        try:
            self._node = Node(config, self._host)
        except BaseException:
            self._run_dir.remove(0.0)
            raise
        self._thread = threading.Thread(target=self._run_bus, name="chipbus", daemon=True)

    @classmethod
    def start(cls, plan: EnginePlan, on_progress: Callable[[Progress], None] | None = None) -> Runtime:
        """Start the tree and wait until every process is ready.

        Raises the child's own error, or ``StartFailed``; then, as on Ctrl-C, nothing is left behind.
        """
        if plan.config.record is not None:
            write_manifest(plan.config.record, plan)
        runtime = cls(plan, on_progress)
        try:
            runtime._start()
        except BaseException:
            runtime.close()
            raise
        return runtime

    def _start(self) -> None:
        deadline_s = time.monotonic() + self.plan.config.start_timeout_s
        self._thread.start()
        if not self._bound.wait(self.plan.config.start_timeout_s):
            raise StartFailed(f"the engine's own inbox was not bound within {self.plan.config.start_timeout_s:g} s")
        if self._death is not None:
            raise self._death
        boot_path = self.plan.write_boot(self._run_dir.path)
        self._supervisor = spawn_supervisor(boot_path, self._run_dir.lock_fd)
        self._run_dir.give_up_lock()
        pidfd = self._supervisor.pidfd
        self._host.ctx.call_soon_threadsafe(lambda: self._host.ctx.watch(pidfd, self._supervisor_ended))
        if not self._settled.wait(max(0.0, deadline_s - time.monotonic()) + 1.0):  # children report before we give up
            raise StartFailed(
                f"the engine was not ready within {self.plan.config.start_timeout_s:g} s; see the log above"
            )
        if self._death is not None:
            raise self._death

    def _run_bus(self) -> None:
        try:
            self._node.run()
        finally:  # whatever ended it, nobody may wait for an answer any more
            if not self._closing:
                self._died(EngineDead("the engine's bus thread ended; its error is in the log"))
            self._bound.set()

    # Requests.

    def submit(
        self, prompt: Prompt, params: SamplingParams, on_change: Callable[[], None]
    ) -> tuple[RequestState, tuple[str, ...]]:
        """Send one prompt; returns its state and the ids under which its completions can be aborted."""
        self.check_usable()
        fields = _prompt_fields(prompt)
        with self._lock:
            number = next(self._numbers)
            seed = params.seed if params.seed is not None else self._seeds.getrandbits(62)
        request_id = f"req-{number}"
        state = RequestState(request_id, params.n, params.logprobs is not None, on_change)
        children = []
        for index in range(params.n):
            child = request_id if params.n == 1 else f"{request_id}.{index}"
            message = Generate(
                request_id=child, params=attrs.evolve(params, n=1, seed=(seed + index) % 2**63), **fields
            )
            children.append(child)
            self._post(lambda m=message, i=index: self._host.submit(m, i, state, self.plan.config.request_timeout_s))  # type: ignore[misc]
        return state, tuple(children)

    def abort(self, request_ids: Sequence[str]) -> None:
        """Cancel requests; unknown or ended ids are ignored."""
        for request_id in request_ids:
            self._post(lambda rid=request_id: self._host.abort(rid))  # type: ignore[misc]

    # What is going on.

    def tree(self) -> tuple[ChildRecord, ...]:
        """The latest picture of the processes."""
        return self._host.tree

    def fetch_statistics(self) -> Statistics:
        """Ask the replicas now; those that do not answer in time are missing from the sum."""
        self.check_usable()
        answered = threading.Event()
        self._post(lambda: self._host.refresh_statistics(lambda _: answered.set()))
        while not answered.wait(0.2) and self._death is None and not self._closing:
            pass
        return self.latest_statistics()

    def latest_statistics(self) -> Statistics:
        """The latest snapshot, without asking anybody."""
        rows = self._host.replicas
        return Statistics(
            replicas=len(rows),
            pages_total=sum(r.pages_total for r in rows),
            pages_free=sum(r.pages_free for r in rows),
            running=sum(r.running for r in rows),
            waiting=sum(r.waiting for r in rows),
            requests=self._host.requests_total,
            steps=sum(r.steps for r in rows),
            prompt_tokens=sum(r.prompt_tokens for r in rows),
            tokens_generated=sum(r.tokens_generated for r in rows),
            step_ns=sum(r.step_ns for r in rows),
            device_ns=sum(r.device_ns for r in rows),
            restarts=sum(r.restarts for r in self._host.tree),
        )

    def check_usable(self) -> None:
        """Raise ``EngineClosed`` or the error the engine died of."""
        if os.getpid() != self._pid:
            raise EngineClosed(
                f"this engine belongs to process {self._pid}; {os.getpid()} is a forked copy and must make its own"
            )
        if self._closing:
            raise EngineClosed("this engine is closed; make a new one")
        if self._death is not None:
            raise self._death

    def _post(self, callback: Callable[[], None]) -> None:
        self._host.ctx.call_soon_threadsafe(callback)

    # The end.

    def _died(self, error: ChipbusError) -> None:
        if self._death is None and not self._closing:
            self._death = error
        self._host.fail_all(error)
        self._settled.set()

    def _supervisor_ended(self) -> None:
        assert self._supervisor is not None
        self._host.ctx.unwatch(self._supervisor.pidfd)
        exit_status = self._supervisor.try_reap()
        reason = exit_status.text if exit_status is not None else "exit status unknown"
        # Nobody else could tell the bus. A little later: its last words may still be on their way through ZeroMQ.
        self._host.ctx.after(LAST_WORDS_S, lambda: self._host.ctx.peer_down(SUPERVISOR, 1, reason))
        if not self._closing:
            self._died(EngineDead(f"the supervisor ended with {reason}, and every worker with it"))

    def close(self) -> CloseReport:
        """Stop every process under one deadline and report how each ended. A second call returns the same report."""
        if os.getpid() != self._pid:
            raise EngineClosed(f"this engine belongs to process {self._pid}; a forked copy cannot close it")
        with self._lock:
            first, self._closing = not self._closing, True
        if not first:
            self._closed.wait(self.plan.config.close_timeout_s + 2)
            assert self._report is not None, "the first close() did not end within its deadline"
            return self._report
        try:
            self._report = self._close(time.monotonic() + self.plan.config.close_timeout_s)
        except BaseException:  # a second Ctrl-C: no more politeness
            if self._supervisor is not None:
                self._supervisor.kill()
                self._supervisor.reap(1.0)
            self._run_dir.remove(1.0)
            self._report = CloseReport(children=(), seconds=0.0)
            raise
        finally:
            self._closed.set()
        return self._report

    def _close(self, deadline_s: float) -> CloseReport:
        def remaining_s(at_least_s: float) -> float:
            return max(at_least_s, deadline_s - time.monotonic())

        began_s = time.monotonic()
        left: list[str] = []
        report = self._ask_supervisor_to_stop(deadline_s) if self._thread.is_alive() else None
        if self._supervisor is not None:
            # A supervisor that has reported is about to exit; one that is failing its start stops its children first;
            # one that could not be asked has nothing to lose yet.
            patience_s = remaining_s(0.1) if report is not None else FAILED_START_S if self._death is not None else 0.0
            if self._supervisor.reap(patience_s) is None:
                self._supervisor.kill()
                if self._supervisor.reap(KILLED_S) is None:
                    left.append(f"supervisor process {self._supervisor.pid}")
        if self._thread.is_alive():
            self._post(self._host.ctx.stop)
            self._thread.join(remaining_s(0.5))
            if self._thread.is_alive():
                left.append("thread chipbus")
        if self._supervisor is not None:
            self._supervisor.close()
        left_on_disk = self._run_dir.remove(remaining_s(0.5))
        report = report or CloseReport(children=(), seconds=0.0)
        report = attrs.evolve(
            report,
            seconds=time.monotonic() - began_s,
            freed=report.freed if left_on_disk else (*report.freed, str(self._run_dir.path)),
            left=(*report.left, *left, *left_on_disk),
        )
        say = get_logger().warning if report.left else get_logger().info
        say("engine.closed", seconds=report.seconds, left=report.left)
        return report

    def _ask_supervisor_to_stop(self, deadline_s: float) -> CloseReport | None:
        answer: list[CloseReport] = []
        answered = threading.Event()

        def on_report(outcome: CloseReport | ChipbusError) -> None:
            if isinstance(outcome, CloseReport):
                answer.append(outcome)
            answered.set()

        def ask() -> None:
            self._host.fail_all(EngineClosed("the engine was closed while the request ran"))
            self._host.shut_down(max(0.1, deadline_s - time.monotonic() - 0.5), on_report)

        self._post(ask)
        answered.wait(max(0.1, deadline_s - time.monotonic()))
        return answer[0] if answer else None


def _prompt_fields(prompt: Prompt) -> dict[str, Any]:
    if isinstance(prompt, str):
        return {"prompt": prompt}
    if isinstance(prompt, Sequence) and prompt and all(isinstance(turn, ChatTurn) for turn in prompt):
        return {"turns": tuple(prompt)}
    if isinstance(prompt, Sequence) and all(isinstance(i, int) and not isinstance(i, bool) for i in prompt):
        return {"prompt_token_ids": pack_tokens([_int32(i) for i in prompt])}
    raise RequestInvalid(f"a prompt is text or a sequence of token ids, not {type(prompt).__name__}")


def _int32(token_id: object) -> int:
    assert isinstance(token_id, int)
    if not 0 <= token_id < 2**31:
        raise RequestInvalid(f"token id {token_id} is outside [0, 2147483648)")
    return token_id


def close_when_forgotten(engine: object, runtime: Runtime) -> weakref.finalize[[Runtime, int], object]:
    """Close the tree when the engine object is collected or the interpreter ends, whichever comes first."""
    return weakref.finalize(engine, _close_quietly, runtime, os.getpid())


def _close_quietly(runtime: Runtime, pid: int) -> None:
    if os.getpid() == pid:
        runtime.close()
