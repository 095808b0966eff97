"""Every exception chipbus raises, in one tree. Each docstring speaks to whoever catches it.

This module imports nothing of ours, so every room may import it. An error that crosses a process boundary
travels as its class name plus its text (see ``chipbus.bus``), so each class is built from its message alone.
"""

from __future__ import annotations

__all__ = [
    "Aborted",
    "AnswerLost",
    "BadFrame",
    "BadTarget",
    "BusError",
    "CheckpointError",
    "ChipbusError",
    "ConfigError",
    "ContextTooLong",
    "CoreException",
    "DeadlineExceeded",
    "DepPoolOverflow",
    "DeviceUnusable",
    "EngineClosed",
    "EngineDead",
    "ExplicitFatal",
    "FlowControlDeadlock",
    "HeapRingDeadlock",
    "InvalidArgs",
    "KernelError",
    "LedgerCorrupt",
    "MailboxFull",
    "MemoryExhausted",
    "NotReady",
    "NumberedError",
    "Overloaded",
    "PeerGone",
    "PinOverloaded",
    "ReplayDiverged",
    "RequestError",
    "RequestInvalid",
    "RestartLimit",
    "RunDirectoryInUse",
    "SchedulerTimeout",
    "ScopeDeadlock",
    "StaleTensor",
    "StartFailed",
    "SyncStartInvalid",
    "TaskAborted",
    "TensorMapOverflow",
    "TensorWaitTimeout",
    "TopologyError",
    "UnknownProgram",
    "WorkerDied",
    "WorkerError",
    "WorkerLost",
    "WrongArity",
]


class ChipbusError(Exception):
    """Root of everything raised on purpose. ``str(error)`` is one sentence: what, where, the value, the rule."""


class ConfigError(ChipbusError, ValueError):
    """A setting, flag, file or field is wrong. Nothing was started. Fix the value; a retry alone is pointless."""


class CheckpointError(ConfigError):
    """A model directory cannot be used: missing, half-written, wrong tensor, unknown architecture."""


class RunDirectoryInUse(ConfigError):
    """The run directory named in the settings belongs to a runtime that lives. Close that one, or name another."""


class TopologyError(ConfigError):
    """A placement is impossible or not offered yet. Nothing was started."""


class BusError(ChipbusError):
    """A message could not be delivered, understood or answered."""


class PeerGone(BusError):
    """The actor asked has ended; the text carries its exit. The ask may or may not have been executed."""


class AnswerLost(PeerGone):
    """A message on the way to or from a living actor was lost. The ask may or may not have been executed."""


class DeadlineExceeded(BusError, TimeoutError):
    """No answer within the deadline. The work may still be going on; its late answer is counted and dropped."""


class MailboxFull(BusError):
    """A bounded queue is full. Nothing was queued; retry later."""


class BadFrame(BusError):
    """Bytes on a socket are no message of ours: unknown kind, wrong version, truncated, too long, left-over."""


class StaleTensor(BusError):
    """A shared-memory handle names memory that was freed or belongs to an earlier life."""


class WorkerError(ChipbusError):
    """A process of ours failed."""


class WorkerDied(WorkerError):
    """A worker ended while it held the request; the text carries its exit. It is restarted; a retry is sane."""


class RestartLimit(WorkerError):
    """A child died more often than its restart intensity allows. Its group stays down; the engine is unusable."""


class StartFailed(WorkerError):
    """A process did not become ready in time, or ended before. Everything started with it was stopped."""


class KernelError(WorkerError):
    """A dispatch failed on its chip: unknown program, wrong argument, a task that raised."""


class NumberedError(KernelError):
    """An error of the task runtime, with the number its users know it by. Each subclass is one row of the table.

    ``str(error)`` is up to three lines: name, number and what failed; what to do; and, for a cascade, the first cause.
    Numbers, names and meanings follow the simpler and pypto runtimes, so that their users need not learn new ones.
    """

    code = 0
    name = "UNNUMBERED"
    hint = ""

    def __init__(self, detail: str = "") -> None:
        # An error that crossed the bus arrives as its whole text: it must not be dressed twice.
        is_whole = detail.startswith(f"{self.name} ({self.code}): ")
        super().__init__(detail if is_whole else f"{self.name} ({self.code}): {detail}\nhint: {self.hint}")

    @property
    def detail(self) -> str:
        """The mechanism, with its numbers: the text without name, hint and first cause."""
        return str(self).removeprefix(f"{self.name} ({self.code}): ").partition("\nhint: ")[0]

    @property
    def first_cause(self) -> str:
        """What failed first, if this error is only fallout of it; else empty."""
        return str(self).partition("\nfirst cause: ")[2]

    def caused_by(self, first: BaseException | str) -> NumberedError:
        """The same error, naming the first cause: of a cascade, the error it began with."""
        first = str(first).rpartition("\nfirst cause: ")[2]
        return type(self)(f"{str(self).partition(chr(10) + 'first cause: ')[0]}\nfirst cause: {first}")


class ScopeDeadlock(NumberedError):
    """A submit waits for space that only the scope it is in could free. Detected at once, not by a time-out."""

    code, name = 1, "SCOPE_DEADLOCK"
    hint = "split the scope, or enlarge the named ring parameter"


class HeapRingDeadlock(NumberedError):
    """A scope's heap cannot hold what it is asked to, and nothing that runs would free any of it."""

    code, name = 2, "HEAP_RING_DEADLOCK"
    hint = "enlarge ring_heap, or put the loop body in a scope of its own"


class FlowControlDeadlock(NumberedError):
    """The task window is full of tasks held by enclosing scopes; nothing that runs would free a slot."""

    code, name = 3, "FLOW_CONTROL_DEADLOCK"
    hint = "enlarge ring_task_window, or nest fewer scopes around the loop"


class DepPoolOverflow(NumberedError):
    """A task has more dependencies than its ring's pool can ever hold."""

    code, name = 4, "DEP_POOL_OVERFLOW"
    hint = "enlarge ring_dep_pool, or let fewer tasks produce what one consumes"


class InvalidArgs(NumberedError):
    """Arguments do not fit the program: arity, direction, dtype, shape, residency or ownership. Nothing was run."""

    code, name = 5, "INVALID_ARGS"
    hint = "fix the call as said above; nothing was run"


class WrongArity(InvalidArgs, TypeError):
    """Wrong number or Python type of arguments. Nothing was run."""


class UnknownProgram(InvalidArgs, ValueError):
    """The program is not registered on this worker. Register it first."""

    hint = "register the program on this worker before it is run"


class SyncStartInvalid(NumberedError):
    """A group asks for more members at once than the worker has chips."""

    code, name = 7, "REQUIRE_SYNC_START_INVALID"
    hint = "ask for fewer members, or give the worker more devices"


class TensorWaitTimeout(NumberedError):
    """The orchestration waited for a tensor's data longer than allowed. Its producer may still be running."""

    code, name = 8, "TENSOR_WAIT_TIMEOUT"
    hint = "look at the producer named above: it hangs, or it is slower than the deadline"


class ExplicitFatal(NumberedError):
    """The orchestration ended itself with ``fatal``; its message is the detail."""

    code, name = 9, "EXPLICIT_ORCH_FATAL"
    hint = "read the message; what was submitted after it was not run"


class TensorMapOverflow(NumberedError):
    """The run's tensor map is full."""

    code, name = 11, "TENSORMAP_OVERFLOW"
    hint = "use larger tiles, or a manual scope with explicit dependencies"


class SchedulerTimeout(NumberedError):
    """No progress until the deadline: a kernel hangs or is very slow. The chip is replaced."""

    code, name = 100, "SCHEDULER_TIMEOUT"
    hint = "look at the task named above; raise the timeout if it is only slow"


class DeviceUnusable(NumberedError):
    """The chip failed before and takes no work until it is replaced."""

    code, name = -1, "DEVICE_UNUSABLE"
    hint = "look at the first cause; the supervisor replaces the worker unless it died too often"


class MemoryExhausted(NumberedError, MemoryError):
    """More memory is asked for than is free. Checked before anything is allocated."""

    code, name = 207001, "MEMORY_ALLOCATION"
    hint = "make the named size smaller, or free memory on this machine"


class CoreException(NumberedError):
    """An in-core function raised. Everything that depends on its output was not run."""

    code, name = 507015, "CORE_EXCEPTION"
    hint = "fix the kernel named above; the worker is usable"


class WorkerLost(NumberedError, WorkerDied):
    """A chip worker ended with tasks in flight; resident tensors on it are gone. It is restarted."""

    code, name = 900001, "WORKER_LOST"  # chipbus's own: no upstream number says that the process is gone
    hint = "run again when the worker is back; allocate and fill its resident tensors again"


class TaskAborted(NumberedError):
    """The task was not run, because one it depends on failed."""

    code, name = 107022, "TASK_ABORT"
    hint = "look at the first cause"


class EngineDead(WorkerError):
    """The supervisor ended, and every process with it. Only ``close()`` is useful now; build a new engine."""


class EngineClosed(ChipbusError, RuntimeError):
    """The engine was closed, or is used in a forked copy of the process that made it."""


class RequestError(ChipbusError):
    """One request cannot be served. Other requests are untouched."""


class RequestInvalid(RequestError, ValueError):
    """A request's own fields are wrong: empty prompt, token id outside the vocabulary, unknown sampling field.

    ``param`` names the field, where one was at fault and the error was raised in this process; else it is empty.
    """

    def __init__(self, text: str = "", *, param: str = "") -> None:
        super().__init__(text)
        self.param = param


class BadTarget(RequestInvalid):
    """The request names a replica or data-parallel rank that does not exist, or two that contradict each other."""


class ContextTooLong(RequestInvalid):
    """The prompt alone leaves no room in the context. Shorten it."""


class Aborted(RequestError):
    """The caller cancelled the request. Its pages are free."""


class Overloaded(RequestError):
    """The queue for new requests is full. Nothing was queued; back off and retry."""


class PinOverloaded(Overloaded):
    """The queue of the replica that the request is pinned to is full; others may have room."""


class NotReady(RequestError):
    """No replica that may serve the request is ready, or will ever be. Nothing was queued; try later, or elsewhere."""


class LedgerCorrupt(ChipbusError):
    """A record breaks off or fails its checksum; the text names file and byte. Records before it are intact."""


class ReplayDiverged(ChipbusError):
    """A replayed dispatch gave another result than the recorded one; the text names the first difference."""
