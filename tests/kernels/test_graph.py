"""Task graphs: tiles cover the bytes they should, and edges are those a byte-by-byte bookkeeper finds."""

from __future__ import annotations

import itertools
import random
from contextlib import ExitStack, suppress
from typing import Any

import numpy as np
import pytest
import task_programs
from hypothesis import given, settings
from hypothesis import strategies as st
from task_programs import READING, WRITING, Alloc, Bookkeeper, Byte, Close, Open, Step

from chipbus.errors import (
    DepPoolOverflow,
    FlowControlDeadlock,
    HeapRingDeadlock,
    InvalidArgs,
    NumberedError,
    ScopeDeadlock,
)
from chipbus.kernels.graph import GraphBuilder, Tag, TaskGraph, Tile
from chipbus.topology import RingSizes, suggest_rings


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


# Scopes


def rings(*, window: int = 64, heap: int = 4096, pool: int = 64) -> RingSizes:
    return RingSizes(task_window=(window,) * 4, heap=(heap,) * 4, dep_pool=(pool,) * 4)


@pytest.mark.guarantee("G17")
def test_memory_of_a_scope_is_used_again_and_its_new_users_wait_for_the_old_ones() -> None:
    graph = GraphBuilder("g", rings(heap=2048))
    tiles = []
    for _ in range(3):
        with graph.scope():
            tile = graph.tensor("uint8", 2048)
            graph.submit("write", (Tag.OUTPUT, tile))
            graph.submit("read", (Tag.INPUT, tile[:1024]))
            graph.submit("read", (Tag.INPUT, tile[1024:]))
            tiles.append(tile)
    built = graph.build()
    assert {tile.buffer.place for tile in tiles} == {(1, 0)}
    assert len({tile.buffer.index for tile in tiles}) == 3
    assert built.heap_bytes == (0, 2048, 0, 0)
    within = {(0, 1), (0, 2), (3, 4), (3, 5), (6, 7), (6, 8)}
    assert built.edges == within | {(1, 3), (2, 3), (4, 6), (5, 6)}


def test_memory_is_used_again_only_when_the_heap_is_full() -> None:
    graph = GraphBuilder("g", rings(heap=4096))
    for _ in range(4):
        with graph.scope():
            graph.submit("write", (Tag.OUTPUT, graph.tensor("uint8", 1024)))
    built = graph.build()
    assert [buffer.place for buffer in built.buffers] == [(1, 0), (1, 1024), (1, 2048), (1, 3072)]
    assert built.edges == frozenset()
    assert built.heap_bytes == (0, 4096, 0, 0)


def test_bytes_nobody_touched_in_a_block_keep_the_users_they_had_before() -> None:
    graph = GraphBuilder("g", rings(heap=1024))
    for kernel in ("first", "second", "third"):
        with graph.scope():
            tile = graph.tensor("uint8", 1024)
            graph.submit(kernel, (Tag.OUTPUT, tile[:8] if kernel == "second" else tile))
    assert graph.build().edges == {(0, 1), (0, 2), (1, 2)}


def test_a_user_without_edges_of_its_own_waits_for_the_users_of_the_block_before() -> None:
    for tag in Tag:
        graph = GraphBuilder("g", rings(heap=1024))
        with graph.scope():
            graph.submit("old", (Tag.OUTPUT, graph.tensor("uint8", 8)))
        with graph.scope():
            tile = graph.tensor("uint8", 8)
            graph.submit("new", (Tag.OUTPUT, tile))
            graph.submit("also", (tag, tile))
        assert graph.build().edges == {(0, 1), (1, 2) if tag.reads else (0, 2)}


def test_reused_memory_with_many_users_costs_a_sum_of_edges_and_not_a_product() -> None:
    graph = GraphBuilder("g", rings(window=512, heap=1024))
    for _ in range(2):
        with graph.scope():
            tile = graph.tensor("uint8", 1024)
            graph.submit("write", (Tag.OUTPUT, tile))
            for _ in range(100):
                graph.submit("read", (Tag.INPUT, tile))
    with graph.scope():
        tile = graph.tensor("uint8", 1024)
        for part in range(100):
            graph.submit("write", (Tag.OUTPUT, tile[part : part + 1]))
    edges = graph.build().edges
    assert {(reader, 101) for reader in range(1, 101)} <= edges  # the first user waits for all readers before it
    assert {(reader, 202) for reader in range(102, 202)} | {(202, other) for other in range(203, 302)} <= edges
    assert len(edges) < 600


def test_a_tile_of_a_scope_that_has_ended_is_refused_and_one_made_outside_stays() -> None:
    graph = GraphBuilder("g")
    outside = graph.tensor("float32", 8)
    with graph.scope():
        inside = graph.tensor("float32", 8)
        graph.submit("write", (Tag.OUTPUT, inside), (Tag.OUTPUT, outside))
    graph.submit("read", (Tag.INPUT, outside))
    with pytest.raises(InvalidArgs, match="scope has ended"):
        graph.submit("read", (Tag.INPUT, inside))
    assert graph.build().edges == {(0, 1)}


def test_explicit_and_manual_dependencies_are_indices_of_tasks() -> None:
    graph = GraphBuilder("g")
    a = graph.bound("a", "uint8", 8)
    first = graph.submit("write", (Tag.OUTPUT_EXISTING, a))
    with graph.scope(manual=True):
        second = graph.submit("update", (Tag.INOUT, a))
        third = graph.submit("update", (Tag.INOUT, a), after=[second])
    graph.submit("read", (Tag.INPUT, a), after=(third,), eps=1)
    for unknown in (-1, 4):
        with pytest.raises(InvalidArgs, match=f"after task {unknown}"):
            graph.submit("k", after=[unknown])
    built = graph.build()
    assert built.edges == {(second, third), (first, 3), (third, 3)}
    assert built.tasks[3].settings == (("eps", 1),)


def test_write_after_read_edges_come_on_request() -> None:
    for track_war in (False, True):
        graph = GraphBuilder("g", track_war=track_war)
        h = graph.intermediate("h", "uint8", 8)
        for _ in range(2):
            graph.submit("write", (Tag.OUTPUT, h))
            graph.submit("read", (Tag.INPUT, h))
        assert graph.build().edges == {(0, 1), (2, 3)} | ({(1, 2)} if track_war else set())


def test_a_program_larger_than_a_window_is_captured_as_long_as_its_scopes_end() -> None:
    graph = GraphBuilder("g", rings(window=4, heap=2048))
    total = graph.bound("total", "uint8", 1)
    for _ in range(100):
        with graph.scope():
            part = graph.tensor("uint8", 1000)
            graph.submit("part", (Tag.OUTPUT, part))
            graph.submit("sum", (Tag.INPUT, part), (Tag.INOUT, total))
    built = graph.build()
    assert len(built.tasks) == 200
    assert {(2 * step - 1, 2 * step + 1) for step in range(1, 100)} <= built.edges  # also of tasks that count as done
    assert built.high_water[1].tasks == 3
    assert [record.ring for record in built.scopes] == [0] + [1] * 100
    assert suggest_rings(built.high_water).ring_heap == (1024, 2048, 1024, 1024)
    assert suggest_rings(built.high_water).ring_task_window == (4,) * 4


def no_scopes(graph: GraphBuilder) -> None:
    for _ in range(8):
        graph.submit("k")


def nested(graph: GraphBuilder) -> None:
    with ExitStack() as scopes:
        for _ in range(8):
            scopes.enter_context(graph.scope())
            for _ in range(3):
                graph.submit("k")


def accumulating(graph: GraphBuilder) -> None:
    for _ in range(5):
        graph.submit("k", (Tag.OUTPUT, graph.tensor("uint8", 1024)))


def wide(graph: GraphBuilder) -> None:
    with graph.scope():
        parts = [graph.tensor("uint8", 1) for _ in range(3)]
        for part in parts:
            graph.submit("k", (Tag.OUTPUT, part))
    tile = graph.bound("a", "uint8", 128)
    with graph.scope(), graph.scope():
        tasks = [graph.submit("k", (Tag.OUTPUT_EXISTING, tile[at : at + 1])) for at in range(128)]
        graph.submit("k", (Tag.INPUT, tile), after=tasks)


@pytest.mark.parametrize(
    ("program", "sizes", "error"),
    [
        (no_scopes, rings(window=4), ScopeDeadlock),
        (nested, rings(window=4), FlowControlDeadlock),
        (accumulating, rings(heap=4096), HeapRingDeadlock),
        (wide, rings(window=256, pool=4), DepPoolOverflow),
    ],
)
@pytest.mark.guarantee("G18")
def test_a_program_that_could_never_run_with_its_rings_is_refused_when_it_is_captured(
    program: Any, sizes: RingSizes, error: type[NumberedError]
) -> None:
    with pytest.raises(error):
        program(GraphBuilder("g", sizes))


class Capture:
    """Captures a random program, and keeps what each task touches: named bytes, and where they are in an executor."""

    def __init__(self, sizes: RingSizes, *, track_war: bool) -> None:
        self.graph = GraphBuilder("g", sizes, track_war=track_war)
        self.books = Bookkeeper(track_war)
        self.named = [self.graph.bound("a", "uint8", 4, 6), self.graph.intermediate("b", "uint8", 4, 6)]
        self.tiles: list[tuple[int, Tile]] = []  # (scope, tile)
        self.scopes: list[tuple[int, bool]] = [(0, False)]
        self.num_scopes = 1
        self.stack = [ExitStack()]
        self.touched: list[list[tuple[Tag, list[Byte]]]] = []

    def step(self, step: Step) -> None:
        if isinstance(step, Open):
            self.stack.append(ExitStack())
            self.stack[-1].enter_context(self.graph.scope(manual=step.manual))
            self.scopes.append((self.num_scopes, step.manual))
            self.num_scopes += 1
        elif isinstance(step, Close):
            if len(self.scopes) > 1:
                self.stack.pop().close()
                self.scopes.pop()
        elif isinstance(step, Alloc):
            self.tiles.append((self.scopes[-1][0], self.graph.tensor("uint8", 4, step.columns)))
        else:
            self.submit(step)

    def submit(self, work: task_programs.Work) -> None:
        open_scopes = {number for number, _ in self.scopes}
        mine = [tile for scope, tile in self.tiles if scope in open_scopes]
        args: list[tuple[Tag, Tile]] = []
        touched: list[tuple[Tag, list[Byte]]] = []
        for use in work.uses:
            index = use.block(len(mine))
            tile = self.named[use.space % 2] if index is None else mine[index]
            args.append(
                (use.tag, tile[use.top : min(4, use.top + use.height), use.left : min(6, use.left + use.width)])
            )
            touched.append((use.tag, [(tile.buffer.index, row, column) for row, column in use.cells()]))
        number, manual = len(self.touched), self.scopes[-1][1]
        given, needed = self.books.edges(touched, manual=manual)
        after = needed - given | {number - ago for ago in work.after if ago <= number}
        try:
            assert self.graph.submit("k", *args, after=sorted(after)) == number
        except NumberedError:
            return
        self.books.add(number, touched, manual=manual)
        self.touched.append(touched)


def run_in_any_order(graph: TaskGraph, touched: list[list[tuple[Tag, list[Byte]]]], rng: random.Random) -> list[Any]:
    """What each task reads, if any number run at once: they read when they start and write when they end."""
    memory: dict[Any, tuple[Byte, int]] = {}  # what holds another buffer's bytes has not been written
    reads: list[Any] = [None] * len(graph.tasks)
    left = [set(task.predecessors) for task in graph.tasks]
    waiting, running = set(range(len(graph.tasks))), list[int]()

    def where(byte: Byte) -> Any:
        buffer = graph.buffers[byte[0]]  # type: ignore[call-overload]
        if buffer.place is None:
            return byte
        assert buffer.place[1] + buffer.shape[0] * buffer.shape[1] <= graph.heap_bytes[buffer.place[0]]
        return buffer.place[0], buffer.place[1] + byte[1] * buffer.shape[1] + byte[2]

    while waiting or running:
        ready = [task for task in waiting if not left[task]]
        if ready and (not running or rng.random() < 0.6):
            task = rng.choice(ready)
            waiting.remove(task)
            running.append(task)
            read = [byte for tag, bytes_ in touched[task] if tag in READING for byte in bytes_]
            found = [memory.get(where(byte)) for byte in read]
            # Memory that still holds another block's bytes has not been written.
            reads[task] = [
                kept[1] if kept and kept[0] == byte else None for kept, byte in zip(found, read, strict=True)
            ]
        else:
            task = running.pop(rng.randrange(len(running)))
            for tag, bytes_ in touched[task]:
                if tag in WRITING:
                    memory.update({where(byte): (byte, task) for byte in bytes_})
            for others in left:
                others.discard(task)
    return reads


@pytest.mark.slow
@settings(deadline=None, print_blob=True, max_examples=300)
@given(
    task_programs.steps(may_fail=False),
    task_programs.sizes(),
    st.booleans(),
    st.integers(0, 2**32).map(random.Random),
)
@pytest.mark.guarantee("G19")
def test_a_captured_graph_gives_the_same_in_any_order_its_edges_allow_although_memory_is_used_again(
    program: list[Step], sizes: RingSizes, track_war: bool, rng: random.Random
) -> None:
    capture = Capture(sizes, track_war=track_war)
    for step in program:
        with suppress(HeapRingDeadlock):  # the step is left out
            capture.step(step)
    for scope in reversed(capture.stack):
        scope.close()
    graph = capture.graph.build()
    assert len(graph.tasks) == len(capture.touched)
    writer: dict[Byte, int] = {}
    expected = []
    for number, touched in enumerate(capture.touched):
        expected.append([writer.get(byte) for tag, bytes_ in touched if tag in READING for byte in bytes_])
        for tag, bytes_ in touched:
            if tag in WRITING:
                writer.update(dict.fromkeys(bytes_, number))
    assert run_in_any_order(graph, capture.touched, rng) == expected
