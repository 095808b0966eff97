"""Chip worker: one process that owns one chip. The bus thread always answers; a second thread computes.

Owns: the chip, its programs and resident tensors, through the compute thread alone. Commands run in order of arrival.

    replica core ──asks──▶ bus thread ──jobs──▶ compute thread ──▶ chip
                 ◀─replies─            ◀─results─
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import attrs
import msgspec

from ..bus import Actor, Call, Failure, Progress, Ready, failure_of, handles
from ..errors import ChipbusError, KernelError, TaskAborted
from ..kernels.chips import Chip, Kept, open_chip
from ..kernels.null import Fault
from ..topology.rings import RingUse
from .busy import BusyTime
from .messages.launching import (
    AllocTensor,
    ChipReport,
    ChipReportRequest,
    Completion,
    Copied,
    CopyFrom,
    CopyTo,
    Described,
    DescribeGraph,
    Done,
    FreeTensor,
    Launch,
    Launched,
    RegisterProgram,
    UnregisterProgram,
)
from .messages.tree import StartError

__all__ = ["ChipActor", "Compute", "InlineCompute", "ThreadCompute"]

Job = Callable[[], Any]
OnDone = Callable[[Any, ChipbusError | None], None]

_PROGRESS_STEPS = 200  # of a load, at most: each takes the bus thread, and so the interpreter's lock


class Compute(Protocol):
    """Runs jobs one after another, off or on the bus thread; ``on_done`` is called on the bus thread."""

    def submit(self, job: Job, on_done: OnDone) -> None: ...

    def close(self, on_closed: Callable[[], None]) -> None: ...


def _attempt(job: Job) -> tuple[Any, ChipbusError | None]:
    try:
        return job(), None
    except ChipbusError as error:
        return None, error
    except Exception as error:  # noqa: BLE001 (a kernel may raise anything; the asker must hear of it, not the process die)
        return None, KernelError(f"{type(error).__name__} on the chip: {error}")


class ThreadCompute:
    """The compute thread of a real chip worker."""

    def __init__(self, call_soon_threadsafe: Callable[[Callable[[], None]], None]) -> None:
        self._post = call_soon_threadsafe
        self._jobs: queue.SimpleQueue[tuple[Job, OnDone] | Callable[[], None]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="compute", daemon=True)
        self._thread.start()

    def submit(self, job: Job, on_done: OnDone) -> None:
        """Queue ``job``. The queue is bounded by the asker's mailbox credit: each job is an open ask."""
        self._jobs.put((job, on_done))

    def close(self, on_closed: Callable[[], None]) -> None:
        """Let queued jobs end, then call ``on_closed`` on the bus thread."""
        self._jobs.put(on_closed)

    def _run(self) -> None:
        while True:
            item = self._jobs.get()
            if not isinstance(item, tuple):
                self._post(item)
                return
            job, on_done = item
            value, error = _attempt(job)
            self._post(lambda on_done=on_done, value=value, error=error: on_done(value, error))  # type: ignore[misc]


class InlineCompute:
    """Compute for the one-process system: a job starts when the one before has ended, and takes its modelled time."""

    def __init__(self, after: Callable[[float, Callable[[], None]], object]) -> None:
        self._after = after
        self._waiting: deque[tuple[Job, OnDone]] = deque()
        self._is_busy = False

    def submit(self, job: Job, on_done: OnDone) -> None:
        """Run ``job`` as soon as the chip is free, report it when the chip would have been done."""
        self._waiting.append((job, on_done))
        if not self._is_busy:
            self._start_next()

    def close(self, on_closed: Callable[[], None]) -> None:
        """Let waiting jobs end, then call ``on_closed``."""
        self.submit(lambda: None, lambda _value, _error: on_closed())

    def _start_next(self) -> None:
        job, on_done = self._waiting.popleft()
        self._is_busy = True
        value, error = _attempt(job)
        cost_s = sum(c.device_ns for c in value.completions) / 1e9 if isinstance(value, Launched) else 0.0

        def end() -> None:
            self._is_busy = False
            on_done(value, error)
            if self._waiting and not self._is_busy:
                self._start_next()

        self._after(cost_s, end)


@attrs.frozen(kw_only=True)
class ChipConfig:
    """What a chip worker is told at spawn."""

    device: str  # "cpu:0", "null:1"
    threads: int
    inline: bool = False  # run jobs on the bus thread, in modelled time (one-process system)
    faults: tuple[Fault, ...] = ()  # of a null chip
    check_numerics: bool = False  # a task that writes NaN fails its dispatch
    weights_fd: int = -1  # of the memory file the supervisor keeps for this chip; -1: none


class ChipActor(Actor):
    """Executes commands on its chip, in order, and records each when the run is recorded."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = msgspec.convert(config, ChipConfig)
        self._chip: Chip | None = None  # the compute thread's, once it has opened it
        self._compute: Compute | None = None
        self._jobs_given = 0
        self._jobs_done = 0
        # Written by the compute thread, each in one assignment, and read by the bus thread:
        self._running: tuple[str, int] | None = None  # what, and since when on the bus clock
        self._committed_bytes = 0
        self._engine = ""
        self._rings: tuple[RingUse, ...] = ()
        self._names: dict[bytes, str] = {}  # of programs, by digest; the compute thread's

    def on_start(self) -> None:
        """Open the chip on the thread that will use it, then report ready."""
        began = time.perf_counter()
        self._busy = BusyTime(self.ctx.clock.now_ns())
        self._compute = (
            InlineCompute(self.ctx.after) if self.config.inline else ThreadCompute(self.ctx.call_soon_threadsafe)
        )
        if self.ctx.ledger is not None:
            self.ctx.ledger.append("chip", {"device": self.config.device, "threads": self.config.threads})

        def open_it() -> None:
            self._chip = self.open_chip()  # here, not when the bus thread hears of it: the next job may run before that

        def opened(_: Any, error: ChipbusError | None) -> None:
            if error is not None:
                self.ctx.tell("supervisor", StartError(type(error).__name__, str(error)))
                return
            self.ctx.tell_ready("supervisor", Ready(seconds=time.perf_counter() - began, detail=self.config.device))

        self._compute.submit(open_it, opened)

    def open_chip(self) -> Chip:
        """The chip this worker owns; called on the compute thread."""
        config = self.config
        kept = None if config.weights_fd < 0 else Kept(config.weights_fd, self._say_weights)
        return open_chip(config.device, config.threads, config.faults, check_numerics=config.check_numerics, kept=kept)

    def _say_weights(self, how: str) -> None:
        self.ctx.call_soon_threadsafe(lambda: self.ctx.log.info("chip.weights", how=how))

    def on_stop(self) -> None:
        """Let the running job end, then give the chip back. A job that never ends is the supervisor's to kill."""
        self.ctx.hold_stop()

        def close_it() -> None:
            if self._chip is not None:
                self._chip.close()

        assert self._compute is not None
        self._compute.submit(close_it, lambda _value, _error: None)
        self._compute.close(self.ctx.stop)

    def progress(self) -> int:
        """A number that moves with every job that ends, and with every task inside one."""
        chip = self._chip
        return self._jobs_done + (0 if chip is None else chip.progress)

    def is_busy(self) -> bool:
        """The compute thread has jobs. Jobs in modelled time run on the bus thread, which shows by its answer."""
        return self._jobs_given > self._jobs_done and not self.config.inline

    @handles(RegisterProgram)
    def _register(self, message: RegisterProgram, call: Call) -> None:
        program = message.program

        def register(chip: Chip) -> None:
            chip.register(program)
            self._names[program.digest] = program.name

        fields = {"program": msgspec.msgpack.encode(program)}
        self._run(call, f"register {program.name}", register, "register", fields)

    @handles(UnregisterProgram)
    def _unregister(self, message: UnregisterProgram, call: Call) -> None:
        digest = message.program

        def unregister(chip: Chip) -> None:
            chip.unregister(digest)
            del self._names[digest]

        self._run(call, "unregister", unregister, "unregister", {"program": digest})

    @handles(AllocTensor)
    def _alloc(self, message: AllocTensor, call: Call) -> None:
        told = 0.0

        def report(done: float, total: float) -> None:
            nonlocal told
            if done < total and done - told < total / _PROGRESS_STEPS:
                return
            told = done
            item = Progress(phase="weights", done=done, total=total, unit="bytes")
            self.ctx.call_soon_threadsafe(lambda: call.item(item))

        tensor = message.tensor

        def alloc(chip: Chip) -> None:
            chip.alloc(tensor, report)
            if tensor.source:
                self._engine = chip.engine
                self.ctx.call_soon_threadsafe(self._say_engine)

        fields = {"tensor": msgspec.msgpack.encode(tensor)}
        self._run(call, f"alloc {tensor.resident}", alloc, "alloc", fields)

    def _say_engine(self) -> None:
        """Once per model: what computes it. A fallback is something nobody asked for."""
        say = self.ctx.log.warning if self._engine.startswith("torch:") else self.ctx.log.info
        say("chip.engine", engine=self._engine)

    @handles(FreeTensor)
    def _free(self, message: FreeTensor, call: Call) -> None:
        resident = message.resident
        self._run(call, f"free {resident}", lambda chip: chip.free(resident), "free", {"resident": resident})

    @handles(CopyTo)
    def _copy_to(self, message: CopyTo, call: Call) -> None:
        resident, value = message.resident, message.value
        fields = {"resident": resident, "value": msgspec.msgpack.encode(value)}
        self._run(call, f"copy to {resident}", lambda chip: chip.copy_to(resident, value), "copy_to", fields)

    @handles(CopyFrom)
    def _copy_from(self, message: CopyFrom, call: Call) -> None:
        resident = message.resident

        def job() -> Copied:
            assert self._chip is not None
            self._running = (f"copy from {resident}", self.ctx.clock.now_ns())
            return Copied(self._chip.copy_from(resident))

        self._submit(call, job, "copy_from", lambda _: [("copy_from", {"resident": resident})])

    @handles(DescribeGraph)
    def _describe(self, message: DescribeGraph, call: Call) -> None:
        def job() -> Described:
            assert self._chip is not None
            return Described(self._chip.describe(message.graph))

        self._submit(call, job, "describe", lambda _: [])

    def _run(self, call: Call, what: str, verb: Callable[[Chip], None], kind: str, fields: dict[str, Any]) -> None:
        """Run a verb that answers ``Done``."""

        def job() -> Done:
            began = time.perf_counter()
            assert self._chip is not None
            self._running = (what, self.ctx.clock.now_ns())
            verb(self._chip)
            self._committed_bytes = self._chip.resident_bytes
            seconds = time.perf_counter() - began
            return Done(seconds, self._committed_bytes, self._chip.is_uniform)

        self._submit(call, job, kind, lambda _: [(kind, fields)])

    @handles(Launch)
    def _launch(self, message: Launch, call: Call) -> None:
        digest = self.ctx.ledger is not None

        def job() -> Launched:
            return self._launch_all(message, digest=digest)

        def entries(launched: Launched) -> list[tuple[str, dict[str, Any]]]:
            failures = dict(launched.failures)
            completions = iter(launched.completions)
            trace_id = call.trace_id.hex()
            return [
                ("failed", {"command": "dispatch", "error": failures[i].text, "trace_id": trace_id})
                if i in failures
                else (
                    "dispatch",
                    {
                        "dispatch": msgspec.msgpack.encode(dispatch),
                        "completion": msgspec.msgpack.encode(next(completions)),
                        "step_id": dispatch.step_id,
                        "trace_id": trace_id,
                    },
                )
                for i, dispatch in enumerate(message.dispatches)
            ]

        self._submit(call, job, "launch", entries)

    def _launch_all(self, message: Launch, *, digest: bool) -> Launched:
        """Every dispatch in order, except those that depend on a failed one. On the compute thread."""
        chip = self._chip
        assert chip is not None
        completions: list[Completion] = []
        failures: dict[int, Failure] = {}
        for position, dispatch in enumerate(message.dispatches):
            after = message.after[position] if position < len(message.after) else ()
            cause = next((failures[before] for before in after if before in failures), None)
            if cause is not None:
                aborted = TaskAborted(f"dispatch {dispatch.dispatch_id} was not run").caused_by(cause.text)
                failures[position] = failure_of(aborted)
                continue
            began_ns = self.ctx.clock.now_ns()
            self._running = (f"dispatch {dispatch.dispatch_id}", began_ns)
            self._busy.begin(self._names.get(dispatch.program, "unknown"), began_ns)
            completion, error = _attempt(lambda d=dispatch: chip.launch(d, digest=digest))  # type: ignore[misc]
            self._busy.end(self.ctx.clock.now_ns())
            if error is None:
                completions.append(completion)
            else:
                failures[position] = failure_of(error)
        self._committed_bytes = chip.resident_bytes
        self._rings = chip.rings
        return Launched(tuple(completions), tuple(failures.items()))

    @handles(ChipReportRequest)
    def _report(self, _: ChipReportRequest, call: Call) -> None:
        running, now_ns = self._running, self.ctx.clock.now_ns()
        what, since_ns = running or ("", 0)
        running_s = (now_ns - since_ns) / 1e9 if running else 0.0
        busy = self._busy.shares(now_ns)
        call.reply(ChipReport(self._committed_bytes, what, running_s, self._engine, busy, self._rings))

    def _submit(
        self, call: Call, job: Job, kind: str, entries: Callable[[Any], list[tuple[str, dict[str, Any]]]]
    ) -> None:
        """Queue a command. ``entries``: what a recorded run notes when it has ended, kind and fields of each."""

        def tracked() -> Any:
            try:
                return job()
            finally:
                self._running = None

        def on_done(value: Any, error: ChipbusError | None) -> None:
            self._jobs_done += 1
            if error is not None:
                if self.ctx.ledger is not None:
                    about = {"command": kind, "error": str(error), "trace_id": call.trace_id.hex()}
                    self.ctx.ledger.append("failed", about)
                call.fail(error)
                return
            if self.ctx.ledger is not None:
                for entry_kind, fields in entries(value):
                    self.ctx.ledger.append(entry_kind, fields)
            call.reply(value)

        assert self._compute is not None
        self._jobs_given += 1
        self._compute.submit(tracked, on_done)
