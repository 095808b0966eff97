"""Each in-core function against a plain reference in fp32 or fp64, over shapes with tails, packed and plain."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from chipbus.errors import KernelError
from chipbus.kernels.graph import GraphBuilder, Tag
from chipbus.kernels.qwen3.rows import plan_rows
from chipbus.kernels.torch_attention import AttentionMemory, widest_block
from chipbus.kernels.torch_executor import BoundGraph
from chipbus.kernels.torch_kernels import KERNELS, Kernel, Window, Workspace
from chipbus.kernels.weights import can_pack, interleave_halves, pack

DTYPES = [torch.float32, torch.bfloat16]


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def run(
    kernel: str, args: Sequence[tuple[Tag, str, Tensor]], *, window: Window | None = None, **settings: Any
) -> dict[str, Tensor]:
    """One task as a graph, its arguments bound by name; the memory afterwards. ``w`` may be packed."""
    graph = GraphBuilder("one")
    tiles = [(tag, graph.bound(name, name_of(tensor.dtype), *tensor.shape)) for tag, name, tensor in args]
    graph.submit(kernel, *tiles, **settings)
    memory = {name: tensor for _, name, tensor in args}
    dtype = next((tensor.dtype for tensor in memory.values() if tensor.is_floating_point()), torch.float32)
    with torch.inference_mode():
        BoundGraph(graph.build(), memory, window or Window.of(1), Workspace(dtype)).run("test")
    return memory


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def close(ours: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    limit = 1e-5 if dtype == torch.float32 else 2.0**-7  # half a unit in the last place of 8 bits, and the sums before
    assert (ours.double() - exact).abs().max() <= limit * exact.abs().max().clamp(min=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 127, 128, 129, 300])
@pytest.mark.parametrize("width", [7, 64])
def test_rms_norm(dtype: torch.dtype, rows: int, width: int) -> None:
    x, gamma = 3 * randn(rows, width, dtype=dtype), randn(width, seed=1)
    out = torch.empty(rows, width, dtype=dtype)
    run(
        "rms_norm",
        [(Tag.INPUT, "x", x), (Tag.INPUT, "gamma", gamma), (Tag.OUTPUT, "h", out)],
        window=Window.of(rows, rows),
        eps=1e-3,
        first_token=0,
    )
    wide = x.double()
    close(out, wide / (wide.square().mean(-1, keepdim=True) + 1e-3).sqrt() * gamma, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("epilogue", ["none", "silu", "mul", "add"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("rows", "out", "inner"), [(1, 5, 3), (17, 33, 64), (64, 129, 40)])
def test_linear(dtype: torch.dtype, packed: bool, epilogue: str, bias: bool, rows: int, out: int, inner: int) -> None:
    x, w, b, other = (
        randn(rows, inner, dtype=dtype), randn(out, inner, dtype=dtype, seed=1) / inner**0.5,
        randn(out, dtype=dtype, seed=2), randn(rows, out, dtype=dtype, seed=3),
    )  # fmt: skip
    if packed and not can_pack(dtype):
        pytest.skip("this machine's oneDNN does not pack this dtype")
    args = [(Tag.INPUT, "x", x), (Tag.INPUT, "w", w)]
    args += [(Tag.INPUT, "bias", b)] if bias else []
    args += [(Tag.INPUT, "other", other)] if epilogue in ("mul", "add") else []
    graph = GraphBuilder("one")
    tiles = [(tag, graph.bound(name, name_of(dtype), *tensor.shape)) for tag, name, tensor in args]
    target = graph.bound("y", name_of(dtype), rows, out)
    graph.submit("linear", *tiles, (Tag.OUTPUT, target), epilogue=epilogue, bias=int(bias))
    y = torch.empty(rows, out, dtype=dtype)
    memory = {name: tensor for _, name, tensor in args} | {"y": y}
    with torch.inference_mode():
        memory["w"] = pack(w) if packed else w
        BoundGraph(graph.build(), memory, Window.of(1), Workspace(dtype)).run("test")
    plain = x.double() @ w.double().T + (b.double() if bias else 0)
    exact = {
        "none": plain,
        "silu": plain * torch.sigmoid(plain),
        "mul": plain * other.double(),
        "add": plain + other.double(),
    }[epilogue]
    close(y, exact, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_move_exactly(dtype: torch.dtype) -> None:
    table, ids = randn(11, 6, dtype=dtype), torch.tensor([10, 0, 3, 3], dtype=torch.int32)
    x = torch.empty(4, 6, dtype=dtype)
    run("load_rows", [(Tag.INPUT, "table", table), (Tag.INPUT, "ids", ids), (Tag.OUTPUT, "x", x)])
    assert torch.equal(x, table[ids.long()])

    loads = torch.tensor([7, 7, 1, 0])
    run("load_rows", [(Tag.INPUT, "source", table), (Tag.INPUT, "rows", loads), (Tag.OUTPUT, "x", x)])
    assert torch.equal(x, table[loads])

    window = Window.of(4)
    window.stores = [(0, 5), (3, 2)]
    wide = torch.full((8, 6), 9.0)
    args = [(Tag.INPUT, "x", x), (Tag.INPUT, "stores", torch.empty(4, 2, dtype=torch.int32)), (Tag.INOUT, "wide", wide)]
    run("store_rows", args, window=window)
    expected = torch.full((8, 6), 9.0)
    expected[5], expected[2] = x[0], x[3]
    assert torch.equal(wide, expected)


def test_rotary_table_is_transformers_angle_for_angle() -> None:
    from transformers import Qwen3Config
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

    config = Qwen3Config(head_dim=24, rope_parameters={"rope_type": "default", "rope_theta": 1e4})
    positions = torch.tensor([0, 1, 7, 40959], dtype=torch.int32)
    rotary = torch.empty(4, 12, 2)
    run("rotary_table", [(Tag.INPUT, "positions", positions), (Tag.OUTPUT, "rotary", rotary)], theta=1e4)
    cos, sin = Qwen3RotaryEmbedding(config)(torch.empty(0), positions[None].long())
    assert torch.equal(rotary[..., 0], cos[0, :, :12])
    assert torch.equal(rotary[..., 1], sin[0, :, :12])


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotation as the paper writes it, halves apart: x (T, heads, d), cos and sin (T, d/2)."""
    first, second = x.chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "real"), [(1, 1), (3, 2), (65, 65), (130, 129)])
@pytest.mark.parametrize("slots_follow", [True, False])
def test_rotate_and_store(dtype: torch.dtype, tokens: int, real: int, slots_follow: bool) -> None:
    heads, kv_heads, dim, pages, page_size = 4, 2, 6, 20, 8
    qkv = randn(tokens, (heads + 2 * kv_heads) * dim, dtype=dtype)
    q_norm, k_norm = randn(dim, seed=1), randn(dim, seed=2)
    angles = randn(tokens, dim // 2, seed=3).double()
    rotary = torch.stack([angles.cos(), angles.sin()], -1).float()
    slots = torch.arange(11, 11 + real) if slots_follow else torch.randperm(
        pages * page_size, generator=torch.Generator().manual_seed(1)
    )[:real]  # fmt: skip
    window = Window.of(tokens)
    window.count, window.slots, window.first_slot = real, slots, 11 if slots_follow else -1
    # The kernel gets heads with interleaved halves, as the loader arranges the projections.
    split = (heads * dim, kv_heads * dim, kv_heads * dim)
    q_in, k_in, v_in = qkv.split(split, -1)
    gamma = torch.cat([q_norm.expand(heads, dim), k_norm.expand(kv_heads, dim)])
    mixed = torch.cat([interleave_halves(q_in.T, dim).T, interleave_halves(k_in.T, dim).T, v_in], -1).contiguous()
    q = torch.empty(tokens, heads, dim, dtype=dtype)
    caches = [torch.zeros(kv_heads, pages, page_size, dim, dtype=dtype) for _ in "kv"]
    run(
        "rotate_and_store",
        [
            (Tag.INPUT, "qkv", mixed),
            (Tag.INPUT, "gamma", interleave_halves(gamma.T.contiguous(), dim).T.contiguous()),
            (Tag.INPUT, "rotary", rotary),
            (Tag.INPUT, "slot_numbers", torch.empty(tokens, dtype=torch.int64)),
            (Tag.OUTPUT, "q", q),
            (Tag.INOUT, "k_cache", caches[0]),
            (Tag.INOUT, "v_cache", caches[1]),
        ],
        window=window,
        eps=1e-5,
        first_token=0,
    )

    def reference(x: Tensor, gamma: Tensor) -> Tensor:
        x = x.double().view(tokens, -1, dim)
        x = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * gamma
        x = turned(x, angles.cos(), angles.sin())
        return interleave_halves(x.transpose(0, 2).contiguous(), dim).transpose(0, 2)

    close(q[:real], reference(q_in, q_norm)[:real], dtype)
    keys, values = (cache.view(kv_heads, -1, dim).transpose(0, 1) for cache in caches)
    close(keys[slots], reference(k_in, k_norm)[:real], dtype)
    assert torch.equal(values[slots], v_in.view(tokens, kv_heads, dim)[:real])
    untouched = torch.ones(pages * page_size, dtype=torch.bool)
    untouched[slots] = False
    assert not keys[untouched].any()
    assert not values[untouched].any()


def attention_reference(q: Tensor, keys: Tensor, values: Tensor, start: int) -> Tensor:
    """q (n, heads, d) at positions from ``start``; keys, values (start + n, kv_heads, d)."""
    groups = q.shape[1] // keys.shape[1]
    keys, values = (x.double().repeat_interleave(groups, 1) for x in (keys, values))
    scores = torch.einsum("nhd,shd->hns", q.double(), keys) / q.shape[2] ** 0.5
    sees = torch.arange(keys.shape[0])[None] <= start + torch.arange(q.shape[0])[:, None]
    weights = scores.masked_fill(~sees, -torch.inf).softmax(-1)
    return torch.einsum("hns,shd->nhd", weights, values)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("starts", "lengths"),
    [
        ([0], [1]),
        ([9], [1]),
        ([0, 37, 16], [1, 1, 1]),
        ([0], [300]),
        ([0, 5, 64], [17, 300, 32]),
        ([700], [290]),
    ],
    ids=str,
)
@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize("block", [1, 64])
def test_paged_attention(
    dtype: torch.dtype, starts: list[int], lengths: list[int], scattered: bool, block: int
) -> None:
    heads, kv_heads, dim, page_size, pages = 4, 2, 8, 16, 160
    total = sum(lengths)
    tokens = total + 3  # padding at the end
    order = np.random.default_rng(0).permutation(pages) if scattered else np.arange(pages)
    tables = np.full((len(starts), 62), -1, np.int32)
    first = 0
    for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        count = -(-(start + length) // page_size)
        tables[row, :count] = order[first : first + count]
        first += count
    static = {
        "vocab_size": 9, "max_model_len": 1000, "max_num_seqs": 9, "max_num_batched_tokens": 999,
        "page_size": page_size, "num_pages": pages,
    }  # fmt: skip
    ints = (np.array(x, np.int32) for x in (starts, lengths))
    plan = plan_rows("test", static, np.zeros(total, np.int32), *ints, tables, np.full(len(starts), -1, np.int32))
    window = Window.of(tokens)
    window.fill_tokens(plan, page_size, 0, total)
    assert all((row.slots is None) == (not scattered or row.start + row.end - row.begin <= 16) for row in window.rows)

    q = randn(tokens, heads, dim, dtype=dtype)
    k_cache, v_cache = (randn(kv_heads, pages, page_size, dim, dtype=dtype, seed=seed) for seed in (1, 2))
    out = torch.zeros(tokens, heads * dim, dtype=dtype)
    unused = [(Tag.INPUT, name, torch.empty(1, dtype=torch.int32)) for name in ("offsets", "ends", "tables")]
    run(
        "paged_attention",
        [
            (Tag.INPUT, "q", q), (Tag.INPUT, "k", k_cache), (Tag.INPUT, "v", v_cache), *unused,
            (Tag.OUTPUT, "attended", out),
        ],
        window=window, block=block, first_token=0,
    )  # fmt: skip
    for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        positions = torch.arange(start + length)
        slots = (
            torch.from_numpy(tables[row].astype(np.int64))[positions // page_size] * page_size + positions % page_size
        )
        keys, values = (c.view(kv_heads, -1, dim).transpose(0, 1)[slots] for c in (k_cache, v_cache))
        mine = slice(plan.offsets[row], plan.offsets[row + 1])
        exact = attention_reference(q[mine], keys, values, start)
        close(out[mine].view(length, heads, dim), exact, dtype)


def test_causal_masks_of_all_sizes_are_cut_from_one() -> None:
    mask = AttentionMemory(torch.float32).mask
    for queries, past in ((3, 2), (1, 0), (256, 5000), (2, 1), (7, 5001)):
        found = mask(queries, past)
        sees = torch.arange(past + queries)[None] <= past + torch.arange(queries)[:, None]
        assert torch.equal(found == 0, sees)
        assert torch.equal(found == -torch.inf, ~sees)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_wide_block_of_queries_is_used_only_where_it_gives_the_bits_of_narrow_ones(dtype: torch.dtype) -> None:
    assert widest_block(64, 4, 2, 24, dtype) in (64, 256)
    assert widest_block(48, 4, 2, 24, dtype) == 48  # 256 is no multiple of it


def test_an_intermediate_made_anew_takes_no_memory_and_a_partly_written_one_keeps_its_own() -> None:
    graph = GraphBuilder("g")
    source = graph.bound("source", "float32", 4, 2)
    whole, parts = graph.intermediate("whole", "float32", 4, 2), graph.intermediate("parts", "float32", 4, 2)
    sink = graph.bound("sink", "float32", 4, 2)
    graph.submit("double", (Tag.INPUT, source), (Tag.OUTPUT, whole))
    graph.submit("double", (Tag.INPUT, whole[:2]), (Tag.OUTPUT, parts[2:]))
    graph.submit("double", (Tag.INPUT, whole[2:]), (Tag.OUTPUT, parts[:2]))
    graph.submit("double", (Tag.INPUT, parts), (Tag.OUTPUT_EXISTING, sink))

    def double(task: Any) -> Callable[[], Tensor]:
        values, here = task.values, task.args[0]
        return lambda: values[here] * 2

    memory = {"source": torch.arange(8.0).view(4, 2), "sink": torch.zeros(4, 2)}
    bound = BoundGraph(
        graph.build(), memory, Window.of(1), Workspace(torch.float32), {"double": Kernel(double, returns=True)}
    )
    for scale in (1, 10):
        memory["source"].copy_(torch.arange(8.0).view(4, 2) * scale)
        bound.run("test")
        assert memory["sink"].tolist() == [[32 * scale, 40 * scale], [48 * scale, 56 * scale], [0, 8 * scale],
                                           [16 * scale, 24 * scale]]  # fmt: skip


def test_a_buffer_without_memory_is_named() -> None:
    graph = GraphBuilder("g")
    graph.submit("load_rows", *((Tag.INPUT, graph.bound(name, "int32", 1)) for name in ("table", "ids", "x")))
    with pytest.raises(KernelError, match="buffer table was given no memory; given: loads, positions, tokens"):
        BoundGraph(graph.build(), {}, Window.of(1), Workspace(torch.float32))


@pytest.mark.guarantee("K20")
def test_a_task_that_raises_is_named() -> None:
    table, ids = torch.zeros(3, 2), torch.tensor([7], dtype=torch.int32)
    graph = GraphBuilder("lookup")
    x = graph.intermediate("x", "float32", 1, 2)
    for name, tensor in (("fine", table), ("short", table[:1])):
        graph.submit(
            "load_rows",
            (Tag.INPUT, graph.bound(name, "float32", *tensor.shape)),
            (Tag.INPUT, graph.bound("ids" if name == "short" else "zero", "int32", 1)),
            (Tag.OUTPUT, x),
        )
    memory = {"fine": table, "short": table[:1], "ids": ids, "zero": torch.zeros(1, dtype=torch.int32)}
    bound = BoundGraph(graph.build(), memory, Window.of(1), Workspace(torch.float32))
    with pytest.raises(KernelError, match=r"dispatch 3 of decode: task 1 of lookup \(load_rows\) failed: "):
        bound.run("dispatch 3 of decode")


def test_the_set_of_kernels_is_closed() -> None:
    assert sorted(KERNELS) == [
        "linear", "load_rows", "paged_attention", "rms_norm", "rotary_table", "rotate_and_store", "store_rows",
    ]  # fmt: skip
