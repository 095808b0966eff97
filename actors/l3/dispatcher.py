"""The bus side of an L3 worker: which task goes where and when, and what becomes of it.

Owns: the lanes to the chips, the sub workers, the order in which tasks start. Thread: the bus loop; a run's state is
touched under the run's lock.

    runs (FIFO) ──ready tasks──▶ a queue per chip ──credit──▶ one Launch message for all that wait only for each other
                ──groups──▶ all members' lanes at once        ──subs──▶ host callables on sub workers

A task that waits only for tasks before it in the same message rides with them: a chain on one chip costs one round
trip. A task of a later run starts before an earlier run has ended only behind what that has left on the same chip.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import attrs

from ...bus import Progress, handles
from ...errors import ChipbusError, CoreException, DeviceUnusable, SchedulerTimeout
from ...kernels.dispatch import Arg, Completion, Dispatch
from ...kernels.program import Program, TensorSpec
from ..lane import ChipLane, Outcome
from ..messages.launching import AllocTensor, CopyFrom, CopyTo, FreeTensor, RegisterProgram, UnregisterProgram
from ..messages.tree import GroupLost
from ..tree_actor import TreeActor
from .gate import OPEN, Gate
from .outcomes import fill, placed, store
from .runs import SUB, BoundArgs, Member, Run, Task, TaskKind
from .subs import SubPool
from .tensors import DeviceTensor, TensorBook

__all__ = ["Dispatcher", "DispatcherSettings"]

MAX_BATCH = 64
"""Launches in one message: more would only delay the first one's completion."""
STALL_S = 5.0
"""A group that cannot start for so long is worth a warning."""
MAX_ERRORS = 100
"""Errors kept per run; the first is what counts."""

OnAnswer = Callable[[Any], None]
OnError = Callable[[ChipbusError], None]


@attrs.frozen(kw_only=True)
class DispatcherSettings:
    """Sizes and deadlines of a dispatcher."""

    devices: tuple[str, ...]  # "cpu:0"; position is the worker id
    depth: int  # launch messages under way per chip
    run_timeout_s: float  # for one launch, or one host callable
    command_timeout_s: float  # for a chip to be back, or to carry out a command


class Dispatcher(TreeActor):
    """Runs the tasks of runs. Methods without ``@handles`` are called on the bus thread by the worker's core."""

    def __init__(
        self,
        settings: DispatcherSettings,
        book: TensorBook,
        make_subs: Callable[[Dispatcher], SubPool],
        on_finished: Callable[[Run], None],
        on_failed: Callable[[ChipbusError], None],
    ) -> None:
        super().__init__()
        self.runs: tuple[Run, ...] = ()  # accepted and not over, in order; replaced whole, under the core's lock
        self.programs: dict[bytes, Program] = {}  # registered; replaced whole
        self.lanes: tuple[ChipLane, ...] = ()
        self.settings = settings
        self._book = book
        self._make_subs = make_subs
        self._on_finished = on_finished
        self._on_failed = on_failed
        self._given_up: dict[int, ChipbusError] = {}
        self._when_ready: dict[int, list[Callable[[ChipbusError | None], None]]] = {}
        self._free_ns: dict[int, int] = {}  # since when a chip has run nothing, as far as was heard
        self._dispatches = 0
        self._group: Task | None = None  # at the head of its queue: its chips take nothing else before it
        self._failed: ChipbusError | None = None

    # The chips.

    def on_start(self) -> None:
        """Make a lane for each chip; the chips follow when they are up."""
        self.subs = self._make_subs(self)
        self._workers = {f"chip.{worker}": worker for worker in range(len(self.settings.devices))}
        self.lanes = tuple(
            ChipLane(
                self.ctx,
                name,
                depth=self.settings.depth,
                launch_timeout_s=self.settings.run_timeout_s,
                command_timeout_s=self.settings.command_timeout_s,
                prepare=lambda: [RegisterProgram(program) for program in self.programs.values()],
                on_ready=partial(self._ready, worker, None),
                on_lost=partial(self._lost, worker),
                on_refused=partial(self._refused, worker),
                on_progress=partial(self._relay, name),
            )
            for name, worker in self._workers.items()
        )
        super().on_start()

    def on_peer_up(self, name: str) -> None:
        """A (new) chip worker."""
        if name in self._workers:
            self.lanes[self._workers[name]].peer_up()

    def on_peer_down(self, name: str, reason: str) -> None:
        """Its supervisor replaces it."""
        if name in self._workers:
            self.lanes[self._workers[name]].peer_down(reason)

    @handles(GroupLost)
    def _group_lost(self, message: GroupLost, call: object) -> None:
        """This chip died too often: nothing waits for it any more."""
        worker = self._workers.get(message.child)
        if worker is not None:
            error = DeviceUnusable(f"{self.where(worker)} died too often and stays down: {message.text}")
            first = self.lanes[worker].first_cause
            self._give_up(worker, error if first is None else error.caused_by(first))
        super()._group_lost(message, call)

    def is_fatal(self, lost: GroupLost) -> bool:
        """As long as one chip is left, programs can run on it."""
        return len(self._given_up) == len(self.lanes)

    def where(self, worker: int) -> str:
        """How errors call a chip: its number and its device."""
        return f"worker {worker} ({self.settings.devices[worker]})"

    def _relay(self, name: str, progress: Progress) -> None:
        if self.events is not None:
            self.events.on_progress(attrs.evolve(progress, phase=f"{name} {progress.phase}"))

    def _lost(self, worker: int, error: ChipbusError) -> None:
        self._book.lose(worker, error)
        self.dispatch()

    def _refused(self, worker: int, error: ChipbusError) -> None:
        """It takes no work without its programs. Who waits for it hears its own words, later work that it is down."""
        error = self._blamed(worker, error)
        unusable = DeviceUnusable(f"{self.where(worker)} refused a program it must have").caused_by(error)
        self._given_up.setdefault(worker, unusable)
        self._ready(worker, error)

    def _give_up(self, worker: int, error: ChipbusError) -> None:
        self._given_up[worker] = error
        self._ready(worker, error)

    def _ready(self, worker: int, error: ChipbusError | None) -> None:
        for waiting in self._when_ready.pop(worker, ()):
            waiting(error)
        self.dispatch()

    def when_ready(self, worker: int, then: Callable[[ChipbusError | None], None]) -> None:
        """Call ``then`` once the chip takes work: at once, or when it is back; with the reason if it never will be."""
        error = self._failed or self._given_up.get(worker)
        if error is not None or self.lanes[worker].is_ready:
            then(error)
        else:
            self._when_ready.setdefault(worker, []).append(then)

    def command(self, worker: int, message: object, on_reply: OnAnswer, on_error: OnError) -> None:
        """Ask a chip for a command as soon as it takes work."""

        def go(error: ChipbusError | None) -> None:
            if error is not None:
                on_error(error)
            else:
                self.lanes[worker].command(message, on_reply, lambda error: on_error(self._blamed(worker, error)))

        self.when_ready(worker, go)

    def _blamed(self, worker: int, error: ChipbusError) -> ChipbusError:
        return placed(self.where(worker), error)

    # Programs: on all chips, or on none.

    def register(self, program: Program, on_done: Callable[[ChipbusError | None], None]) -> None:
        """Register on every chip; if one refuses, it is taken back from the others."""
        accepted: list[int] = []
        refused: list[ChipbusError] = []

        def ended(worker: int, error: ChipbusError | None) -> None:
            (accepted.append(worker) if error is None else refused.append(error))
            if len(accepted) + len(refused) < len(self.lanes):
                return
            if not refused:
                self.programs = {**self.programs, program.digest: program}
                on_done(None)
                return
            for other in accepted:
                self.lanes[other].command(UnregisterProgram(program.digest), _ignore, _ignore)
            on_done(refused[0])

        for worker in range(len(self.lanes)):
            self.command(worker, RegisterProgram(program), lambda _, w=worker: ended(w, None), partial(ended, worker))  # type: ignore[misc]

    def unregister(self, digest: bytes, on_done: Callable[[ChipbusError | None], None]) -> None:
        """Forget a program on every chip."""
        self.programs = {other: program for other, program in self.programs.items() if other != digest}
        missing = len(self.lanes)

        def ended(_: object) -> None:
            nonlocal missing
            missing -= 1
            if not missing:
                on_done(None)

        for lane in self.lanes:  # a chip that is down is not told again
            lane.command(UnregisterProgram(digest), ended, ended)

    # Tensors.

    def alloc(
        self, tensor: DeviceTensor, spec: TensorSpec, value: Arg | None, on_reply: OnAnswer, on_error: OnError
    ) -> None:
        """Allocate a tensor, with a first value if there is one: both in order, one after the other."""

        def filled(_: object) -> None:
            self._book.opened(tensor)
            on_reply(None)

        def refused(error: ChipbusError) -> None:
            self.lanes[tensor.worker_id].command(FreeTensor(tensor.address), _ignore, _ignore)
            on_error(error)

        def allocated(reply: object) -> None:
            if value is None:
                filled(reply)
            else:
                self.command(tensor.worker_id, CopyTo(tensor.address, value), filled, refused)

        self.command(tensor.worker_id, AllocTensor(spec), allocated, on_error)

    def alloc_deferred(self, run: Run, tensor: DeviceTensor) -> None:
        """Allocate a tensor of an orchestration, ahead of its launches. Book and ``run.commands`` know it already."""

        def failed(error: ChipbusError) -> None:
            with run.lock:
                self._note(run, error)
            self._book.discard(tensor)
            self._command_ended(run)

        spec = TensorSpec(tensor.address, tensor.dtype, tensor.shape)
        self.command(tensor.worker_id, AllocTensor(spec), lambda _: self._command_ended(run), failed)

    def free_quietly(self, tensor: DeviceTensor, then: OnAnswer) -> None:
        """Free a tensor of a worker that is being closed; its chip may be gone."""
        self.lanes[tensor.worker_id].command(FreeTensor(tensor.address), then, then)

    def _command_ended(self, run: Run) -> None:
        with run.lock:
            run.commands = max(0, run.commands - 1)
        self._settle(run)
        self.dispatch()

    # Runs.

    def advance(self, run: Run) -> None:
        """Something was submitted, or the run was sealed or aborted."""
        with run.lock:
            if self._failed is not None:
                run.abort(self._failed)
            self._collect(run)
            if run.abort_cause is not None:
                self._drop(run, run.aborted(), sent_too=False)
        self._settle(run)
        self.dispatch()

    def _drop(self, run: Run, error: ChipbusError, *, sent_too: bool) -> None:
        """What is not running of an aborted run, or ``sent_too``: all of it, ends with ``error``. The lock is held."""
        for task in run.tasks:
            if not task.is_over and (sent_too or not task.is_sent):
                self._fail(run, task, error)
                self._collect(run)  # those that depend on it are over now
        run.ready.clear()
        run.groups.clear()
        run.subs.clear()

    def fail_all(self, error: ChipbusError) -> None:
        """See ``TreeActor.fail_all``: no chip answers any more."""
        self._failed = self._failed or error
        for worker in list(self._when_ready):
            self._ready(worker, error)
        for run in self.runs:
            with run.lock:
                run.abort(error)
                self._collect(run)
                self._drop(run, error, sent_too=True)
                run.in_flight.clear()
                run.commands = 0
                run.progress.set()
            self._settle(run)
        self._on_failed(error)

    def _collect(self, run: Run) -> None:
        """Take from the run's engine what became ready or failed, and queue it. The run's lock is held."""
        engine = run.engine
        while True:
            for number in engine.take_failed():
                task = run.by_id[number]
                if not task.is_over:
                    error = engine.error(number)
                    assert isinstance(error, ChipbusError)
                    task.error = error
                    self._note(run, error)
                    self._over(run, task)
            ready = engine.take_ready()
            if not ready:
                return
            for number in ready:
                self._queue(run, run.by_id[number])

    def _queue(self, run: Run, task: Task) -> None:
        if task.is_sent:
            return  # it rides with the launch that made it ready
        if task.kind is TaskKind.CHIP:
            run.ready.setdefault(task.members[0].worker, []).append(task)
        elif task.kind is TaskKind.GROUP:
            run.groups.append(task)
        elif task.kind is TaskKind.SUB:
            run.subs.extend((task, index) for index in range(len(task.members)))
        else:
            self._member_ended(run, task, 0, None)

    def _settle(self, run: Run) -> None:
        """End the run if nothing of it is left."""
        with run.lock:
            if run.done.is_set() or not run.is_sealed or run.commands or not run.engine.is_drained:
                return
            if self.ctx.ledger is not None:
                self.ctx.ledger.append(
                    "run",
                    {"run": run.number, "name": run.name, "tasks": len(run.tasks), "error": str(run.error or "")},
                )
        self._on_finished(run)

    # What starts.

    def dispatch(self) -> None:
        """Start whatever may start now."""
        earlier: list[Run] = []
        reserved: frozenset[int] = frozenset()
        for run in self.runs:
            if run.done.is_set():
                continue
            gate = Gate(earlier) if earlier else OPEN
            if gate.is_shut:
                return
            with run.lock:
                if gate.is_open:
                    reserved |= self._start_groups(run, reserved)
                    self._start_subs(run)
                for worker in list(run.ready):
                    if worker not in reserved and gate.lets(worker):
                        self._launch_ready(run, worker, gate)
            self._settle(run)
            if not run.done.is_set():
                earlier.append(run)

    def _launch_ready(self, run: Run, worker: int, gate: Gate) -> None:
        lane = self.lanes[worker]
        unusable = self._failed or self._given_up.get(worker)
        while run.ready.get(worker):
            if unusable is not None:
                for task in run.ready.pop(worker):
                    self._fail(run, task, self._of_task(run, task, worker, unusable))
                self._collect(run)
            elif not lane.has_credit:
                return
            else:
                batch, after = self._batch(run, worker, gate)
                if not batch:
                    return
                self._send(run, worker, [(task, 0) for task in batch], after)

    def _batch(self, run: Run, worker: int, gate: Gate) -> tuple[list[Task], list[tuple[int, ...]]]:
        """Ready tasks of one chip in order of submission, and those that wait only for them; who waits for whom."""
        heap = [task.number for task in run.ready.pop(worker)]
        heapq.heapify(heap)
        is_ready = set(heap)
        batch: list[Task] = []
        after: list[tuple[int, ...]] = []
        at: dict[int, int] = {}
        later: list[Task] = []
        while heap:
            task = run.tasks[heapq.heappop(heap)]
            bound = task.members[0].bound
            assert bound is not None
            if task.number in is_ready:
                # Uploads come before the message, so only the first task of one may bring some.
                if len(batch) == MAX_BATCH or (batch and bound.uploads) or not gate.admits(bound):
                    later.append(task)
                    continue
                lost = next((error for t in bound.residents if (error := self._lost_cause(t))), None)
                if lost is not None:
                    self._fail(run, task, self._of_task(run, task, worker, lost))
                    self._collect(run)
                    continue
            at[task.id] = len(batch)
            batch.append(task)
            after.append(tuple(at[before] for before in task.before if before in at))
            if len(batch) < MAX_BATCH:
                for number in run.engine.successors(task.id):
                    rider = run.by_id[number]
                    if rider.number not in is_ready and self._may_ride(run, rider, worker, at, gate):
                        heapq.heappush(heap, rider.number)
        if later:
            run.ready.setdefault(worker, []).extend(later)
        return batch, after

    def _lost_cause(self, tensor: DeviceTensor) -> ChipbusError | None:
        cause = self._book.lost(tensor)
        if cause is None:
            return None
        return DeviceUnusable(f"{tensor} was lost when its chip worker ended").caused_by(cause)

    def _may_ride(self, run: Run, task: Task, worker: int, at: dict[int, int], gate: Gate) -> bool:
        """Whether a task that is not ready may go in the message of those it waits for."""
        if task.is_sent or task.kind is not TaskKind.CHIP or task.members[0].worker != worker:
            return False
        bound = task.members[0].bound
        assert bound is not None
        if bound.uploads or not gate.admits(bound):
            return False
        for number in task.before:
            if number in at:
                other = run.by_id[number].members[0].bound
                if bound.reads_host and other is not None and other.outputs:
                    return False  # its arguments may be values that are not there yet
            elif not run.by_id[number].is_over:
                return False
        return not any(self._book.lost(tensor) for tensor in bound.residents)

    def _start_groups(self, run: Run, reserved: frozenset[int]) -> frozenset[int]:
        """Start groups in order, each on all its chips at once; the chips of the first that cannot start."""
        while run.groups:
            task = run.groups[0]
            workers = [member.worker for member in task.members]
            unusable = [(w, e) for w in workers if (e := self._failed or self._given_up.get(w)) is not None]
            lost = [(m.worker, e) for m in task.members for t in _bound(m).residents if (e := self._lost_cause(t))]
            if unusable or lost:
                run.groups.popleft()
                self._fail(run, task, self._of_task(run, task, *(unusable + lost)[0]))
                self._collect(run)
            elif reserved.isdisjoint(workers) and all(self.lanes[worker].has_credit for worker in workers):
                run.groups.popleft()
                self._group = None
                for index, worker in enumerate(workers):
                    self._send(run, worker, [(task, index)], ())
            else:
                self._watch_group(task)
                return frozenset(workers)
        return frozenset()

    def _watch_group(self, task: Task) -> None:
        if self._group is task:
            return
        self._group = task

        def warn() -> None:
            if self._group is task:
                workers = [member.worker for member in task.members]
                busy = [self.where(worker) for worker in workers if not self.lanes[worker].has_credit]
                self.ctx.log.warning("group.stalled", group=task.label, waits_for=busy, seconds=STALL_S)

        self.ctx.after(STALL_S, warn)

    def _start_subs(self, run: Run) -> None:
        while run.subs and self.subs.has_room:
            task, index = run.subs.popleft()
            if not task.is_over:
                self._start_sub(run, task, index)

    def _start_sub(self, run: Run, task: Task, index: int) -> None:
        self._sent(run, task)
        run.in_flight[SUB] += 1
        call = task.members[index].call
        assert call is not None

        def ended(error: BaseException | None) -> None:
            timer.cancel()
            if error is None:
                finish(Completion(dispatch_id=0))
            elif isinstance(error, ChipbusError):
                finish(error)
            else:
                failure = CoreException(f"{type(error).__name__}: {error}")
                failure.__cause__ = error
                finish(failure)

        def expired() -> None:
            give_up()
            finish(SchedulerTimeout(f"the host callable did not end within {self.settings.run_timeout_s:g} s"))

        def finish(outcome: Outcome) -> None:
            self._ended(run, SUB, [(task, index)], [outcome])

        give_up = self.subs.submit(call, ended)
        timer = self.ctx.after(self.settings.run_timeout_s, expired)

    def _send(self, run: Run, worker: int, batch: Sequence[tuple[Task, int]], after: Sequence[tuple[int, ...]]) -> None:
        """One message: uploads before it, downloads behind it, all in order on the chip."""
        lane = self.lanes[worker]
        if run.trace_id is None:
            run.trace_id = self.ctx.random.randbytes(16)
        dispatches = []
        downloads: dict[int, tuple[DeviceTensor, Any, list[Task]]] = {}
        for task, index in batch:
            bound = _bound(task.members[index])
            for tensor, array in bound.uploads:
                self._copy(run, worker, CopyTo(tensor.address, Arg.of(array, tensor.dtype)), _ignore)
            for tensor, array in bound.downloads:
                downloads.setdefault(tensor.address, (tensor, array, []))[2].append(task)
            self._sent(run, task)
            self._dispatches += 1
            assert task.program is not None
            args = tuple(
                [
                    arg if isinstance(arg, Arg) else Arg.of(arg, param.dtype)
                    for arg, param in zip(bound.args, task.program.params, strict=True)
                ]
            )
            dispatches.append(
                Dispatch(
                    dispatch_id=self._dispatches,
                    step_id=run.number,
                    program=task.program.digest,
                    args=args,
                    config=task.config,
                )
            )
        run.in_flight[worker] += len(batch)
        lane.launch(dispatches, after, partial(self._ended, run, worker, batch), run.trace_id)
        for tensor, array, writers in downloads.values():
            self._copy(run, worker, CopyFrom(tensor.address), partial(store, array, writers))

    def _copy(self, run: Run, worker: int, message: object, on_reply: Callable[[Any], ChipbusError | None]) -> None:
        run.commands += 1  # the run's lock is held

        def replied(reply: object) -> None:
            error = on_reply(reply)
            if error is not None:
                failed(error)
            else:
                self._command_ended(run)

        def failed(error: ChipbusError) -> None:
            with run.lock:
                self._note(run, placed(f"run {run.number}, copy on {self.where(worker)}", error))
            self._command_ended(run)

        self.lanes[worker].command(message, replied, failed)

    def _sent(self, run: Run, task: Task) -> None:
        """It is on its way. A rider is started in its engine only when its turn has come, that is, at its end."""
        if not task.is_sent:
            task.is_sent = True
            task.sent_ns = self.ctx.clock.now_ns()
            run.unsent -= 1

    # What ends.

    def _ended(self, run: Run, worker: int, batch: Sequence[tuple[Task, int]], outcomes: Sequence[Outcome]) -> None:
        now_ns = self.ctx.clock.now_ns()
        with run.lock:
            run.in_flight[worker] -= len(batch)
            at_ns = max(batch[0][0].sent_ns, self._free_ns.get(worker, 0))
            for (task, index), outcome in zip(batch, outcomes, strict=True):
                if task.is_over:
                    continue  # what it waited for failed, or the run was given up
                # One message says when all of it had ended; the chip's own times say how it went on before.
                task.began_ns, task.ended_ns = task.began_ns or at_ns, now_ns
                if isinstance(outcome, Completion):
                    if worker != SUB:
                        at_ns = min(now_ns, at_ns + outcome.device_ns)
                        task.ended_ns = max(task.began_ns, at_ns)
                    outcome = fill(task.members[index].bound, outcome)
                if isinstance(outcome, Completion):
                    task.completions.append((worker, outcome))
                    self._member_ended(run, task, index, None)
                else:
                    self._member_ended(run, task, index, self._of_task(run, task, worker, outcome))
                    self._collect(run)  # those behind it in this message that depend on it are over now
            self._collect(run)
            run.progress.set()
        if worker != SUB:
            self._free_ns[worker] = at_ns
        self._settle(run)
        self.dispatch()

    def _fail(self, run: Run, task: Task, error: ChipbusError) -> None:
        """A task failed as a whole. The lock is held; ``_collect`` follows, for those that depend on it."""
        self._note(run, error)
        task.error = task.error or error
        for index in task.open_members.copy() if task.is_started else (0,):
            run.engine.fail(task.id, error, index)
        task.open_members.clear()
        self._over(run, task)

    def _member_ended(self, run: Run, task: Task, index: int, error: ChipbusError | None) -> None:
        """One launch of a task ended. A rider starts only now, when what it waited for has ended."""
        if not task.is_started:
            task.is_started = True
            run.engine.start(task.id)
        task.open_members.discard(index)
        if error is None:
            run.engine.complete(task.id, index)
        else:
            self._note(run, error)
            task.error = task.error or error
            run.engine.fail(task.id, error, index)
        if not task.open_members:
            self._over(run, task)

    def _over(self, run: Run, task: Task) -> None:
        self._sent(run, task)
        task.is_over = True
        task.ended_ns = task.ended_ns or self.ctx.clock.now_ns()
        if task.over is not None:
            task.over.set()

    def _note(self, run: Run, error: ChipbusError) -> None:
        if len(run.errors) < MAX_ERRORS:
            run.errors.append(error)

    def _of_task(self, run: Run, task: Task, worker: int, error: ChipbusError) -> ChipbusError:
        """The error with the place it happened at: run, task, program or callable, chip."""
        place = "a sub worker" if worker == SUB else self.where(worker)
        return placed(f"run {run.number}, task {task.number} ({task.label}) on {place}", error)


def _bound(member: Member) -> BoundArgs:
    assert member.bound is not None
    return member.bound


def _ignore(_: object) -> None:
    pass
