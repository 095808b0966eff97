"""The closed set of in-core functions, in torch: this module defines what each kernel of a task graph computes.

Owns nothing between launches but the ``Workspace``. Each kernel is bound to a task once and then called for
every replay without arguments; what changes between replays is read from the tiles' memory and the ``Window``.

    rms_norm          x, gamma → h                       x / sqrt(mean(x²) + eps) · gamma, in fp32
    linear            x, w[, bias][, other] → y          x · wᵀ + bias, then none | silu | mul (by other) | add (other)
    rotary_table      positions → rotary                 (cos, sin) of position · theta^(−2i/d), fp32
    rotate_and_store  qkv, gamma, rotary, slots → q, k_cache, v_cache    head norm, rotation of neighbour pairs, paging
    paged_attention   q, k_cache, v_cache, rows → o      softmax(q · kᵀ / √d) · v over each row's pages, causal
    load_rows         source, numbers → x                rows of a table or buffer
    store_rows        x, stores → target                 rows to a buffer, converted to its dtype
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import attrs
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from .qwen3.rows import RowPlan

__all__ = ["KERNELS", "BoundTask", "Kernel", "Row", "Window", "Workspace"]

_ATTENTION_ROWS = 256  # query block: as fast as SDPA's own causal path and bit-equal to it, without its T × S mask
_NORM_ROWS = 128  # keeps the fp32 copy of a block in the L2 cache
_ROTATE_ROWS = 64  # likewise; 1.3 × faster than all at once


@attrs.frozen(eq=False)
class Row:
    """The tokens of one sequence inside a window."""

    begin: int  # first token in the window
    end: int  # one past the last
    start: int  # position of the first token
    first_slot: int  # where its pages begin in the cache if they follow each other, else -1
    slots: Tensor | None  # (context,) int64, the slot of every position up to the last token, if they do not


@attrs.define(eq=False)
class Window:
    """The inputs of one replay, refilled before it. Tensors keep their memory; the rest is replaced.

    Tokens from ``count`` on are padding: computed, never stored, attending to nothing.
    """

    tokens: Tensor  # (T,) int32
    positions: Tensor  # (T,) int32
    loads: Tensor  # (T,) int64
    count: int = 0
    slots: Tensor = attrs.field(factory=lambda: torch.empty(0, dtype=torch.int64))  # (count,)
    first_slot: int = -1  # the first of ``slots`` if they follow each other, else -1
    rows: list[Row] = attrs.field(factory=list)
    stores: list[tuple[int, int]] = attrs.field(factory=list)  # (row of the source, row of the target)

    @classmethod
    def of(cls, size: int) -> Window:
        """A window of ``size`` tokens, all padding."""
        tokens, positions = torch.zeros(size, dtype=torch.int32), torch.zeros(size, dtype=torch.int32)
        return cls(tokens, positions, torch.zeros(size, dtype=torch.int64))

    def fill_tokens(self, plan: RowPlan, page_size: int, begin: int, end: int) -> None:
        """Take tokens ``begin:end`` of a dispatch."""
        self.count = end - begin
        for memory, values in ((self.tokens.numpy(), plan.tokens), (self.positions.numpy(), plan.positions)):
            memory[: self.count] = values[begin:end]
            memory[self.count :] = 0
        slots = plan.slots[begin:end]
        self.slots = torch.from_numpy(slots)
        follows = int(slots[-1]) - int(slots[0]) == self.count - 1 and bool((np.diff(slots) == 1).all())
        self.first_slot = int(slots[0]) if follows else -1
        self.rows, self.stores = [], []
        for row, row_begin in enumerate(plan.offsets[:-1]):
            row_end = plan.offsets[row + 1]
            first, last = max(row_begin, begin), min(row_end, end)
            if first >= last:
                continue
            start = plan.starts[row] + first - row_begin
            context = start + last - first
            pages = plan.tables[row, : -(-context // page_size)].astype(np.int64)
            scattered: Tensor | None = None
            if len(pages) > 1 and (np.diff(pages) != 1).any():
                inside = np.arange(page_size)
                scattered = torch.from_numpy((pages[:, None] * page_size + inside).reshape(-1)[:context])
            first_slot = -1 if scattered is not None else int(pages[0]) * page_size
            self.rows.append(Row(first - begin, last - begin, start, first_slot, scattered))
            if row_end <= end and plan.rows[row] >= 0:
                self.stores.append((row_end - 1 - begin, plan.rows[row]))

    def fill_rows(self, rows: list[int]) -> None:
        """Take rows of a buffer, to be stored in the rows of the same number of the next one."""
        self.count = len(rows)
        memory = self.loads.numpy()
        memory[: self.count] = rows
        memory[self.count :] = rows[0]
        self.stores = list(enumerate(rows))


class Workspace:
    """Memory kernels of all graphs of a chip share, because tasks run one at a time. Grows as needed."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._past = -1
        self._mask = torch.empty(0)
        self._gathered = [torch.empty(0), torch.empty(0)]
        self._scratch: dict[tuple[int, ...], Tensor] = {}

    def scratch(self, *shape: int) -> Tensor:
        """fp32 memory of a kernel for one call. All who ask for a shape get the same, so that it stays in the cache."""
        return self._scratch.setdefault(shape, torch.empty(shape))

    def gather(self, which: int, cache: Tensor, slots: Tensor) -> Tensor:
        """Slots of a layer's keys (``which`` 0) or values (1), (kv_heads, slots, d), as (kv_heads, len(slots), d)."""
        shape = (cache.shape[0], len(slots), cache.shape[2])
        if self._gathered[which].numel() < math.prod(shape):
            self._gathered[which] = torch.empty(2 * math.prod(shape), dtype=self._dtype)
        target = self._gathered[which][: math.prod(shape)].view(shape)
        return torch.index_select(cache, 1, slots, out=target)

    def mask(self, queries: int, past: int) -> Tensor:
        """Additive causal mask (queries, past + queries): query i sees keys up to past + i. At most 256 queries.

        All masks are views of one tensor, whose last columns are the triangle.
        """
        if past > self._past:
            self._past = max(past, 2 * self._past, 1024)
            self._mask = torch.zeros(_ATTENTION_ROWS, self._past + _ATTENTION_ROWS, dtype=self._dtype)
            self._mask[:, self._past :] = torch.full_like(self._mask[:, self._past :], float("-inf")).triu_(1)
        return self._mask[:queries, self._past - past : self._past + queries]


@attrs.frozen(eq=False)
class BoundTask:
    """A task with memory: ``values`` holds the tensor of each tile of the graph, ``args`` which of them it works on."""

    settings: Mapping[str, Any]
    values: list[Tensor]
    args: tuple[int, ...]
    window: Window
    workspace: Workspace

    def tensor(self, position: int) -> Tensor:
        """An argument whose memory stays: bound, or written in place."""
        return self.values[self.args[position]]


@attrs.frozen
class Kernel:
    """How a kernel is bound. One that ``returns`` makes its last argument's tensor anew in each call."""

    bind: Callable[[BoundTask], Callable[[], Any]]
    returns: bool


class _MeanSquare:
    """1 / sqrt(mean(x²) + eps) over the last axis: three calls instead of five."""

    def __init__(self, width: int, eps: float) -> None:
        self._eps = torch.full((1,), eps)
        self._share = 1.0 / width

    def __call__(self, x: Tensor, out: Tensor) -> Tensor:
        torch.linalg.vector_norm(x, dim=-1, keepdim=True, out=out)
        return torch.addcmul(self._eps, out, out, value=self._share, out=out).rsqrt_()


def _rms_norm(task: BoundTask) -> Callable[[], None]:
    values, source = task.values, task.args[0]
    gamma, target = task.tensor(1), task.tensor(2)
    rows, width = target.shape
    block = min(rows, _NORM_ROWS)
    wide, factor = task.workspace.scratch(block, width), task.workspace.scratch(block, 1)
    scale = _MeanSquare(width, task.settings["eps"])

    def one() -> None:
        wide.copy_(values[source])
        wide.mul_(scale(wide, factor)).mul_(gamma)
        target.copy_(wide)

    def many() -> None:
        x = values[source]
        for begin in range(0, rows, block):
            end = min(begin + block, rows)
            part = wide[: end - begin].copy_(x[begin:end])
            part.mul_(scale(part, factor[: end - begin])).mul_(gamma)
            target[begin:end].copy_(part)

    return one if rows == block else many


def _linear(task: BoundTask) -> Callable[[], Tensor]:
    values, epilogue = task.values, task.settings["epilogue"]
    source, weight = task.args[0], task.tensor(1)
    bias = task.tensor(2) if task.settings["bias"] else None
    other = task.args[-2]
    if weight.is_mkldnn:
        plain = torch.ops.mkldnn._linear_pointwise.default
        paired = torch.ops.mkldnn._linear_pointwise.binary
        if epilogue in ("mul", "add"):
            return lambda: paired(values[source], values[other], weight, bias, epilogue)
        name = {"none": "none", "silu": "swish"}[epilogue]
        return lambda: plain(values[source], weight, bias, name, [], "")

    linear = functional.linear
    if epilogue == "silu":
        return lambda: functional.silu(linear(values[source], weight, bias), inplace=True)
    if epilogue == "mul":
        return lambda: linear(values[source], weight, bias).mul_(values[other])
    if epilogue == "add":
        return lambda: linear(values[source], weight, bias).add_(values[other])
    return lambda: linear(values[source], weight, bias)


def _rotary_table(task: BoundTask) -> Callable[[], None]:
    positions, rotary = task.tensor(0), task.tensor(1)
    half = rotary.shape[1]
    # As transformers computes it, so that fp32 angles agree to the last bit.
    exponents = torch.arange(0, 2 * half, 2, dtype=torch.int64).float() / (2 * half)
    frequencies = 1.0 / (task.settings["theta"] ** exponents)
    angles = torch.empty(rotary.shape[:2])
    cos, sin = rotary[..., 0], rotary[..., 1]

    def run() -> None:
        torch.mul(positions.float()[:, None], frequencies, out=angles)
        torch.cos(angles, out=cos)
        torch.sin(angles, out=sin)

    return run


def _rotate_and_store(task: BoundTask) -> Callable[[], None]:
    values, window, qkv = task.values, task.window, task.args[0]
    gamma, q = task.tensor(1), task.tensor(4)
    rotation = torch.view_as_complex(task.tensor(2))[:, None]  # (T, 1, d/2)
    k_cache, v_cache = (_by_slot(task.tensor(position)) for position in (5, 6))
    tokens, heads, dim = q.shape
    turned = gamma.shape[0]  # query and key heads together
    block = min(tokens, _ROTATE_ROWS)
    wide, factors = task.workspace.scratch(block, turned, dim), task.workspace.scratch(block, turned, 1)
    pairs = torch.view_as_complex(wide.view(block, turned, dim // 2, 2))
    scale = _MeanSquare(dim, task.settings["eps"])

    def run() -> None:
        mixed = values[qkv].view(tokens, -1, dim)
        for begin in range(0, tokens, block):
            count = min(block, tokens - begin)
            part = wide if count == block else wide[:count]
            factor = factors if count == block else factors[:count]
            part.copy_(mixed[begin : begin + count, :turned])
            part.mul_(scale(part, factor)).mul_(gamma)
            pairs[:count].mul_(rotation[begin : begin + count])
            q[begin : begin + count].copy_(part[:, :heads])
            real = min(count, window.count - begin)
            if real > 0:
                _store(k_cache, window, begin, part[:real, heads:])
                _store(v_cache, window, begin, mixed[begin : begin + real, turned:])

    return run


def _by_slot(cache: Tensor) -> Tensor:
    """One layer's cache (kv_heads, pages, page_size, head_dim) as (kv_heads, slots, head_dim)."""
    return cache.flatten(1, 2)


def _store(cache: Tensor, window: Window, begin: int, values: Tensor) -> None:
    """Write (n, kv_heads, head_dim) for tokens ``begin : begin + n`` of the window to their slots."""
    count = values.shape[0]
    if window.first_slot >= 0:
        cache.narrow(1, window.first_slot + begin, count).copy_(values.transpose(0, 1))
    else:
        cache.index_copy_(1, window.slots[begin : begin + count], values.transpose(0, 1).to(cache.dtype))


def _paged_attention(task: BoundTask) -> Callable[[], None]:
    window, workspace = task.window, task.workspace
    q, attended = task.tensor(0), task.tensor(6)
    k_cache, v_cache = (_by_slot(task.tensor(position)) for position in (1, 2))
    heads, dim = q.shape[1:]
    kv_heads = k_cache.shape[0]
    queries = q.transpose(0, 1)[None]  # (1, heads, T, d)
    outputs = attended.view(-1, heads, dim).transpose(0, 1)[None]
    attend = functional.scaled_dot_product_attention
    is_grouped = heads != kv_heads

    def run() -> None:
        for row in window.rows:
            context = row.start + row.end - row.begin
            if row.slots is None:
                keys = k_cache.narrow(1, row.first_slot, context)[None]
                values = v_cache.narrow(1, row.first_slot, context)[None]
            else:  # the same numbers in the same order, so the same bits wherever the pages are
                keys = workspace.gather(0, k_cache, row.slots)[None]
                values = workspace.gather(1, v_cache, row.slots)[None]
            for begin in range(row.begin, row.end, _ATTENTION_ROWS):
                count = min(_ATTENTION_ROWS, row.end - begin)
                past = row.start + begin - row.begin
                seen = past + count
                outputs.narrow(2, begin, count).copy_(
                    attend(
                        queries.narrow(2, begin, count),
                        keys.narrow(2, 0, seen),
                        values.narrow(2, 0, seen),
                        attn_mask=workspace.mask(count, past) if count > 1 and past else None,
                        is_causal=count > 1 and not past,
                        enable_gqa=is_grouped,
                    )
                )

    return run


def _load_rows(task: BoundTask) -> Callable[[], Tensor]:
    source, numbers = task.tensor(0), task.tensor(1)
    return lambda: source.index_select(0, numbers)


def _store_rows(task: BoundTask) -> Callable[[], None]:
    values, source, window = task.values, task.args[0], task.window
    target = task.tensor(2)

    def run() -> None:
        x = values[source]
        for here, there in window.stores:
            target[there].copy_(x[here])

    return run


KERNELS: Mapping[str, Kernel] = {
    "rms_norm": Kernel(_rms_norm, returns=False),
    "linear": Kernel(_linear, returns=True),
    "rotary_table": Kernel(_rotary_table, returns=False),
    "rotate_and_store": Kernel(_rotate_and_store, returns=False),
    "paged_attention": Kernel(_paged_attention, returns=False),
    "load_rows": Kernel(_load_rows, returns=True),
    "store_rows": Kernel(_store_rows, returns=False),
}
