"""Task graphs: tiles cover the bytes they should, and edges are those a byte-by-byte bookkeeper finds."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chipbus.kernels.graph import GraphBuilder, Tag, TensorMap, Tile


@st.composite
def slices(draw: st.DrawFn, shape: tuple[int, ...]) -> tuple[int | slice, ...]:
    parts: list[int | slice] = []
    for extent in shape[: draw(st.integers(0, len(shape)))]:
        if draw(st.booleans()):
            parts.append(draw(st.integers(0, extent - 1)))
        else:
            begin = draw(st.integers(0, extent))
            parts.append(slice(begin, draw(st.integers(begin, extent))))
    return tuple(parts)


SHAPE = (3, 4, 5)


def bytes_of(tile: Tile) -> set[int]:
    return {byte for begin, end in tile.byte_ranges() for byte in range(begin, end)}


@settings(deadline=None, print_blob=True)
@given(first=slices(SHAPE), data=st.data())
def test_a_tile_covers_exactly_the_bytes_numpy_says(first: tuple[int | slice, ...], data: st.DataObject) -> None:
    tile = GraphBuilder("g").bound("b", "int32", *SHAPE)[first]
    array = np.arange(3 * 4 * 5).reshape(SHAPE)[first]
    if tile.shape:
        second = data.draw(slices(tile.shape)) if all(tile.shape) else ()
        tile, array = tile[second], array[second]
    assert tile.shape == array.shape
    assert bytes_of(tile) == {4 * int(element) + byte for element in np.ravel(array) for byte in range(4)}
    ranges = tile.byte_ranges()
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(ranges))


def test_contiguous_tiles_are_one_range() -> None:
    buffer = GraphBuilder("g").bound("b", "bfloat16", 8, 16, 4)
    assert buffer.is_whole
    assert buffer.byte_ranges() == [(0, 1024)]
    assert buffer[2:4].byte_ranges() == [(256, 512)]
    assert buffer[1, 3:5].byte_ranges() == [(128 + 24, 128 + 40)]
    assert len(buffer[:, 3:5].byte_ranges()) == 8
    assert buffer[:, 3:3].byte_ranges() == []


def test_indices_outside_a_tile_are_refused() -> None:
    buffer = GraphBuilder("g").bound("b", "int32", 4, 4)
    for index in (4, -1, (0, 0, 0), slice(None, None, 2), (0, 9)):
        with pytest.raises(IndexError):
            buffer[index]


@settings(deadline=None, print_blob=True)
@given(
    st.lists(
        st.tuples(st.integers(0, 40), st.integers(1, 12), st.booleans()),
        max_size=40,
    )
)
def test_the_tensor_map_agrees_with_a_byte_by_byte_one(actions: list[tuple[int, int, bool]]) -> None:
    found, plain = TensorMap(), dict[int, int]()
    for task, (begin, length, writes) in enumerate(actions):
        end = begin + length
        expected = {plain[byte] for byte in range(begin, end) if byte in plain}
        assert set(found.producers(0, begin, end)) == expected
        assert set(found.producers(1, begin, end)) == set()
        if writes:
            found.produced(0, begin, end, task)
            plain.update(dict.fromkeys(range(begin, end), task))


@settings(deadline=None, print_blob=True)
@given(
    st.lists(
        st.lists(st.tuples(st.sampled_from(list(Tag)), st.integers(0, 1), slices((4, 6))), min_size=1, max_size=4),
        max_size=14,
    )
)
@pytest.mark.guarantee("K5")
def test_edges_are_those_of_a_byte_by_byte_bookkeeper(
    tasks: list[list[tuple[Tag, int, tuple[int | slice, ...]]]],
) -> None:
    graph = GraphBuilder("g")
    buffers = [graph.bound("a", "int32", 4, 6), graph.intermediate("b", "float64", 4, 6)]
    last: dict[tuple[int, int], int] = {}
    expected = set()
    for task, args in enumerate(tasks):
        tiles = [(tag, buffers[which][index]) for tag, which, index in args]
        assert graph.submit("k", *tiles) == task
        touched = [(tag, [(tile.buffer.index, byte) for byte in bytes_of(tile)]) for tag, tile in tiles]
        for tag, places in touched:
            if tag in (Tag.INPUT, Tag.INOUT):
                expected |= {(last[place], task) for place in places if place in last}
        for tag, places in touched:
            if tag in (Tag.OUTPUT, Tag.INOUT, Tag.OUTPUT_EXISTING):
                last.update(dict.fromkeys(places, task))
    assert graph.build().edges == expected


def test_tags_give_read_after_write_and_write_after_write_but_never_write_after_read() -> None:
    graph = GraphBuilder("g")
    a, b = graph.bound("a", "int32", 8), graph.intermediate("b", "int32", 8)
    graph.submit("write", (Tag.OUTPUT, b))
    graph.submit("read", (Tag.INPUT, b[:4]), (Tag.OUTPUT_EXISTING, a))
    graph.submit("update", (Tag.INOUT, b[2:]))
    graph.submit("replace", (Tag.OUTPUT_EXISTING, b))
    graph.submit("peek", (Tag.NO_DEP, b))
    graph.submit("gather", (Tag.INPUT, b), (Tag.INPUT, a))
    assert graph.build().edges == {(0, 1), (0, 2), (3, 5), (1, 5)}


def test_a_buffer_keeps_its_one_declaration() -> None:
    graph = GraphBuilder("g")
    assert graph.bound("a", "int32", 2) == graph.bound("a", "int32", 2)
    for again in (lambda: graph.bound("a", "int32", 3), lambda: graph.intermediate("a", "int32", 2)):
        with pytest.raises(ValueError, match="buffer a is declared twice"):
            again()
