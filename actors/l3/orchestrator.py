"""What an orchestration function holds: it submits tasks to chips and host callables, and never waits unless it must.

Owns: the scopes and heap memory of the run it builds. Thread: the one that called ``run`` or ``submit``.

    submit ──▶ check ──▶ engine (edges) ──▶ buffered ──flush──▶ bus thread ──▶ chips, host callables
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from ...errors import (
    ChipbusError,
    ExplicitFatal,
    InvalidArgs,
    SchedulerTimeout,
    SyncStartInvalid,
    TensorWaitTimeout,
    WrongArity,
)
from ...kernels.dispatch import LaunchConfig
from ...kernels.engine import Access, HeapBlock, RingFull
from ...kernels.program import Program
from ...kernels.tags import Tag
from .binding import HOST_SPACE, Binding, DeferredTensor, Tagged, host_access, host_range
from .latch import Latch
from .programs import check_call
from .runs import Member, Run, RunConfig, Task, TaskKind, Wait
from .tensors import DeviceTensor, StackedTensor, TensorBook, check_array, check_dtype, check_shape, host_dtype

__all__ = ["FLUSH_TASKS", "Orchestrator", "Site"]

FLUSH_TASKS = 64
"""Submits are handed to the chips in lots of this size, unless the function ends or waits before."""

FULL_WAIT_S = 1.0  # until a full ring is looked at again without a sign of progress
T = TypeVar("T")


class Site(Protocol):
    """Where an orchestration runs: its worker, as far as it needs to know it."""

    @property
    def num_workers(self) -> int: ...

    @property
    def book(self) -> TensorBook: ...

    @property
    def wait(self) -> Wait: ...

    @property
    def run_timeout_s(self) -> float: ...

    def binding(self, program: object) -> Binding:
        """A registered program, ready to be bound; ``UnknownProgram``."""
        ...

    def sub(self, call: object) -> tuple[str, Callable[..., object]]:
        """A host callable and what it is called; by name, if it was given to the worker under one."""
        ...

    def launch_config(self, config: RunConfig) -> LaunchConfig | None: ...

    def advance(self, run: Run) -> None:
        """Have the bus thread look at what was submitted."""
        ...

    def allocate(self, run: Run, tensor: DeviceTensor, name: str) -> None:
        """Have a chip allocate a tensor, ahead of all launches that are submitted from now on."""
        ...


class Orchestrator:
    """Submits the tasks of one run. Passed to the orchestration function; of no use after it has returned."""

    def __init__(self, run: Run, site: Site) -> None:
        self._run = run
        self._site = site
        self._buffered = 0
        self._fatal: ExplicitFatal | None = None
        self._arenas: dict[int, NDArray[np.uint8]] = {}
        self._blocks: list[list[tuple[int, int, HeapBlock]]] = [[]]  # heap memory of the open scopes, by address

    # Tasks.

    def submit_next_level(
        self,
        program: object,
        *args: Any,
        worker: int,
        after: Sequence[int] = (),
        config: RunConfig | None = None,
    ) -> int:
        """Run a program on one chip. Its parameters' directions give the tags. Returns the task's id, for ``after``.

        args: resident, stacked or deferred tensors, numpy arrays (read when the program starts, written when it has
        ended), numbers for parameters without axes. Raises ``InvalidArgs`` and its kin here, at once.
        """
        if self._fatal is not None:
            return -1
        binding = self._site.binding(program)
        self._check_worker(worker)
        accesses: list[Access] = []
        member = Member(worker, binding.bind(args, worker, accesses))
        return self._submit(
            TaskKind.CHIP, binding.program.name, (member,), accesses, after, binding.program, self._config(config)
        )

    def submit_group(
        self,
        program: object,
        args: Sequence[Sequence[Any]],
        *,
        workers: Sequence[int],
        after: Sequence[int] = (),
        config: RunConfig | None = None,
    ) -> int:
        """Run a program on several chips as one task: all of them start, or none; it ends with the last one."""
        if self._fatal is not None:
            return -1
        binding = self._site.binding(program)
        name = binding.program.name
        if isinstance(workers, str | bytes) or not isinstance(workers, Sequence) or not isinstance(args, Sequence):
            raise WrongArity(f"group of {name}: args and workers are sequences, one entry for each member")
        if len(workers) > self._site.num_workers:
            raise SyncStartInvalid(
                f"group of {name}: {len(workers)} members are to start together on {self._site.num_workers} chips"
            )
        for worker in workers:
            self._check_worker(worker)
        if not workers or len(set(workers)) != len(workers):
            raise InvalidArgs(f"group of {name}: workers are {list(workers)}; expected at least one, all different")
        if len(args) != len(workers):
            raise WrongArity(f"group of {name}: {len(args)} lists of arguments for {len(workers)} workers")
        accesses: list[Access] = []
        members = tuple(
            Member(worker, binding.bind(given, worker, accesses)) for worker, given in zip(workers, args, strict=True)
        )
        return self._submit(TaskKind.GROUP, name, members, accesses, after, binding.program, self._config(config))

    def submit_sub(self, call: object, *args: Any, after: Sequence[int] = ()) -> int:
        """Run a host callable on a sub worker. Arrays without a tag of their own count as read and written."""
        return self.submit_sub_group(call, [args], after=after)

    def submit_sub_group(self, call: object, args: Sequence[Sequence[Any]], *, after: Sequence[int] = ()) -> int:
        """Run a host callable once for each list of arguments, as one task, on any free sub workers."""
        if self._fatal is not None:
            return -1
        name, function = self._site.sub(call)
        if not args:
            raise InvalidArgs(f"group of {name}: no arguments; expected at least one list of them")
        accesses: list[Access] = []
        members = []
        for given in args:
            values = [self._sub_value(name, index, value, accesses) for index, value in enumerate(given)]
            check_call(name, function, values)
            members.append(Member(-1, call=partial(function, *values)))
        return self._submit(TaskKind.SUB, name, tuple(members), accesses, after)

    def wait(self, value: Any, timeout_s: float = 15.0) -> None:
        """Wait until whatever writes a tensor or array has ended, so that the function may read it.

        Raises ``TensorWaitTimeout``, or ``TaskAborted`` if its producer failed.
        """
        if self._fatal is not None:
            return
        accesses = [self._reading(part) for part in self._parts(value)]
        over = Latch()
        number = self._submit(TaskKind.BARRIER, "wait", (), accesses, (), over=over)
        self.flush()
        task = self._run.by_id[number]
        if not self._site.wait(over, timeout_s):
            waited = [self._run.by_id[before] for before in task.before]
            names = ", ".join(f"task {other.number} ({other.label})" for other in waited if not other.is_over)
            raise TensorWaitTimeout(
                f"run {self._run.number}: the data was not there within {timeout_s:g} s; its producer is"
                f" {names or 'an earlier run'}"
            )
        if task.error is not None:
            raise task.error

    def fatal(self, message: str) -> None:
        """End the run: what is not running is not run. Raises ``ExplicitFatal``; if caught, later calls do nothing."""
        if self._fatal is None:
            self._fatal = ExplicitFatal(f"run {self._run.number}: {message}")
        raise self._fatal

    # Memory.

    @contextmanager
    def scope(self, *, manual: bool = False) -> Iterator[None]:
        """Arrays of ``alloc`` made inside are given back when it is left and its tasks have ended.

        ``manual``: no dependencies are inferred inside, only those of ``after``.
        """
        with self._run.lock:
            self._run.engine.open_scope(manual=manual)
        self._blocks.append([])
        try:
            yield
        finally:
            self._blocks.pop()
            with self._run.lock:
                self._run.engine.close_scope()

    def alloc(self, shape: Sequence[int], dtype: str) -> NDArray[Any]:
        """A host array from the heap ring of the innermost scope, undefined until written. bfloat16 is float32 here.

        Waits for memory if tasks that run will give some back; raises ``HeapRingDeadlock`` if none ever will.
        """
        where = f"run {self._run.number}, alloc"
        extents = check_shape(shape, where)
        kind = host_dtype(check_dtype(dtype, where))
        if self._fatal is not None:
            return np.empty(extents, kind)
        nbytes = kind.itemsize * int(np.prod(extents, dtype=np.int64))
        block = self._when_room(lambda: self._run.engine.alloc(nbytes))
        arena = self._arenas.get(block.ring)
        if arena is None:
            arena = self._arenas[block.ring] = np.empty(self._run.sizes.heap[block.ring], np.uint8)
        array = arena[block.offset : block.offset + nbytes].view(kind).reshape(extents)
        self._blocks[-1].append((*host_range(array), block))
        return array

    def deferred(
        self,
        name: str,
        shape: Sequence[int],
        dtype: str,
        *,
        worker: int,
        upload: NDArray[Any] | None = None,
        must_exist: bool = False,
        host: NDArray[Any] | None = None,
    ) -> DeferredTensor:
        """A chip tensor called ``name``: the one an earlier run left there under that name, else a new one of zeros.

        upload: copied to it before a task that uses it. host: filled from it after each task that writes it.
        must_exist: refuse to make a new one. It stays on its chip until it is freed or the worker is closed.
        """
        where = f"run {self._run.number}, deferred tensor {name!r}"
        self._check_worker(worker)
        dtype, extents = check_dtype(dtype, where), check_shape(shape, where)
        for array in (upload, host):
            if array is not None:
                check_array(array, dtype, extents, where)
        tensor = self._site.book.named(worker, name)
        if tensor is None:
            if must_exist:
                raise InvalidArgs(
                    f"{where}: it does not exist on worker {worker}; no earlier run made it, or it was lost"
                )
            tensor = self._site.book.make(dtype, extents, worker)
            self._site.allocate(self._run, tensor, name)
        elif (tensor.dtype, tensor.shape) != (dtype, extents):
            raise InvalidArgs(f"{where}: it exists as {tensor}; expected {dtype} {list(extents)}")
        return DeferredTensor(name, tensor, host, upload)

    @staticmethod
    def tagged(tag: Tag, value: Any) -> Tagged:
        """The argument with a tag of its own: ``Tag.INPUT`` for what a host callable only reads, for one."""
        return Tagged(tag, value)

    @staticmethod
    def no_dep(value: Any) -> Tagged:
        """The argument without dependencies: constants, and memory that is ordered by hand."""
        return Tagged(Tag.NO_DEP, value)

    # How submits get to the chips.

    def flush(self) -> None:
        """Hand everything submitted so far to the chips now."""
        if self._buffered:
            self._buffered = 0
            self._site.advance(self._run)

    def _submit(
        self,
        kind: TaskKind,
        label: str,
        members: tuple[Member, ...],
        accesses: Sequence[Access],
        after: Sequence[int],
        program: Program | None = None,
        config: LaunchConfig | None = None,
        over: Latch | None = None,
    ) -> int:
        run = self._run
        if after:
            self._check_after(label, after)
        if self._arenas:
            accesses = [self._in_heap(label, access) for access in accesses]
        engine = run.engine

        def submit() -> int:
            number = engine.submit(accesses, after=after, members=max(1, len(members)), label=label)
            task = Task(number, len(run.tasks), kind, label, members, engine.predecessors(number), program, config)
            task.open_members = set(range(max(1, len(members))))
            task.over = over
            task.accesses = accesses
            run.tasks.append(task)
            run.by_id[number] = task
            run.unsent += 1
            run.writes_host |= any(member.writes_host for member in members)
            return number

        number = self._when_room(submit)
        self._buffered += 1
        if self._buffered >= FLUSH_TASKS:
            self.flush()
        return number

    def _when_room(self, attempt: Callable[[], T]) -> T:
        """Try until the ring has room. What will never have any raises its own error."""
        run = self._run
        waited_s = 0.0
        while True:
            with run.lock:
                if run.abort_cause is not None:
                    raise run.abort_cause
                try:
                    return attempt()
                except RingFull as full:  # tasks end under the lock, so none can have ended unnoticed
                    run.progress.clear()
                    why = full
            self._buffered = 1  # whatever was submitted must get going now
            self.flush()
            if not self._site.wait(run.progress, FULL_WAIT_S):
                waited_s += FULL_WAIT_S
                if waited_s >= self._site.run_timeout_s:
                    raise SchedulerTimeout(f"run {run.number}: nothing ended for {waited_s:g} s, and {why}")

    def _config(self, config: RunConfig | None) -> LaunchConfig | None:
        return self._run.config if config is None else self._site.launch_config(config)

    # Checks.

    def _check_worker(self, worker: object) -> None:
        if type(worker) is not int or not 0 <= worker < self._site.num_workers:
            raise InvalidArgs(f"worker is {worker!r}; expected a chip's number, 0 to {self._site.num_workers - 1}")

    def _check_after(self, label: str, after: Sequence[int]) -> None:
        for task in after:
            if type(task) is not int or task not in self._run.by_id:
                raise InvalidArgs(f"{label}: after names {task!r}; expected ids of tasks of this run")

    def _in_heap(self, label: str, access: Access) -> Access:
        """An access to an array of ``alloc`` names its block, which the engine then keeps as long as the task."""
        if access.space != HOST_SPACE or not access.ranges:
            return access
        begin, end = access.ranges[0]
        for arena in self._arenas.values():
            first, last = host_range(arena)
            if not first <= begin < last:
                continue
            for scope in self._blocks:
                for low, high, block in scope:
                    if low <= begin and end <= high:
                        return Access(access.tag, block, ((begin - low, end - low),))
            raise InvalidArgs(f"{label}: an array of alloc is used after its scope was left")
        return access

    def _sub_value(self, name: str, index: int, value: Any, accesses: list[Access]) -> Any:
        tag = Tag.INOUT
        if type(value) is Tagged:
            tag, value = value.tag, value.value
        if isinstance(value, np.ndarray):
            if not value.flags.c_contiguous:
                raise InvalidArgs(f"{name}, argument {index}: the array is not contiguous; pass a copy")
            if tag is not Tag.NO_DEP:
                accesses.append(host_access(tag, value))
        elif isinstance(value, DeviceTensor | StackedTensor | DeferredTensor):
            raise WrongArity(f"{name}, argument {index}: {type(value).__name__} given; host callables take host arrays")
        return value

    def _parts(self, value: Any) -> list[DeviceTensor | NDArray[Any]]:
        if isinstance(value, DeferredTensor):
            return [value.tensor]
        if isinstance(value, StackedTensor):
            return list(value.shards)
        if isinstance(value, DeviceTensor | np.ndarray):
            return [value]
        raise WrongArity(f"wait: {type(value).__name__} given; expected a tensor or an array")

    def _reading(self, value: DeviceTensor | NDArray[Any]) -> Access:
        if isinstance(value, DeviceTensor):
            return self._site.book.check(value, "wait").access(Tag.INPUT)
        return host_access(Tag.INPUT, value)

    @property
    def fatal_error(self) -> ChipbusError | None:
        """What ``fatal`` was called with."""
        return self._fatal
