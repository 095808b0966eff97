"""One run of an L3 worker: its tasks, its graph engine, how it ends, and the handle its caller holds.

Owns: the state of one run, guarded by the run's one lock. Written by the caller's thread (submits) and the bus thread
(launches, completions); read by both.
"""

from __future__ import annotations

import enum
import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any

import attrs
from numpy.typing import NDArray

from ...errors import ChipbusError, DeadlineExceeded, TaskAborted
from ...kernels.diagnosis import RunGraph
from ...kernels.dispatch import Arg, Completion, LaunchConfig
from ...kernels.engine import Access, TaskEngine
from ...kernels.program import Program
from ...topology.rings import RingRequest, RingSizes
from .latch import Latch
from .tensors import DeviceTensor

__all__ = ["SUB", "BoundArgs", "Member", "Run", "RunConfig", "RunHandle", "Task", "TaskKind", "Wait"]

Wait = Callable[[Latch, float | None], bool]
"""Wait for an event for at most so many seconds (None: for ever); whether it is set."""


SUB = -1
"""Where host callables are counted among the chips."""


@attrs.frozen(kw_only=True)
class RunConfig:
    """What one run, or one task of it, asks for beyond its arguments. It applies to nothing else."""

    rings: RingRequest | None = None  # sizes of the task window, heap and dependency pool; None: the worker's
    timeline: bool = False  # have the chips note when each of their tasks began and ended


class TaskKind(enum.Enum):
    """What a task runs on."""

    CHIP = "chip"
    GROUP = "group"
    SUB = "sub"
    BARRIER = "barrier"  # nothing: it is over as soon as it could start


@attrs.define(eq=False)
class BoundArgs:
    """The arguments of one program launch, checked. ``args`` holds arrays where their values are read at launch."""

    args: list[Arg | NDArray[Any]]
    outputs: list[NDArray[Any]]  # to be filled from ``Completion.outputs``, in that order
    residents: list[DeviceTensor]
    uploads: list[tuple[DeviceTensor, NDArray[Any]]] = attrs.field(factory=list)  # before it starts
    downloads: list[tuple[DeviceTensor, NDArray[Any]]] = attrs.field(factory=list)  # after it has ended
    reads_host: bool = False


@attrs.define(eq=False)
class Member:
    """One launch of a task: on a chip, or of a host callable (``worker`` -1)."""

    worker: int
    bound: BoundArgs | None = None
    call: Callable[[], object] | None = None

    @property
    def writes_host(self) -> bool:
        """Whether arrays of the host application may change when it ends."""
        return self.bound is None or bool(self.bound.outputs or self.bound.downloads)


@attrs.define(eq=False)
class Task:
    """One submitted task. ``id`` is the engine's, ``number`` counts the run's submits from 0."""

    id: int
    number: int
    kind: TaskKind
    label: str
    members: tuple[Member, ...]
    before: tuple[int, ...]  # ids of the tasks it had to wait for when it was submitted
    program: Program | None = None
    config: LaunchConfig | None = None
    accesses: Sequence[Access] = ()
    open_members: set[int] = attrs.field(factory=set)  # launches that have not ended
    is_sent: bool = False  # or over
    is_started: bool = False  # in the engine
    is_over: bool = False
    error: ChipbusError | None = None
    sent_ns: int = 0
    began_ns: int = 0
    ended_ns: int = 0
    completions: list[tuple[int, Completion]] = attrs.field(factory=list)  # and the worker it came from
    over: Latch | None = None  # of a barrier


class Run:
    """One run, from its admission until its last task has ended and its last copy has arrived."""

    def __init__(self, number: int, name: str, sizes: RingSizes, config: LaunchConfig | None, *, track_war: bool):
        self.number = number
        self.name = name
        self.sizes = sizes
        self.config = config  # of every launch that has none of its own
        self.engine = TaskEngine(sizes, track_war=track_war)
        self.lock = threading.Lock()
        self.tasks: list[Task] = []
        self.by_id: dict[int, Task] = {}
        self.ready: dict[int, list[Task]] = {}  # per chip
        self.groups: deque[Task] = deque()
        self.subs: deque[tuple[Task, int]] = deque()  # and the member
        self.is_sealed = False  # nothing is submitted any more
        self.unsent = 0
        self.in_flight: Counter[int] = Counter()  # launches per chip; -1: host callables
        self.commands = 0  # allocations and copies under way
        self.writes_host = False
        self.abort_cause: ChipbusError | None = None  # what is not running yet is not run any more
        self.errors: list[ChipbusError] = []
        self.value: Any = None
        self.began_ns = 0
        self.trace_id: bytes | None = None
        self.progress = Latch()
        self.done = Latch()

    @property
    def error(self) -> ChipbusError | None:
        """The first one."""
        return self.errors[0] if self.errors else None

    def abort(self, cause: ChipbusError) -> None:
        """Run nothing of it that is not running. Call with the lock held, then have it advanced."""
        if self.abort_cause is None and not self.done.is_set():
            self.abort_cause = cause
            if not self.errors:
                self.errors.append(cause)

    def aborted(self) -> TaskAborted:
        """What becomes of a task that is not run because of the abort."""
        assert self.abort_cause is not None
        error = TaskAborted(f"run {self.number} was ended before the task started").caused_by(self.abort_cause)
        assert isinstance(error, TaskAborted)
        return error


class RunHandle:
    """A run that was submitted. Any number of threads may wait for it; all see the same outcome."""

    def __init__(
        self,
        run: Run,
        wait: Wait,
        graph: Callable[[Run], RunGraph],
        chip_graphs: Callable[[Run], tuple[RunGraph, ...]],
    ) -> None:
        self._run = run
        self._wait = wait
        self._graph = graph
        self._chip_graphs = chip_graphs

    def __repr__(self) -> str:
        state = "running" if not self.done else "failed" if self._run.error else "done"
        return f"<run {self._run.number} of {self._run.name}, {state}>"

    @property
    def number(self) -> int:
        """Counts the runs of its worker from 1; ``Dispatch.step_id`` of its launches."""
        return self._run.number

    @property
    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return self._run.done.is_set()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it has ended, at most ``timeout`` seconds; whether it has. The run goes on either way."""
        return self._wait(self._run.done, timeout)

    def result(self, timeout: float | None = None) -> Any:
        """What the orchestration function returned (None for a single program), once all its tasks have ended.

        Raises the run's first error, or ``DeadlineExceeded`` after ``timeout`` seconds, which leaves the run going.
        """
        if not self.wait(timeout):
            raise DeadlineExceeded(f"run {self._run.number} of {self._run.name} has not ended within {timeout:g} s")
        if self._run.error is not None:
            raise self._run.error
        return self._run.value

    @property
    def error(self) -> ChipbusError | None:
        """The first error, None if there was none (yet)."""
        return self._run.error

    @property
    def errors(self) -> tuple[ChipbusError, ...]:
        """Everything that went wrong, in order."""
        return tuple(self._run.errors)

    def graph(self) -> RunGraph:
        """Its tasks, edges, lanes and times, as far as it has got: for ``chipbus.kernels.diagnosis``."""
        return self._graph(self._run)

    def chip_graphs(self) -> tuple[RunGraph, ...]:
        """What each launch did on its chip, task by task: of a run with ``RunConfig(timeline=True)``, else empty.

        Asks the chips, which must still have the programs registered.
        """
        return self._chip_graphs(self._run)

    @property
    def high_water(self) -> Any:
        """Most of each ring resource that was in use at once, for ``suggest_rings``."""
        with self._run.lock:
            return self._run.engine.high_water()
