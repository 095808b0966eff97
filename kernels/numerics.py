"""Measure which numbers of rows give a row the same bits on this machine, and say what cannot be kept.

Owns nothing: reports are values. The Qwen3 programs promise a token the same bits whatever shares its window. With
torch that rests on how oneDNN and MKL block their sums, which differs between processors, threads and versions; native
kernels are written to keep it. Hence this probe, over the very kernels and windows a chip uses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from itertools import pairwise
from typing import Any, Protocol

import attrs
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .graph import GraphBuilder, Tag, TaskGraph
from .int8 import Int8Matrix
from .native import open_cores
from .native.graph import NativeGraph
from .native.shapes import engine_of
from .native.weights import Segment, packed_bytes
from .qwen3.graphs import ATTENTION_BLOCK, PREFILL_BUCKETS, ROW_BUCKETS
from .qwen3.model import ModelSpec
from .qwen3.rows import RowPlan, plan_rows
from .torch_executor import BoundGraph, HeapArenas
from .torch_kernels import Window, Workspace
from .weights import pack

__all__ = ["NumericsReport", "RowClasses", "Widths", "probe_classes"]

_WINDOWS = tuple(sorted({*PREFILL_BUCKETS, *ROW_BUCKETS}))
_FEW = (1, 2, 3, 5, 7)  # native kernels compute no padding: tasks of theirs have any number of rows
_HEAD_COLUMNS = 8192  # of the vocabulary: enough to be blocked like all of it
_PAGE = 16
_CONTEXT = 5 * ATTENTION_BLOCK + 17


@attrs.frozen(kw_only=True)
class Widths:
    """The shapes that matter for blocking; by default Qwen3-0.6B's."""

    hidden: int = 1024
    inner: int = 3072
    heads: int = 16
    kv_heads: int = 8
    head_dim: int = 128
    vocab: int = 151_936

    @classmethod
    def of(cls, spec: ModelSpec) -> Widths:
        """A model's."""
        return cls(
            hidden=spec.hidden_size,
            inner=spec.intermediate_size,
            heads=spec.num_heads,
            kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            vocab=spec.vocab_size,
        )


@attrs.frozen
class RowClasses:
    """One operation, and the ways of asking for it in groups that give the same bits."""

    operation: str
    classes: tuple[tuple[str, ...], ...]

    @property
    def is_kept(self) -> bool:
        """Whether all give the same."""
        return len(self.classes) == 1

    def __str__(self) -> str:
        if self.is_kept:
            return f"{self.operation}: the same bits in all {len(self.classes[0])} cases"
        return f"{self.operation}: {len(self.classes)} classes: " + " | ".join(
            ", ".join(group) for group in self.classes
        )


@attrs.frozen(kw_only=True)
class NumericsReport:
    """What ``probe_classes`` found for one engine, dtype and number of threads."""

    engine: str
    """"torch", or "native" and its instruction set."""
    dtype: str
    weights: str = ""
    """"int8", or "" for the dtype."""
    threads: int
    operations: tuple[RowClasses, ...]

    @property
    def problems(self) -> tuple[str, ...]:
        """What cannot be kept on this machine; empty if a token's bits depend on its text alone."""
        return tuple(str(found) for found in self.operations if not found.is_kept)

    def __str__(self) -> str:
        verdict = "batch and chunks show in the last bits" if self.problems else "batch-invariant"
        numbers = f"{self.dtype} with {self.weights} weights" if self.weights else self.dtype
        head = f"{self.engine}: {numbers}, {self.threads} threads: {verdict}"
        return "\n  ".join([head, *map(str, self.operations)])


def probe_classes(
    dtype: str, threads: int, widths: Widths | None = None, *, weights: str = "", isa: str = ""
) -> NumericsReport:
    """Run every kernel in windows of every size on random numbers, and compare bits.

    Seconds at the widths of Qwen3-0.6B. weights: "int8", or "" for ``dtype``. isa: as ``CpuChip`` takes it.
    """
    name = engine_of(isa=isa).partition(":")[0].removesuffix(", as asked")
    with _threads(threads), torch.inference_mode(), ExitStack() as opened:
        engine: _Engine
        if name == "torch":
            engine = _TorchEngine(dtype, weights)
        else:
            engine = opened.enter_context(closing(_NativeEngine(threads, isa, weights or dtype)))
        probe = _Probe(engine, dtype, widths or Widths())
        return NumericsReport(
            engine=name,
            dtype=dtype,
            weights=weights,
            threads=threads,
            operations=(*probe.linears(), probe.norm(), probe.rotation(), probe.prompt(), probe.decode()),
        )


class _Engine(Protocol):
    """Runs graphs of one task."""

    few: tuple[int, ...]
    """Numbers of rows it is asked for besides those of the windows."""

    def pack(self, matrix: Tensor) -> Any: ...

    def bind(self, graph: TaskGraph, memory: Mapping[str, Any], tokens: int) -> BoundGraph | NativeGraph: ...


class _TorchEngine:
    few: tuple[int, ...] = ()

    def __init__(self, dtype: str, weights: str) -> None:
        self._workspace = Workspace(getattr(torch, dtype))
        self.pack = Int8Matrix.of if weights == "int8" else pack

    def bind(self, graph: TaskGraph, memory: Mapping[str, Any], tokens: int) -> BoundGraph:
        return BoundGraph(graph, memory, Window.of(tokens), self._workspace)


class _NativeEngine:
    few: tuple[int, ...] = _FEW

    def __init__(self, threads: int, isa: str, weights: str) -> None:
        self._cores = open_cores(threads, isa)
        self._weights = weights
        self._segments: list[Segment] = []

    def pack(self, matrix: Tensor) -> Any:
        segment = Segment(self._cores, packed_bytes(matrix.shape[0], matrix.shape[1], self._weights))
        self._segments.append(segment)
        return segment.pack(matrix, self._weights)

    def bind(self, graph: TaskGraph, memory: Mapping[str, Any], tokens: int) -> NativeGraph:
        arenas = HeapArenas(lambda count, _: torch.empty(count, dtype=torch.uint8))
        return NativeGraph(self._cores, graph, memory, arenas)

    def close(self) -> None:
        for segment in self._segments:
            segment.close()


class _Probe:
    """Operands of one model's shapes, and the kernels on them."""

    def __init__(self, engine: _Engine, dtype: str, widths: Widths) -> None:
        self._engine, self._dtype, self._widths = engine, getattr(torch, dtype), widths
        self._random = torch.Generator().manual_seed(0)
        self._windows = (*engine.few, *_WINDOWS)

    def linears(self) -> Iterator[RowClasses]:
        sizes = self._widths
        attended = sizes.heads * sizes.head_dim
        yield self._linear("qkv", sizes.hidden, attended + 2 * sizes.kv_heads * sizes.head_dim)
        yield self._linear("output", attended, sizes.hidden, "add")
        yield self._linear("gate", sizes.hidden, sizes.inner, "silu")
        yield self._linear("up", sizes.hidden, sizes.inner, "mul")
        yield self._linear("down", sizes.inner, sizes.hidden, "add")
        yield self._linear("head", sizes.hidden, min(sizes.vocab, _HEAD_COLUMNS), rows_only=True)

    def norm(self) -> RowClasses:
        width = self._widths.hidden
        x, gamma = self._draw(_WINDOWS[-1], width), self._draw(width).float()

        def rows(count: int) -> Tensor:
            out = torch.empty(count, width, dtype=self._dtype)
            args = ((Tag.INPUT, x[:count]), (Tag.INPUT, gamma), (Tag.OUTPUT, out))
            self._run("rms_norm", args, count, eps=1e-6)
            return out

        return _by_windows("norm", rows, self._windows)

    def rotation(self) -> RowClasses:
        sizes = self._widths
        turned = sizes.heads + sizes.kv_heads
        qkv = self._draw(_WINDOWS[-1], (turned + sizes.kv_heads) * sizes.head_dim)
        gamma = self._draw(turned, sizes.head_dim).float()
        rotary = self._draw(_WINDOWS[-1], sizes.head_dim // 2, 2).float()

        def rows(count: int) -> Tensor:
            q = torch.empty(count, sizes.heads, sizes.head_dim, dtype=self._dtype)
            k, v = (torch.zeros(sizes.kv_heads, 1, count, sizes.head_dim, dtype=self._dtype) for _ in "kv")
            inputs = (qkv[:count], gamma, rotary[:count], "slots")
            args = (*((Tag.INPUT, x) for x in inputs), *((Tag.OUTPUT, x) for x in (q, k, v)))
            self._run("rotate_and_store", args, count, eps=1e-6)
            return torch.cat([q, k[:, 0].transpose(0, 1), v[:, 0].transpose(0, 1)], 1)

        return _by_windows("rotation", rows, self._windows)

    def prompt(self) -> RowClasses:
        cuts = {
            f"chunks of {count}": [*range(0, _CONTEXT, count), _CONTEXT] for count in (_CONTEXT, 1, 7, 64, 100, 256)
        }
        return self._attention("attention of a prompt", cuts, ATTENTION_BLOCK)

    def decode(self) -> RowClasses:
        return self._attention("attention of generated tokens", {"singly": [*range(_CONTEXT + 1)]}, 1)

    def _linear(
        self, name: str, inner: int, out: int, epilogue: str = "none", *, rows_only: bool = False
    ) -> RowClasses:
        windows = (*self._engine.few, *ROW_BUCKETS) if rows_only else self._windows
        x, other = self._draw(windows[-1], inner), self._draw(windows[-1], out)
        weight = self._engine.pack(self._draw(out, inner) / inner**0.5)

        def rows(count: int) -> Tensor:
            y = torch.empty(count, out, dtype=self._dtype)
            paired = [(Tag.INPUT, other[:count])] if epilogue in ("mul", "add") else []
            args = ((Tag.INPUT, x[:count]), (Tag.INPUT, weight), *paired, (Tag.OUTPUT, y))
            self._run("linear", args, count, epilogue=epilogue, bias=0)
            return y

        return _by_windows(f"linear {name}, {inner} to {out}", rows, windows)

    def _attention(self, operation: str, cuts: Mapping[str, Sequence[int]], block: int) -> RowClasses:
        """One sequence, its chunks ending at the given positions, its pages in order and scattered."""
        sizes = self._widths
        pages = -(-_CONTEXT // _PAGE)
        keys, values = (self._draw(sizes.kv_heads, _CONTEXT, sizes.head_dim) for _ in "kv")
        queries = self._draw(_CONTEXT, sizes.heads, sizes.head_dim)
        orders = {"pages in order": np.arange(pages), "pages anywhere": np.random.default_rng(0).permutation(pages)}
        found = {}
        for where, order in orders.items():
            slots = torch.from_numpy((order[:, None] * _PAGE + np.arange(_PAGE)).reshape(-1)[:_CONTEXT])
            caches = [
                torch.full((sizes.kv_heads, pages, _PAGE, sizes.head_dim), torch.nan, dtype=self._dtype) for _ in "kv"
            ]
            for cache, content in zip(caches, (keys, values), strict=True):
                cache.flatten(1, 2)[:, slots] = content
            for how, ends in cuts.items():
                found[f"{how}, {where}"] = torch.cat(
                    [self._attend(queries[start:end], start, caches, order, block) for start, end in pairwise(ends)]
                )
        return RowClasses(operation, _classes(found))

    def _attend(
        self, queries: Tensor, start: int, caches: list[Tensor], order: NDArray[np.int64], block: int
    ) -> Tensor:
        count = queries.shape[0]
        attended = torch.empty(count, queries.shape[1] * queries.shape[2], dtype=self._dtype)
        inputs = (queries, *caches, "row_offsets", "row_ends", "block_tables")
        args = (*((Tag.INPUT, x) for x in inputs), (Tag.OUTPUT, attended))
        self._run("paged_attention", args, count, start, order, _PAGE, block=block)
        return attended

    def _draw(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._random).to(self._dtype)

    def _run(
        self,
        kernel: str,
        args: Sequence[tuple[Tag, Any]],
        count: int,
        start: int = 0,
        order: NDArray[np.int64] | None = None,
        page_size: int = 0,
        **settings: int | float | str,
    ) -> None:
        """One task on the given memory, or on inputs of its window by name.

        The window holds ``count`` tokens of one sequence from position ``start`` on. ``order``: its pages; without,
        one page holds them all.
        """
        order, page_size = (np.zeros(1, np.int64), count) if order is None else (order, page_size)
        graph = GraphBuilder("probe")
        named = {
            "tokens": graph.bound("tokens", "int32", count),
            "positions": graph.bound("positions", "int32", count),
            "slots": graph.bound("slots", "int64", count),
            "row_offsets": graph.bound("row_offsets", "int32", count + 1),
            "row_ends": graph.bound("row_ends", "int32", count),
            "block_tables": graph.bound("block_tables", "int32", count, len(order)),
            "stores": graph.bound("stores", "int32", count, 2),
        }
        memory: dict[str, Any] = {}
        tiles = []
        for tag, given in args:
            if isinstance(given, str):
                tiles.append((tag, named[given]))
                continue
            name = f"argument.{len(tiles)}"
            memory[name] = given
            dtype = str(given.dtype if isinstance(given, Tensor) else self._dtype).removeprefix("torch.")
            shape = given.shape[:2] if kernel == "linear" else given.shape  # a packed matrix may have more
            tiles.append((tag, graph.bound(name, dtype, *shape)))
        graph.submit(kernel, *tiles, after=(), first_token=0, **settings)
        bound = self._engine.bind(graph.build(), memory, count)
        bound.window.fill_tokens(_plan(count, start, order.astype(np.int32), page_size), page_size, 0, count)
        bound.run("probe")


def _plan(count: int, start: int, order: NDArray[np.int32], page_size: int) -> RowPlan:
    """One sequence's tokens from position ``start`` on."""
    pages = len(order)
    static = {
        "vocab_size": 1, "max_model_len": pages * page_size, "max_num_seqs": 1, "max_num_batched_tokens": count,
        "page_size": page_size, "num_pages": pages,
    }  # fmt: skip
    first, length, nowhere = (np.array([value], np.int32) for value in (start, count, -1))
    return plan_rows("probe", static, np.zeros(count, np.int32), first, length, order[None], nowhere)


def _by_windows(operation: str, rows: Callable[[int], Tensor], windows: Sequence[int]) -> RowClasses:
    """``rows(n)``: results of the first n rows, computed in one window."""
    return RowClasses(operation, _classes({str(count): rows(count) for count in windows}))


def _classes(found: Mapping[str, Tensor]) -> tuple[tuple[str, ...], ...]:
    """Group results that agree bit for bit in all the rows they both have."""
    groups: list[tuple[list[str], Tensor]] = []
    for name, result in found.items():
        for at, (names, longest) in enumerate(groups):
            common = min(len(longest), len(result))
            if torch.equal(longest[:common], result[:common]):
                names.append(name)
                groups[at] = names, max(longest, result, key=len)
                break
        else:
            groups.append(([name], result))
    return tuple(tuple(names) for names, _ in groups)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
