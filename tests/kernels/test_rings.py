"""Heap rings: blocks never overlap, never leave the ring, and fit whenever a byte-by-byte ring would let them."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chipbus.kernels.rings import HeapBlock, HeapRing, RingMark, ScopeRecord


def freed(heap: HeapRing, block: HeapBlock) -> None:
    block.is_open = False
    heap.reclaim()


@pytest.mark.guarantee("G6")
def test_a_drained_heap_takes_a_block_as_large_as_itself_wherever_it_had_got_to() -> None:
    heap = HeapRing(0, 8192)
    for nbytes in (1024, 3000, 5000):
        block = heap.allocate(nbytes)
        assert block is not None
        freed(heap, block)
        assert heap.occupancy == 0
        whole = heap.allocate(8192)
        assert whole is not None
        assert whole.offset == 0
        assert heap.allocate(1) is None
        freed(heap, whole)


def test_full_and_empty_are_told_apart() -> None:
    heap = HeapRing(0, 4096)
    blocks = [heap.allocate(1024) for _ in range(4)]
    assert heap.occupancy == heap.capacity
    assert heap.allocate(1) is None
    for block in blocks:
        assert block is not None
        freed(heap, block)
    assert heap.occupancy == 0
    assert heap.allocate(1) is not None


def test_blocks_are_given_back_in_order_and_only_when_nobody_uses_them() -> None:
    heap = HeapRing(0, 4096)
    first, second = heap.allocate(1024), heap.allocate(1024)
    assert first is not None
    assert second is not None
    first.users = 1
    freed(heap, second)
    freed(heap, first)
    assert heap.occupancy == 2048
    first.users = 0
    heap.reclaim()
    assert heap.occupancy == 0


def test_an_empty_block_has_a_place_of_its_own() -> None:
    heap = HeapRing(0, 4096)
    first, second = heap.allocate(0), heap.allocate(0)
    assert first is not None
    assert second is not None
    assert (first.offset, second.offset) == (0, 1024)


@settings(deadline=None, print_blob=True)
@given(
    st.sampled_from([1024, 4096, 16_384]),
    st.lists(st.one_of(st.integers(0, 5000), st.sampled_from(["free oldest", "free youngest"])), max_size=60),
)
def test_blocks_fit_exactly_when_a_byte_by_byte_ring_has_room(capacity: int, actions: list[int | str]) -> None:
    heap = HeapRing(2, capacity)
    blocks: list[HeapBlock] = []
    for action in actions:
        if isinstance(action, int):
            size = max(1, -(-action // 1024)) * 1024
            taken = [
                unit for block in blocks for unit in range(block.offset // 1024, (block.offset + block.size) // 1024)
            ]
            room = has_room(taken, blocks, size, capacity)
            assert heap.would_fit(action, blocks[0] if blocks else None) == room
            block = heap.allocate(action)
            assert (block is not None) == room
            if block is not None:
                assert block.offset % 1024 == 0
                assert block.offset + action <= capacity
                assert not set(taken) & set(range(block.offset // 1024, (block.offset + block.size) // 1024))
                blocks.append(block)
        elif blocks:
            freed(heap, blocks[0 if action == "free oldest" else -1])
            while blocks and not blocks[0].is_open:
                blocks.pop(0)
        assert heap.occupancy == sum(block.size for block in blocks)
    assert heap.occupancy <= heap.most <= capacity


def has_room(taken: list[int], blocks: list[HeapBlock], size: int, capacity: int) -> bool:
    """Behind the youngest block, or, if there is none before its end, from the start of the ring."""
    units, count = capacity // 1024, size // 1024
    if not blocks:
        return count <= units
    behind = (blocks[-1].offset + blocks[-1].size) // 1024
    free = list(itertools.takewhile(lambda unit: unit not in taken, range(behind, units)))
    at_start = list(itertools.takewhile(lambda unit: unit not in taken, range(behind)))
    return len(free) >= count or (len(free) == units - behind and len(at_start) >= count)


def test_the_record_of_a_scope_tells_high_water_what_stays_and_what_was_taken() -> None:
    record = ScopeRecord(1, 1, RingMark(10, 4, 4096, 1024, 7, 7))
    with pytest.raises(ValueError, match="open"):
        record.high_water()
    record.end = RingMark(25, 20, 9216, 4096, 9, 8)
    assert record.high_water() == (21, 8192, 2)
    assert record.live_at_exit() == (5, 5120, 1)
    assert record.allocated() == (15, 5120, 2)
