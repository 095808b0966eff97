"""The Qwen3 programs as task graphs over tiles: traced once per shape bucket, the same for every executor.

Owns nothing, no torch. A dispatch runs in windows of at most the largest bucket; a window's tokens are padded to its
bucket, and what becomes of padding is never read. Each layer is a scope: what it needs besides the hidden state ``x``
lives in the heap. Tile sizes come from the program's configuration (``tiling.Tiling``).

    load_rows ─▶ x ─▶ [rms_norm ─▶ h ─▶ linear ─▶ qkv ─▶ rotate_and_store ─▶ q, k_cache, v_cache ─▶ paged_attention ─▶
              attended ─▶ linear + x ─▶ y ─▶ rms_norm ─▶ h ─▶ silu(linear), · linear ─▶ act ─▶ linear + y ─▶ x] × layers
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from typing import Any

from ...topology.rings import HEAP_ALIGNMENT, RingSizes
from ..graph import GraphBuilder, Tag, TaskGraph, Tile
from ..program import DTYPE_BYTES
from .tiling import spans

__all__ = [
    "ATTENTION_BLOCK",
    "PREFILL_BUCKETS",
    "ROW_BUCKETS",
    "bucket_of",
    "scratch_bytes",
    "trace_decode",
    "trace_final_norm",
    "trace_lm_head",
    "trace_prefill",
]

PREFILL_BUCKETS = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 320, 384, 448, 512, 640, 768, 896, 1024)
"""Prompt tokens per window. At most 1024: intermediates stay in cache, and reading the weights once more costs 4 % of
such a window. At least 8: see ``ROW_BUCKETS``."""

ROW_BUCKETS = (8, 16, 24, 32, 48, 64)
"""Generated tokens, or rows of which logits are wanted, per window. oneDNN adds up one to three rows in another order
than more in some shapes; eight take as long as one, which is what reading the weights takes."""

ATTENTION_BLOCK = 64
"""Positions whose queries a prompt's attention asks together, counted from position 0."""


def bucket_of(count: int, buckets: Sequence[int]) -> int:
    """The smallest bucket that holds ``count``; the largest, if none does (the rest goes into the next window)."""
    return buckets[min(bisect.bisect_left(buckets, count), len(buckets) - 1)]


def trace_prefill(static: Mapping[str, Any], tokens: int) -> TaskGraph:
    """All layers over one window of ``tokens`` prompt tokens.

    Bound by name: ``tokens``, ``positions`` (T,), ``slots`` (T,), the rows' ``row_offsets`` (R + 1,), ``row_ends`` (R,)
    and ``block_tables`` (R, P) with R ≤ T; ``stores`` (R, 2), pairs of a token and the row of ``hidden`` its state goes
    to; ``k_cache``, ``v_cache``, ``hidden``; weights as ``embed``, ``layers.N.…``.
    """
    return _Capture(f"prefill.{tokens}", static, tokens).forward(ATTENTION_BLOCK, static["tile_query_tokens"])


def trace_decode(static: Mapping[str, Any], tokens: int) -> TaskGraph:
    """All layers over one window of ``tokens`` generated tokens, each a row. Bound as in ``trace_prefill``."""
    return _Capture(f"decode.{tokens}", static, tokens).forward(1, static["tile_query_rows"])


def trace_final_norm(static: Mapping[str, Any], rows: int) -> TaskGraph:
    """RMSNorm of ``rows`` rows: those of ``hidden`` named by ``loads``, to those of ``normed`` named by ``stores``."""
    return _Capture(f"final_norm.{rows}", static, rows).final_norm()


def trace_lm_head(static: Mapping[str, Any], rows: int) -> TaskGraph:
    """Logits of ``rows`` rows: those of ``normed`` named by ``loads``, to those of ``logits`` named by ``stores``."""
    return _Capture(f"lm_head.{rows}", static, rows).lm_head()


def scratch_bytes(static: Mapping[str, Any]) -> int:
    """Upper bound of the memory all graphs of a chip keep or use besides residents and weights."""
    item = DTYPE_BYTES[static["dtype"]]
    windows = sum(PREFILL_BUCKETS) + sum(ROW_BUCKETS)
    kept = item * static["hidden_size"] * windows + 4 * static["head_dim"] * windows  # x and rotary: per graph
    largest = max(PREFILL_BUCKETS)
    made = _layer_bytes(static, largest)  # what linears return
    scores = item * max(ROW_BUCKETS) * static["vocab_size"]
    mask = item * 2 * 256 * (static["max_model_len"] + 256)
    gathered = item * 4 * static["max_model_len"] * static["num_kv_heads"] * static["head_dim"]
    sampling = 4 * 3 * static["vocab_size"]
    total: int = kept + _heap(made) + max(made, scores) + mask + gathered + sampling
    return total


class _Capture:
    """One graph of one program for one bucket while it is traced."""

    def __init__(self, name: str, static: Mapping[str, Any], tokens: int) -> None:
        self._static, self._tokens = static, tokens
        heap = _heap(_layer_bytes(static, tokens))
        self._graph = GraphBuilder(name, RingSizes(heap=(heap, heap, heap, heap)))

    def forward(self, block: int, query_tile: int) -> TaskGraph:
        graph, static, tokens = self._graph, self._static, self._tokens
        hidden, dtype = static["hidden_size"], static["dtype"]
        x = graph.intermediate("x", dtype, tokens, hidden, row_unit=static["tile_tokens"])
        rotary = graph.intermediate("rotary", "float32", tokens, static["head_dim"] // 2, 2)
        embed = graph.bound("embed", dtype, static["vocab_size"], hidden)
        ids, positions = (graph.bound(name, "int32", tokens) for name in ("tokens", "positions"))
        graph.submit("load_rows", (Tag.INPUT, embed), (Tag.INPUT, ids), (Tag.OUTPUT, x))
        graph.submit("rotary_table", (Tag.INPUT, positions), (Tag.OUTPUT, rotary), theta=static["rope_theta"])
        for layer in range(static["num_layers"]):
            with graph.scope():
                self._layer(layer, x, rotary, block, query_tile)
        self._store_rows(x, "hidden", dtype)
        return graph.build()

    def final_norm(self) -> TaskGraph:
        h = self._graph.intermediate("h", self._static["dtype"], self._tokens, self._static["hidden_size"])
        self._norm("final_norm", self._load_rows("hidden"), h)
        self._store_rows(h, "normed", self._static["dtype"])
        return self._graph.build()

    def lm_head(self) -> TaskGraph:
        scores = self._graph.intermediate("scores", self._static["dtype"], self._tokens, self._static["vocab_size"])
        self._linear("lm_head", self._load_rows("normed"), scores, columns=self._static["tile_head_columns"])
        self._store_rows(scores, "logits", "float32")
        return self._graph.build()

    def _layer(self, layer: int, x: Tile, rotary: Tile, block: int, query_tile: int) -> None:
        static, tokens, prefix = self._static, self._tokens, f"layers.{layer}."
        heads, kv_heads, head_dim = static["num_heads"], static["num_kv_heads"], static["head_dim"]
        tile = static["tile_tokens"]
        both = math.gcd(tile, query_tile)  # what attention shares is cut both ways; 0 is all tokens, gcd(0, n) is n

        def new(*shape: int, row_unit: int = tile) -> Tile:
            return self._graph.tensor(static["dtype"], tokens, *shape, row_unit=row_unit)

        h, qkv = new(static["hidden_size"]), new((heads + 2 * kv_heads) * head_dim)
        q = new(heads, head_dim, row_unit=both)
        self._norm(prefix + "input_norm", x, h)
        self._linear(prefix + "qkv", h, qkv)
        stored = self._rotate_and_store(layer, qkv, rotary, q)
        attended = new(heads * head_dim, row_unit=both)
        self._attend(layer, q, attended, stored, block, query_tile)
        y, normed = new(static["hidden_size"]), new(static["hidden_size"])
        self._linear(prefix + "o", attended, y, "add", x)
        self._norm(prefix + "post_norm", y, normed)
        gate, act = new(static["intermediate_size"]), new(static["intermediate_size"])
        self._linear(prefix + "gate", normed, gate, "silu")
        self._linear(prefix + "up", normed, act, "mul", gate)
        self._linear(prefix + "down", act, x, "add", y)

    def _norm(self, name: str, source: Tile, target: Tile) -> None:
        gamma = self._graph.bound(name, "float32", source.shape[1])
        for begin, end in self._token_tiles():
            args = (Tag.INPUT, source[begin:end]), (Tag.INPUT, gamma), (Tag.OUTPUT, target[begin:end])
            self._graph.submit("rms_norm", *args, eps=self._static["rms_norm_eps"], first_token=begin)

    def _linear(
        self,
        name: str,
        source: Tile,
        target: Tile,
        epilogue: str = "none",
        other: Tile | None = None,
        columns: int | None = None,
    ) -> None:
        """target = source · wᵀ, a task per tile of tokens and columns. The sum over the source's columns is one."""
        static, width = self._static, target.shape[1]
        weight = self._graph.bound(name, static["dtype"], width, source.shape[1])
        has_bias = static["attention_bias"] and name.endswith((".qkv", ".o"))
        bias = self._graph.bound(f"{name}_bias", static["dtype"], width) if has_bias else None
        sources = [(begin, end, (Tag.INPUT, source[begin:end])) for begin, end in self._token_tiles()]
        for left, right in spans(width, static["tile_columns"] if columns is None else columns):
            weights = [(Tag.INPUT, weight[left:right])]
            if bias is not None:
                weights.append((Tag.INPUT, bias[left:right]))
            for begin, end, rows in sources:
                args = [rows, *weights]
                if other is not None:
                    args.append((Tag.INPUT, other[begin:end, left:right]))
                target_tile = (Tag.OUTPUT, target[begin:end, left:right])
                self._graph.submit(
                    "linear", *args, target_tile, epilogue=epilogue, bias=int(has_bias), first_token=begin
                )

    def _rotate_and_store(self, layer: int, qkv: Tile, rotary: Tile, q: Tile) -> list[int]:
        """Returns the tasks: attention waits for all, since a token may see keys of any tile."""
        static = self._static
        heads = static["num_heads"] + static["num_kv_heads"]
        gamma = self._graph.bound(f"layers.{layer}.qk_norm", "float32", heads, static["head_dim"])
        slots = self._graph.bound("slots", "int64", self._tokens)
        caches = self._caches(layer)
        return [
            self._graph.submit(
                "rotate_and_store",
                (Tag.INPUT, qkv[begin:end]),
                (Tag.INPUT, gamma),
                (Tag.INPUT, rotary[begin:end]),
                (Tag.INPUT, slots[begin:end]),
                (Tag.OUTPUT, q[begin:end]),
                *((Tag.OUTPUT_EXISTING, cache) for cache in caches),
                eps=static["rms_norm_eps"],
                first_token=begin,
            )
            for begin, end in self._token_tiles()
        ]

    def _attend(self, layer: int, q: Tile, attended: Tile, stored: Sequence[int], block: int, query_tile: int) -> None:
        static, tokens = self._static, self._tokens
        pages = -(-static["max_model_len"] // static["page_size"])
        rows = (
            (Tag.INPUT, self._graph.bound("row_offsets", "int32", tokens + 1)),
            (Tag.INPUT, self._graph.bound("row_ends", "int32", tokens)),
            (Tag.INPUT, self._graph.bound("block_tables", "int32", tokens, pages)),
        )
        group = static["num_heads"] // static["num_kv_heads"]
        width = group * static["head_dim"]
        k_cache, v_cache = self._caches(layer)
        for first, last in spans(static["num_kv_heads"], static["tile_kv_heads"]):
            cached = (Tag.INPUT, k_cache[first:last]), (Tag.INPUT, v_cache[first:last])
            for begin, end in spans(tokens, query_tile):
                self._graph.submit(
                    "paged_attention",
                    (Tag.INPUT, q[begin:end, first * group : last * group]),
                    *cached,
                    *rows,
                    (Tag.OUTPUT, attended[begin:end, first * width : last * width]),
                    after=stored,
                    block=block,
                    first_token=begin,
                )

    def _caches(self, layer: int) -> list[Tile]:
        """Keys and values of a layer, (kv_heads, pages, page_size, head_dim)."""
        static = self._static
        pages = static["num_kv_heads"], static["num_pages"], static["page_size"], static["head_dim"]
        shape = static["num_layers"], *pages
        return [self._graph.bound(name, static["dtype"], *shape)[layer] for name in ("k_cache", "v_cache")]

    def _load_rows(self, name: str) -> Tile:
        static = self._static
        x = self._graph.intermediate("x", static["dtype"], self._tokens, static["hidden_size"])
        source = self._graph.bound(name, static["dtype"], static["max_num_seqs"], static["hidden_size"])
        numbers = self._graph.bound("loads", "int64", self._tokens)
        self._graph.submit("load_rows", (Tag.INPUT, source), (Tag.INPUT, numbers), (Tag.OUTPUT, x))
        return x

    def _store_rows(self, source: Tile, name: str, dtype: str) -> None:
        target = self._graph.bound(name, dtype, self._static["max_num_seqs"], source.shape[1])
        stores = self._graph.bound("stores", "int32", self._tokens, 2)
        self._graph.submit("store_rows", (Tag.INPUT, source), (Tag.INPUT, stores), (Tag.INOUT, target))

    def _token_tiles(self) -> list[tuple[int, int]]:
        return list(spans(self._tokens, self._static["tile_tokens"]))


def _layer_bytes(static: Mapping[str, Any], tokens: int) -> int:
    """Heap memory of one layer of a window."""
    heads = (3 * static["num_heads"] + 2 * static["num_kv_heads"]) * static["head_dim"]
    width: int = heads + 3 * static["hidden_size"] + 2 * static["intermediate_size"]
    return tokens * DTYPE_BYTES[static["dtype"]] * width + 9 * HEAP_ALIGNMENT


def _heap(count: int) -> int:
    """The smallest heap ring that holds a layer, so that the next one finds the same memory in the cache."""
    return 1 << (count - 1).bit_length()
