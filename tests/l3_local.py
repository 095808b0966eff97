"""An L3 worker in one process, on a virtual clock: all of it is real, but its chips only add numbers.

Faults are told to chips by what they are doing, so that each can be met in each state.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import attrs
import numpy as np
from numpy.typing import NDArray

from chipbus.actors.chip import ChipActor
from chipbus.actors.l3.core import CoreSettings, L3Core
from chipbus.actors.l3.dispatcher import Dispatcher, DispatcherSettings
from chipbus.actors.l3.latch import Latch
from chipbus.actors.messages.launching import ChipReportRequest
from chipbus.actors.messages.tree import Condemn, GroupLost
from chipbus.actors.tree_actor import TreeEvents
from chipbus.bus import Actor, Call, LocalSystem, Ready, handles
from chipbus.errors import CoreException, DeadlineExceeded, EngineClosed, KernelError, MemoryExhausted
from chipbus.kernels import Arg, Completion, Direction, Dispatch, Param, Program, TensorSpec
from chipbus.topology.rings import RingRequest

__all__ = ["ADD", "BOOM", "BUMP", "FILL", "MIX", "LocalWorker", "Plan", "vector"]

LAUNCH_NS = 1_000_000


def _program(name: str, *params: Param) -> Program:
    return Program(name, f"test.{name}", (), params)


def _either(name: str, *shape: int | str, direction: Direction = Direction.IN) -> Param:
    return Param(name, "float32", shape, direction, resident=None)


ADD = _program("add", _either("a", "N"), _either("b", "N"), _either("out", "N", direction=Direction.OUT))
"""out = a + b."""
BUMP = _program("bump", _either("x", "N", direction=Direction.INOUT))
"""x += 1."""
FILL = _program("fill", _either("x", "N", direction=Direction.OUT), _either("value"))
"""x = value."""
MIX = _program("mix", _either("x", "N", direction=Direction.INOUT), _either("a", "N"))
"""x = (2 x + a) mod 1009: the order of mixes shows in the result."""
BOOM = _program("boom", _either("x", "N", direction=Direction.INOUT))
"""Raises."""


def vector(*values: float) -> NDArray[np.float32]:
    return np.array(values, np.float32)


class AddingChip:
    """A ``Chip`` that runs the programs above."""

    def __init__(self) -> None:
        self.programs: dict[bytes, Program] = {}
        self.residents: dict[int, NDArray[Any]] = {}
        self.launched: list[str] = []

    @property
    def resident_bytes(self) -> int:
        return sum(array.nbytes for array in self.residents.values())

    @property
    def progress(self) -> int:
        return len(self.launched)

    rings = ()
    is_uniform = False  # it runs no model

    def register(self, program: Program) -> None:
        if not program.kind.startswith("test."):
            raise KernelError(f"program {program.name} is of kind {program.kind!r}")
        self.programs[program.digest] = program

    def unregister(self, digest: bytes) -> None:
        del self.programs[digest]

    def alloc(self, tensor: TensorSpec, report: object = None) -> None:
        assert tensor.resident not in self.residents, "an address is never used twice"
        self.residents[tensor.resident] = np.zeros(
            tensor.shape, "float32" if tensor.dtype == "bfloat16" else tensor.dtype
        )

    def free(self, resident: int) -> None:
        if resident not in self.residents:
            raise KernelError(f"resident {resident} is unknown or was freed")
        del self.residents[resident]

    def copy_to(self, resident: int, value: Arg) -> None:
        self.residents[resident][...] = value.numpy()

    def copy_from(self, resident: int) -> Arg:
        return Arg.of(self.residents[resident])

    def launch(self, dispatch: Dispatch, *, digest: bool = False) -> Completion:
        program = self.programs[dispatch.program]
        self.launched.append(program.name)
        arrays = []
        for param, arg in zip(program.params, dispatch.args, strict=True):
            if arg.resident:
                if arg.resident not in self.residents:
                    raise KernelError(f"resident {arg.resident} is unknown or was freed")
                arrays.append(self.residents[arg.resident])
            else:
                arrays.append(
                    np.zeros(arg.shape, np.float32) if param.direction is Direction.OUT else arg.numpy().copy()
                )
        if program.name == "boom":
            raise CoreException("the in-core function raised")
        with np.errstate(all="ignore"):  # memory that was never written may hold anything
            self._compute(program.name, arrays)
        outputs = tuple(
            Arg.of(array)
            for param, arg, array in zip(program.params, dispatch.args, arrays, strict=True)
            if param.direction is not Direction.IN and not arg.resident
        )
        return Completion(dispatch_id=dispatch.dispatch_id, outputs=outputs, device_ns=LAUNCH_NS)

    @staticmethod
    def _compute(name: str, arrays: list[NDArray[Any]]) -> None:
        if name == "add":
            arrays[2][...] = arrays[0] + arrays[1]
        elif name == "bump":
            arrays[0] += 1
        elif name == "mix":
            arrays[0][...] = (2 * arrays[0] + arrays[1]) % 1009
        else:
            arrays[0][...] = arrays[1]

    def close(self) -> None:
        self.residents.clear()


@attrs.define
class Plan:
    """What a chip does wrong: ``fault`` at the ``nth`` command of a ``kind`` ("register", "alloc", "launch", …)."""

    fault: str  # fail, hang, die, slow, corrupt, refuse_alloc, lost, stop, delayed
    kind: str
    nth: int = 1
    seen: int = 0

    def strikes(self, kind: str) -> bool:
        """Whether this command is the one; at most once."""
        self.seen += kind == self.kind
        return kind == self.kind and self.seen == self.nth


class PlannedChip(ChipActor):
    """A chip worker that goes wrong as told. What it did is shared by all its lives."""

    def __init__(self, worker: LocalWorker, name: str) -> None:
        super().__init__({"device": "null:0", "threads": 1, "inline": True})
        self.worker = worker
        self.name = name
        self.is_stuck = False
        self.is_stopped = False
        self.chip = AddingChip()

    def open_chip(self) -> Any:
        return self.chip

    def _submit(self, call: Call, job: Callable[[], Any], kind: str, entries: Any) -> None:
        if self.is_stuck or self.is_stopped:
            return
        self.worker.commands[self.name].append(kind)
        plan = self.worker.plans.get(self.name)
        fault = plan.fault if plan is not None and plan.strikes(kind) else ""
        if fault in ("hang", "stop"):
            self.is_stuck, self.is_stopped = True, fault == "stop"
            self._running = (f"{kind} (stuck)", self.ctx.clock.now_ns())
            return
        if fault == "die":
            self.is_stuck = True
            self.ctx.after(0.0, lambda: self.worker.kill(self.name, "exit code 13"))
            return
        if fault in ("slow", "delayed"):
            self.ctx.after(3.0, lambda: ChipActor._submit(self, call, job, kind, entries))
            return
        super()._submit(_Deaf(call) if fault == "lost" else call, self._spoilt(job, fault), kind, entries)  # type: ignore[arg-type]

    def _spoilt(self, job: Callable[[], Any], fault: str) -> Callable[[], Any]:
        def spoilt() -> Any:
            if fault == "refuse_alloc":
                raise MemoryExhausted("injected: no memory")
            if fault == "fail":
                raise CoreException("injected: the command failed")
            value = job()
            if fault == "corrupt" and hasattr(value, "completions"):
                return attrs.evolve(value, completions=tuple(attrs.evolve(c, outputs=()) for c in value.completions))
            return value

        return spoilt

    @handles(ChipReportRequest)
    def _report(self, message: ChipReportRequest, call: Call) -> None:
        if not self.is_stopped:
            super()._report(message, call)


class _Deaf:
    """A reply port whose answers are lost on the way."""

    def __init__(self, call: Call) -> None:
        self.trace_id = call.trace_id

    def reply(self, _: object) -> None: ...

    def fail(self, _: object) -> None: ...


class Keeper(Actor):
    """Stands in for the supervisor: replaces dead chips, kills condemned ones, gives up after ``max_restarts``."""

    def __init__(self, worker: LocalWorker) -> None:
        self.worker = worker
        self.deaths: Counter[str] = Counter()

    @handles(Ready)
    def _ready(self, _message: Ready, _call: Call | None) -> None: ...

    @handles(Condemn)
    def _condemn(self, message: Condemn, _call: Call | None) -> None:
        if self.worker.system.incarnation(message.child) == message.incarnation:
            self.ctx.after(0.0, lambda: self.worker.kill(message.child, "signal 9 (SIGKILL)"))

    def died(self, name: str) -> None:
        self.deaths[name] += 1
        if self.deaths[name] > self.worker.max_restarts:
            self.ctx.tell("host", GroupLost(name, "died too often"))
        else:
            self.ctx.after(0.05, lambda: self.worker.start_chip(name))


class InlineSubs:
    """Sub workers on the virtual clock: a callable runs at once; one that returns a float takes so many seconds."""

    threads: tuple[threading.Thread, ...] = ()

    def __init__(self, count: int, actor: Dispatcher, inside: threading.local) -> None:
        self.count = self.free = count
        self._actor = actor
        self._inside = inside

    @property
    def has_room(self) -> bool:
        return self.free > 0

    def submit(self, call: Callable[[], object], on_done: Callable[[BaseException | None], None]) -> Callable[[], None]:
        self.free -= 1
        is_over = False
        error: BaseException | None = None
        value: object = None
        self._inside.callback = True
        try:
            value = call()
        except BaseException as raised:  # noqa: BLE001 (as sub workers do)
            error = raised
        self._inside.callback = False

        def leave() -> bool:
            nonlocal is_over
            was_over, is_over = is_over, True
            self.free += not was_over
            return not was_over

        def end() -> None:
            if leave():
                on_done(error)

        def give_up() -> None:
            leave()

        self._actor.ctx.after(value if isinstance(value, float) else 0.0, end)
        return give_up

    def close(self) -> None: ...


class LocalWorker:
    """The core of an L3 worker with its verbs, ``close`` and everything around it."""

    def __init__(
        self,
        *programs: Program,
        chips: int = 1,
        seed: int = 0,
        plans: dict[str, Plan] | None = None,
        rings: RingRequest | None = None,
        depth: int = 2,
        sub_workers: int = 1,
        subs: dict[str, Callable[..., object]] | None = None,
        track_war: bool = False,
        max_restarts: int = 3,
        command_timeout_s: float = 5.0,
        start: bool = True,
    ) -> None:
        self.system = LocalSystem(seed)
        self.plans = plans or {}
        self.max_restarts = max_restarts
        self.commands: dict[str, list[str]] = {f"chip.{worker}": [] for worker in range(chips)}
        self.chips: dict[str, PlannedChip] = {}
        self.is_stopping = False
        self.stops = 0
        settings = CoreSettings(
            depth=depth,
            rings=rings,
            subs=subs or {},
            track_war=track_war,
            run_timeout_s=10.0,
            start_timeout_s=20.0,
            close_timeout_s=5.0,
            checks_memory=False,
        )
        dispatching = DispatcherSettings(
            devices=tuple(f"null:{worker}" for worker in range(chips)),
            depth=depth,
            run_timeout_s=10.0,
            command_timeout_s=command_timeout_s,
        )
        self.core = L3Core(
            settings,
            lambda core: Dispatcher(
                dispatching,
                core.book,
                lambda actor: InlineSubs(sub_workers, actor, core.inside),
                core.finished,
                core.failed,
            ),
            self.wait,
        )
        self.core.bind_post(lambda callback: self.core.dispatcher.ctx.call_soon_threadsafe(callback))
        self.core.add_programs(programs or (ADD, BUMP, FILL, MIX, BOOM))
        self.dead: list[BaseException] = []
        self.core.dispatcher.events = TreeEvents(
            on_bound=lambda: None,
            on_ready=lambda: None,
            on_dead=self._died,
            on_progress=lambda _: None,
        )
        self.keeper = Keeper(self)
        if start:
            self.core.start(self.start_processes)

    # The verbs under test.

    def __getattr__(self, name: str) -> Any:
        return getattr(self.core, name)

    def close(self) -> str:
        return str(self.core.close(self.stop_processes))

    def launched(self, worker: int = 0) -> list[str]:
        """Names of the programs the chip's present life has run, in order."""
        return self.chips[f"chip.{worker}"].chip.launched

    # What the process tree does in a real worker.

    def start_processes(self) -> None:
        self.system.spawn("supervisor", self.keeper, connect=("host",))
        self.system.spawn("host", self.core.dispatcher)
        for name in self.commands:
            self.start_chip(name)

    def start_chip(self, name: str) -> None:
        if self.is_stopping:
            return
        self.chips[name] = PlannedChip(self, name)
        self.system.spawn(name, self.chips[name], connect=("host", "supervisor"))

    def kill(self, name: str, reason: str) -> None:
        if self.system.incarnation(name):
            self.system.kill(name, reason)
            self.keeper.died(name)

    def stop_processes(self) -> str:
        self.is_stopping = True
        self.stops += 1
        if self.system.incarnation("host"):
            self.core.dispatcher.fail_all(EngineClosed("the worker was closed while the run went on"))
            lanes = self.core.dispatcher.lanes
            for name in self.commands:
                if self.system.incarnation(name):
                    self.system.kill(name, "stopped")
            self.system.run_until(lambda: not any(lane._in_flight for lane in lanes))
            self.system.kill("host", "stopped")
            self.system.kill("supervisor", "stopped")
        return f"stopped {os.getpid()}"

    def _died(self, error: Any) -> None:
        self.dead.append(error)
        self.core.dispatcher.fail_all(error)

    def wait(self, event: Latch, timeout_s: float | None) -> bool:
        """Waiting is letting the others work."""
        limit_s = 10_000.0 if timeout_s is None else timeout_s
        try:
            self.system.run_until(event.is_set, limit_s)
        except DeadlineExceeded:
            assert timeout_s is not None, "something waits for ever"
            return False
        return True

    def pass_time(self, seconds: float) -> None:
        until_ns = self.system.clock.now_ns() + int(seconds * 1e9)
        self.system.run_until(lambda: self.system.clock.now_ns() >= until_ns, seconds)

    # What must hold when nothing is going on.

    def check_nothing_leaks(self) -> None:
        """No run, question, launch, place or sub worker is held; no handler raised."""
        core, dispatcher = self.core, self.core.dispatcher
        self.pass_time(0.1)  # what was posted last has its turn
        assert dispatcher.runs == ()
        assert core._open == {}
        assert core._active == 0
        assert not core._queue
        assert dispatcher._when_ready == {}
        for lane in dispatcher.lanes:
            assert lane._in_flight == {}
            assert lane._launches == 0
        assert dispatcher.subs.free == dispatcher.subs.count  # type: ignore[attr-defined]
        assert dispatcher.ctx.counters().get("handler_failures", 0) == 0
