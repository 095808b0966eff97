"""The Qwen3 programs as task graphs over tiles: traced once per shape bucket, the same for every executor.

Owns nothing, no torch. A dispatch runs in windows of at most the largest bucket; a window's tokens are padded to its
bucket, and padding is computed but never stored.

    load_rows ─▶ x ─▶ [rms_norm ─▶ h ─▶ linear ─▶ qkv ─▶ rotate_and_store ─▶ q, k_cache, v_cache ─▶ paged_attention ─▶
              attended ─▶ linear + x ─▶ y ─▶ rms_norm ─▶ h ─▶ silu(linear), · linear ─▶ act ─▶ linear + y ─▶ x] × layers
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from typing import Any

from ..graph import GraphBuilder, Tag, TaskGraph, Tile
from ..program import DTYPE_BYTES

__all__ = [
    "PREFILL_BUCKETS",
    "ROW_BUCKETS",
    "bucket_of",
    "row_buckets",
    "scratch_bytes",
    "trace_final_norm",
    "trace_forward",
    "trace_lm_head",
]

PREFILL_BUCKETS = (64, 128, 192, 256, 320, 384, 448, 512, 640, 768, 896, 1024)
"""Prompt tokens per window. At least 64: oneDNN's bf16 linears add up in another order for fewer rows; at most 1024:
intermediates stay in cache, and reading the weights once more costs 4 % of such a window."""

ROW_BUCKETS = (1, 2, 4, 8, 16, 24, 32)
"""Generated tokens per window. At most 32: oneDNN's bf16 linears give a row the same bits for every count up to 32."""


def row_buckets(dtype: str) -> tuple[int, ...]:
    """``ROW_BUCKETS`` for a compute dtype: in fp32 one row alone takes another way through oneDNN, so it is padded."""
    return ROW_BUCKETS[1:] if dtype == "float32" else ROW_BUCKETS


def bucket_of(count: int, buckets: Sequence[int]) -> int:
    """The smallest bucket that holds ``count``; the largest, if none does (the rest goes into the next window)."""
    return buckets[min(bisect.bisect_left(buckets, count), len(buckets) - 1)]


def trace_forward(static: Mapping[str, Any], tokens: int) -> TaskGraph:
    """All layers over one window of ``tokens`` tokens, which is prefill's and decode's graph alike.

    Bound by name: ``tokens``, ``positions`` (T,), ``slots`` (T,), the rows' ``row_offsets`` (R + 1,), ``row_ends`` (R,)
    and ``block_tables`` (R, P) with R ≤ T; ``stores`` (R, 2), pairs of a token and the row of ``hidden`` its state goes
    to; ``k_cache``, ``v_cache``, ``hidden``; weights as ``embed``, ``layers.N.…``.
    """
    graph = GraphBuilder(f"forward.{tokens}")
    dtype, hidden = static["dtype"], static["hidden_size"]
    heads, kv_heads, head_dim = static["num_heads"], static["num_kv_heads"], static["head_dim"]
    inner, eps = static["intermediate_size"], static["rms_norm_eps"]
    pages = -(-static["max_model_len"] // static["page_size"])
    cache = (static["num_layers"], kv_heads, static["num_pages"], static["page_size"], head_dim)

    ids = graph.bound("tokens", "int32", tokens)
    positions = graph.bound("positions", "int32", tokens)
    slots = graph.bound("slots", "int64", tokens)
    rows = (
        (Tag.INPUT, graph.bound("row_offsets", "int32", tokens + 1)),
        (Tag.INPUT, graph.bound("row_ends", "int32", tokens)),
        (Tag.INPUT, graph.bound("block_tables", "int32", tokens, pages)),
    )
    k_cache, v_cache = graph.bound("k_cache", dtype, *cache), graph.bound("v_cache", dtype, *cache)
    x = graph.intermediate("x", dtype, tokens, hidden)
    y = graph.intermediate("y", dtype, tokens, hidden)
    h = graph.intermediate("h", dtype, tokens, hidden)
    qkv = graph.intermediate("qkv", dtype, tokens, (heads + 2 * kv_heads) * head_dim)
    q = graph.intermediate("q", dtype, tokens, heads, head_dim)
    attended = graph.intermediate("attended", dtype, tokens, heads * head_dim)
    gate = graph.intermediate("gate", dtype, tokens, inner)
    act = graph.intermediate("act", dtype, tokens, inner)
    rotary = graph.intermediate("rotary", "float32", tokens, head_dim // 2, 2)

    def norm(name: str, source: Tile) -> None:
        gamma = graph.bound(name, "float32", hidden)
        graph.submit("rms_norm", (Tag.INPUT, source), (Tag.INPUT, gamma), (Tag.OUTPUT, h), eps=eps)

    def linear(name: str, source: Tile, target: Tile, epilogue: str = "none", other: Tile | None = None) -> None:
        args = [(Tag.INPUT, source), (Tag.INPUT, graph.bound(name, dtype, target.shape[1], source.shape[1]))]
        has_bias = static["attention_bias"] and name.endswith((".qkv", ".o"))
        if has_bias:
            args.append((Tag.INPUT, graph.bound(f"{name}_bias", dtype, target.shape[1])))
        if other is not None:
            args.append((Tag.INPUT, other))
        graph.submit("linear", *args, (Tag.OUTPUT, target), epilogue=epilogue, bias=int(has_bias))

    embed = graph.bound("embed", dtype, static["vocab_size"], hidden)
    graph.submit("load_rows", (Tag.INPUT, embed), (Tag.INPUT, ids), (Tag.OUTPUT, x))
    graph.submit("rotary_table", (Tag.INPUT, positions), (Tag.OUTPUT, rotary), theta=static["rope_theta"])
    for layer in range(static["num_layers"]):
        prefix = f"layers.{layer}."
        norm(prefix + "input_norm", x)
        linear(prefix + "qkv", h, qkv)
        graph.submit(
            "rotate_and_store",
            (Tag.INPUT, qkv),
            (Tag.INPUT, graph.bound(prefix + "qk_norm", "float32", heads + kv_heads, head_dim)),
            (Tag.INPUT, rotary),
            (Tag.INPUT, slots),
            (Tag.OUTPUT, q),
            (Tag.INOUT, k_cache[layer]),
            (Tag.INOUT, v_cache[layer]),
            eps=eps,
        )
        graph.submit(
            "paged_attention",
            (Tag.INPUT, q),
            (Tag.INPUT, k_cache[layer]),
            (Tag.INPUT, v_cache[layer]),
            *rows,
            (Tag.OUTPUT, attended),
        )
        linear(prefix + "o", attended, y, "add", x)
        norm(prefix + "post_norm", y)
        linear(prefix + "gate", h, gate, "silu")
        linear(prefix + "up", h, act, "mul", gate)
        linear(prefix + "down", act, x, "add", y)
    _store_rows(graph, x, "hidden", dtype, static, hidden)
    return graph.build()


def trace_final_norm(static: Mapping[str, Any], rows: int) -> TaskGraph:
    """RMSNorm of ``rows`` rows: those of ``hidden`` named by ``loads``, to those of ``normed`` named by ``stores``."""
    graph = GraphBuilder(f"final_norm.{rows}")
    dtype, width = static["dtype"], static["hidden_size"]
    x = _load_rows(graph, "hidden", rows, static)
    h = graph.intermediate("h", dtype, rows, width)
    gamma = graph.bound("final_norm", "float32", width)
    graph.submit("rms_norm", (Tag.INPUT, x), (Tag.INPUT, gamma), (Tag.OUTPUT, h), eps=static["rms_norm_eps"])
    _store_rows(graph, h, "normed", dtype, static, width)
    return graph.build()


def trace_lm_head(static: Mapping[str, Any], rows: int) -> TaskGraph:
    """Logits of ``rows`` rows: those of ``normed`` named by ``loads``, to those of ``logits`` named by ``stores``."""
    graph = GraphBuilder(f"lm_head.{rows}")
    dtype, width, vocab = static["dtype"], static["hidden_size"], static["vocab_size"]
    x = _load_rows(graph, "normed", rows, static)
    out = graph.intermediate("scores", dtype, rows, vocab)
    weight = graph.bound("lm_head", dtype, vocab, width)
    graph.submit("linear", (Tag.INPUT, x), (Tag.INPUT, weight), (Tag.OUTPUT, out), epilogue="none", bias=0)
    _store_rows(graph, out, "logits", "float32", static, vocab)
    return graph.build()


def scratch_bytes(static: Mapping[str, Any]) -> int:
    """Upper bound of the memory all graphs of a chip keep or use besides residents and weights."""
    item = DTYPE_BYTES[static["dtype"]]
    heads = static["num_heads"] * static["head_dim"]
    kept = (2 * heads + static["hidden_size"]) * (sum(PREFILL_BUCKETS) + sum(ROW_BUCKETS))  # q, attended, h: per graph
    qkv = heads + 2 * static["num_kv_heads"] * static["head_dim"]
    window = max(PREFILL_BUCKETS) * (3 * static["hidden_size"] + qkv + 2 * static["intermediate_size"])
    scores = max(ROW_BUCKETS) * static["vocab_size"]
    mask = 2 * 256 * (static["max_model_len"] + 256)
    gathered = 4 * static["max_model_len"] * static["num_kv_heads"] * static["head_dim"]
    return int(item * (kept + max(window, scores) + mask + gathered) + 4 * 3 * static["vocab_size"])


def _load_rows(graph: GraphBuilder, name: str, rows: int, static: Mapping[str, Any]) -> Tile:
    dtype, width = static["dtype"], static["hidden_size"]
    x = graph.intermediate("x", dtype, rows, width)
    source = graph.bound(name, dtype, static["max_num_seqs"], width)
    graph.submit("load_rows", (Tag.INPUT, source), (Tag.INPUT, graph.bound("loads", "int64", rows)), (Tag.OUTPUT, x))
    return x


def _store_rows(
    graph: GraphBuilder, source: Tile, name: str, dtype: str, static: Mapping[str, Any], width: int
) -> None:
    target = graph.bound(name, dtype, static["max_num_seqs"], width)
    stores = graph.bound("stores", "int32", source.shape[0], 2)
    graph.submit("store_rows", (Tag.INPUT, source), (Tag.INPUT, stores), (Tag.INOUT, target))
