"""Binds a task graph to memory and runs it on the native engine: one call, no Python between first and last task.

Owns: the window's memory and intermediates outside the heap. What each kernel means is in kernels/torch_kernels.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...errors import CoreException, KernelError
from ..graph import Buffer, Tag, Task, TaskGraph, Tile
from ..program import DTYPE_BYTES
from ..qwen3.rows import RowPlan
from ..torch_executor import HeapArenas, from_token, tiles_of
from ..torch_kernels import rotary_frequencies
from . import library
from .weights import FORMATS, PackedMatrix

__all__ = ["NativeGraph", "NativeWindow"]

_DTYPES = {"float32": 0, "bfloat16": 1}
_EPILOGUES = {"none": 0, "silu": 1, "mul": 2, "add": 3}
_TASK = np.dtype(
    [
        ("kernel", "<i4"), ("dtype", "<i4"), ("first", "<i4"), ("rows", "<i4"), ("columns", "<i4"), ("inner", "<i4"),
        ("settings", "<i4", 6), ("real", "<f4"), ("waits", "<i4"), ("next_begin", "<i4"), ("next_end", "<i4"),
        ("args", [("data", "<u8"), ("stride", "<i8")], 9),
    ]
)  # fmt: skip
"""``Task`` of task.h, field by field."""


class NativeWindow:
    """The inputs of one replay, under the names graphs bind them by; see ``graphs.trace_prefill`` for the shapes.

    Tokens from ``tokens`` on are padding, which no kernel looks at.
    """

    def __init__(self, graph: TaskGraph) -> None:
        self.count = self.rows = self.num_stores = 0
        self.memory: dict[str, NDArray[Any]] = {
            buffer.name: np.zeros(buffer.shape, buffer.dtype)
            for buffer in graph.buffers
            if buffer.is_bound and buffer.name in _WINDOW
        }

    def fill_tokens(self, plan: RowPlan, page_size: int, begin: int, end: int) -> None:
        """Take tokens ``begin:end`` of a dispatch."""
        memory = self.memory
        self.count = end - begin
        memory["tokens"][: self.count] = plan.tokens[begin:end]
        memory["positions"][: self.count] = plan.positions[begin:end]
        memory["slots"][: self.count] = plan.slots[begin:end]
        offsets, starts, targets = np.array(plan.offsets), np.array(plan.starts), np.array(plan.rows)
        first = int(np.searchsorted(offsets, begin, "right")) - 1
        last = int(np.searchsorted(offsets, end, "left"))
        self.rows = last - first
        ends = np.minimum(offsets[first + 1 : last + 1], end)
        memory["row_offsets"][: self.rows + 1] = np.clip(offsets[first : last + 1], begin, end) - begin
        memory["row_ends"][: self.rows] = starts[first:last] + ends - offsets[first:last]
        width = min(plan.tables.shape[1], memory["block_tables"].shape[1])
        memory["block_tables"][: self.rows, :width] = plan.tables[first:last, :width]
        wanted = (offsets[first + 1 : last + 1] <= end) & (targets[first:last] >= 0)
        self._store(ends[wanted] - 1 - begin, targets[first:last][wanted])

    def fill_rows(self, rows: list[int]) -> None:
        """Take rows of a buffer, to be stored in the rows of the same number of the next one."""
        self.count = len(rows)
        self.memory["loads"][: self.count] = rows
        self._store(np.arange(self.count), np.array(rows))

    def _store(self, sources: NDArray[Any], targets: NDArray[Any]) -> None:
        self.num_stores = len(sources)
        self.memory["stores"][: self.num_stores, 0] = sources
        self.memory["stores"][: self.num_stores, 1] = targets


_WINDOW = frozenset(
    ("tokens", "positions", "loads", "slots", "row_offsets", "row_ends", "block_tables", "stores")
)  # fmt: skip


class NativeGraph:
    """A graph with memory, ready to be replayed: refill ``window``, then ``run``. Used like a ``BoundGraph``."""

    def __init__(
        self,
        cores: Any,
        graph: TaskGraph,
        memory: Mapping[str, Tensor | PackedMatrix],
        arenas: HeapArenas,
        *,
        check_numerics: bool = False,
    ) -> None:
        assert _TASK.itemsize == library.TASK_BYTES
        self.window = NativeWindow(graph)
        self.uses_heap = any(buffer.place is not None for buffer in graph.buffers)
        self.tasks = len(graph.tasks)
        self.weight_bytes = 0  # scales of int8 matrices included
        self._cores = cores
        self._graph = graph
        self._check = check_numerics
        self._given = memory
        self._arenas = arenas
        self._kept: dict[str | int, Tensor] = {}  # what only addresses point at
        self._addresses: dict[int, int] = {}
        tasks = np.zeros(len(graph.tasks), _TASK)
        for at, task in enumerate(graph.tasks):
            record = tasks[at]
            record["kernel"] = library.KERNELS.index(task.kernel)
            _FILL[task.kernel](self, task, dict(task.settings), record)
        tasks["next_begin"], tasks["next_end"], successors = _successors(graph)
        self._run = library.Graph(tasks.view(np.uint8), successors)

    def busy_ns(self) -> tuple[int, ...]:
        """See ``Executor.busy_ns``: of all graphs on these cores."""
        return tuple(busy for _, busy in self._cores.counters())

    def run(self, where: str) -> None:
        """Every task once, each after its predecessors.

        With ``check_numerics``, raises ``CoreException`` for the first task found whose output holds a NaN.
        """
        window = self.window
        self._verify(where, self._cores.run(self._run, window.count, window.rows, window.num_stores, self._check))

    def run_timed(self, where: str, began: int, synchronize: Callable[[], None]) -> tuple[list[int], list[int]]:
        """Like ``run``; returns (begin, end) of each task in ns after ``began``, and the core it ran on."""
        window = self.window
        failed, begins, ends, cores = self._cores.run_timed(
            self._run, window.count, window.rows, window.num_stores, self._check
        )
        self._verify(where, failed)
        times = np.stack([begins, ends], 1) - began
        return times.reshape(-1).tolist(), cores.tolist()

    def _verify(self, where: str, failed: int) -> None:
        if failed >= 0:
            raise CoreException(nan_found(where, self._graph, failed))

    # Where things are

    def point(self, record: Any, position: int, tile: Tile, *, axis: int = 0) -> None:
        """Argument ``position`` is ``tile``; its stride that of ``axis``."""
        item = DTYPE_BYTES[tile.buffer.dtype]
        record["args"][position]["data"] = self._address(tile.buffer) + tile.offset * item
        record["args"][position]["stride"] = tile.strides[axis] * item

    def matrix(self, tile: Tile) -> PackedMatrix:
        """The packed matrix that a tile of rows belongs to."""
        found = self._given[tile.buffer.name]
        assert isinstance(found, PackedMatrix), f"{tile.buffer.name} is not packed for the native engine"
        return found

    def keep(self, name: str, tensor: Tensor) -> int:
        """The address of memory that lives as long as the graph, the same for the same name."""
        return self._kept.setdefault(name, tensor).data_ptr()

    def _address(self, buffer: Buffer) -> int:
        address = self._addresses.get(buffer.index)
        if address is None:
            address = self._addresses[buffer.index] = self._find(buffer)
        return address

    def _find(self, buffer: Buffer) -> int:
        if buffer.name in self.window.memory:
            return self.window.memory[buffer.name].ctypes.data
        if buffer.is_bound:
            found = self._given.get(buffer.name)
            if not isinstance(found, Tensor):
                raise KernelError(f"buffer {buffer.name} was given no memory; given: {', '.join(sorted(self._given))}")
            return found.data_ptr()
        if buffer.place is not None:
            return self._arenas.tensor(*buffer.place, buffer.dtype, buffer.shape).data_ptr()
        tensor = torch.empty(buffer.shape, dtype=getattr(torch, buffer.dtype))
        return self._kept.setdefault(buffer.index, tensor).data_ptr()


def nan_found(where: str, graph: TaskGraph, at: int) -> str:
    """What ``--check-numerics`` says of a task whose output holds a NaN."""
    task = graph.tasks[at]
    output = next(tile for tag, tile in task.args if tag is Tag.OUTPUT)
    return (
        f"{where}: task {at} of {graph.name} ({task.kernel}) wrote NaN to a tile of {output.buffer.name}"
        f"{from_token(task)}; its tiles: {tiles_of(task)}"
    )


def _successors(graph: TaskGraph) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]:
    """Where each task's successors begin and end in one list, and the list."""
    edges = [(before, after) for after, task in enumerate(graph.tasks) for before in task.predecessors]
    edges.sort()
    pairs = np.array(edges, np.int32).reshape(-1, 2)
    bounds = np.searchsorted(pairs[:, 0], np.arange(len(graph.tasks) + 1)).astype(np.int32)
    return bounds[:-1], bounds[1:], np.ascontiguousarray(pairs[:, 1])


# How a task of each kernel becomes a record. Order of arguments and settings: see the kernel in kernels.inl.


def _common(record: Any, task: Task, settings: Mapping[str, Any], output: Tile) -> None:
    record["dtype"] = _DTYPES[output.buffer.dtype]
    record["first"] = settings.get("first_token", 0)
    record["rows"] = output.shape[0]
    record["columns"] = math.prod(output.shape[1:])


def _load_rows(graph: NativeGraph, task: Task, settings: Mapping[str, Any], record: Any) -> None:
    source, numbers, target = (tile for _, tile in task.args)
    _common(record, task, settings, target)
    record["settings"][:2] = target.shape[1] * DTYPE_BYTES[target.buffer.dtype], DTYPE_BYTES[numbers.buffer.dtype]
    for position, tile in enumerate((source, numbers, target)):
        graph.point(record, position, tile)


def _rotary_table(graph: NativeGraph, task: Task, settings: Mapping[str, Any], record: Any) -> None:
    positions, rotary = (tile for _, tile in task.args)
    _common(record, task, settings, rotary)
    record["columns"] = half = rotary.shape[1]
    theta = float(settings["theta"])
    graph.point(record, 0, positions)
    record["args"][1]["data"] = graph.keep(f"frequencies {theta} {half}", rotary_frequencies(theta, half))
    graph.point(record, 2, rotary)


def _rms_norm(graph: NativeGraph, task: Task, settings: Mapping[str, Any], record: Any) -> None:
    _common(record, task, settings, task.args[2][1])
    record["real"] = settings["eps"]
    for position, (_, tile) in enumerate(task.args):
        graph.point(record, position, tile)


def _linear(graph: NativeGraph, task: Task, settings: Mapping[str, Any], record: Any) -> None:
    tiles = [tile for _, tile in task.args]
    x, w, y = tiles[0], tiles[1], tiles[-1]
    matrix = graph.matrix(w)
    left = w.offset // w.buffer.shape[1]
    panel, skipped = divmod(left, library.PANEL)
    _common(record, task, settings, y)
    record["inner"] = x.shape[1]
    record["settings"][:4] = _EPILOGUES[settings["epilogue"]], settings["bias"], FORMATS[matrix.format], skipped
    graph.point(record, 0, x)
    args = record["args"]
    args[1]["data"], args[1]["stride"] = matrix.address + panel * matrix.panel_bytes, matrix.panel_bytes
    if settings["bias"]:
        graph.point(record, 2, tiles[2])
    if settings["epilogue"] in ("mul", "add"):
        graph.point(record, 3, tiles[-2])
    graph.point(record, 4, y)
    read = matrix.panel_bytes
    if matrix.format == "int8":
        scales = 4 * library.PANEL * -(-x.shape[1] // library.GROUP)
        read += 2 * scales
        args[5]["data"], args[5]["stride"] = matrix.scales + panel * scales, scales
        args[6]["data"], args[6]["stride"] = matrix.sums + panel * scales, scales
    if record["first"] == 0:  # other tiles of tokens find it in the cache
        graph.weight_bytes += read * -(-w.shape[0] // library.PANEL)


def _rotate_and_store(graph: NativeGraph, task: Task, settings: Mapping[str, Any], record: Any) -> None:
    qkv, gamma, rotary, slots, q, k_cache, v_cache = (tile for _, tile in task.args)
    _common(record, task, settings, q)
    record["settings"][:3] = q.shape[1], k_cache.shape[0], q.shape[2]
    record["real"] = settings["eps"]
    for position, tile in enumerate((qkv, gamma, rotary, slots, q, k_cache, v_cache)):
        graph.point(record, position, tile)


def _paged_attention(graph: NativeGraph, task: Task, settings: Mapping[str, Any], record: Any) -> None:
    q, k_cache, v_cache, offsets, ends, tables, attended = (tile for _, tile in task.args)
    _common(record, task, settings, attended)
    kv_heads, _, page_size, dim = k_cache.shape
    record["settings"][:4] = kv_heads, q.shape[1] // kv_heads, dim, page_size
    record["real"] = dim**-0.5
    for position, tile in enumerate((q, k_cache, v_cache, offsets, ends, tables, attended)):
        graph.point(record, position, tile)


def _store_rows(graph: NativeGraph, task: Task, settings: Mapping[str, Any], record: Any) -> None:
    source, stores, target = (tile for _, tile in task.args)
    _common(record, task, settings, source)
    record["settings"][0] = _DTYPES[target.buffer.dtype]
    for position, tile in enumerate((source, stores, target)):
        graph.point(record, position, tile)


_FILL: Mapping[str, Callable[[NativeGraph, Task, Mapping[str, Any], Any], None]] = {
    "load_rows": _load_rows,
    "rotary_table": _rotary_table,
    "rms_norm": _rms_norm,
    "linear": _linear,
    "rotate_and_store": _rotate_and_store,
    "paged_attention": _paged_attention,
    "store_rows": _store_rows,
}
