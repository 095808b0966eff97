"""The L3 worker as a host application uses it: constructor, verbs, close. Its chips are processes of their own.

Owns: the process tree and the core that works on it. Any thread.

    with L3Worker([prefill, decode], devices=["cpu:0"]) as worker:
        cache = worker.alloc_tensor((2, 1024), "float32")
        worker.run(prefill, tokens, cache)
        worker.run(decode, token, cache)          # the cache stayed on the chip
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import attrs
import msgspec
import numpy as np
from numpy.typing import NDArray

from ...bus import Progress
from ...errors import ConfigError, WrongArity
from ...kernels.faults import Fault
from ...kernels.memory import available_bytes
from ...kernels.program import Program
from ...kernels.tile_source import is_loading
from ...kernels.tiles import TileProgram
from ...topology.rings import RingRequest, check_reservation
from ..boot import HOST, Boot, ChildSpec
from ..manifest import write_manifest
from ..messages.tree import ChildRecord, CloseReport
from ..process_tree import ProcessTree, TreeSettings, close_when_forgotten
from .core import CoreSettings, L3Core, WorkerState
from .dispatcher import Dispatcher, DispatcherSettings
from .latch import Latch
from .programs import Orchestration, Registration, check_devices, check_programs, check_subs
from .runs import RunConfig, RunHandle
from .subs import ThreadSubs
from .tensors import DeviceTensor, StackedTensor, check_dtype, check_shape, host_dtype

__all__ = ["L3Worker"]

THREAD_JOIN_S = 0.5  # for an idle sub worker to end
AnyProgram = Program | TileProgram | Orchestration


class L3Worker:
    """Runs any number of programs on the chips of this host; ready when the constructor returns.

    Programs share tensors that stay on the chips between runs. Any thread may call it. Raises ``ConfigError`` and
    ``InvalidArgs`` before anything is started; if starting fails, the child's own error, and nothing is left.
    """

    def __init__(
        self,
        programs: AnyProgram | Sequence[AnyProgram],
        devices: Sequence[str] = ("cpu:0",),
        *,
        threads: int | None = None,
        rings: RingRequest | None = None,
        depth: int = 2,
        sub_workers: int = 1,
        subs: Mapping[str, Callable[..., object]] | None = None,
        track_war: bool = False,
        run_timeout_s: float = 600.0,
        stall_timeout_s: float = 10.0,
        start_timeout_s: float = 300.0,
        close_timeout_s: float = 10.0,
        record: Path | None = None,
        seed: int = 0,
        faults: Mapping[int, Sequence[Fault]] | None = None,
        max_restarts: int = 5,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> None:
        """The worker id of a chip is its position in ``devices``.

        threads:       compute threads per chip; None: the cores of this machine, shared evenly
        rings:         ring sizes where a run asks for none of its own
        depth:         runs accepted at once (the next ``submit`` waits), and launch messages under way per chip
        sub_workers:   threads for host callables
        subs:          host callables that orchestrations submit by name
        track_war:     have tasks also wait for those that read what they overwrite
        run_timeout_s: for one launch or host callable; a chip that takes longer is replaced
        stall_timeout_s: without an answer from a process, or a task ended on a busy chip, until it is replaced
        faults:        what goes wrong on purpose, by worker id; null chips only
        max_restarts:  deaths of one chip within 30 s after which it stays down
        """
        if is_loading():
            raise ConfigError(
                "this file is being read for one of its programs; start workers under if __name__ == '__main__'"
            )
        given = check_programs(programs)
        names = check_devices(devices, given)
        callables = check_subs(subs or {}, given)
        for name, value, least in (
            ("depth", depth, 2),
            ("sub_workers", sub_workers, 1),
            ("max_restarts", max_restarts, 0),
        ):
            _check_whole(name, value, least)
        if threads is not None:
            _check_whole("threads", threads, 1)
        for name, seconds in (
            ("run_timeout_s", run_timeout_s),
            ("stall_timeout_s", stall_timeout_s),
            ("start_timeout_s", start_timeout_s),
            ("close_timeout_s", close_timeout_s),
        ):
            _check_seconds(name, seconds)
        self._faults = _check_faults(faults or {}, names)
        computes = not names[0].startswith("null")
        self._devices = names
        self._threads = threads or max(1, len(os.sched_getaffinity(0)) // len(names))
        self._max_restarts = max_restarts
        self._stall_timeout_s = stall_timeout_s
        self._record = None if record is None else Path(record)
        self._only = given[0] if len(given) == 1 else None
        settings = CoreSettings(
            depth=depth,
            rings=rings,
            subs=callables,
            track_war=track_war,
            run_timeout_s=run_timeout_s,
            start_timeout_s=start_timeout_s,
            close_timeout_s=close_timeout_s,
            checks_memory=computes,
        )
        dispatching = DispatcherSettings(
            devices=names, depth=depth, run_timeout_s=run_timeout_s, command_timeout_s=start_timeout_s
        )
        self._core = core = L3Core(
            settings,
            lambda core: Dispatcher(
                dispatching,
                core.book,
                lambda actor: ThreadSubs(sub_workers, actor.ctx.call_soon_threadsafe, core.inside),
                core.finished,
                core.failed,
            ),
            Latch.wait,
        )
        if computes:
            check_reservation(core.rings, available_bytes(), len(names))
        core.add_programs(given)
        self._start_timeout_s, self._close_timeout_s, self._seed = start_timeout_s, close_timeout_s, seed
        tree = TreeSettings(
            what="worker",
            start_timeout_s=start_timeout_s,
            close_timeout_s=close_timeout_s,
            stall_timeout_s=stall_timeout_s,
            seed=seed,
            record=self._record,
        )
        self._tree = ProcessTree(core.dispatcher, tree, on_progress)
        core.bind_post(self._tree.post)
        try:
            core.start(self._start)
        except BaseException:
            self._core.close(self._stop)
            raise
        self._finalizer = close_when_forgotten(self, self._tree)

    def _start(self) -> None:
        if self._record is not None:
            settings = {"devices": ", ".join(self._devices), "threads": self._threads, "seed": self._seed}
            write_manifest(self._record, settings)
        self._tree.start(self._boot)
        self._core.enter_bus_thread()

    def _boot(self, run_dir: Path) -> Boot:
        return Boot(
            run_dir=str(run_dir),
            host_pid=os.getpid(),
            children=tuple(self._chip(worker, device) for worker, device in enumerate(self._devices)),
            max_restarts=self._max_restarts,
            stall_timeout_s=self._stall_timeout_s,
            close_timeout_s=self._close_timeout_s,
            record=None if self._record is None else str(self._record.absolute()),
            seed=self._seed,
        )

    def _chip(self, worker: int, device: str) -> ChildSpec:
        return ChildSpec(
            name=f"chip.{worker}",
            kind="chip",
            connect=(HOST,),
            preload="light" if device.startswith("null") else "torch",
            config={
                "device": device,
                "threads": self._threads,
                "faults": msgspec.to_builtins(self._faults.get(worker, ())),
            },
            start_timeout_s=self._start_timeout_s,
        )

    # Programs and runs.

    def register(self, program: Program | TileProgram) -> Registration:
        """Make a program known on every chip, or, if one refuses it, on none. Again is harmless."""
        return self._core.register(program)

    def unregister(self, program: Program | TileProgram | Registration) -> None:
        """Forget a program everywhere, after the runs accepted so far. Raises ``UnknownProgram``."""
        self._core.unregister(program)

    @property
    def programs(self) -> tuple[Program, ...]:
        """Everything registered."""
        return self._core.programs

    def __call__(self, *args: Any) -> Any:
        """``run`` of the program the worker was made for; ``WrongArity`` (a ``TypeError``) if there were several."""
        if self._only is None:
            names = ", ".join(program.name for program in self._core.programs)
            raise WrongArity(f"this worker has several programs ({names}); say which one: worker.run(program, …)")
        return self.run(self._only, *args)

    def run(self, program: Any, *args: Any, config: RunConfig | None = None, worker: int = 0) -> Any:
        """``submit``, and wait for the result."""
        return self._core.run(program, *args, config=config, worker=worker)

    def submit(self, program: Any, *args: Any, config: RunConfig | None = None, worker: int = 0) -> RunHandle:
        """Run a registered program on one chip, or an orchestration function ``(orchestrator, *args)``.

        The function runs here and now, in this thread, and submits tasks; what chips do goes on after this has
        returned. Runs take their turn; with ``depth`` of them under way this waits for the oldest. Raises what is wrong
        with the arguments, and what the function raises.
        """
        return self._core.submit(program, *args, config=config, worker=worker)

    # Tensors.

    def alloc_tensor(
        self, shape: Sequence[int], dtype: str, init: NDArray[Any] | None = None, worker_id: int = 0
    ) -> DeviceTensor:
        """A tensor that stays on one chip, of zeros or with the values of ``init`` (bfloat16: given as float32)."""
        return self._core.alloc_tensor(shape, dtype, init, worker_id)

    def alloc_weights(self, source: str, dtype: str, fingerprint: str = "", worker_id: int = 0) -> DeviceTensor:
        """A checkpoint directory's weights on one chip, for programs that take some."""
        return self._core.alloc_weights(source, dtype, fingerprint, worker_id)

    def free_tensor(self, tensor: DeviceTensor) -> None:
        """Free a tensor, after the runs accepted so far. A foreign or freed one is refused with ``InvalidArgs``."""
        self._core.free_tensor(tensor)

    def copy_to(self, tensor: DeviceTensor, array: NDArray[Any]) -> None:
        """Overwrite a tensor with an array of its shape, after the runs accepted so far."""
        self._core.copy_to(tensor, array)

    def copy_from(self, tensor: DeviceTensor) -> NDArray[Any]:
        """A tensor's values, after the runs accepted so far; bfloat16 comes as float32."""
        return self._core.copy_from(tensor)

    def alloc_stacked_tensor(self, host: NDArray[Any], worker_ids: Sequence[int]) -> StackedTensor:
        """Slice ``i`` along the first axis goes to chip ``worker_ids[i]``, all at once; all of them, or none."""
        return self._core.alloc_stacked_tensor(host, worker_ids)

    def free_stacked_tensor(self, stacked: StackedTensor) -> None:
        """Free every shard."""
        self._core.free_stacked_tensor(stacked)

    def copy_stacked_from(self, stacked: StackedTensor) -> NDArray[Any]:
        """The shards' values, stacked along the first axis."""
        return self._core.copy_stacked_from(stacked)

    def host_tensor(self, shape: Sequence[int], dtype: str) -> NDArray[Any]:
        """An array of zeros to pass to programs; any numpy array will do. bfloat16 is float32 on the host."""
        return np.zeros(check_shape(shape, "host_tensor"), host_dtype(check_dtype(dtype, "host_tensor")))

    def committed_device_memory(self, worker_id: int = 0) -> int:
        """Bytes one chip holds in tensors and weights, scratch included, as of the last command that ended."""
        return self._core.committed_device_memory(worker_id)

    # What is going on.

    @property
    def state(self) -> WorkerState:
        """NEW, STARTING, READY, DRAINING, CLOSED or FAILED."""
        return self._core.state

    def explain(self) -> str:
        """Every ring size and where it came from, one a line."""
        return self._core.rings.explain()

    def tree(self) -> tuple[ChildRecord, ...]:
        """The worker's processes as they are now: state, pid, restarts, how the last life ended."""
        return self._tree.records()

    # The end.

    def close(self) -> CloseReport:
        """Let accepted runs end, free tensors, stop every process; how each ended, and what was left (nothing).

        Twice or from several threads at once: one close, the same report. After one that failed: tried again. Inside an
        orchestration, a host callable or ``on_progress`` it is refused.
        """
        report = self._core.close(self._stop)
        assert isinstance(report, CloseReport)
        return report

    def _stop(self) -> CloseReport:
        report = self._tree.close()
        subs = getattr(self._core.dispatcher, "subs", None)
        if subs is None:
            return report
        subs.close()
        for thread in subs.threads:
            thread.join(THREAD_JOIN_S)
        left = tuple(f"thread {thread.name}" for thread in subs.threads)
        return attrs.evolve(report, left=(*report.left, *left))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _check_whole(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{name} is {value!r}; it must be an integer of at least {least}")


def _check_seconds(name: str, value: object) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value) or value <= 0:
        raise ConfigError(f"{name} is {value!r}; it must be a number of seconds above 0")


def _check_faults(faults: Mapping[int, Sequence[Fault]], devices: Sequence[str]) -> Mapping[int, Sequence[Fault]]:
    for worker in faults:
        if type(worker) is not int or not 0 <= worker < len(devices) or not devices[worker].startswith("null"):
            raise ConfigError(f"faults are given for worker {worker!r}; only null chips have any: {', '.join(devices)}")
    return faults
