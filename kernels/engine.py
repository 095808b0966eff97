"""The task graph engine, one for chips and hosts: which task may run when, and what a failure takes with it.

Owns: the tasks, edges, scopes and ring accounts of one run. A pure state machine: no threads, no clock, no memory, no
torch; whoever drives it executes what it says is ready, and guards it with one lock where several threads do.

    submit ─▶ BUILDING ─▶ PENDING ─▶ READY ─start─▶ RUNNING ─complete─▶ COMPLETED ─▶ CONSUMED ─▶ FREE
                             └─a producer failed─────────┴────fail────▶ FAILED ──────────┘
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Hashable, Iterable, Sequence

import attrs

from ..errors import (
    DepPoolOverflow,
    FlowControlDeadlock,
    HeapRingDeadlock,
    InvalidArgs,
    ScopeDeadlock,
    TaskAborted,
    TensorMapOverflow,
)
from ..topology.rings import RINGS, RingSizes, RingUse
from .rings import HeapBlock, HeapRing, RingFull, RingMark, ScopeRecord
from .tags import Tag
from .tensor_map import ByteRange, TensorMap

__all__ = ["INLINE_FAN_IN", "MAX_SCOPE_DEPTH", "Access", "HeapBlock", "RingFull", "TaskEngine", "TaskId", "TaskState"]

TaskId = int
"""``(ring << 32) | number of the task on its ring``. Never used again within a run."""

INLINE_FAN_IN = 64
"""Dependencies a task slot has room for; only further ones take entries of the dependency pool."""

MAX_SCOPE_DEPTH = 64
"""The run itself is the scope of depth 0."""

_MAX_ERRORS = 64
_MAX_SCOPE_RECORDS = 4_096


class TaskState(enum.Enum):
    """Where a task is. FREE also stands for a task whose slot has been taken back, and for one that never was."""

    FREE = "free"
    BUILDING = "building"
    PENDING = "pending"
    READY = "ready"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CONSUMED = "consumed"


_BUILDING, _PENDING, _READY = TaskState.BUILDING, TaskState.PENDING, TaskState.READY
_RUNNING, _CONSUMED = TaskState.RUNNING, TaskState.CONSUMED
_INPUT, _INOUT, _NO_DEP = Tag.INPUT, Tag.INOUT, Tag.NO_DEP


@attrs.frozen
class Access:
    """What a task does to some bytes: disjoint ranges ``[begin, end)`` of one address space.

    ``space`` is whatever names the memory, a ``HeapBlock`` for memory of a scope.
    """

    tag: Tag
    space: Hashable
    ranges: tuple[ByteRange, ...]


class _Task:
    """The slot of one task."""

    __slots__ = (
        "blocks",
        "deps_begin",
        "error",
        "has_ended",
        "id",
        "label",
        "members",
        "needs",
        "producers",
        "references",
        "scope",
        "state",
        "successors",
        "waits",
    )

    def __init__(self, task: TaskId, scope: _Scope, label: str, producers: tuple[TaskId, ...], deps_begin: int) -> None:
        self.id = task
        self.scope = scope
        self.label = label
        self.producers = producers  # all of them, also those that had ended before
        self.deps_begin = deps_begin  # dependency entries its ring had ever given out before
        self.state = _BUILDING
        self.has_ended = False
        self.error: BaseException | None = None
        self.waits = 0  # producers that have not ended
        self.needs: Sequence[_Task] = ()  # producers that it holds a reference on, until it ends
        self.successors: list[_Task] = []
        self.references = 1  # its scope, and successors that have not ended
        self.members: set[int] | None = None  # of a group: members that have not ended
        self.blocks: Sequence[HeapBlock] = ()


class _Ring:
    """One ring: its tasks in order of submission, and its accounts."""

    __slots__ = ("capacity", "deps_given", "deps_taken", "heap", "index", "most", "most_deps", "pool", "taken", "tasks")

    def __init__(self, index: int, sizes: RingSizes) -> None:
        self.index = index
        self.capacity = sizes.task_window[index] - 1
        self.pool = sizes.dep_pool[index]
        self.heap = HeapRing(index, sizes.heap[index])
        self.tasks: deque[_Task] = deque()
        self.taken = 0  # tasks there have been
        self.most = 0
        self.deps_taken = 0
        self.deps_given = 0
        self.most_deps = 0

    def mark(self) -> RingMark:
        given = self.taken - len(self.tasks)
        return RingMark(self.taken, given, self.heap.allocated, self.heap.freed, self.deps_taken, self.deps_given)

    def use(self) -> RingUse:
        return RingUse(
            tasks=self.most,
            heap_bytes=self.heap.most,
            heap_largest=self.heap.largest,
            heap_allocated=self.heap.allocated,
            dep_entries=self.most_deps,
        )


class _Scope:
    """One scope: what it must let go of when it closes."""

    __slots__ = ("blocks", "is_manual", "is_open", "record", "ring", "tasks")

    def __init__(self, ring: _Ring, record: ScopeRecord, *, is_manual: bool) -> None:
        self.ring = ring
        self.record = record
        self.is_manual = is_manual
        self.is_open = True
        self.tasks: list[_Task] = []
        self.blocks: list[HeapBlock] = []


class TaskEngine:
    """One run: submit tasks in program order, execute what ``take_ready`` names, say how it ended.

    ``submit`` and ``alloc`` raise ``RingFull`` when running tasks must end first (call again then), and a
    ``NumberedError`` when that could never help. After either nothing has changed.
    """

    def __init__(self, sizes: RingSizes, *, track_war: bool = False, max_map_entries: int = 65_536) -> None:
        self.sizes = sizes
        self.errors: list[BaseException] = []
        """What tasks failed with, the first 64, without those that were not run for it."""
        self.submitted = 0
        self.completed = 0
        self.failed = 0
        """Tasks that failed, those that were not run for it included."""
        self.consumed = 0
        self._track_war = track_war
        self._max_map_entries = max_map_entries
        self._map = TensorMap(track_readers=track_war)
        self._rings = [_Ring(index, sizes) for index in range(RINGS)]
        self._tasks: dict[TaskId, _Task] = {}
        self._ready: list[TaskId] = []
        self._aborted: list[TaskId] = []
        self._errors_of: dict[TaskId, tuple[BaseException, BaseException]] = {}  # its own error, the first cause
        self._records: deque[ScopeRecord] = deque(maxlen=_MAX_SCOPE_RECORDS)
        self._scopes: list[_Scope] = []
        self._is_finished = False
        self._open(is_manual=False)

    # Building the graph

    def open_scope(self, *, manual: bool = False) -> None:
        """Tasks and memory from now on belong to a new scope, on ring ``min(depth, 3)``.

        In a ``manual`` scope only ``after`` makes edges: the tensor map is neither asked nor told.
        """
        self._check_unfinished("open a scope")
        if len(self._scopes) > MAX_SCOPE_DEPTH:
            raise InvalidArgs(f"a scope of depth {len(self._scopes)} is opened; scopes nest {MAX_SCOPE_DEPTH} deep")
        self._open(is_manual=manual)

    def close_scope(self) -> None:
        """End the innermost scope; never waits. Its memory is free when the tasks that use it have ended."""
        if len(self._scopes) < 2:
            raise InvalidArgs("close_scope without open_scope; the run's own scope ends with finish")
        self._close()

    def alloc(self, nbytes: int) -> HeapBlock:
        """Memory of the innermost scope, starting at a multiple of 1,024. Raises ``RingFull``, or code 2."""
        self._check_unfinished("allocate memory")
        if nbytes < 0:
            raise InvalidArgs(f"a block of {nbytes} bytes is asked for; sizes are at least 0")
        scope = self._scopes[-1]
        heap = scope.ring.heap
        block = heap.allocate(nbytes)
        if block is None:
            held = next((open_scope.blocks[0] for open_scope in self._open_on(scope.ring) if open_scope.blocks), None)
            if heap.would_fit(nbytes, held):
                raise RingFull(scope.ring.index, "heap", heap.occupancy, heap.capacity, "ring_heap")
            raise HeapRingDeadlock(
                f"ring {scope.ring.index}: the heap holds {heap.occupancy:,} of {heap.capacity:,} bytes,"
                f" {heap.held_since(held):,} of them until scopes end that are still open,"
                f" and a block of {nbytes:,} bytes is asked for; parameter ring_heap"
            )
        scope.blocks.append(block)
        return block

    def submit(
        self, accesses: Iterable[Access], *, after: Iterable[TaskId] = (), members: int = 1, label: str = ""
    ) -> TaskId:
        """Add a task that depends on ``after`` and on what the tags of its accesses say.

        ``members`` above 1: a group, one task that has ended when each member has. A task with a failed producer never
        becomes READY: ``take_failed`` names it. Raises ``RingFull``, or codes 1, 3, 4, 5 and 11.
        """
        self._check_unfinished("submit a task")
        scope = self._scopes[-1]
        ring = scope.ring
        if len(ring.tasks) >= ring.capacity:
            self._refuse_slot(scope)
        if members < 1:
            raise InvalidArgs(f"task {label!r} has {members} members; a group has at least 1")
        task_id = (ring.index << 32) | ring.taken

        found: dict[TaskId, None] = {}
        for producer in after:
            if producer not in self._tasks:
                self._check_known(producer, label)
            found[producer] = None
        blocks: list[HeapBlock] = []
        reads: list[Access] = []
        writes: list[Access] = []
        for access in accesses:
            space, tag = access.space, access.tag
            if type(space) is HeapBlock:
                if not space.is_open:
                    raise InvalidArgs(f"task {label!r} works on memory whose scope has ended: {space}")
                blocks.append(space)
            if tag is _NO_DEP or scope.is_manual:
                continue
            if tag is _INPUT or tag is _INOUT:
                self._map.find_writers(space, access.ranges, found)
                reads.append(access)
            if tag is not _INPUT:
                if self._track_war:
                    self._map.find_readers(space, access.ranges, found)
                writes.append(access)

        deps = len(found) - INLINE_FAN_IN
        if deps > 0 and deps > ring.pool - (ring.deps_taken - ring.deps_given):
            self._refuse_deps(scope, deps, label)
        self._tell_map(task_id, reads, writes, label)

        # From here on nothing can go wrong, and the task shows itself only when all its edges are there.
        task = _Task(task_id, scope, label, tuple(found), ring.deps_taken)
        if members > 1:
            task.members = set(range(members))
        ring.taken += 1
        if deps > 0:
            ring.deps_taken += deps
            ring.most_deps = max(ring.most_deps, ring.deps_taken - ring.deps_given)
        ring.tasks.append(task)
        if len(ring.tasks) > ring.most:
            ring.most = len(ring.tasks)
        scope.tasks.append(task)
        self.submitted += 1
        tasks = self._tasks
        tasks[task_id] = task
        if self._errors_of:
            for identity in found:
                if identity in self._errors_of:
                    self._abort(task, identity)
                    return task_id
        if found:
            needs = []
            for identity in found:
                producer_task = tasks.get(identity)
                if producer_task is not None and not producer_task.has_ended:
                    producer_task.successors.append(task)
                    producer_task.references += 1
                    needs.append(producer_task)
            task.needs = needs
            task.waits = len(needs)
        if blocks:
            task.blocks = blocks
            for block in blocks:
                block.users += 1
        if task.waits:
            task.state = _PENDING
        else:
            task.state = _READY
            self._ready.append(task_id)
        return task_id

    def finish(self) -> None:
        """There will be no more tasks: closes all scopes. May be called again."""
        while self._scopes:
            self._close()
        self._is_finished = True

    # Executing it

    def take_ready(self) -> list[TaskId]:
        """The tasks that became READY since the last call, first come first."""
        ready, self._ready = self._ready, []
        return ready

    def take_failed(self) -> list[TaskId]:
        """The tasks that became FAILED since the last call because one they depend on did; ``error`` says of what."""
        aborted, self._aborted = self._aborted, []
        return aborted

    def start(self, task: TaskId) -> None:
        """A READY task is RUNNING."""
        slot = self._tasks[task]
        assert slot.state is _READY, f"task {task} is started, but it is {slot.state.value}"
        slot.state = _RUNNING

    def complete(self, task: TaskId, member: int = 0) -> None:
        """A RUNNING task, or one member of it, has ended well."""
        slot = self._tasks[task]
        assert slot.state is _RUNNING, f"task {task} is completed, but it is {slot.state.value}"
        if slot.members is not None:
            slot.members.remove(member)
            if slot.members:
                return
            if slot.error is not None:
                self._fail(slot, slot.error)
                return
        self.completed += 1
        slot.state = TaskState.COMPLETED
        self._end(slot)

    def fail(self, task: TaskId, error: BaseException, member: int = 0) -> None:
        """A RUNNING task, or one member of it, has failed: what depends on it will not run.

        A group has failed when all its members have ended, with the error of the first that failed. A task that is not
        RUNNING yet can fail, too: as a whole, and it will not run.
        """
        slot = self._tasks[task]
        assert not slot.has_ended, f"task {task} fails, but it is {slot.state.value}"
        if slot.state is _RUNNING and slot.members is not None:
            slot.members.remove(member)
            if slot.error is None:
                slot.error = error
            if slot.members:
                return
            error = slot.error
        elif slot.state is _READY and task in self._ready:
            self._ready.remove(task)
        self._fail(slot, error)

    # Looking at it

    @property
    def first_error(self) -> BaseException | None:
        """What the first task to fail failed with."""
        return self.errors[0] if self.errors else None

    @property
    def is_drained(self) -> bool:
        """Whether there will be no more tasks and every task's slot has been taken back."""
        return self._is_finished and not self._tasks

    def state(self, task: TaskId) -> TaskState:
        """Where the task is."""
        slot = self._tasks.get(task)
        return TaskState.FREE if slot is None else slot.state

    def error(self, task: TaskId) -> BaseException | None:
        """What the task failed with: for one that was not run a ``TaskAborted`` that names the first cause."""
        return self._errors_of[task][0] if task in self._errors_of else None

    def label(self, task: TaskId) -> str:
        """What ``submit`` was told; empty for a task that is FREE."""
        return self._tasks[task].label if task in self._tasks else ""

    def predecessors(self, task: TaskId) -> tuple[TaskId, ...]:
        """Every task it depends on, also those that had ended when it was submitted; empty for a task that is FREE."""
        return self._tasks[task].producers if task in self._tasks else ()

    def successors(self, task: TaskId) -> tuple[TaskId, ...]:
        """The tasks that had to wait for it; empty for a task that is FREE."""
        return tuple(slot.id for slot in self._tasks[task].successors) if task in self._tasks else ()

    def high_water(self) -> tuple[RingUse, ...]:
        """The most each ring has held at once."""
        return tuple(ring.use() for ring in self._rings)

    def occupancy(self) -> tuple[RingUse, ...]:
        """What each ring holds now."""
        return tuple(
            RingUse(
                tasks=len(ring.tasks),
                heap_bytes=ring.heap.occupancy,
                dep_entries=ring.deps_taken - ring.deps_given,
            )
            for ring in self._rings
        )

    @property
    def scopes(self) -> tuple[ScopeRecord, ...]:
        """The last 4,096 scopes in order of opening, the run's own among them; kept after a failure, too."""
        return tuple(self._records)

    # Scopes

    def _open(self, *, is_manual: bool) -> None:
        depth = len(self._scopes)
        ring = self._rings[min(depth, RINGS - 1)]
        record = ScopeRecord(depth, ring.index, ring.mark())
        self._records.append(record)
        self._scopes.append(_Scope(ring, record, is_manual=is_manual))

    def _close(self) -> None:
        scope = self._scopes.pop()
        scope.is_open = False
        for block in scope.blocks:
            block.is_open = False
            self._map.forget(block)
        scope.ring.heap.reclaim()
        for task in scope.tasks:
            task.references -= 1
            if not task.references and task.has_ended:
                self._consume(task)
        scope.record.end = scope.ring.mark()
        scope.tasks.clear()
        scope.blocks.clear()

    def _open_on(self, ring: _Ring) -> list[_Scope]:
        """The open scopes of a ring, outermost first: so the first with a task has the oldest that is held."""
        if ring.index < RINGS - 1:
            return self._scopes[ring.index : ring.index + 1]
        return self._scopes[RINGS - 1 :]

    # Refusals: what a ring holds for open scopes only the caller could free, and it is waiting here

    def _refuse_slot(self, scope: _Scope) -> None:
        ring = scope.ring
        oldest = ring.tasks[0]
        if not oldest.scope.is_open:  # it ends in any case, since tasks wait only for older ones
            raise RingFull(ring.index, "task window", len(ring.tasks), ring.capacity, "ring_task_window")
        where = f"ring {ring.index}: the task window holds {len(ring.tasks):,} of {ring.capacity:,} tasks"
        if oldest.scope is scope:
            raise ScopeDeadlock(
                f"{where}, and the oldest belongs to the scope that submits one more; parameter ring_task_window"
            )
        raise FlowControlDeadlock(
            f"{where}, and the oldest belongs to an enclosing scope, of depth {oldest.scope.record.depth}, while one of"
            f" depth {scope.record.depth} submits one more; parameter ring_task_window"
        )

    def _refuse_deps(self, scope: _Scope, deps: int, label: str) -> None:
        ring = scope.ring
        occupancy = ring.deps_taken - ring.deps_given
        oldest = next((open_scope.tasks[0] for open_scope in self._open_on(ring) if open_scope.tasks), None)
        held = ring.deps_taken - oldest.deps_begin if oldest else 0
        if deps + held <= ring.pool:
            raise RingFull(ring.index, "dependency pool", occupancy, ring.pool, "ring_dep_pool")
        raise DepPoolOverflow(
            f"ring {ring.index}: the dependency pool holds {occupancy:,} of {ring.pool:,} entries, {held:,} of them"
            f" until scopes end that are still open, and task {label!r} with {deps + INLINE_FAN_IN:,} dependencies"
            f" needs {deps:,} more; parameter ring_dep_pool"
        )

    def _check_unfinished(self, what: str) -> None:
        if self._is_finished:
            raise InvalidArgs(f"{what}: the run takes no more tasks, finish was called")

    def _check_known(self, task: TaskId, label: str) -> None:
        ring, number = task >> 32, task & 0xFFFF_FFFF
        if not (0 <= ring < RINGS and number < self._rings[ring].taken):
            raise InvalidArgs(f"task {label!r} comes after task {task}, which this run does not have")

    def _tell_map(self, task: TaskId, reads: list[Access], writes: list[Access], label: str) -> None:
        tensor_map = self._map
        restore = None
        touched = reads + writes if self._track_war else writes
        # A byte range adds itself and cuts at most one other in two, among writers and among readers.
        if tensor_map.entries + 4 * sum(len(access.ranges) for access in touched) > self._max_map_entries:
            restore = tensor_map.save({access.space for access in touched})
        for access in writes:
            # INOUT is a reader itself, which later writers wait for; nobody waits for a writer that only overwrites.
            tensor_map.written(access.space, access.ranges, task, forget_readers=access.tag is _INOUT)
        if self._track_war:
            # After the writes: who overwrites what this task reads and writes must wait for its reading.
            for access in reads:
                tensor_map.read(access.space, access.ranges, task)
        if restore is not None and tensor_map.entries > self._max_map_entries:
            needed = tensor_map.entries
            restore()
            raise TensorMapOverflow(
                f"the tensor map holds {tensor_map.entries:,} of {self._max_map_entries:,} byte ranges,"
                f" and task {label!r} would make them {needed:,}"
            )

    # Ends

    def _end(self, task: _Task) -> None:
        """After a task completed or failed: wake who waits, and let go of what it held."""
        task.has_ended = True
        for successor in task.successors:
            successor.waits -= 1
            if not successor.waits and successor.state is _PENDING:
                successor.state = _READY
                self._ready.append(successor.id)
        for producer in task.needs:
            producer.references -= 1
            if not producer.references and producer.has_ended:
                self._consume(producer)
        task.needs = ()
        if task.blocks:
            for block in task.blocks:
                block.users -= 1
                if not block.users and not block.is_open:
                    self._rings[block.ring].heap.reclaim()
            task.blocks = ()
        if not task.references:
            self._consume(task)

    def _fail(self, task: _Task, error: BaseException) -> None:
        if len(self.errors) < _MAX_ERRORS:
            self.errors.append(error)
        self._errors_of[task.id] = (error, error)
        failures = deque([task])
        while failures:
            failure = failures.popleft()
            for successor in failure.successors:
                if successor.state is _PENDING:
                    failures.append(successor)
                    self._mark_aborted(successor, failure.id)
            failure.state = TaskState.FAILED
            self.failed += 1
            self._end(failure)

    def _abort(self, task: _Task, producer: TaskId) -> None:
        """A task that has not been published will not run."""
        self._mark_aborted(task, producer)
        self.failed += 1
        self._end(task)

    def _mark_aborted(self, task: _Task, producer: TaskId) -> None:
        first = self._errors_of[producer][1]
        text = f"task {task.id} {task.label!r} was not run: task {producer}, which it depends on, failed"
        self._errors_of[task.id] = (TaskAborted(text).caused_by(first), first)
        task.state = TaskState.FAILED
        self._aborted.append(task.id)

    def _consume(self, task: _Task) -> None:
        task.state = _CONSUMED
        self.consumed += 1
        ring = task.scope.ring
        tasks = ring.tasks
        while tasks and tasks[0].state is _CONSUMED:
            oldest = tasks.popleft()
            oldest.state = TaskState.FREE
            oldest.successors.clear()
            del self._tasks[oldest.id]
            ring.deps_given += max(0, len(oldest.producers) - INLINE_FAN_IN)
