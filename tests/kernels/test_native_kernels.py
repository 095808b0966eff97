"""Each native kernel against torch, which defines it, and fp64; and a row's bits, whatever shares its task.

Shapes are drawn at random, with tails everywhere: rows, columns and inputs that are no multiple of any block, tiles
that begin inside a panel, strided tiles, pages anywhere. Whatever a kernel has no business reading holds NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from native_runs import ISAS, Row, cut, dtype_of, plan_of, randn, run_native, run_torch, same_bits, window_tiles
from torch import Tensor

from chipbus.kernels.graph import GraphBuilder, Tag, TaskGraph
from chipbus.kernels.torch_kernels import rotary_frequencies
from chipbus.kernels.weights import can_pack

DTYPES = ["float32", "bfloat16"]

ROUNDING = {"float32": 2.0**-24, "bfloat16": 2.0**-8}
"""Of a result to its dtype: the most that is lost, as a share of the result."""

LIMITS: Mapping[str, Mapping[str, float]] = {
    "linear": {"float32": 1e-6, "bfloat16": 1e-6},  # of Σ |x·w| + |bias|, times or plus |other|
    "rms_norm": {"float32": 3e-7, "bfloat16": 3e-7},  # of the result
    "rotary_table": {"float32": 3e-8},  # of 1
    "rotate_and_store": {"float32": 5e-7, "bfloat16": 5e-7},  # of the length of the pair that is turned
    # of Σ chance · |v|, in fp32 times 1 + the largest Σ |q·k| / √d; in bf16 chances are rounded
    "paged_attention": {"float32": 5e-7, "bfloat16": 2.0**-8},
    "load_rows": {"float32": 0, "bfloat16": 0},
    "store_rows": {"float32": 0, "bfloat16": 0},
}
"""What a native kernel may be off from fp64 besides, as a share of what it adds up. 0: it only moves and converts."""

MANY = settings(
    deadline=None,
    print_blob=True,
    max_examples=15,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
THOROUGH = settings(MANY, max_examples=40)
SEEDS = st.integers(0, 2**32 - 1)
THREADS = st.integers(1, 4)


@attrs.frozen(eq=False, repr=False)
class Case:
    """Tasks of one kernel, and what they must write."""

    kernel: str
    dtype: str
    graph: TaskGraph
    tokens: int
    memory: dict[str, Tensor]
    fill: Callable[[Any], None]
    exact: dict[str, Tensor]
    """By name of a buffer, all of it in fp64. NaN: not to be written."""
    scale: dict[str, Tensor]
    """What the limit is a share of."""
    matrices: tuple[str, ...] = ()
    moved: tuple[str, ...] = ()
    """Buffers whose values are copied."""

    def tolerance(self, name: str) -> Tensor:
        exact = self.exact[name].nan_to_num()
        if name in self.moved or not LIMITS[self.kernel][self.dtype]:
            return torch.zeros_like(exact)
        return ROUNDING[self.dtype] * exact.abs() + LIMITS[self.kernel][self.dtype] * self.scale[name]

    def by_native(self, isa: str, threads: int = 1) -> dict[str, Tensor]:
        return run_native(isa, self.graph, self.memory, self.fill, matrices=self.matrices, threads=threads)

    def by_torch(self) -> dict[str, Tensor]:
        return run_torch(self.graph, self.memory, self.fill, matrices=self.matrices, tokens=self.tokens)

    def check(self, isa: str, threads: int) -> None:
        ours, theirs = self.by_native(isa, threads), self.by_torch()
        for name, before in self.memory.items():
            if name not in self.exact:
                assert same_bits(ours[name], before), f"{name} is not an output"
                continue
            written = ~self.exact[name].isnan()
            assert same_bits(ours[name].where(~written, before), before), f"{name} was written where nobody asked"
            tolerance = self.tolerance(name)
            off = (ours[name].double() - self.exact[name]).abs()[written]
            assert (off <= tolerance[written]).all(), f"{name} is off by up to {float(off.max())}"
            if not can_pack(ours[name].dtype) and self.kernel == "linear":  # torch rounds before each epilogue
                tolerance = tolerance + ROUNDING[self.dtype] * self.scale[name]
            apart = (ours[name].double() - theirs[name].double()).abs()[written]
            assert (apart <= 2 * tolerance[written]).all(), f"{name} is up to {float(apart.max())} from torch"


def counted(tokens: int) -> Callable[[Any], None]:
    """Fills a window with so many tokens, for kernels that look at nothing else of it."""

    def fill(window: Any) -> None:
        window.count = tokens

    return fill


# linear


def finished(epilogue: str, plain: Tensor, other: Tensor) -> Tensor:
    return {
        "none": plain,
        "silu": plain * torch.sigmoid(plain),
        "mul": plain * other,
        "add": plain + other,
    }[epilogue]


def linear_graph(
    memory: Mapping[str, Tensor],
    token_tiles: Sequence[tuple[int, int]],
    column_tiles: Sequence[tuple[int, int]],
    epilogue: str,
    left: int,
    top: int,
) -> TaskGraph:
    """y[:, left:…] of x[:, top:…], in so many tasks."""
    graph = GraphBuilder("linear")
    tiles = {name: graph.bound(name, dtype_of(tensor), *tensor.shape) for name, tensor in memory.items()}
    inner = memory["w"].shape[1]
    for begin, end in token_tiles:
        for first, last in column_tiles:
            here = slice(begin, end), slice(left + first, left + last)
            args = [(Tag.INPUT, tiles["x"][begin:end, top : top + inner]), (Tag.INPUT, tiles["w"][first:last])]
            if "bias" in memory:
                args.append((Tag.INPUT, tiles["bias"][first:last]))
            if epilogue in ("mul", "add"):
                args.append((Tag.INPUT, tiles["other"][here]))
            args.append((Tag.OUTPUT, tiles["y"][here]))
            graph.submit("linear", *args, epilogue=epilogue, bias=int("bias" in memory), first_token=begin)
    return graph.build()


@st.composite
def linears(draw: st.DrawFn, dtype: str) -> Case:
    random = np.random.default_rng(draw(SEEDS))
    rows, padding = draw(st.integers(1, 70)), draw(st.sampled_from([0, 0, 1, 9]))
    out = draw(st.one_of(st.integers(1, 70), st.integers(1, 300), st.sampled_from([64, 128, 192])))
    step = 1 if dtype == "float32" else 2  # the kernels take pairs of bf16
    inner = step * draw(st.one_of(st.integers(1, 40), st.integers(1, 160), st.sampled_from([16, 32, 64, 128, 256])))
    epilogue, bias = draw(st.sampled_from(["none", "silu", "mul", "add"])), draw(st.booleans())
    left, right, top, bottom = (draw(st.sampled_from([0, 0, 2, 6])) for _ in range(4))
    size = rows + padding
    x = torch.full((size, top + inner + bottom), torch.nan, dtype=getattr(torch, dtype))
    x[:rows, top : top + inner] = randn(random, rows, inner, dtype=dtype)
    memory = {
        "x": x,
        "w": (randn(random, out, inner) / inner**0.5).to(x.dtype),
        "y": randn(random, size, left + out + right, dtype=dtype),
    }
    if bias:
        memory["bias"] = randn(random, out, dtype=dtype)
    if epilogue in ("mul", "add"):
        memory["other"] = randn(random, size, left + out + right, dtype=dtype)
    wide = {name: tensor.double() for name, tensor in memory.items()}
    here = slice(0, rows), slice(left, left + out)
    given = wide["x"][:rows, top : top + inner]
    plain = given @ wide["w"].T + wide.get("bias", torch.zeros(1))
    added = given.abs() @ wide["w"].abs().T + wide.get("bias", torch.zeros(1)).abs()
    other = wide["other"][here] if "other" in wide else torch.zeros(1)
    exact, scale = torch.full_like(wide["y"], torch.nan), torch.ones_like(wide["y"])
    exact[here] = finished(epilogue, plain, other)
    scale[here] = added * other.abs() if epilogue == "mul" else added + other.abs()
    graph = linear_graph(memory, cut(random, size), cut(random, out), epilogue, left, top)
    return Case("linear", dtype, graph, size, memory, counted(rows), {"y": exact}, {"y": scale}, ("w",))


# rows


@st.composite
def norms(draw: st.DrawFn, dtype: str) -> Case:
    random = np.random.default_rng(draw(SEEDS))
    rows, padding, width = draw(st.integers(1, 40)), draw(st.integers(0, 3)), draw(st.integers(2, 300))
    left, right = (draw(st.sampled_from([0, 0, 3])) for _ in range(2))
    size, eps = rows + padding, draw(st.sampled_from([1e-6, 1e-3]))
    x = torch.full((size, left + width + right), torch.nan, dtype=getattr(torch, dtype))
    x[:rows, left : left + width] = randn(random, rows, width, dtype=dtype) * 10.0 ** random.integers(-2, 3)
    memory = {"x": x, "gamma": randn(random, width), "h": randn(random, size, right + width + left, dtype=dtype)}
    graph = GraphBuilder("norm")
    tiles = {name: graph.bound(name, dtype_of(tensor), *tensor.shape) for name, tensor in memory.items()}
    for begin, end in cut(random, size):
        args = (Tag.INPUT, tiles["x"][begin:end, left : left + width]), (Tag.INPUT, tiles["gamma"])
        target = (Tag.OUTPUT, tiles["h"][begin:end, right : right + width])
        graph.submit("rms_norm", *args, target, eps=eps, first_token=begin)
    wide, here = x[:rows, left : left + width].double(), (slice(0, rows), slice(right, right + width))
    exact, scale = (torch.full(memory["h"].shape, value, dtype=torch.float64) for value in (torch.nan, 1.0))
    exact[here] = wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * memory["gamma"].double()
    scale[here] = exact[here].abs()
    return Case("rms_norm", dtype, graph.build(), size, memory, counted(rows), {"h": exact}, {"h": scale})


@st.composite
def rotary_tables(draw: st.DrawFn, dtype: str) -> Case:
    del dtype
    random = np.random.default_rng(draw(SEEDS))
    rows, padding, half = draw(st.integers(1, 30)), draw(st.integers(0, 3)), draw(st.integers(1, 128))
    theta = draw(st.sampled_from([1e4, 1e6, 5e6]))
    positions = random.integers(0, draw(st.sampled_from([2, 1000, 131072])), rows).astype(np.int32)
    graph = GraphBuilder("rotary")
    memory = {"rotary": randn(random, rows + padding, half, 2)}
    given, rotary = (
        graph.bound("positions", "int32", rows + padding),
        graph.bound("rotary", "float32", rows + padding, half, 2),
    )
    graph.submit("rotary_table", (Tag.INPUT, given), (Tag.OUTPUT, rotary), theta=theta)

    def fill(window: Any) -> None:
        window.count = rows
        native = getattr(window, "memory", None)
        (window.positions.numpy() if native is None else native["positions"])[:rows] = positions

    # The angle is a product in fp32, as in transformers; what is made of it is exact.
    angles = (torch.from_numpy(positions).float()[:, None] * rotary_frequencies(theta, half)).double()
    exact = torch.full((rows + padding, half, 2), torch.nan, dtype=torch.float64)
    exact[:rows] = torch.stack([angles.cos(), angles.sin()], -1)
    if padding:  # torch fills the table of the whole window
        memory["rotary"][rows:] = 0
    return Case(
        "rotary_table", "float32", graph.build(), rows + padding, memory, fill, {"rotary": exact},
        {"rotary": torch.ones_like(exact)},
    )  # fmt: skip


@st.composite
def loads(draw: st.DrawFn, dtype: str) -> Case:
    random = np.random.default_rng(draw(SEEDS))
    rows, padding, width, count = (draw(st.integers(*bounds)) for bounds in ((1, 40), (0, 3), (1, 80), (1, 30)))
    by = draw(st.sampled_from(["loads", "tokens"]))  # int64 and int32
    chosen = random.integers(0, count, rows)
    memory = {
        "source": randn(random, count, width, dtype=dtype),
        "x": randn(random, rows + padding, width, dtype=dtype),
    }
    graph = GraphBuilder("load")
    numbers = graph.bound(by, "int64" if by == "loads" else "int32", rows + padding)
    tiles = {name: graph.bound(name, dtype, *tensor.shape) for name, tensor in memory.items()}
    graph.submit("load_rows", (Tag.INPUT, tiles["source"]), (Tag.INPUT, numbers), (Tag.OUTPUT, tiles["x"]))

    def fill(window: Any) -> None:
        window.count = rows
        native = getattr(window, "memory", None)
        (getattr(window, by).numpy() if native is None else native[by])[:rows] = chosen

    exact = torch.full(memory["x"].shape, torch.nan, dtype=torch.float64)
    exact[:rows] = memory["source"][chosen].double()
    return Case("load_rows", dtype, graph.build(), rows + padding, memory, fill, {"x": exact}, {})


@st.composite
def stores(draw: st.DrawFn, dtype: str) -> Case:
    """Conversions of every kind to ``dtype``: from bf16 and from fp32."""
    random = np.random.default_rng(draw(SEEDS))
    lengths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=8))
    source, width, targets = draw(st.sampled_from(DTYPES)), draw(st.integers(1, 80)), draw(st.integers(8, 20))
    places = random.permutation(targets)[: len(lengths)]
    rows = [
        Row(0, length, [at], int(place) if random.random() < 0.8 else -1)
        for at, (length, place) in enumerate(zip(lengths, places, strict=True))
    ]
    plan, size = plan_of(rows, 16, len(rows)), sum(lengths) + draw(st.integers(0, 3))
    x = randn(random, size, width, dtype=source) * 10.0 ** random.integers(-3, 4)
    memory = {"x": x, "target": randn(random, targets, width, dtype=dtype)}
    graph = GraphBuilder("store")
    tiles = {name: graph.bound(name, dtype_of(tensor), *tensor.shape) for name, tensor in memory.items()}
    window = window_tiles(graph, size, 1)
    graph.submit("store_rows", (Tag.INPUT, tiles["x"]), (Tag.INPUT, window["stores"]), (Tag.INOUT, tiles["target"]))
    exact = torch.full(memory["target"].shape, torch.nan, dtype=torch.float64)
    for row, last in zip(rows, np.cumsum(lengths) - 1, strict=True):
        if row.target >= 0:
            exact[row.target] = x[last].to(exact.dtype if dtype == "float32" else torch.bfloat16).double()
    fill = filling(plan, 16)
    return Case("store_rows", dtype, graph.build(), size, memory, fill, {"target": exact}, {})


def filling(plan: Any, page_size: int) -> Callable[[Any], None]:
    """Fills a window with all tokens of a plan."""

    def fill(window: Any) -> None:
        window.fill_tokens(plan, page_size, 0, len(plan.tokens))

    return fill


# pages


@attrs.frozen(eq=False)
class Paged:
    """Rows of a window, with pages of their own."""

    rows: list[Row]
    page_size: int
    num_pages: int

    @property
    def tokens(self) -> int:
        return sum(row.length for row in self.rows)

    def slots(self, row: Row, begin: int, end: int) -> Tensor:
        """Where positions ``begin:end`` are in the cache."""
        at = np.arange(begin, end)
        return torch.from_numpy(
            np.array(row.pages, np.int64)[at // self.page_size] * self.page_size + at % self.page_size
        )


@st.composite
def paged(draw: st.DrawFn, random: np.random.Generator, *, most: int = 200) -> Paged:
    page_size = draw(st.sampled_from([1, 3, 16, 128]))
    is_decode = draw(st.booleans())
    around = st.sampled_from([63, 64, 65, 127, 128, 129])
    shapes = []
    for _ in range(draw(st.integers(1, 12 if is_decode else 3))):
        context = draw(st.one_of(st.integers(1, most), around))
        shapes.append((context, 1 if is_decode else draw(st.integers(1, min(context, 90)))))
    counts = [-(-context // page_size) for context, _ in shapes]
    num_pages = sum(counts) + 2
    order = random.permutation(num_pages) if draw(st.booleans()) else np.arange(num_pages)
    rows, first = [], 0
    for (context, length), count in zip(shapes, counts, strict=True):
        rows.append(Row(context - length, length, order[first : first + count].tolist()))
        first += count
    return Paged(rows, page_size, num_pages)


DIMS = st.sampled_from([16, 24, 64, 128, 256, 6, 80])


def rotation_graph(
    memory: Mapping[str, Tensor], pages: int, tiles_of: Sequence[tuple[int, int]], eps: float
) -> TaskGraph:
    graph = GraphBuilder("rotate")
    tiles = {name: graph.bound(name, dtype_of(tensor), *tensor.shape) for name, tensor in memory.items()}
    tiles |= window_tiles(graph, memory["q"].shape[0], pages)
    for begin, end in tiles_of:
        args = [(Tag.INPUT, tiles[name][begin:end]) for name in ("qkv", "rotary", "slots")]
        args.insert(1, (Tag.INPUT, tiles["gamma"]))
        args.append((Tag.OUTPUT, tiles["q"][begin:end]))
        args += [(Tag.OUTPUT_EXISTING, tiles[name]) for name in ("k_cache", "v_cache")]
        graph.submit("rotate_and_store", *args, eps=eps, first_token=begin)
    return graph.build()


@st.composite
def rotations(draw: st.DrawFn, dtype: str) -> Case:
    random = np.random.default_rng(draw(SEEDS))
    kv_heads, group, dim = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(DIMS)
    heads, where = kv_heads * group, draw(paged(random, most=60))
    rows, size, eps = where.tokens, where.tokens + draw(st.integers(0, 3)), draw(st.sampled_from([1e-6, 1e-3]))
    width = (heads + 2 * kv_heads) * dim
    qkv = torch.full((size, width), torch.nan, dtype=getattr(torch, dtype))
    qkv[:rows] = randn(random, rows, width, dtype=dtype)
    angles = randn(random, size, dim // 2)
    rotary = torch.stack([angles.cos(), angles.sin()], -1)
    cache = kv_heads, where.num_pages, where.page_size, dim
    memory = {
        "qkv": qkv, "gamma": randn(random, heads + kv_heads, dim), "rotary": rotary,
        "q": randn(random, size, heads, dim, dtype=dtype),
        "k_cache": randn(random, *cache, dtype=dtype), "v_cache": randn(random, *cache, dtype=dtype),
    }  # fmt: skip
    graph = rotation_graph(memory, max(len(row.pages) for row in where.rows), cut(random, size), eps)
    mixed = qkv[:rows].double().view(rows, heads + 2 * kv_heads, dim)
    turned = mixed[:, : heads + kv_heads]
    turned = turned / (turned.square().mean(-1, keepdim=True) + eps).sqrt() * memory["gamma"].double()
    cos, sin = rotary[:rows, None].double().unbind(-1)
    even, odd = turned[..., ::2], turned[..., 1::2]
    pairs = torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(2)
    lengths = (even.square() + odd.square()).sqrt().repeat_interleave(2, -1)
    slots = torch.cat([where.slots(row, row.start, row.start + row.length) for row in where.rows])
    exact = {
        name: torch.full(memory[name].shape, torch.nan, dtype=torch.float64) for name in ("q", "k_cache", "v_cache")
    }
    scale = {name: torch.ones_like(tensor) for name, tensor in exact.items()}
    exact["q"][:rows], scale["q"][:rows] = pairs[:, :heads], lengths[:, :heads]
    for name, into, values in (
        ("k_cache", exact, pairs[:, heads:]), ("k_cache", scale, lengths[:, heads:]),
        ("v_cache", exact, mixed[:, heads + kv_heads :]),
    ):  # fmt: skip
        into[name].flatten(1, 2)[:, slots] = values.transpose(0, 1)
    plan = plan_of(where.rows, where.page_size, where.num_pages)
    return Case(
        "rotate_and_store", dtype, graph, size, memory, filling(plan, where.page_size), exact, scale,
        moved=("v_cache",),
    )  # fmt: skip


def attention_graph(
    memory: Mapping[str, Tensor],
    tokens: int,
    pages: int,
    token_tiles: Sequence[tuple[int, int]],
    head_tiles: Sequence[tuple[int, int]],
    block: int,
) -> TaskGraph:
    graph = GraphBuilder("attention")
    tiles = {name: graph.bound(name, dtype_of(tensor), *tensor.shape) for name, tensor in memory.items()}
    tiles |= window_tiles(graph, tokens, pages)
    kv_heads = memory["k_cache"].shape[0]
    group, width = memory["q"].shape[1] // kv_heads, memory["attended"].shape[1] // kv_heads
    for first, last in head_tiles:
        for begin, end in token_tiles:
            args = [(Tag.INPUT, tiles["q"][begin:end, first * group : last * group])]
            args += [(Tag.INPUT, tiles[name][first:last]) for name in ("k_cache", "v_cache")]
            args += [(Tag.INPUT, tiles[name]) for name in ("row_offsets", "row_ends", "block_tables")]
            args.append((Tag.OUTPUT, tiles["attended"][begin:end, first * width : last * width]))
            graph.submit("paged_attention", *args, block=block, first_token=begin)
    return graph.build()


def attended(q: Tensor, keys: Tensor, values: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """In fp64, and what the limit is a share of: q (n, heads, d), keys and values (kv_heads, start + n, d)."""
    group = q.shape[1] // keys.shape[0]
    keys, values = (x.double().repeat_interleave(group, 0) for x in (keys, values))
    scores = torch.einsum("nhd,hsd->hns", q.double(), keys) / q.shape[2] ** 0.5
    sees = torch.arange(keys.shape[1])[None] <= start + torch.arange(q.shape[0])[:, None]
    chances = scores.masked_fill(~sees, -torch.inf).softmax(-1)
    scale = torch.einsum("hns,hsd->nhd", chances, values.abs())
    if q.dtype == torch.float32:  # in bf16 what the rounding of chances costs is far more
        products = torch.einsum("nhd,hsd->hns", q.double().abs(), keys.abs()) / q.shape[2] ** 0.5
        scale = scale * (1 + products.amax(-1).T[..., None])
    return torch.einsum("hns,hsd->nhd", chances, values), scale


@st.composite
def attentions(draw: st.DrawFn, dtype: str) -> Case:
    random = np.random.default_rng(draw(SEEDS))
    kv_heads, group, dim = draw(st.integers(1, 3)), draw(st.integers(1, 8)), draw(DIMS)
    where = draw(paged(random))
    rows, size = where.tokens, where.tokens + draw(st.integers(0, 3))
    cache = kv_heads, where.num_pages, where.page_size, dim
    kind = getattr(torch, dtype)
    memory = {
        "q": torch.full((size, kv_heads * group, dim), torch.nan, dtype=kind),
        "k_cache": torch.full(cache, torch.nan, dtype=kind), "v_cache": torch.full(cache, torch.nan, dtype=kind),
        "attended": randn(random, size, kv_heads * group * dim, dtype=dtype),
    }  # fmt: skip
    memory["q"][:rows] = randn(random, rows, kv_heads * group, dim, dtype=dtype) * 2
    exact = torch.full(memory["attended"].shape, torch.nan, dtype=torch.float64)
    scale, first = torch.ones_like(exact), 0
    for row in where.rows:
        context = row.start + row.length
        slots, mine = where.slots(row, 0, context), slice(first, first + row.length)
        keys, values = (randn(random, kv_heads, context, dim, dtype=dtype) for _ in "kv")
        memory["k_cache"].flatten(1, 2)[:, slots], memory["v_cache"].flatten(1, 2)[:, slots] = keys, values
        one, magnitude = attended(memory["q"][mine], keys, values, row.start)
        exact[mine], scale[mine] = one.flatten(1), magnitude.flatten(1)
        first += row.length
    block = 1 if all(row.length == 1 for row in where.rows) else 64
    pages = max(len(row.pages) for row in where.rows) + draw(st.integers(0, 2))
    graph = attention_graph(memory, size, pages, cut(random, size), cut(random, kv_heads), block)
    plan = plan_of(where.rows, where.page_size, where.num_pages)
    return Case(
        "paged_attention", dtype, graph, size, memory, filling(plan, where.page_size), {"attended": exact},
        {"attended": scale},
    )  # fmt: skip


CASES: Mapping[str, Callable[[str], st.SearchStrategy[Case]]] = {
    "linear": linears,
    "rms_norm": norms,
    "rotary_table": rotary_tables,
    "rotate_and_store": rotations,
    "paged_attention": attentions,
    "load_rows": loads,
    "store_rows": stores,
}


@pytest.mark.guarantee("K30")
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("kernel", "dtype"), [(kernel, dtype) for kernel in CASES for dtype in LIMITS[kernel]])
@MANY
@given(data=st.data(), threads=THREADS)
def test_a_native_kernel_is_its_torch_reference_within_its_limit(
    kernel: str, dtype: str, isa: str, data: st.DataObject, threads: int
) -> None:
    data.draw(CASES[kernel](dtype)).check(isa, threads)


# A row's bits. Each of these computes rows by their numbers, once alone and once as a drawn selection of all of them:
# in any order, more than once, in any tiles, on several threads. What it returns are the rows' results.

Run = Callable[[str, int, Sequence[int], np.random.Generator], list[list[Tensor]]]


def linear_rows(random: np.random.Generator, dtype: str) -> tuple[int, Run]:
    out, left = int(random.choice([5, 64, 129, 200])), int(random.choice([0, 2]))
    inner = int(random.choice([2, 34, 64, 96, 300, 512]))  # with whole AMX tiles and without
    epilogue, has_bias = random.choice(["none", "silu", "mul", "add"]), bool(random.integers(2))
    x, w, other = (randn(random, *shape, dtype=dtype) for shape in ((70, inner), (out, inner), (70, out)))
    bias = randn(random, out, dtype=dtype)

    def run(isa: str, threads: int, chosen: Sequence[int], cuts: np.random.Generator) -> list[list[Tensor]]:
        memory = {"x": x[chosen], "w": w, "y": torch.zeros(len(chosen), left + out, dtype=x.dtype)}
        if has_bias:
            memory["bias"] = bias
        if epilogue in ("mul", "add"):
            memory["other"] = torch.zeros_like(memory["y"])
            memory["other"][:, left:] = other[chosen]
        graph = linear_graph(memory, cut(cuts, len(chosen)), cut(cuts, out), epilogue, left, 0)
        done = run_native(isa, graph, memory, counted(len(chosen)), matrices=("w",), threads=threads)
        return [[row] for row in done["y"][:, left:]]

    return 70, run


def norm_rows(random: np.random.Generator, dtype: str) -> tuple[int, Run]:
    width = int(random.integers(2, 300))
    x, gamma = randn(random, 70, width, dtype=dtype), randn(random, width)

    def run(isa: str, threads: int, chosen: Sequence[int], cuts: np.random.Generator) -> list[list[Tensor]]:
        memory = {"x": x[chosen], "gamma": gamma, "h": torch.zeros(len(chosen), width, dtype=x.dtype)}
        graph = GraphBuilder("norm")
        tiles = {name: graph.bound(name, dtype_of(tensor), *tensor.shape) for name, tensor in memory.items()}
        for begin, end in cut(cuts, len(chosen)):
            args = (Tag.INPUT, tiles["x"][begin:end]), (Tag.INPUT, tiles["gamma"]), (Tag.OUTPUT, tiles["h"][begin:end])
            graph.submit("rms_norm", *args, eps=1e-6, first_token=begin)
        done = run_native(isa, graph.build(), memory, counted(len(chosen)), threads=threads)
        return [[row] for row in done["h"]]

    return 70, run


def table_rows(random: np.random.Generator, dtype: str) -> tuple[int, Run]:
    del dtype
    half = int(random.integers(1, 128))
    positions = random.integers(0, 40000, 70).astype(np.int32)

    def run(isa: str, threads: int, chosen: Sequence[int], cuts: np.random.Generator) -> list[list[Tensor]]:
        del cuts
        graph = GraphBuilder("rotary")
        given = graph.bound("positions", "int32", len(chosen))
        rotary = graph.bound("rotary", "float32", len(chosen), half, 2)
        graph.submit("rotary_table", (Tag.INPUT, given), (Tag.OUTPUT, rotary), theta=1e6)

        def fill(window: Any) -> None:
            window.count = len(chosen)
            window.memory["positions"][:] = positions[chosen]

        memory = {"rotary": torch.zeros(len(chosen), half, 2)}
        return [[row] for row in run_native(isa, graph.build(), memory, fill, threads=threads)["rotary"]]

    return 70, run


def rotated_rows(random: np.random.Generator, dtype: str) -> tuple[int, Run]:
    kv_heads, group, dim = int(random.integers(1, 3)), int(random.integers(1, 4)), int(random.choice([6, 24, 64, 256]))
    heads = kv_heads * group
    qkv, gamma = randn(random, 70, (heads + 2 * kv_heads) * dim, dtype=dtype), randn(random, heads + kv_heads, dim)
    rotary = randn(random, 70, dim // 2, 2)

    def run(isa: str, threads: int, chosen: Sequence[int], cuts: np.random.Generator) -> list[list[Tensor]]:
        count = len(chosen)
        cache = torch.zeros(kv_heads, count, 1, dim, dtype=qkv.dtype)
        memory = {
            "qkv": qkv[chosen], "gamma": gamma, "rotary": rotary[chosen],
            "q": torch.zeros(count, heads, dim, dtype=qkv.dtype), "k_cache": cache, "v_cache": cache,
        }  # fmt: skip
        places = cuts.permutation(count)
        plan = plan_of([Row(0, 1, [int(page)]) for page in places], 1, count)
        graph = rotation_graph(memory, 1, cut(cuts, count), 1e-6)
        done = run_native(isa, graph, memory, filling(plan, 1), threads=threads)
        return [
            [done["q"][at], done["k_cache"][:, place], done["v_cache"][:, place]] for at, place in enumerate(places)
        ]

    return 70, run


ROWS: Mapping[str, Callable[[np.random.Generator, str], tuple[int, Run]]] = {
    "linear": linear_rows,
    "rms_norm": norm_rows,
    "rotary_table": table_rows,
    "rotate_and_store": rotated_rows,
}


def assert_same(ours: Sequence[Sequence[Tensor]], theirs: Sequence[Sequence[Tensor]]) -> None:
    for at, (mine, expected) in enumerate(zip(ours, theirs, strict=True)):
        assert all(same_bits(*pair) for pair in zip(mine, expected, strict=True)), f"row {at} of {len(ours)}"


@pytest.mark.slow
@pytest.mark.guarantee("K31")
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("kernel", "dtype"), [(kernel, dtype) for kernel in ROWS for dtype in LIMITS[kernel]])
@THOROUGH
@given(seed=SEEDS, counts=st.lists(st.integers(1, 70), min_size=1, max_size=4), threads=THREADS)
def test_a_row_has_the_same_bits_whatever_shares_its_task(
    kernel: str, dtype: str, isa: str, seed: int, counts: list[int], threads: int
) -> None:
    random = np.random.default_rng(seed)
    total, run = ROWS[kernel](random, dtype)
    whole = run(isa, 1, range(total), random)
    for row in random.integers(0, total, 3).tolist():
        assert_same(run(isa, 1, [row], random), [whole[row]])
    for count in counts:
        chosen = random.integers(0, total, count).tolist()
        assert_same(run(isa, threads, chosen, random), [whole[row] for row in chosen])


@pytest.mark.slow
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inner", [34, 1088])
def test_a_linear_row_has_the_same_bits_among_any_number_of_rows(inner: int, dtype: str, isa: str) -> None:
    random = np.random.default_rng(inner)
    x, w = randn(random, 130, inner, dtype=dtype), randn(random, 70, inner, dtype=dtype)

    def run(count: int) -> Tensor:
        memory = {"x": x[:count], "w": w, "y": torch.zeros(count, 70, dtype=x.dtype)}
        graph = linear_graph(memory, [(0, count)], [(0, 70)], "none", 0, 0)
        return run_native(isa, graph, memory, counted(count), matrices=("w",))["y"]

    whole = run(130)
    for count in range(1, 130):
        assert same_bits(run(count), whole[:count]), count


@attrs.frozen(eq=False)
class Text:
    """Everything attention may be asked of one text: queries, keys and values of all its positions."""

    q: Tensor  # (positions, heads, d)
    keys: Tensor  # (kv_heads, positions, d)
    values: Tensor

    @classmethod
    def drawn(cls, random: np.random.Generator, length: int, kv_heads: int, group: int, dim: int, dtype: str) -> Text:
        shapes = (length, kv_heads * group, dim), (kv_heads, length, dim), (kv_heads, length, dim)
        return cls(*(randn(random, *shape, dtype=dtype) * 2 for shape in shapes))


def attended_chunks(
    isa: str,
    threads: int,
    chunks: Sequence[tuple[Text, int, int]],
    page_size: int,
    random: np.random.Generator | None = None,
) -> list[Tensor]:
    """What positions ``[begin, end)`` of texts get in one window, each (n, kv_heads · group · d).

    With ``random``: pages anywhere, tiles of any size; without, in order and in one task. All else in the cache is NaN,
    later positions of the same text too.
    """
    counts = [-(-end // page_size) for _, _, end in chunks]
    total = sum(counts) + (0 if random is None else int(random.integers(3)))
    order = np.arange(total) if random is None else random.permutation(total)
    first, (kv_heads, _, dim) = chunks[0][0], chunks[0][0].keys.shape
    tokens = sum(end - begin for _, begin, end in chunks)
    cache = torch.full((kv_heads, total * page_size, dim), torch.nan, dtype=first.q.dtype)
    caches, rows, taken = (cache, cache.clone()), [], 0
    for (text, begin, end), count in zip(chunks, counts, strict=True):
        pages = order[taken : taken + count]
        taken += count
        slots = torch.from_numpy((pages[:, None] * page_size + np.arange(page_size)).reshape(-1)[:end])
        for memory, values in zip(caches, (text.keys, text.values), strict=True):
            memory[:, slots] = values[:, :end]
        rows.append(Row(begin, end - begin, pages.tolist()))
    memory = {
        "q": torch.cat([text.q[begin:end] for text, begin, end in chunks]),
        **{
            name: c.view(kv_heads, total, page_size, dim)
            for name, c in zip(("k_cache", "v_cache"), caches, strict=True)
        },
        "attended": torch.zeros(tokens, first.q.shape[1] * dim, dtype=first.q.dtype),
    }
    cuts = [[(0, extent)] if random is None else cut(random, extent) for extent in (tokens, kv_heads)]
    graph = attention_graph(memory, tokens, max(counts), *cuts, block=64)
    done = run_native(isa, graph, memory, filling(plan_of(rows, page_size, total), page_size), threads=threads)
    return list(done["attended"].split([end - begin for _, begin, end in chunks]))


@pytest.mark.slow
@pytest.mark.guarantee("K32")
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@THOROUGH
@given(seed=SEEDS, data=st.data(), threads=THREADS)
def test_a_position_is_attended_to_the_same_bits_in_any_chunk_batch_tile_and_pages(
    dtype: str, isa: str, seed: int, data: st.DataObject, threads: int
) -> None:
    random = np.random.default_rng(seed)
    shape = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 8), DIMS), label="KV heads, group, dim")
    lengths = data.draw(st.lists(st.integers(1, 220), min_size=1, max_size=3), label="texts")
    texts = [Text.drawn(random, length, *shape, dtype) for length in lengths]
    whole = [attended_chunks(isa, 1, [(text, 0, len(text.q))], 16)[0] for text in texts]
    assert not any(rows.isnan().any() for rows in whole)
    windows = data.draw(
        st.lists(
            st.tuples(st.booleans(), st.sampled_from([1, 3, 16, 128]), st.integers(1, 10)), min_size=1, max_size=4
        ),
        label="windows: decode, page size, rows",
    )
    for is_decode, page_size, count in windows:
        chunks, expected = [], []
        for which in random.integers(0, len(texts), count if is_decode else 1 + count // 4).tolist():
            begin = int(random.integers(lengths[which]))
            end = begin + 1 if is_decode else int(random.integers(begin, lengths[which])) + 1
            chunks.append((texts[which], begin, end))
            expected.append(whole[which][begin:end])
        assert_same([attended_chunks(isa, threads, chunks, page_size, random)], [expected])
