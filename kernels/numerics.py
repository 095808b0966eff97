"""Measure which numbers of rows give a row the same bits on this machine, and say what cannot be kept.

Owns nothing: reports are values. The Qwen3 programs promise a token the same bits whatever shares its window. That
rests on how oneDNN and MKL block their sums, which differs between processors, threads and versions. Hence this probe,
over the very kernels and windows a chip uses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise

import attrs
import numpy as np
import torch
from torch import Tensor

from .graph import GraphBuilder, Tag
from .qwen3.graphs import ATTENTION_BLOCK, PREFILL_BUCKETS, ROW_BUCKETS
from .qwen3.model import ModelSpec
from .qwen3.rows import plan_rows
from .torch_executor import BoundGraph
from .torch_kernels import Window, Workspace
from .weights import pack

__all__ = ["NumericsReport", "RowClasses", "Widths", "probe_classes"]

_WINDOWS = tuple(sorted({*PREFILL_BUCKETS, *ROW_BUCKETS}))
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
    """What ``probe_classes`` found for one dtype and number of threads."""

    dtype: str
    threads: int
    operations: tuple[RowClasses, ...]

    @property
    def problems(self) -> tuple[str, ...]:
        """What cannot be kept on this machine; empty if a token's bits depend on its text alone."""
        return tuple(str(found) for found in self.operations if not found.is_kept)

    def __str__(self) -> str:
        verdict = "batch and chunks show in the last bits" if self.problems else "batch-invariant"
        return "\n  ".join([f"{self.dtype}, {self.threads} threads: {verdict}", *map(str, self.operations)])


def probe_classes(dtype: str, threads: int, widths: Widths | None = None) -> NumericsReport:
    """Run every kernel in windows of every size on random numbers, and compare bits.

    Seconds at the widths of Qwen3-0.6B.
    """
    widths = widths or Widths()
    with _threads(threads), torch.inference_mode():
        probe = _Probe(getattr(torch, dtype), widths)
        return NumericsReport(
            dtype=dtype,
            threads=threads,
            operations=(*probe.linears(), probe.norm(), probe.rotation(), probe.prompt(), probe.decode()),
        )


class _Probe:
    """Operands of one model's shapes, and the kernels on them."""

    def __init__(self, dtype: torch.dtype, widths: Widths) -> None:
        self._dtype, self._widths = dtype, widths
        self._name = str(dtype).removeprefix("torch.")
        self._random = torch.Generator().manual_seed(0)
        self._workspace = Workspace(dtype)

    def linears(self) -> Iterator[RowClasses]:
        sizes = self._widths
        attended = sizes.heads * sizes.head_dim
        yield self._linear("qkv", sizes.hidden, attended + 2 * sizes.kv_heads * sizes.head_dim)
        yield self._linear("output", attended, sizes.hidden, "add")
        yield self._linear("gate", sizes.hidden, sizes.inner, "silu")
        yield self._linear("up", sizes.hidden, sizes.inner, "mul")
        yield self._linear("down", sizes.inner, sizes.hidden, "add")
        yield self._linear("head", sizes.hidden, min(sizes.vocab, _HEAD_COLUMNS), windows=ROW_BUCKETS)

    def norm(self) -> RowClasses:
        width = self._widths.hidden
        x, gamma = self._draw(_WINDOWS[-1], width), self._draw(width).float()

        def rows(count: int) -> Tensor:
            out = torch.empty(count, width, dtype=self._dtype)
            args = ((Tag.INPUT, x[:count]), (Tag.INPUT, gamma), (Tag.OUTPUT, out))
            self._run("rms_norm", args, Window.of(count, count), eps=1e-6, first_token=0)
            return out

        return _by_windows("norm", rows, _WINDOWS)

    def rotation(self) -> RowClasses:
        sizes = self._widths
        turned = sizes.heads + sizes.kv_heads
        qkv = self._draw(_WINDOWS[-1], (turned + sizes.kv_heads) * sizes.head_dim)
        gamma = self._draw(turned, sizes.head_dim).float()
        rotary = self._draw(_WINDOWS[-1], sizes.head_dim // 2, 2).float()

        def rows(count: int) -> Tensor:
            window = Window.of(count, count)
            window.first_slot = 0
            q = torch.empty(count, sizes.heads, sizes.head_dim, dtype=self._dtype)
            k, v = (torch.zeros(sizes.kv_heads, 1, count, sizes.head_dim, dtype=self._dtype) for _ in "kv")
            inputs = (qkv[:count], gamma, rotary[:count], torch.empty(count, dtype=torch.int64))
            args = (*((Tag.INPUT, x) for x in inputs), *((Tag.OUTPUT, x) for x in (q, k, v)))
            self._run("rotate_and_store", args, window, eps=1e-6, first_token=0)
            return torch.cat([q, k[:, 0].transpose(0, 1), v[:, 0].transpose(0, 1)], 1)

        return _by_windows("rotation", rows, _WINDOWS)

    def prompt(self) -> RowClasses:
        cuts = {
            f"chunks of {count}": [*range(0, _CONTEXT, count), _CONTEXT] for count in (_CONTEXT, 1, 7, 64, 100, 256)
        }
        return self._attention("attention of a prompt", cuts, ATTENTION_BLOCK)

    def decode(self) -> RowClasses:
        return self._attention("attention of generated tokens", {"singly": [*range(_CONTEXT + 1)]}, 1)

    def _linear(
        self, name: str, inner: int, out: int, epilogue: str = "none", windows: Sequence[int] = _WINDOWS
    ) -> RowClasses:
        x, other = self._draw(windows[-1], inner), self._draw(windows[-1], out)
        weight = pack(self._draw(out, inner) / inner**0.5)

        def rows(count: int) -> Tensor:
            y = torch.empty(count, out, dtype=self._dtype)
            paired = [(Tag.INPUT, other[:count])] if epilogue in ("mul", "add") else []
            args = ((Tag.INPUT, x[:count]), (Tag.INPUT, weight), *paired, (Tag.OUTPUT, y))
            self._run("linear", args, Window.of(1), epilogue=epilogue, bias=0)
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

    def _attend(self, queries: Tensor, start: int, caches: list[Tensor], order: np.ndarray, block: int) -> Tensor:
        count = queries.shape[0]
        pages = len(order)
        static = {
            "vocab_size": 1, "max_model_len": pages * _PAGE, "max_num_seqs": 1, "max_num_batched_tokens": count,
            "page_size": _PAGE, "num_pages": pages,
        }  # fmt: skip
        first, length, nowhere = (np.array([value], np.int32) for value in (start, count, -1))
        plan = plan_rows(
            "probe", static, np.zeros(count, np.int32), first, length, order[None].astype(np.int32), nowhere
        )
        window = Window.of(count)
        window.fill_tokens(plan, _PAGE, 0, count)
        attended = torch.empty(count, queries.shape[1] * queries.shape[2], dtype=self._dtype)
        rows = [torch.empty(1, dtype=torch.int32) for _ in range(3)]
        args = (*((Tag.INPUT, x) for x in (queries, *caches, *rows)), (Tag.OUTPUT, attended))
        self._run("paged_attention", args, window, block=block, first_token=0)
        return attended

    def _draw(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._random).to(self._dtype)

    def _run(
        self, kernel: str, args: Sequence[tuple[Tag, Tensor]], window: Window, **settings: int | float | str
    ) -> None:
        """One task on the given memory."""
        graph = GraphBuilder("probe")
        names = [f"argument.{position}" for position in range(len(args))]
        tiles = [
            (tag, graph.bound(name, str(tensor.dtype).removeprefix("torch."), *tensor.shape))
            for name, (tag, tensor) in zip(names, args, strict=True)
        ]
        graph.submit(kernel, *tiles, after=(), **settings)
        memory = {name: tensor for name, (_, tensor) in zip(names, args, strict=True)}
        BoundGraph(graph.build(), memory, window, self._workspace).run("probe")


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
