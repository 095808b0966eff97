"""An L3 worker without its processes: programs, tensors and runs, as its callers see them.

Owns: the worker's state, the admission of runs, questions under way. Any thread. How to get onto the bus thread and
how to wait come from outside, so that the same code runs on a virtual clock in one process.
"""

from __future__ import annotations

import enum
import itertools
import os
import secrets
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any

import attrs
import numpy as np
from numpy.typing import NDArray

from ...errors import (
    ChipbusError,
    EngineClosed,
    InvalidArgs,
    KernelError,
    MemoryExhausted,
    UnknownProgram,
    WrongArity,
)
from ...kernels.diagnosis import RunGraph, run_of_launch
from ...kernels.dispatch import Arg, LaunchConfig
from ...kernels.memory import available_bytes
from ...kernels.program import Program, TensorSpec
from ...topology.rings import RingRequest, RingSizes, resolve_rings
from ..messages.launching import Copied, CopyFrom, CopyTo, DescribeGraph, FreeTensor
from .binding import Binding
from .dispatcher import Dispatcher
from .latch import Latch
from .orchestrator import Orchestrator
from .programs import Orchestration, Registration, as_program
from .question import Question
from .run_graph import run_graph
from .runs import Run, RunConfig, RunHandle, Wait
from .tensors import DeviceTensor, StackedTensor, TensorBook, check_array, check_dtype, check_shape

__all__ = ["MAX_COPY_BYTES", "CoreSettings", "L3Core", "WorkerState"]

MAX_COPY_BYTES = 60 << 20
"""Largest array that travels to or from a chip: it goes in one message."""

_MAX_CONFIGS = 64  # whose ring sizes are remembered

Ask = Callable[[Callable[[Any], None], Callable[[ChipbusError], None]], None]


class WorkerState(enum.Enum):
    """Of an L3 worker. CLOSED is for good; a failed worker can only be closed."""

    NEW = "new"
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    CLOSED = "closed"
    FAILED = "failed"


@attrs.frozen(kw_only=True)
class CoreSettings:
    """What a worker's core needs to know."""

    depth: int  # runs accepted at once
    rings: RingRequest | None
    subs: Mapping[str, Callable[..., object]]
    track_war: bool
    run_timeout_s: float
    start_timeout_s: float
    close_timeout_s: float
    checks_memory: bool  # whether chips take memory of this machine


class L3Core:
    """The verbs of an L3 worker. ``inside.callback`` is true on a thread that runs a callback of the worker."""

    def __init__(
        self,
        settings: CoreSettings,
        make_dispatcher: Callable[[L3Core], Dispatcher],
        wait: Wait,
    ) -> None:
        self.settings = settings
        self.state = WorkerState.NEW
        self.inside = threading.local()
        self.wait = wait
        self.owner = secrets.token_hex(4)
        self.book = TensorBook(self.owner)
        self.rings = resolve_rings(None, settings.rings)
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._death: ChipbusError | None = None
        self._bindings: dict[bytes, Binding] = {}
        self._numbers = itertools.count(1)
        self._active = 0  # runs admitted and not over
        self._queue: deque[Latch] = deque()  # submitters that wait for admission
        self._open: dict[object, Callable[[ChipbusError], None]] = {}  # questions under way
        self._closing: Latch | None = None
        self._close_error: BaseException | None = None
        self._resolve = lru_cache(_MAX_CONFIGS)(self._resolved)
        self._default = self._resolve(RunConfig())
        self.dispatcher = make_dispatcher(self)

    def bind_post(self, post: Callable[[Callable[[], None]], None]) -> None:
        """How to get onto the bus thread; before ``start``."""
        self._post = post

    def enter_bus_thread(self) -> None:
        """Remember on the bus thread that whatever the worker calls there is a callback."""

        def mark() -> None:
            self.inside.callback = True

        self._post(mark)

    # Where an orchestration runs (``orchestrator.Site``).

    @property
    def num_workers(self) -> int:
        """Chips."""
        return len(self.dispatcher.settings.devices)

    @property
    def run_timeout_s(self) -> float:
        """For one launch."""
        return self.settings.run_timeout_s

    def binding(self, program: object) -> Binding:
        """A registered program, by itself, its registration or its digest. Raises ``UnknownProgram``."""
        if isinstance(program, Program | Registration):
            digest = program.digest
        elif isinstance(program, bytes):
            digest = program
        else:
            found = as_program(program)
            if found is None:
                raise WrongArity(f"program is a {type(program).__name__}; expected a program or its registration")
            digest = found.digest
        binding = self._bindings.get(digest)
        if binding is None:
            name = getattr(program, "name", digest.hex()[:12])
            known = ", ".join(b.program.name for b in self._bindings.values()) or "none"
            raise UnknownProgram(f"{name} is not registered on this worker; registered: {known}")
        return binding

    def sub(self, call: object) -> tuple[str, Callable[..., object]]:
        """See ``Site.sub``."""
        if isinstance(call, str):
            if call not in self.settings.subs:
                known = ", ".join(self.settings.subs) or "none"
                raise UnknownProgram(f"there is no host callable {call!r} on this worker; given: {known}")
            return call, self.settings.subs[call]
        if not callable(call):
            raise WrongArity(f"{call!r} cannot be called; a sub task is a host callable, or the name of one")
        return getattr(call, "__name__", type(call).__name__), call

    def launch_config(self, config: RunConfig) -> LaunchConfig | None:
        """What chips are told."""
        return self._resolve(config)[1]

    def advance(self, run: Run) -> None:
        """See ``Site.advance``."""
        self._post(lambda: self.dispatcher.advance(run))

    def allocate(self, run: Run, tensor: DeviceTensor, name: str) -> None:
        """See ``Site.allocate``."""
        self._check_free_memory(tensor)
        self.book.opened(tensor, name)
        with run.lock:
            run.commands += 1
        self._post(lambda: self.dispatcher.alloc_deferred(run, tensor))

    # Runs.

    def submit(self, program: object, *args: Any, config: RunConfig | None = None, worker: int = 0) -> RunHandle:
        """Accept a run: of one program on one chip, or of an orchestration function. Returns while it is under way."""
        self._check_outside("submit")
        if not isinstance(config, RunConfig | None):
            raise WrongArity(f"config is a {type(config).__name__}; expected a RunConfig")
        function: Any = program.function if isinstance(program, Orchestration) else program
        is_single = not callable(function) or as_program(function) is not None
        if is_single:
            name = self.binding(function).program.name
        else:
            name = getattr(function, "__name__", type(function).__name__)
        run = self._admit(name, config)
        orchestrator = Orchestrator(run, self)
        try:
            if is_single:
                orchestrator.submit_next_level(function, *args, worker=worker)
            else:
                with self._in_callback():
                    run.value = function(orchestrator, *args)
                if orchestrator.fatal_error is not None:  # the function caught it
                    raise orchestrator.fatal_error
        except BaseException as error:
            cause = (
                error if isinstance(error, ChipbusError) else KernelError(f"{name}: {type(error).__name__}: {error}")
            )
            with run.lock:
                run.abort(cause)
            raise
        finally:
            with run.lock:
                run.engine.finish()
                run.is_sealed = True
            self.advance(run)
        return RunHandle(run, self._wait_outside, self._graph, self._chip_graphs)

    def run(self, program: object, *args: Any, config: RunConfig | None = None, worker: int = 0) -> Any:
        """``submit`` and wait for the result."""
        return self.submit(program, *args, config=config, worker=worker).result()

    def _chip_graphs(self, run: Run) -> tuple[RunGraph, ...]:
        """Of each launch that was asked for a timeline, what it did on its chip."""
        self._check_ready()
        self._check_outside("chip_graphs")

        def describer(worker: int) -> Callable[[str], str]:
            return lambda name: str(self._command("describe", worker, DescribeGraph(name)).json)

        with run.lock:
            launches = [launch for task in run.tasks for launch in task.completions if launch[1].graph]
        return tuple(run_of_launch(completion, describer(worker)) for worker, completion in launches)

    def _graph(self, run: Run) -> RunGraph:
        return run_graph(run, self.dispatcher.settings.devices)

    def _admit(self, name: str, config: RunConfig | None) -> Run:
        """Wait for a place: runs are taken in order, at most ``depth`` of them at once."""
        sizes, launch_config = self._default if config is None else self._resolve(config)
        ticket: Latch | None = None
        with self._lock:
            self._check_ready()
            if self._queue or self._active >= self.settings.depth:
                ticket = Latch()
                self._queue.append(ticket)
            else:
                self._active += 1
        if ticket is not None:
            self._await_place(ticket)
        with self._lock:
            try:
                self._check_ready()
            except ChipbusError:
                self._leave()
                raise
            run = Run(next(self._numbers), name, sizes, launch_config, track_war=self.settings.track_war)
            self.dispatcher.runs = (*self.dispatcher.runs, run)
        return run

    def _await_place(self, ticket: Latch) -> None:
        try:
            self.wait(ticket, None)
        except BaseException:  # Ctrl-C: give the place, or the claim to one, back
            with self._lock:
                if ticket.is_set():
                    self._leave()
                else:
                    self._queue.remove(ticket)
            raise

    def _leave(self) -> None:
        """A place is free. The lock is held."""
        self._active -= 1
        while self._queue and (self._active < self.settings.depth or self.state is not WorkerState.READY):
            self._active += 1
            self._queue.popleft().set()

    def finished(self, run: Run) -> None:
        """A run is over; called on the bus thread."""
        with self._lock:
            self.dispatcher.runs = tuple(other for other in self.dispatcher.runs if other is not run)
            self._leave()
        run.done.set()
        run.progress.set()

    # Programs.

    def add_programs(self, programs: Sequence[object]) -> None:
        """Before the start: every life of a chip begins with these."""
        for given in programs:
            program = as_program(given)
            if program is not None:
                self.dispatcher.programs = {**self.dispatcher.programs, program.digest: program}
                self._bindings[program.digest] = Binding(program, self.book)

    def register(self, given: object) -> Registration:
        """Make a program known on every chip, or, if one refuses it, on none. Again is harmless."""
        self._check_outside("register")
        self._check_ready()
        program = as_program(given)
        if program is None:
            raise WrongArity(f"program is a {type(given).__name__}; expected a program")
        if program.digest not in self._bindings:

            def ask(on_reply: Callable[[Any], None], on_error: Callable[[ChipbusError], None]) -> None:
                self.dispatcher.register(program, lambda e: on_reply(None) if e is None else on_error(e))

            self._ask(f"register {program.name}", ask)
            self._bindings[program.digest] = Binding(program, self.book)
        return Registration(program.name, program.digest, program.abi_fingerprint)

    def unregister(self, given: object) -> None:
        """Forget a program everywhere, after the runs accepted so far. Raises ``UnknownProgram``."""
        self._check_outside("unregister")
        self._check_ready()
        digest = self.binding(given).program.digest
        del self._bindings[digest]
        self._settle_runs()
        self._ask("unregister", lambda on_reply, _: self.dispatcher.unregister(digest, on_reply))

    @property
    def programs(self) -> tuple[Program, ...]:
        """Everything registered."""
        return tuple(binding.program for binding in self._bindings.values())

    # Tensors.

    def alloc_tensor(
        self, shape: Sequence[int], dtype: str, init: NDArray[Any] | None = None, worker_id: int = 0
    ) -> DeviceTensor:
        """A tensor on one chip, of zeros or with the values of ``init``."""
        self._check_outside("alloc_tensor")
        self._check_ready()
        self._check_worker(worker_id)
        dtype, extents = check_dtype(dtype, "alloc_tensor"), check_shape(shape, "alloc_tensor")
        value = None if init is None else self._value(init, dtype, extents, "alloc_tensor, init")
        tensor = self.book.make(dtype, extents, worker_id)
        self._check_free_memory(tensor)
        self._alloc(tensor, TensorSpec(tensor.address, dtype, extents), value)
        return tensor

    def alloc_weights(self, source: str, dtype: str, fingerprint: str = "", worker_id: int = 0) -> DeviceTensor:
        """A checkpoint directory's weights on one chip; ``fingerprint`` as in ``TensorSpec``."""
        self._check_outside("alloc_weights")
        self._check_ready()
        self._check_worker(worker_id)
        tensor = self.book.make(check_dtype(dtype, "alloc_weights"), (), worker_id)
        self._alloc(tensor, TensorSpec(tensor.address, tensor.dtype, (), source, fingerprint), None)
        return tensor

    def free_tensor(self, tensor: DeviceTensor) -> None:
        """Free a tensor, after the runs accepted so far. Raises ``InvalidArgs`` if it is another worker's, or freed."""
        self._check_outside("free_tensor")
        self._check_ready()
        self._check_tensor(tensor, "free_tensor")
        if not self.book.closed(tensor):
            return  # its chip has died since
        self._settle_runs()
        self._command("free_tensor", tensor.worker_id, FreeTensor(tensor.address))

    def copy_to(self, tensor: DeviceTensor, array: NDArray[Any]) -> None:
        """Overwrite a tensor with a host array, after the runs accepted so far."""
        self._check_outside("copy_to")
        self._check_ready()
        self._check_tensor(tensor, "copy_to")
        self.book.check(tensor, "copy_to")
        value = self._value(array, tensor.dtype, tensor.shape, "copy_to")
        self._settle_runs()
        self._command("copy_to", tensor.worker_id, CopyTo(tensor.address, value))

    def copy_from(self, tensor: DeviceTensor) -> NDArray[Any]:
        """A tensor's values, after the runs accepted so far; bfloat16 comes as float32."""
        self._check_outside("copy_from")
        self._check_ready()
        self._check_tensor(tensor, "copy_from")
        self.book.check(tensor, "copy_from")
        self._check_size(tensor.nbytes, "copy_from")
        self._settle_runs()
        reply = self._command("copy_from", tensor.worker_id, CopyFrom(tensor.address))
        assert isinstance(reply, Copied)
        return reply.value.numpy().copy()

    def alloc_stacked_tensor(self, host: NDArray[Any], worker_ids: Sequence[int]) -> StackedTensor:
        """One slice along the first axis per chip; all of them are sent at once. If one fails, none is left."""
        self._check_outside("alloc_stacked_tensor")
        self._check_ready()
        if isinstance(worker_ids, str | bytes) or not isinstance(worker_ids, Sequence):
            raise WrongArity(f"worker_ids is {worker_ids!r}; expected a sequence of chip numbers")
        for worker in worker_ids:
            self._check_worker(worker)
        if not worker_ids or len(set(worker_ids)) != len(worker_ids):
            raise InvalidArgs(f"worker_ids are {list(worker_ids)}; expected at least one, all different")
        if not isinstance(host, np.ndarray):
            raise WrongArity(f"alloc_stacked_tensor: {type(host).__name__} given; expected a numpy array")
        if host.ndim < 2 or host.shape[0] != len(worker_ids):
            raise InvalidArgs(
                f"alloc_stacked_tensor: shape is {list(host.shape)}; expected {len(worker_ids)} slices along axis 0"
            )
        dtype = check_dtype(host.dtype, "alloc_stacked_tensor")
        self._check_size(host[0].nbytes, "alloc_stacked_tensor")
        shards = [self.book.make(dtype, host.shape[1:], worker) for worker in worker_ids]
        self._check_free_memory(*shards)
        errors: list[ChipbusError] = []
        pending = [
            self._begin(
                "alloc_stacked_tensor",
                self._allocation(shard, TensorSpec(shard.address, dtype, shard.shape), Arg.of(host[i], dtype)),
            )
            for i, shard in enumerate(shards)
        ]
        made = []
        for shard, question in zip(shards, pending, strict=True):
            try:
                question.answer()
                made.append(shard)
            except ChipbusError as error:
                errors.append(error)
        if errors:
            for shard in made:
                self.free_tensor(shard)
            raise errors[0]
        return StackedTensor(tuple(shards))

    def free_stacked_tensor(self, stacked: StackedTensor) -> None:
        """Free every shard. One that cannot be freed does not keep the others; its error is raised at the end."""
        self._check_stacked(stacked, "free_stacked_tensor")
        errors: list[ChipbusError] = []
        for shard in stacked.shards:
            try:
                self.free_tensor(shard)
            except ChipbusError as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def copy_stacked_from(self, stacked: StackedTensor) -> NDArray[Any]:
        """The shards' values, stacked along a first axis in their order."""
        self._check_stacked(stacked, "copy_stacked_from")
        return np.stack([self.copy_from(shard) for shard in stacked.shards])

    def committed_device_memory(self, worker_id: int = 0) -> int:
        """Bytes one chip holds in tensors and weights, scratch included, as of the last command that ended."""
        self._check_worker(worker_id)
        return self.dispatcher.lanes[worker_id].committed_bytes

    # Life.

    def start(self, start_processes: Callable[[], None]) -> None:
        """Start, and wait until every chip has every program. Raises what went wrong; then only ``close`` is useful."""
        self.state = WorkerState.STARTING
        try:
            start_processes()
            pending = [
                self._begin("start", lambda ok, bad, w=worker: self.dispatcher.when_ready(w, _either(ok, bad)))  # type: ignore[misc]
                for worker in range(self.num_workers)
            ]
            for question in pending:
                question.answer()
        except BaseException:
            self.state = WorkerState.FAILED
            raise
        with self._lock:
            if self.state is WorkerState.STARTING:
                self.state = WorkerState.READY

    def failed(self, error: ChipbusError) -> None:
        """The processes are gone, or are being stopped: nothing that waits may wait on. Called on the bus thread."""
        with self._lock:
            self._death = self._death or error
            if self.state in (WorkerState.STARTING, WorkerState.READY):
                self.state = WorkerState.FAILED
            waiting, self._open = self._open, {}
            while self._queue:
                self._active += 1
                self._queue.popleft().set()
        for end in waiting.values():
            end(error)

    def close(self, stop_processes: Callable[[], Any]) -> Any:
        """Drain, free, stop; what ``stop_processes`` returns. Again: the same; meanwhile: wait for the one under way.

        Raises ``InvalidArgs`` inside a callback of this worker, which it would wait for.
        """
        self._check_process()
        self._check_outside("close")
        with self._lock:
            closing = self._closing
            if closing is None:
                self._closing = mine = Latch()
                if self.state is not WorkerState.CLOSED:
                    self.state = WorkerState.FAILED if self._death is not None else WorkerState.DRAINING
                while self._queue:
                    self._active += 1
                    self._queue.popleft().set()
        if closing is not None:
            self.wait(closing, None)
            if self._close_error is not None:
                raise self._close_error
            return stop_processes()  # idempotent: its report
        self._close_error = None
        try:
            if self.state is WorkerState.DRAINING:
                self._drain()
            report = stop_processes()
            self.state = WorkerState.CLOSED
        except BaseException as error:
            self._close_error = error
            raise
        else:
            return report
        finally:
            with self._lock:
                self._closing = None  # so that a failed close can be tried again
            mine.set()

    def _drain(self) -> None:
        """Let accepted runs end, then give back what chips hold, all under one deadline."""
        clock = self.dispatcher.ctx.clock
        deadline_ns = clock.now_ns() + int(1e9 * self.settings.close_timeout_s)

        def left_s() -> float:
            return max(0.0, (deadline_ns - clock.now_ns()) / 1e9)

        for run in self.dispatcher.runs:
            if not self.wait(run.done, left_s()):
                self._post(
                    lambda: self.dispatcher.fail_all(EngineClosed("the worker was closed while the run went on"))
                )
                return
        pending = []
        for tensor in self.book.live():
            self.book.closed(tensor)
            free = partial(self.dispatcher.free_quietly, tensor)
            pending.append(self._begin("close", lambda ok, _, free=free: free(ok)))  # type: ignore[misc]
        for question in pending:  # a chip that does not answer is stopped all the same
            self.wait(question.ended, left_s())

    # Questions to the bus thread.

    def _ask(self, what: str, ask: Ask) -> Any:
        return self._begin(what, ask).answer()

    def _begin(self, what: str, ask: Ask) -> Question:
        question = Question(what, self.wait, 2 * self.settings.start_timeout_s + self.settings.run_timeout_s)
        with self._lock:
            if self._death is not None:
                raise self._death
            self._open[question] = question.failed

        def ended(_: object) -> None:
            self._open.pop(question, None)

        def on_reply(reply: Any) -> None:
            ended(question)
            question.answered(reply)

        def on_error(error: ChipbusError) -> None:
            ended(question)
            question.failed(error)

        self._post(lambda: ask(on_reply, on_error))
        return question

    def _command(self, what: str, worker: int, message: object) -> Any:
        return self._ask(what, lambda ok, bad: self.dispatcher.command(worker, message, ok, bad))

    def _alloc(self, tensor: DeviceTensor, spec: TensorSpec, value: Arg | None) -> None:
        self._ask("alloc_tensor", self._allocation(tensor, spec, value))

    def _allocation(self, tensor: DeviceTensor, spec: TensorSpec, value: Arg | None) -> Ask:
        return lambda ok, bad: self.dispatcher.alloc(tensor, spec, value, ok, bad)

    def _settle_runs(self) -> None:
        """Wait for the runs accepted so far: operations on tensors take their turn behind them."""
        for run in self.dispatcher.runs:
            self.wait(run.done, None)

    # Checks.

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise EngineClosed(
                f"this worker belongs to process {self._pid}; {os.getpid()} is a forked copy and must make its own"
            )

    def _check_ready(self) -> None:
        self._check_process()
        if self._death is not None and self.state is WorkerState.FAILED:
            raise self._death
        if self.state is not WorkerState.READY:
            raise EngineClosed(f"this worker is {self.state.value}; only a ready one takes work")

    @contextmanager
    def _in_callback(self) -> Iterator[None]:
        self.inside.callback = True
        try:
            yield
        finally:
            self.inside.callback = False

    def _check_outside(self, what: str) -> None:
        if getattr(self.inside, "callback", False):
            raise InvalidArgs(
                f"{what} is called from inside a callback of this worker, which it would have to wait for;"
                " an orchestration has the verbs of its orchestrator"
            )

    def _wait_outside(self, event: Latch, timeout_s: float | None) -> bool:
        if not event.is_set():
            self._check_outside("waiting for a run")
        return self.wait(event, timeout_s)

    def _check_worker(self, worker: object) -> None:
        if type(worker) is not int or not 0 <= worker < self.num_workers:
            raise InvalidArgs(f"worker_id is {worker!r}; expected a chip's number, 0 to {self.num_workers - 1}")

    def _check_tensor(self, tensor: object, what: str) -> None:
        if not isinstance(tensor, DeviceTensor):
            raise WrongArity(f"{what}: {type(tensor).__name__} given; expected a tensor of this worker")

    def _check_stacked(self, stacked: object, what: str) -> None:
        if not isinstance(stacked, StackedTensor):
            raise WrongArity(f"{what}: {type(stacked).__name__} given; expected a stacked tensor of this worker")

    def _check_size(self, nbytes: int, what: str) -> None:
        if nbytes > MAX_COPY_BYTES:
            raise InvalidArgs(f"{what}: {nbytes:,} bytes; at most {MAX_COPY_BYTES:,} travel to or from a chip at once")

    def _check_free_memory(self, *tensors: DeviceTensor) -> None:
        needed = sum(tensor.nbytes for tensor in tensors)
        if self.settings.checks_memory and needed > MAX_COPY_BYTES and needed > (free := available_bytes()):
            raise MemoryExhausted(f"{', '.join(map(str, tensors))}: {needed:,} bytes asked for, {free:,} are free")

    def _value(self, array: object, dtype: str, shape: tuple[int, ...], where: str) -> Arg:
        checked = check_array(array, dtype, shape, where)
        self._check_size(checked.nbytes, where)
        return Arg.of(checked, dtype)

    def _resolved(self, config: RunConfig) -> tuple[RingSizes, LaunchConfig | None]:
        """Sizes for the run's own graph, and what its chips are told: nothing where nothing was asked for."""
        sizes = resolve_rings(config.rings, self.settings.rings)
        if sizes != RingSizes():
            return sizes, LaunchConfig(
                task_window=sizes.task_window, heap=sizes.heap, dep_pool=sizes.dep_pool, timeline=config.timeline
            )
        return sizes, LaunchConfig(timeline=True) if config.timeline else None


def _either(
    on_reply: Callable[[Any], None], on_error: Callable[[ChipbusError], None]
) -> Callable[[ChipbusError | None], None]:
    return lambda error: on_reply(None) if error is None else on_error(error)
