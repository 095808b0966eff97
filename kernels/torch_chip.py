"""A chip that computes with torch on one torch device: its memory, its commands, and tile programs.

Owns: programs, resident tensors and weights, bound graphs and the heap they share (bounded). One thread.
"""

from __future__ import annotations

import hashlib
import time
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import KernelError, MemoryExhausted
from ..topology.rings import RingUse
from .arguments import check_arguments, check_copy, check_kind, check_tensor, find_program, find_resident
from .captures import Capture, Captures
from .chips import Report
from .dispatch import Arg, Completion, Dispatch, LaunchConfig, Usage
from .graph import TaskGraph
from .int8 import Int8Matrix
from .memory import weights_bytes
from .program import Direction, Param, Program, TensorSpec, nbytes
from .torch_executor import BoundGraph, HeapArenas, TaskCount
from .torch_kernels import Window, Workspace
from .weights import load_weights, pack, spec_of

__all__ = ["Executor", "Launch", "Runner", "TorchChip"]

E = TypeVar("E", bound="Executor")
R = TypeVar("R")

_MAX_GRAPHS = 64  # all buckets of the Qwen3 programs are 36


class Executor(Protocol):
    """A graph bound to memory: ``BoundGraph``, or another that runs the same graphs."""

    uses_heap: bool
    tasks: int
    weight_bytes: int
    """Of weights that a run reads, each once."""

    def busy_ns(self) -> tuple[int, ...]:
        """Per core, how long it has run tasks since it was started; empty where no core is counted."""
        ...

    def run(self, where: str) -> None:
        """Every task once. One that fails is a ``CoreException`` naming it, after ``where``."""
        ...

    def run_timed(self, where: str, began: int, synchronize: Callable[[], None]) -> tuple[list[int], list[int]]:
        """Likewise; (begin, end) of each task in ns after ``began``, in one list, and the core of each."""
        ...


class TorchChip(ABC):
    """A ``Chip`` on ``device``. ``runners``: how each kind of program is run, beside tile programs.

    ``check_numerics``: look at what every task wrote; a NaN is a ``CoreException`` naming task and tile.

    Equal dispatches on equal residents give equal bits, for the same threads.
    """

    def __init__(
        self,
        device: torch.device,
        runners: Mapping[str, Runner] | None = None,
        max_graphs: int = _MAX_GRAPHS,
        *,
        check_numerics: bool = False,
    ) -> None:
        self.device = device
        self.engine = "torch"
        self.is_uniform = False  # attention of a generated token is a call of its own
        self.check_numerics = check_numerics
        self._runners = {"tile": _run_tiles, **(runners or {})}
        self._max_graphs = max_graphs
        self._programs: dict[bytes, Program] = {}
        self._statics: dict[bytes, Mapping[str, Any]] = {}
        self._residents: dict[int, TensorSpec] = {}
        self._tensors: dict[int, Tensor] = {}
        self._weights: dict[int, Mapping[str, Any]] = {}
        self._weight_bytes: dict[int, int] = {}
        self._captures = Captures(max_graphs)
        self._graphs: OrderedDict[tuple[str, tuple[int, ...]], Executor] = OrderedDict()
        # Dispatches that were found right once, and hold nothing by value: run again, they need no further look.
        self._settled: dict[tuple[bytes, tuple[Arg, ...], LaunchConfig | None], Executor] = {}
        self.arenas = HeapArenas(self._new_memory)
        self._workspaces: dict[torch.dtype, Workspace] = {}
        self._count = TaskCount()
        self._is_open = True

    @property
    def resident_bytes(self) -> int:
        """See ``Chip.resident_bytes``; untouched pages of a tensor count too, although they take no memory yet."""
        kept = sum(tensor.nbytes for tensor in self._tensors.values()) + sum(self._weight_bytes.values())
        return kept + self.arenas.nbytes

    @property
    def progress(self) -> int:
        """See ``Chip.progress``."""
        return self._count.ended

    @property
    def num_graphs(self) -> int:
        """Bound graphs held now."""
        return len(self._graphs)

    @property
    def rings(self) -> tuple[RingUse, ...]:
        """See ``Chip.rings``."""
        return self._captures.rings

    def register(self, program: Program) -> None:
        """See ``Chip.register``."""
        self._check_open()
        check_kind(program, self._runners)
        self._captures.register(program)
        self._programs[program.digest] = program
        self._statics[program.digest] = dict(program.static)

    def unregister(self, digest: bytes) -> None:
        """See ``Chip.unregister``."""
        self._check_open()
        program = find_program(self._programs, digest, "unregister")
        self._captures.unregister(program)
        del self._programs[digest], self._statics[digest]
        self._keep_graphs(lambda key, _: not key[0].endswith(f"@{digest.hex()[:12]}"))

    def alloc(self, tensor: TensorSpec, report: Report | None = None) -> None:
        """See ``Chip.alloc``."""
        self._check_open()
        check_tensor(tensor, self._residents)
        if tensor.source:

            def counted(done: float, total: float) -> None:
                self._count.ended += 1
                if report is not None:
                    report(done, total)

            with torch.inference_mode():
                self._weights[tensor.resident], self._weight_bytes[tensor.resident] = self.load(tensor, counted)
        else:
            what = f"resident {tensor.resident} of {tensor.dtype} {list(tensor.shape)}"
            self._tensors[tensor.resident] = self._new_tensor(tensor.dtype, tensor.shape, what)
        self._residents[tensor.resident] = tensor

    def free(self, resident: int) -> None:
        """See ``Chip.free``; graphs bound to the resident go with it."""
        self._check_open()
        find_resident(self._residents, resident)
        for memory in (self._residents, self._tensors, self._weights, self._weight_bytes):
            memory.pop(resident, None)
        self._keep_graphs(lambda key, _: resident not in key[1])

    def copy_to(self, resident: int, value: Arg) -> None:
        """See ``Chip.copy_to``."""
        self._check_open()
        check_copy(find_resident(self._residents, resident), value)
        _fill(self._tensors[resident], value)

    def copy_from(self, resident: int) -> Arg:
        """See ``Chip.copy_from``."""
        self._check_open()
        spec = find_resident(self._residents, resident)
        check_copy(spec, None)
        return _value_of(spec.dtype, self._tensors[resident])

    def launch(self, dispatch: Dispatch, *, digest: bool = False) -> Completion:
        """See ``Chip.launch``; ``device_ns`` is the wall time of the kernels, digests not included."""
        self._check_open()
        settled = self._settled.get((dispatch.program, dispatch.args, dispatch.config))
        if settled is not None and not digest:
            with torch.inference_mode():
                where = f"dispatch {dispatch.dispatch_id} of {self._programs[dispatch.program].name}"
                _, usage = self.counted(settled, lambda: settled.run(where))
            return Completion(dispatch_id=dispatch.dispatch_id, device_ns=usage.run_ns, usage=usage)
        program = find_program(self._programs, dispatch.program, f"dispatch {dispatch.dispatch_id}")
        sizes = check_arguments(program, dispatch, self._residents)
        launch = Launch(self, program, dispatch, sizes)
        with torch.inference_mode():
            self._runners[program.kind](launch)
            self.synchronize()
            device_ns = time.perf_counter_ns() - launch.began
            digests = launch.digests() if digest else ()
        return Completion(
            dispatch_id=dispatch.dispatch_id,
            outputs=tuple(launch.outputs[param.name] for param in program.params if param.name in launch.outputs),
            device_ns=device_ns,
            digests=digests,
            task_times=np.array(launch.task_times, "<i8").tobytes(),
            task_cores=np.array(launch.task_cores, "<i2").tobytes(),
            graph=" ".join(launch.graphs),
            usage=launch.usage,
        )

    def describe(self, graph: str) -> str:
        """See ``Chip.describe``."""
        self._check_open()
        return self._captures.describe(graph)

    def close(self) -> None:
        """See ``Chip.close``."""
        self._is_open = False
        self._captures.clear()
        self.arenas.clear()
        for memory in (
            self._programs, self._statics, self._residents, self._tensors, self._weights, self._weight_bytes,
            self._graphs, self._settled, self._workspaces,
        ):  # fmt: skip
            memory.clear()

    def tensor(self, resident: int) -> Tensor:
        """The memory of a resident tensor, for programs and tests."""
        return self._tensors[resident]

    @abstractmethod
    def free_bytes(self) -> int:
        """Memory that can be allocated now."""

    def zeros(self, count: int) -> Tensor:
        """``count`` zero bytes of the device's memory."""
        return torch.zeros(count, dtype=torch.uint8, device=self.device)

    @abstractmethod
    def synchronize(self) -> None:
        """Return when everything queued on the device has ended."""

    def load(self, tensor: TensorSpec, report: Report | None) -> tuple[Mapping[str, Any], int]:
        """A checkpoint's weights by the names graphs bind them by, and the bytes they take."""
        spec = spec_of(tensor)
        weights = load_weights(spec, report, Int8Matrix.of if tensor.weights == "int8" else pack)
        return weights, weights_bytes(spec, tensor.weights)

    def bind(self, launch: Launch, capture: Capture, make: Callable[[Mapping[str, Any]], E]) -> E:
        """A captured graph on the dispatch's residents: the one bound before, or what ``make`` makes of their memory.

        Arguments of a tile program by value get memory of their own.
        """
        key = (capture.name, tuple(arg.resident for arg in launch.args.values()))
        graph = self._graphs.get(key)
        if graph is None:
            memory: dict[str, Any] = {}
            for param in launch.program.params:
                arg = launch.args[param.name]
                if arg.resident in self._weights:
                    memory |= self._weights[arg.resident]
                elif arg.resident:
                    memory[param.name] = self._tensors[arg.resident]
                elif param.resident is None:
                    memory[param.name] = self._new_tensor(arg.dtype, arg.shape, f"{launch.where}: {param.name}")
            if self.arenas.are_short_of(capture.graph.heap_bytes):
                self._keep_graphs(lambda _, graph: not graph.uses_heap)  # their memory is about to move
                self.arenas.grow(capture.graph.heap_bytes, launch.where)
            with self.device:  # where kernels make what they keep
                graph = make(memory)
            self._graphs[key] = graph
            if len(self._graphs) > self._max_graphs:
                self._graphs.popitem(last=False)
                self._settled.clear()
        self._graphs.move_to_end(key)
        return cast("E", graph)

    def bind_torch(self, launch: Launch, capture: Capture, tokens: int, dtype: torch.dtype) -> BoundGraph:
        """``bind`` for the torch executor, with a window of ``tokens``."""

        def make(memory: Mapping[str, Tensor]) -> BoundGraph:
            workspace = self._workspaces.setdefault(dtype, Workspace(dtype))
            return BoundGraph(
                capture.graph,
                memory,
                Window.of(tokens),
                workspace,
                incores=capture.incores,
                arenas=self.arenas,
                check_numerics=self.check_numerics,
                count=self._count,
            )

        return self.bind(launch, capture, make)

    def counted(self, graph: Executor, run: Callable[[], R]) -> tuple[R, Usage]:
        """What ``run``, which runs ``graph`` once, returned, and what that took."""
        before, began = graph.busy_ns(), time.perf_counter_ns()
        result = run()
        self.synchronize()
        run_ns = time.perf_counter_ns() - began
        busy = tuple(now - then for then, now in zip(before, graph.busy_ns(), strict=True))
        return result, Usage(tasks=graph.tasks, run_ns=run_ns, busy_ns=busy or (run_ns,), bytes_read=graph.weight_bytes)

    def settle(self, launch: Launch, graph: Executor) -> None:
        """The same dispatch again may run ``graph`` at once, until residents or graphs change."""
        self._settled[launch.dispatch.program, launch.dispatch.args, launch.dispatch.config] = graph

    def capture_builtin(self, launch: Launch, bucket: str, trace: Callable[[], TaskGraph]) -> Capture:
        """The graph of a built-in program for a bucket; traced at first use."""
        return self._captures.of_builtin(launch.program, bucket, trace)

    def capture_tiles(self, launch: Launch) -> Capture:
        """The graph of a tile program for the shapes of a dispatch; traced at first use."""
        return self._captures.of_tile(launch.where, launch.program, launch.sizes, launch.dispatch.config)

    def static_of(self, program: Program) -> Mapping[str, Any]:
        """A registered program's configuration by name."""
        return self._statics[program.digest]

    def _keep_graphs(self, keeps: Callable[[tuple[str, tuple[int, ...]], Executor], bool]) -> None:
        """Forget the other bound graphs, and the heap with the last that used it."""
        self._settled.clear()
        self._graphs = OrderedDict((key, graph) for key, graph in self._graphs.items() if keeps(key, graph))
        if not any(graph.uses_heap for graph in self._graphs.values()):
            self.arenas.clear()

    def _new_tensor(self, dtype: str, shape: tuple[int, ...], what: str) -> Tensor:
        return self._new_memory(nbytes(dtype, shape), what).view(getattr(torch, dtype)).view(shape)

    def _new_memory(self, count: int, what: str) -> Tensor:
        """Zero bytes for ``what``, or ``MemoryExhausted`` with both numbers, before any of it is taken."""
        free = self.free_bytes()
        if count > free:
            raise MemoryExhausted(f"{what} needs {count:,} bytes; {free:,} are free on {self.device}")
        return self.zeros(count)

    def _check_open(self) -> None:
        if not self._is_open:
            raise KernelError("the chip is closed")


class Launch:
    """One dispatch while it runs: its arguments by name, and what its runner says of outputs, digests, times, usage."""

    def __init__(self, chip: TorchChip, program: Program, dispatch: Dispatch, sizes: Mapping[str, int]) -> None:
        self.chip = chip
        self.program = program
        self.dispatch = dispatch
        self.sizes = sizes  # what the symbols of the shapes stand for
        self.where = f"dispatch {dispatch.dispatch_id} of {program.name}"
        self.static = chip.static_of(program)
        self.args = {param.name: arg for param, arg in zip(program.params, dispatch.args, strict=True)}
        self.outputs: dict[str, Arg] = {}
        self.task_times: list[int] = []
        self.task_cores: list[int] = []
        self.graphs: list[str] = []
        self.usage = Usage()
        self.began = time.perf_counter_ns()
        self._written: dict[str, Callable[[], Iterable[Tensor]]] = {}

    def array(self, name: str) -> NDArray[Any]:
        """An argument by value."""
        return self.args[name].numpy()

    def tensor(self, name: str) -> Tensor:
        """A resident argument."""
        return self.chip.tensor(self.args[name].resident)

    def run(self, capture: Capture, graph: Executor) -> None:
        """Replay a bound graph, with times if the dispatch asks for them."""
        config = self.dispatch.config
        if config is None or not config.timeline:
            _, usage = self.chip.counted(graph, lambda: graph.run(self.where))
        else:
            (times, cores), usage = self.chip.counted(
                graph, lambda: graph.run_timed(self.where, self.began, self.chip.synchronize)
            )
            self.graphs.append(capture.name)
            self.task_times += times
            self.task_cores += cores
        self.usage += usage

    def read(self, nbytes: int) -> None:
        """Count bytes that graphs read beyond their weights."""
        self.usage += Usage(bytes_read=nbytes)

    def give(self, name: str, array: NDArray[Any]) -> None:
        """An OUT parameter by value."""
        self.outputs[name] = Arg.of(array)

    def wrote(self, name: str, pieces: Callable[[], Iterable[Tensor]]) -> None:
        """Which pieces of a parameter this dispatch wrote; only looked at if digests are wanted."""
        self._written[name] = pieces

    def digests(self) -> tuple[bytes, ...]:
        """One per OUT and INOUT parameter, over the bytes written."""
        digests = []
        for param in self.program.params:
            if param.direction is Direction.IN:
                continue
            digest = hashlib.blake2b(digest_size=16)
            if param.name in self._written:
                for piece in self._written[param.name]():
                    digest.update(_bytes_of(piece).data)
            else:
                digest.update(self.outputs[param.name].data)
            digests.append(digest.digest())
        return tuple(digests)


Runner = Callable[[Launch], None]
"""Runs one kind of program: computes, then tells the launch what was given and written."""


def _run_tiles(launch: Launch) -> None:
    capture = launch.chip.capture_tiles(launch)
    graph = launch.chip.bind_torch(launch, capture, 0, torch.float32)
    params = launch.program.params
    for param in params:
        if param.direction is not Direction.OUT and not launch.args[param.name].resident:
            _fill(graph.memory[param.name], launch.args[param.name])
    launch.began = time.perf_counter_ns()  # what is timed is kernels, not copies
    launch.run(capture, graph)
    for param in params:
        if param.direction is not Direction.IN:
            _report(launch, param, graph)
    config = launch.dispatch.config
    if all(arg.resident for arg in launch.dispatch.args) and (config is None or not config.timeline):
        launch.chip.settle(launch, graph)


def _report(launch: Launch, param: Param, graph: BoundGraph) -> None:
    launch.wrote(param.name, lambda: graph.written(param.name))
    if not launch.args[param.name].resident:
        launch.outputs[param.name] = _value_of(param.dtype, graph.memory[param.name])


def _fill(tensor: Tensor, value: Arg) -> None:
    """Overwrite a tensor with an array by value of its dtype and shape."""
    if not value.data:
        return
    target = tensor.view(-1).view(torch.uint8)
    if tensor.device.type == "cpu":
        target.numpy()[:] = np.frombuffer(value.data, np.uint8)
    else:
        target.copy_(torch.frombuffer(bytearray(value.data), dtype=torch.uint8))


def _value_of(dtype: str, tensor: Tensor) -> Arg:
    return Arg(dtype=dtype, shape=tuple(tensor.shape), data=_bytes_of(tensor).tobytes())


def _bytes_of(tensor: Tensor) -> NDArray[np.uint8]:
    """A tensor's memory as bytes (zero-copy if it is contiguous and on the host)."""
    array: NDArray[np.uint8] = tensor.contiguous().view(-1).view(torch.uint8).cpu().numpy()
    return array
