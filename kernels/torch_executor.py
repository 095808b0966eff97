"""Runs task graphs with torch: binds a graph to memory once, then replays it in submission order.

Owns: the memory of a graph's intermediates, and of heap rings, which all graphs of a chip share. Write-after-read needs
no tracking here, because tasks run one at a time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import attrs
import torch
from torch import Tensor

from ..errors import CoreException, KernelError
from .graph import Buffer, Tag, Task, TaskGraph, Tile
from .incore import InCore
from .int8 import Int8Matrix
from .program import nbytes
from .torch_kernels import KERNELS, BoundTask, Kernel, Window, Workspace
from .weights import packed_rows

__all__ = ["BoundGraph", "HeapArenas", "TaskCount", "from_token", "tiles_of"]

# Bound by name in built-in programs, but read from the window as Python values: a tensor element costs a call each.
_WINDOW_VALUES = ("slots", "row_offsets", "row_ends", "block_tables", "stores")
_WHOLE_WINDOW = ("load_rows", "rotary_table")  # kernels of one task for all tokens, without a first one
_NOTHING = torch.empty(0)


class HeapArenas:
    """Memory of the four heap rings, as large as the largest graph needs: what is in it does not outlive a launch."""

    def __init__(self, new_memory: Callable[[int, str], Tensor]) -> None:
        self._new_memory = new_memory  # bytes, what for
        self._rings: dict[int, Tensor] = {}

    @property
    def nbytes(self) -> int:
        """Memory held now."""
        return sum(ring.nbytes for ring in self._rings.values())

    def are_short_of(self, heap_bytes: tuple[int, ...]) -> bool:
        """Whether any ring is smaller than that."""
        return any(count > self._size(ring) for ring, count in enumerate(heap_bytes))

    def grow(self, heap_bytes: tuple[int, ...], where: str) -> None:
        """Make each ring at least that large. One that grows moves: tensors made in it before are no longer its own."""
        for ring, count in enumerate(heap_bytes):
            if count > self._size(ring):
                self._rings.pop(ring, None)
                self._rings[ring] = self._new_memory(count, f"{where}: ring_heap[{ring}]")

    def tensor(self, ring: int, offset: int, dtype: str, shape: tuple[int, ...]) -> Tensor:
        """The tensor of a buffer at a place of a ring."""
        memory = self._rings[ring][offset : offset + nbytes(dtype, shape)] if 0 not in shape else _NOTHING.byte()
        return memory.view(getattr(torch, dtype)).view(shape)

    def clear(self) -> None:
        """Give everything back."""
        self._rings.clear()

    def _size(self, ring: int) -> int:
        return self._rings[ring].nbytes if ring in self._rings else 0


@attrs.define
class TaskCount:
    """How many tasks have ended. Written by the thread that runs them; any other may look whether it moves."""

    ended: int = 0


class BoundGraph:
    """A graph with memory, ready to be replayed: refill ``window`` or ``memory``, then ``run``.

    An intermediate written only by kernels that make a new tensor gets that tensor (no copy, freed when replaced);
    any other has fixed memory: where the graph places it in ``arenas``, else its own for the life of the graph.
    """

    def __init__(
        self,
        graph: TaskGraph,
        memory: Mapping[str, Any],
        window: Window,
        workspace: Workspace,
        kernels: Mapping[str, Kernel] = KERNELS,
        *,
        incores: Mapping[str, InCore] | None = None,
        arenas: HeapArenas | None = None,
        check_numerics: bool = False,
        count: TaskCount | None = None,
    ) -> None:
        self.window = window
        self.memory = memory
        self.uses_heap = any(buffer.place is not None for buffer in graph.buffers)
        self.tasks = len(graph.tasks)
        self.weight_bytes = sum(_weight_bytes(task, memory) for task in graph.tasks)
        self._graph = graph
        self._count = count or TaskCount()
        given = {"tokens": window.tokens, "positions": window.positions, "loads": window.loads, **memory}
        kernels = {**kernels, **{name: _incore(incore) for name, incore in (incores or {}).items()}}
        fresh = _fresh_buffers(graph, kernels, incores or {})
        places: dict[Tile, int] = {}
        values: list[Any] = []
        fixed: dict[int, Tensor] = {}
        self._calls: list[Callable[[], Any]] = []
        for task in graph.tasks:
            for _, tile in task.args:
                if tile not in places:
                    places[tile] = len(values)
                    is_fresh = tile.buffer.index in fresh
                    values.append(_NOTHING if is_fresh else _view(tile, _fixed(tile.buffer, given, fixed, arenas)))
            kernel = kernels[task.kernel]
            args = tuple(places[tile] for _, tile in task.args)
            call = kernel.bind(BoundTask(dict(task.settings), values, args, window, workspace))
            if kernel.returns:
                is_fresh = task.args[-1][1].buffer.index in fresh
                call = _replacing(values, args[-1], call) if is_fresh else _copying(values[args[-1]], call)
            self._calls.append(_checking(call, values, task, args, window) if check_numerics else call)
        self._values = values
        self._places = places
        self._fresh = [place for tile, place in places.items() if tile.buffer.index in fresh]

    def busy_ns(self) -> tuple[int, ...]:
        """Nothing: torch computes on threads of its own."""
        return ()

    def run(self, where: str) -> None:
        """Every task once, in submission order. One that raises is a ``CoreException`` naming it, after ``where``."""
        at, count = 0, self._count
        try:
            for at, call in enumerate(self._calls):  # noqa: B007 (read when a task raises)
                call()
                count.ended += 1
        except Exception as error:  # whatever a kernel raises, the caller must learn which one it was
            raise self._failed(where, at, error) from error
        finally:
            self._let_go()

    def run_timed(self, where: str, began: int, synchronize: Callable[[], None]) -> tuple[list[int], list[int]]:
        """Like ``run``; returns (begin, end) of each task in ns after ``began``, in one list, and its core: 0."""
        times: list[int] = []
        at = 0
        try:
            for at, call in enumerate(self._calls):  # noqa: B007 (read when a task raises)
                begin = time.perf_counter_ns()
                call()
                synchronize()
                times += begin - began, time.perf_counter_ns() - began
                self._count.ended += 1
        except Exception as error:
            raise self._failed(where, at, error) from error
        finally:
            self._let_go()
        return times, [0] * len(self._calls)

    def written(self, name: str) -> Iterator[Tensor]:
        """The tiles of a bound buffer that tasks write, each once, in order of submission."""
        tiles = dict.fromkeys(
            tile for task in self._graph.tasks for tag, tile in task.args if tag.writes and tile.buffer.name == name
        )
        for tile in tiles:
            yield self._values[self._places[tile]]

    def _let_go(self) -> None:
        for place in self._fresh:  # else every bucket would hold on to the tensors of its last replay
            self._values[place] = _NOTHING

    def _failed(self, where: str, at: int, error: Exception) -> CoreException:
        task = self._graph.tasks[at]
        what = f"task {at} of {self._graph.name} ({task.kernel})"
        return CoreException(f"{where}: {what} failed: {type(error).__name__}: {error}; its tiles: {tiles_of(task)}")


def tiles_of(task: Task) -> str:
    """What a task works on, for people."""
    return ", ".join(f"{tile.buffer.name} {list(tile.shape)}" for _, tile in task.args)


def from_token(task: Task) -> str:
    """Where in its window a task works, if that is cut into tiles of tokens."""
    first = dict(task.settings).get("first_token")
    return "" if first is None else f", from token {first} of the window"


def _weight_bytes(task: Task, given: Mapping[str, Any]) -> int:
    """Of the weights of a linear; 0 for tiles of later tokens, which find them in a cache."""
    if task.kernel != "linear" or dict(task.settings).get("first_token", 0):
        return 0
    _, weight = task.args[1]
    matrix = given.get(weight.buffer.name)
    if isinstance(matrix, Int8Matrix):
        return matrix.nbytes * weight.shape[0] // matrix.shape[0]
    return nbytes(weight.buffer.dtype, weight.shape)


def _incore(incore: InCore) -> Kernel:
    def bind(task: BoundTask) -> Callable[[], None]:
        return partial(incore.function, *(task.values[place] for place in task.args), **task.settings)

    return Kernel(bind, returns=False)


def _fresh_buffers(graph: TaskGraph, kernels: Mapping[str, Kernel], incores: Mapping[str, InCore]) -> set[int]:
    """Intermediates that need no memory of their own. In-core functions are bound to tensors that stay."""
    fresh = {buffer.index for buffer in graph.buffers if not buffer.is_bound}
    for task in graph.tasks:
        for position, (tag, tile) in enumerate(task.args):
            is_made_anew = kernels[task.kernel].returns and position == len(task.args) - 1
            if not tile.is_whole or (tag.writes and not is_made_anew) or task.kernel in incores:
                fresh.discard(tile.buffer.index)
    return fresh


def _fixed(buffer: Buffer, given: Mapping[str, Tensor], fixed: dict[int, Tensor], arenas: HeapArenas | None) -> Tensor:
    if buffer.is_bound:
        if buffer.name in given:
            return given[buffer.name]
        if buffer.name in _WINDOW_VALUES:
            return _NOTHING
        raise KernelError(f"buffer {buffer.name} was given no memory; given: {', '.join(sorted(given))}")
    if buffer.index not in fixed:
        if buffer.place is not None and arenas is not None:
            fixed[buffer.index] = arenas.tensor(*buffer.place, buffer.dtype, buffer.shape)
        else:
            fixed[buffer.index] = torch.empty(buffer.shape, dtype=getattr(torch, buffer.dtype))
    return fixed[buffer.index]


def _view(tile: Tile, memory: Tensor | Int8Matrix) -> Tensor | Int8Matrix:
    """The tensor of a tile. Packed weights are opaque: some of their rows are packed once more."""
    if tile.is_whole or memory is _NOTHING:
        return memory
    if isinstance(memory, Int8Matrix) or memory.is_mkldnn:
        first = tile.offset // tile.buffer.shape[1]
        last = first + tile.shape[0]
        return memory.rows(first, last) if isinstance(memory, Int8Matrix) else packed_rows(memory, first, last)
    return memory.as_strided(tile.shape, tile.strides, memory.storage_offset() + tile.offset)


def _checking(
    call: Callable[[], Any], values: list[Tensor], task: Task, places: tuple[int, ...], window: Window
) -> Callable[[], None]:
    """``call``, and then a look at what it wrote. Rows of a window's padding mean nothing and are not looked at."""
    first = dict(task.settings).get("first_token", 0 if task.kernel in _WHOLE_WINDOW else None)
    written = [
        (tile, place)
        for (tag, tile), place in zip(task.args, places, strict=True)
        if tag in (Tag.OUTPUT, Tag.INOUT) and getattr(torch, tile.buffer.dtype).is_floating_point
    ]

    def checked() -> None:
        call()
        for tile, place in written:
            values_written = values[place] if first is None else values[place][: max(0, window.count - int(first))]
            if torch.isnan(values_written).any():
                raise FloatingPointError(f"it wrote NaN to a tile of {tile.buffer.name}{from_token(task)}")

    return checked


def _replacing(values: list[Tensor], place: int, compute: Callable[[], Tensor]) -> Callable[[], None]:
    def call() -> None:
        values[place] = compute()

    return call


def _copying(target: Tensor, compute: Callable[[], Tensor]) -> Callable[[], None]:
    def call() -> None:
        target.copy_(compute())

    return call
