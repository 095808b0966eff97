"""One task graph on the native engine and with torch, each on memory of its own that begins equal."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from torch import Tensor

from chipbus.kernels.graph import GraphBuilder, TaskGraph, Tile
from chipbus.kernels.int8 import Int8Matrix
from chipbus.kernels.native import open_cores, why_not
from chipbus.kernels.qwen3.rows import RowPlan, plan_rows
from chipbus.kernels.torch_executor import BoundGraph, HeapArenas
from chipbus.kernels.torch_kernels import Window, Workspace
from chipbus.kernels.weights import pack

__all__ = [
    "ENGINES", "ISAS", "NEEDS_NATIVE", "Prepared", "Row", "core_threads", "cut", "dtype_of", "plan_of", "prepare",
    "randn", "run_native", "run_torch", "same_bits", "window_tiles",
]  # fmt: skip

_KNOWN = ("avx2", "avx512", "avx512bf16", "amx", "amx-emulated")
_HERE = [isa for isa in _KNOWN if not why_not(isa)]

NEEDS_NATIVE = pytest.mark.skipif(not _HERE, reason=why_not() or "it is here")

ISAS: list[Any] = _HERE or [pytest.param("", marks=NEEDS_NATIVE)]
"""Instruction sets this machine has, to parametrize by. Without the engine one that is skipped and says why."""

ENGINES = [*_HERE, "none"]
"""What ``CpuChip`` takes as ``isa``: every native engine of this machine, and torch."""


def core_threads() -> int:
    """Threads of native engines in this process. By name: torch and tqdm start some of their own when they please."""
    names = []
    for thread in Path("/proc/self/task").iterdir():
        try:
            names.append((thread / "comm").read_text())
        except OSError:  # it ended
            continue
    return sum(name.startswith("chip core ") for name in names)


def dtype_of(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def randn(random: np.random.Generator, *shape: int, dtype: str = "float32") -> Tensor:
    return torch.from_numpy(random.standard_normal(shape, np.float32)).to(getattr(torch, dtype))


def same_bits(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two tensors are the same bytes: of NaN and of zeros too."""
    assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
    raw = ours.contiguous().view(torch.uint8), theirs.contiguous().view(torch.uint8)
    return torch.equal(*raw)


def cut(random: np.random.Generator, extent: int, most: int = 4) -> list[tuple[int, int]]:
    """``range(extent)`` in at most ``most`` pieces, cut anywhere."""
    places = {0, extent, *random.integers(0, extent + 1, int(random.integers(most))).tolist()}
    return list(itertools.pairwise(sorted(places)))


# Windows


@attrs.frozen(eq=False)
class Row:
    """Consecutive positions of one sequence in a window."""

    start: int
    length: int
    pages: Sequence[int]
    target: int = -1


def plan_of(rows: Sequence[Row], page_size: int, num_pages: int) -> RowPlan:
    """The rows of a window as the programs lay them out."""
    static = {
        "vocab_size": 2, "max_model_len": 1 << 20, "max_num_seqs": 1 << 20, "max_num_batched_tokens": 1 << 20,
        "page_size": page_size, "num_pages": num_pages,
    }  # fmt: skip
    tables = np.full((len(rows), max(len(row.pages) for row in rows)), -1, np.int32)
    for at, row in enumerate(rows):
        tables[at, : len(row.pages)] = row.pages
    starts, lengths, targets = (
        np.array([getattr(row, name) for row in rows], np.int32) for name in ("start", "length", "target")
    )
    return plan_rows("test", static, np.zeros(int(lengths.sum()), np.int32), starts, lengths, tables, targets)


def window_tiles(graph: GraphBuilder, tokens: int, pages: int) -> dict[str, Tile]:
    """Everything a native window of tokens has, by name."""
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {
        "tokens": ("int32", (tokens,)), "positions": ("int32", (tokens,)), "slots": ("int64", (tokens,)),
        "row_offsets": ("int32", (tokens + 1,)), "row_ends": ("int32", (tokens,)),
        "block_tables": ("int32", (tokens, pages)), "stores": ("int32", (tokens, 2)),
    }  # fmt: skip
    return {name: graph.bound(name, dtype, *shape) for name, (dtype, shape) in shapes.items()}


# Runs

Memory = Mapping[str, Tensor]
Fill = Callable[[Any], None]


def _copies(memory: Memory) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in memory.items()}


def _arenas(graph: TaskGraph) -> HeapArenas:
    arenas = HeapArenas(lambda count, _: torch.zeros(count, dtype=torch.uint8))
    arenas.grow(graph.heap_bytes, "test")
    return arenas


@attrs.frozen(eq=False)
class Prepared:
    """A graph bound to memory for the native engine. Its matrices are packed in a segment that lives as long."""

    cores: Any
    bound: Any
    memory: dict[str, Tensor]
    segment: Any


def prepare(
    isa: str,
    graph: TaskGraph,
    memory: Memory,
    *,
    matrices: Collection[str] = (),
    weights: str = "",
    threads: int = 1,
    check_numerics: bool = False,
) -> Prepared:
    from chipbus.kernels.native.graph import NativeGraph
    from chipbus.kernels.native.weights import Segment, packed_bytes

    cores = open_cores(threads, isa)
    ours = _copies(memory)
    given: dict[str, Any] = dict(ours)
    segment = None
    if matrices:
        sizes = [packed_bytes(*ours[name].shape, weights or dtype_of(ours[name])) for name in matrices]
        segment = Segment(cores, sum(sizes))
        for name in matrices:
            given[name] = segment.pack(ours[name], weights or dtype_of(ours[name]))
    bound = NativeGraph(cores, graph, given, _arenas(graph), check_numerics=check_numerics)
    return Prepared(cores, bound, ours, segment)


def run_native(
    isa: str,
    graph: TaskGraph,
    memory: Memory,
    fill: Fill,
    *,
    matrices: Collection[str] = (),
    weights: str = "",
    threads: int = 1,
    check_numerics: bool = False,
) -> dict[str, Tensor]:
    """The memory after one run. ``matrices``: what is packed of it, as ``weights`` ("int8") or as they are."""
    made = prepare(
        isa, graph, memory, matrices=matrices, weights=weights, threads=threads, check_numerics=check_numerics
    )
    fill(made.bound.window)
    try:
        made.bound.run("test")
    finally:
        if made.segment is not None:
            made.segment.close()
    return made.memory


def run_torch(
    graph: TaskGraph,
    memory: Memory,
    fill: Fill,
    *,
    tokens: int,
    matrices: Collection[str] = (),
    weights: str = "",
    check_numerics: bool = False,
) -> dict[str, Tensor]:
    """The same with torch, for a window of ``tokens``."""
    ours = _copies(memory)
    packed = {name: Int8Matrix.of(ours[name]) if weights == "int8" else pack(ours[name]) for name in matrices}
    window = Window.of(tokens)
    fill(window)
    dtype = _dtype_of_graph(ours.values())
    with torch.inference_mode():
        BoundGraph(
            graph, {**ours, **packed}, window, Workspace(dtype), arenas=_arenas(graph), check_numerics=check_numerics
        ).run("test")
    return ours


def _dtype_of_graph(tensors: Iterable[Tensor]) -> torch.dtype:
    is_half = any(tensor.dtype == torch.bfloat16 for tensor in tensors)
    return torch.bfloat16 if is_half else torch.float32
