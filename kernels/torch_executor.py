"""Runs task graphs with torch: binds a graph to memory once, then replays it in submission order.

Owns: the memory of a graph's intermediates. Write-after-read needs no tracking here, because tasks run one at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import KernelError
from .graph import Buffer, TaskGraph, Tile
from .torch_kernels import KERNELS, BoundTask, Kernel, Window, Workspace

__all__ = ["BoundGraph"]

# Bound by name in every graph, but read from the window as Python values: a tensor element costs a call each.
_WINDOW_VALUES = ("slots", "row_offsets", "row_ends", "block_tables", "stores")
_NOTHING = torch.empty(0)


class BoundGraph:
    """A graph with memory, ready to be replayed: refill ``window``, then ``run``.

    An intermediate written only by kernels that make a new tensor gets that tensor (no copy, freed when replaced);
    any other has fixed memory for the life of the graph.
    """

    def __init__(
        self,
        graph: TaskGraph,
        memory: Mapping[str, Tensor],
        window: Window,
        workspace: Workspace,
        kernels: Mapping[str, Kernel] = KERNELS,
    ) -> None:
        self.window = window
        self._graph = graph
        given = {"tokens": window.tokens, "positions": window.positions, "loads": window.loads, **memory}
        fresh = _fresh_buffers(graph, kernels)
        places: dict[Tile, int] = {}
        values: list[Tensor] = []
        fixed: dict[int, Tensor] = {}
        self._calls: list[Callable[[], Any]] = []
        for task in graph.tasks:
            for _, tile in task.args:
                if tile not in places:
                    places[tile] = len(values)
                    is_fresh = tile.buffer.index in fresh
                    values.append(_NOTHING if is_fresh else _view(tile, _fixed(tile.buffer, given, fixed)))
            kernel = kernels[task.kernel]
            args = tuple(places[tile] for _, tile in task.args)
            call = kernel.bind(BoundTask(dict(task.settings), values, args, window, workspace))
            if kernel.returns:
                is_fresh = task.args[-1][1].buffer.index in fresh
                call = _replacing(values, args[-1], call) if is_fresh else _copying(values[args[-1]], call)
            self._calls.append(call)
        self._values = values
        self._fresh = [place for tile, place in places.items() if tile.buffer.index in fresh]

    def run(self, where: str) -> None:
        """Every task once, in submission order. A task that raises is a ``KernelError`` naming it, after ``where``."""
        at = 0
        try:
            for at, call in enumerate(self._calls):  # noqa: B007 (read when a task raises)
                call()
        except Exception as error:  # whatever a kernel raises, the caller must learn which one it was
            task = f"task {at} of {self._graph.name} ({self._graph.tasks[at].kernel})"
            raise KernelError(f"{where}: {task} failed: {error}") from error
        for place in self._fresh:  # else every bucket would hold on to the tensors of its last replay
            self._values[place] = _NOTHING


def _fresh_buffers(graph: TaskGraph, kernels: Mapping[str, Kernel]) -> set[int]:
    """Intermediates that need no memory of their own."""
    fresh = {buffer.index for buffer in graph.buffers if not buffer.is_bound}
    for task in graph.tasks:
        for position, (tag, tile) in enumerate(task.args):
            is_made_anew = kernels[task.kernel].returns and position == len(task.args) - 1
            if not tile.is_whole or (tag.writes and not is_made_anew):
                fresh.discard(tile.buffer.index)
    return fresh


def _fixed(buffer: Buffer, given: Mapping[str, Tensor], fixed: dict[int, Tensor]) -> Tensor:
    if buffer.is_bound:
        if buffer.name in _WINDOW_VALUES:
            return _NOTHING
        if buffer.name not in given:
            raise KernelError(f"buffer {buffer.name} was given no memory; given: {', '.join(sorted(given))}")
        return given[buffer.name]
    if buffer.index not in fixed:
        fixed[buffer.index] = torch.empty(buffer.shape, dtype=getattr(torch, buffer.dtype))
    return fixed[buffer.index]


def _view(tile: Tile, memory: Tensor) -> Tensor:
    """The tensor of a tile. Packed weights are opaque and only ever used whole."""
    if tile.is_whole or memory.numel() == 0:
        return memory
    return memory.as_strided(tile.shape, tile.strides, memory.storage_offset() + tile.offset)


def _replacing(values: list[Tensor], place: int, compute: Callable[[], Tensor]) -> Callable[[], None]:
    def call() -> None:
        values[place] = compute()

    return call


def _copying(target: Tensor, compute: Callable[[], Tensor]) -> Callable[[], None]:
    def call() -> None:
        target.copy_(compute())

    return call
