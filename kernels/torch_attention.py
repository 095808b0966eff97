"""Attention over paged keys and values, in torch: one row's result is the same bits however its context was computed.

Owns: the ``AttentionMemory`` kernels of one chip share, because tasks run one at a time.

Sums over keys are added up in an order that depends on how many keys there are and on how many queries are asked
together. So both must follow from a query's position alone. Queries are asked in blocks that begin at multiples of
``block`` and are always full; their keys end where the block ends. What a chunk of a prompt does not have of its first
and last block is padding: queries that nobody reads, keys that are zero and masked.

    positions   0 ········ 64 ········ 128 ········ 192        a chunk of positions 70 to 150 asks two blocks:
    keys        ├─────────── first block ──┤                   64 to 127 over keys 0 to 127,
                ├─────────── second block ─────────────┤       128 to 191 over keys 0 to 191
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial

import attrs
import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["AttentionMemory", "PagedRow", "attend_blocks", "attend_singly", "widest_block"]

_WIDE = 256  # positions; beyond, no faster


@attrs.frozen(eq=False)
class PagedRow:
    """Consecutive positions of one sequence, and where its keys and values are."""

    begin: int  # first token in the window
    end: int  # one past the last
    start: int  # position of the first token
    first_slot: int  # where its pages begin in the cache if they follow each other, else -1
    slots: Tensor | None  # (context,) int64, the slot of every position up to the last token, if they do not

    @property
    def context(self) -> int:
        """Positions up to and with the last token."""
        return self.start + self.end - self.begin

    def cut(self, begin: int, end: int) -> PagedRow:
        """What it has of tokens ``begin:end`` of the window, counted from ``begin``."""
        first, last = max(self.begin, begin), min(self.end, end)
        return PagedRow(first - begin, last - begin, self.start + first - self.begin, self.first_slot, self.slots)


class AttentionMemory:
    """Masks, padded queries, and keys and values gathered from pages. Grows as needed."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._past = -1
        self._mask = torch.empty(0)
        self._gathered = [torch.empty(0), torch.empty(0)]
        self._queries: dict[tuple[int, ...], Tensor] = {}
        self._widest: dict[tuple[int, ...], int] = {}

    def mask(self, queries: int, past: int) -> Tensor:
        """Additive causal mask (queries, past + queries): query i sees keys up to past + i. At most 256 queries.

        All masks are views of one tensor, whose last columns are the triangle.
        """
        if past > self._past:
            self._past = max(past, 2 * self._past, 1024)
            self._mask = torch.zeros(_WIDE, self._past + _WIDE, dtype=self._dtype)
            self._mask[:, self._past :] = torch.full_like(self._mask[:, self._past :], float("-inf")).triu_(1)
        return self._mask[:queries, self._past - past : self._past + queries]

    def gather(self, which: int, cache: Tensor, row: PagedRow, count: int) -> Tensor:
        """A row's keys (``which`` 0) or values (1) of a cache (kv_heads, slots, d), as (1, kv_heads, ``count``, d).

        Zeros from the row's context on: what pages hold there was left by others and may be anything, NaN too.
        """
        shape = (cache.shape[0], count, cache.shape[2])
        if self._gathered[which].numel() < math.prod(shape):
            self._gathered[which] = torch.empty(2 * math.prod(shape), dtype=self._dtype)
        target = self._gathered[which][: math.prod(shape)].view(shape)
        known = min(row.context, count)
        if row.slots is not None:
            torch.index_select(cache, 1, row.slots[:known], out=target[:, :known])
        else:
            target[:, :known].copy_(cache.narrow(1, row.first_slot, known))
        target[:, known:].zero_()
        return target[None]

    def padded(self, queries: Tensor, at: int, count: int) -> Tensor:
        """(1, heads, n, d) queries as rows from ``at`` on of (1, heads, ``count``, d); the others mean nothing."""
        shape = (1, queries.shape[1], count, queries.shape[3])
        if shape not in self._queries:
            self._queries[shape] = torch.zeros(shape, dtype=self._dtype)
        block = self._queries[shape]
        block.narrow(2, at, queries.shape[2]).copy_(queries)
        return block

    def widest_block(self, block: int, heads: int, kv_heads: int, dim: int) -> int:
        """See ``widest_block``; measured at first use, for the threads of then."""
        key = (block, heads, kv_heads, dim)
        if key not in self._widest:
            self._widest[key] = widest_block(block, heads, kv_heads, dim, self._dtype)
        return self._widest[key]


def attend_singly(
    memory: AttentionMemory,
    row: PagedRow,
    queries: Sequence[Tensor],
    outputs: Sequence[Tensor],
    k_cache: Tensor,
    v_cache: Tensor,
) -> None:
    """Each position of a row by itself over exactly the keys it sees.

    queries, outputs: one (1, heads, 1, d) per token of the window; k_cache, v_cache: (1, kv_heads, slots, d).
    """
    is_grouped = queries[0].shape[1] != k_cache.shape[1]
    gathered: list[Tensor] = []
    for at in range(row.begin, row.end):
        seen = row.start + at - row.begin + 1
        if row.slots is None:
            keys, values = k_cache.narrow(2, row.first_slot, seen), v_cache.narrow(2, row.first_slot, seen)
        else:
            gathered = gathered or [
                memory.gather(which, cache[0], row, row.context) for which, cache in enumerate((k_cache, v_cache))
            ]
            keys, values = (tensor.narrow(2, 0, seen) for tensor in gathered)
        attended = functional.scaled_dot_product_attention(queries[at], keys, values, enable_gqa=is_grouped)
        outputs[at].copy_(attended)


def attend_blocks(
    memory: AttentionMemory,
    row: PagedRow,
    queries: Tensor,
    outputs: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block: int,
) -> None:
    """A row's positions in blocks of ``block``, or of more where that gives the same bits.

    queries, outputs: (1, heads, window, d); k_cache, v_cache: (kv_heads, slots, d).
    """
    heads, kv_heads, dim = queries.shape[1], k_cache.shape[0], queries.shape[3]
    caches = (k_cache, v_cache)
    padded_end = -(-row.context // block) * block
    gathered: list[Tensor] = []
    for first, count in _blocks(row.start, row.context, block, memory.widest_block(block, heads, kv_heads, dim)):
        last = first + count
        if row.slots is None and last <= row.context:
            keys, values = (cache.narrow(1, row.first_slot, last)[None] for cache in caches)
        else:
            gathered = gathered or [memory.gather(which, cache, row, padded_end) for which, cache in enumerate(caches)]
            keys, values = (tensor.narrow(2, 0, last) for tensor in gathered)
        begin, end = max(first, row.start), min(last, row.context)
        here = row.begin + begin - row.start
        asked = queries.narrow(2, here, end - begin)
        attended = _causal(
            memory, asked if end - begin == count else memory.padded(asked, begin - first, count), keys, values
        )
        outputs.narrow(2, here, end - begin).copy_(attended.narrow(2, begin - first, end - begin))


def widest_block(block: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> int:
    """The largest block, ``block`` or 256, whose rows have the same bits as in blocks of ``block``, measured now.

    On a Zen 4 EPYC with torch 2.13 that is ``block`` in both dtypes; larger ones add up in another order.
    """
    if _WIDE % block:
        return block
    memory = AttentionMemory(dtype)
    random = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, generator=random)
    q, k, v = (draw(1, count, 3 * _WIDE, dim).to(dtype) for count in (heads, kv_heads, kv_heads))
    # In each block every key is there twice, with opposite values: of its last sums little is left but their roundings,
    # which bf16 then shows. Where sums are as large as their terms it shows one in ten thousand.
    for first in range(0, 3 * _WIDE, block):
        half = first + block // 2
        twice = first + torch.randperm(block // 2, generator=random)
        k[:, :, half : first + block], v[:, :, half : first + block] = k[:, :, twice], -v[:, :, twice]
    for first in range(0, 3 * _WIDE, _WIDE):
        wide = _causal(memory, q.narrow(2, first, _WIDE), k[:, :, : first + _WIDE], v[:, :, : first + _WIDE])
        for at in range(0, _WIDE, block):
            last = first + at + block
            narrow = _causal(memory, q.narrow(2, first + at, block), k[:, :, :last], v[:, :, :last])
            if not torch.equal(narrow, wide.narrow(2, at, block)):
                return block
    return _WIDE


def _blocks(start: int, end: int, block: int, wide: int) -> Iterator[tuple[int, int]]:
    """(first position, positions) of the blocks that cover ``start:end``; wide ones only where all of one is wanted."""
    at = start - start % block
    while at < end:
        count = wide if at % wide == 0 and start <= at and at + wide <= end else block
        yield at, count
        at += count


def _causal(memory: AttentionMemory, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """A full block of queries (1, heads, n, d) over all keys up to the block's end."""
    count = queries.shape[2]
    past = keys.shape[2] - count
    return functional.scaled_dot_product_attention(
        queries,
        keys,
        values,
        attn_mask=memory.mask(count, past) if past else None,
        is_causal=not past,
        enable_gqa=queries.shape[1] != keys.shape[1],
    )
