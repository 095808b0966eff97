"""The closed set of in-core functions, in torch: this module defines what each kernel of a task graph computes.

Owns nothing between launches but the ``Workspace``. Each kernel is bound to a task once and then called for
every replay without arguments; what changes between replays is read from the tiles' memory and the ``Window``.
A kernel on a tile of tokens is told which by ``first_token``. What it computes for a token does not depend on the
others of the window (``kernels/numerics.py`` measures on which machines that holds).

    rms_norm          x, gamma → h                       x / sqrt(mean(x²) + eps) · gamma, in fp32
    linear            x, w[, bias][, other] → y          x · wᵀ + bias, then none | silu | mul (by other) | add (other);
                                                         with w in int8, x · wᵀ is what ``int8`` says, the rest in fp32
    rotary_table      positions → rotary                 (cos, sin) of position · theta^(−2i/d), fp32
    rotate_and_store  qkv, gamma, rotary, slots → q, k_cache, v_cache    head norm, rotation of neighbour pairs, paging
    paged_attention   q, k_cache, v_cache, rows → o      softmax(q · kᵀ / √d) · v over each row's pages, causal
    load_rows         source, numbers → x                rows of a table or buffer
    store_rows        x, stores → target                 rows to a buffer, converted to its dtype
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import attrs
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from .int8 import Int8Matrix, multiply
from .qwen3.rows import RowPlan
from .torch_attention import AttentionMemory, PagedRow, attend_blocks, attend_singly

__all__ = ["KERNELS", "BoundTask", "Kernel", "Window", "Workspace", "rotary_frequencies"]

_NORM_ROWS = 128  # keeps the fp32 copy of a block in the L2 cache
_ROTATE_ROWS = 64  # likewise; 1.3 × faster than all at once


@attrs.define(eq=False)
class Window:
    """The inputs of one replay, refilled before it. Tensors keep their memory; the rest is replaced.

    Tokens from ``count`` on are padding: linears compute them, nothing else does, and nobody reads them.
    """

    tokens: Tensor  # (T,) int32
    positions: Tensor  # (T,) int32
    loads: Tensor  # (T,) int64
    count: int = 0
    slots: Tensor = attrs.field(factory=lambda: torch.empty(0, dtype=torch.int64))  # (count,)
    first_slot: int = -1  # the first of ``slots`` if they follow each other, else -1
    rows: list[PagedRow] = attrs.field(factory=list)
    stores: list[tuple[int, int]] = attrs.field(factory=list)  # (row of the source, row of the target)

    @classmethod
    def of(cls, size: int, count: int = 0) -> Window:
        """A window of ``size`` tokens, all padding but ``count``."""
        tokens, positions = torch.zeros(size, dtype=torch.int32), torch.zeros(size, dtype=torch.int32)
        return cls(tokens, positions, torch.zeros(size, dtype=torch.int64), count)

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
            self.rows.append(PagedRow(first - begin, last - begin, start, first_slot, scattered))
            if row_end <= end and plan.rows[row] >= 0:
                self.stores.append((row_end - 1 - begin, plan.rows[row]))

    def rows_of(self, begin: int, end: int) -> list[PagedRow]:
        """What the rows have of tokens ``begin:end``, counted from ``begin``."""
        if begin == 0 and self.count <= end:
            return self.rows
        return [row.cut(begin, end) for row in self.rows if row.begin < end and row.end > begin]

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
        self.attention = AttentionMemory(dtype)
        self._scratch: dict[tuple[int, ...], Tensor] = {}

    def scratch(self, *shape: int) -> Tensor:
        """fp32 memory of a kernel for one call. All who ask for a shape get the same, so that it stays in the cache."""
        return self._scratch.setdefault(shape, torch.empty(shape))


@attrs.frozen(eq=False)
class BoundTask:
    """A task with memory: ``values`` holds the tensor of each tile of the graph, ``args`` which of them it works on."""

    settings: Mapping[str, Any]
    values: list[Any]  # tensors, but weights may be an ``Int8Matrix``
    args: tuple[int, ...]
    window: Window
    workspace: Workspace

    def tensor(self, position: int) -> Tensor:
        """An argument whose memory stays: bound, or written in place."""
        found: Tensor = self.values[self.args[position]]
        return found


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
    values, source, window = task.values, task.args[0], task.window
    gamma, target = task.tensor(1), task.tensor(2)
    rows, width = target.shape
    block = min(rows, _NORM_ROWS)
    wide, factor = task.workspace.scratch(block, width), task.workspace.scratch(block, 1)
    scale = _MeanSquare(width, task.settings["eps"])
    first = task.settings["first_token"]

    def run() -> None:
        x = values[source]
        real = min(rows, window.count - first)
        for begin in range(0, real, block):
            count = min(block, real - begin)
            part = wide[:count].copy_(x[begin : begin + count])
            part.mul_(scale(part, factor[:count])).mul_(gamma)
            target[begin : begin + count].copy_(part)

    return run


_SPOT: tuple[Any, ...] = ([0, 0], [1, 1], [1, 1], 1)  # padding, stride, dilation, groups of a one-pixel convolution
_UNARY = {"none": "none", "silu": "swish"}


def _linear(task: BoundTask) -> Callable[[], Tensor]:
    values, epilogue = task.values, task.settings["epilogue"]
    source, weight = task.args[0], task.values[task.args[1]]
    bias = task.tensor(2) if task.settings["bias"] else None
    other = task.args[-2]
    if isinstance(weight, Int8Matrix):
        return _linear_in_int8(task, weight, bias)
    if weight.is_mkldnn and weight.dim() == 4:
        return _linear_as_convolution(task, weight, bias)
    if weight.is_mkldnn:
        plain = torch.ops.mkldnn._linear_pointwise.default
        paired = torch.ops.mkldnn._linear_pointwise.binary
        if epilogue in ("mul", "add"):
            return lambda: paired(values[source], values[other], weight, bias, epilogue)
        name = _UNARY[epilogue]
        return lambda: plain(values[source], weight, bias, name, [], "")

    linear = functional.linear
    if epilogue == "silu":
        return lambda: functional.silu(linear(values[source], weight, bias), inplace=True)
    if epilogue == "mul":
        return lambda: linear(values[source], weight, bias).mul_(values[other])
    if epilogue == "add":
        return lambda: linear(values[source], weight, bias).add_(values[other])
    return lambda: linear(values[source], weight, bias)


def _linear_in_int8(task: BoundTask, weight: Int8Matrix, bias: Tensor | None) -> Callable[[], Tensor]:
    values, source, other, epilogue = task.values, task.args[0], task.args[-2], task.settings["epilogue"]

    def run() -> Tensor:
        x = values[source]
        y = multiply(x, weight)
        if bias is not None:
            y.add_(bias)
        if epilogue == "silu":  # in fp64: the last bit of torch's fp32 exponential depends on where a number is
            y = functional.silu(y.double())
        elif epilogue == "mul":
            y.mul_(values[other])
        elif epilogue == "add":
            y.add_(values[other])
        return y.to(x.dtype)

    return run


def _linear_as_convolution(task: BoundTask, weight: Tensor, bias: Tensor | None) -> Callable[[], Tensor]:
    """Rows as the pixels of an image one pixel wide: see ``weights.pack``."""
    values, epilogue = task.values, task.settings["epilogue"]
    source, other = task.args[0], task.args[-2]
    columns = weight.shape[0]
    plain = torch.ops.mkldnn._convolution_pointwise.default
    paired = torch.ops.mkldnn._convolution_pointwise.binary
    stays = values[source].numel() > 0  # an input made anew in each replay is not there yet
    image = _image(values[source]) if stays else None

    def read() -> Tensor:
        return _image(values[source]) if image is None else image

    def rows(y: Tensor) -> Tensor:
        return y.as_strided((y.shape[2], columns), (columns, 1))

    if epilogue in ("mul", "add"):
        return lambda: rows(paired(read(), _image(values[other]), weight, bias, *_SPOT, epilogue, None, None, [], None))
    name = _UNARY[epilogue]
    return lambda: rows(plain(read(), weight, bias, *_SPOT, name, [], ""))


def _image(x: Tensor) -> Tensor:
    """(rows, width) as one image of that many channels, (1, width, rows, 1)."""
    rows, width = x.shape
    stride = x.stride(0)
    return x.as_strided((1, width, rows, 1), (rows * stride, 1, stride, stride))


def rotary_frequencies(theta: float, half: int) -> Tensor:
    """theta^(−i / half) for i below ``half``, fp32, as transformers computes it: angles agree to the last bit."""
    exponents = torch.arange(0, 2 * half, 2, dtype=torch.int64).float() / (2 * half)
    return 1.0 / (theta**exponents)


def _rotary_table(task: BoundTask) -> Callable[[], None]:
    positions, rotary = task.tensor(0), task.tensor(1)
    frequencies = rotary_frequencies(task.settings["theta"], rotary.shape[1])
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
    first = task.settings["first_token"]

    def run() -> None:
        mixed = values[qkv].view(tokens, -1, dim)
        real = min(tokens, window.count - first)
        for begin in range(0, real, block):
            count = min(block, real - begin)
            part, end = wide[:count], begin + count
            part.copy_(mixed[begin:end, :turned])
            part.mul_(scale(part, factors[:count])).mul_(gamma)
            pairs[:count].mul_(rotation[begin:end])
            q[begin:end].copy_(part[:, :heads])
            _store(k_cache, window, first + begin, part[:, heads:])
            _store(v_cache, window, first + begin, mixed[begin:end, turned:])

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
        cache.transpose(0, 1)[window.slots[begin : begin + count]] = values.to(cache.dtype)


def _paged_attention(task: BoundTask) -> Callable[[], None]:
    window, memory = task.window, task.workspace.attention
    q, attended = task.tensor(0), task.tensor(6)
    k_cache, v_cache = (_by_slot(task.tensor(position)) for position in (1, 2))
    tokens, heads, dim = q.shape
    queries = q.transpose(0, 1)[None]  # (1, heads, T, d)
    outputs = attended.view(tokens, heads, dim).transpose(0, 1)[None]
    first, block = task.settings["first_token"], task.settings["block"]

    def in_blocks() -> None:
        for row in window.rows_of(first, first + tokens):
            attend_blocks(memory, row, queries, outputs, k_cache, v_cache, block)

    if block > 1:
        return in_blocks
    asked, given = ([x.narrow(2, at, 1) for at in range(tokens)] for x in (queries, outputs))
    all_keys, all_values = k_cache[None], v_cache[None]

    def singly() -> None:
        for row in window.rows_of(first, first + tokens):
            attend_singly(memory, row, asked, given, all_keys, all_values)

    return singly


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
