"""Row units: fewer byte ranges to keep, the same edges; and memory that is given out again stays in order."""

from __future__ import annotations

import itertools
from contextlib import ExitStack, suppress
from typing import Any

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chipbus.errors import InvalidArgs, NumberedError, TensorMapOverflow
from chipbus.kernels import graph as graph_module
from chipbus.kernels.diagnosis.captured import run_of_capture
from chipbus.kernels.diagnosis.hazards import find_races
from chipbus.kernels.graph import GraphBuilder, Tag, TaskGraph, Tile
from chipbus.kernels.qwen3 import graphs
from chipbus.kernels.qwen3.tiling import COARSE, Tiling
from chipbus.topology import RingSizes


class Exact(GraphBuilder):
    """Tracks every byte, whatever units are asked for."""

    def bound(self, name: str, dtype: str, *shape: int, row_unit: int = 1) -> Tile:
        return super().bound(name, dtype, *shape)

    def intermediate(self, name: str, dtype: str, *shape: int, row_unit: int = 1) -> Tile:
        return super().intermediate(name, dtype, *shape)

    def tensor(self, dtype: str, *shape: int, row_unit: int = 1) -> Tile:
        return super().tensor(dtype, *shape)


def ancestors(graph: TaskGraph) -> list[set[int]]:
    """Per task all that have ended before it starts."""
    found: list[set[int]] = []
    for task in graph.tasks:
        found.append(set(task.predecessors).union(*(found[before] for before in task.predecessors)))
    return found


def assert_orders_all_of(graph: TaskGraph, other: TaskGraph) -> None:
    assert len(graph.tasks) == len(other.tasks)
    before = ancestors(graph)
    assert all(earlier in before[later] for earlier, later in other.edges)


# Random programs


@attrs.frozen
class Memory:
    shape: tuple[int, ...]
    unit: int


@attrs.frozen
class Use:
    """A piece of one of the memories there are, between two of the places where it may be cut on each axis."""

    tag: Tag
    which: int
    cuts: tuple[tuple[int, int], ...]

    def of(self, tile: Tile, unit: int) -> Tile:
        parts = []
        for axis, (extent, cut) in enumerate(zip(tile.shape, self.cuts, strict=False)):
            step = -(-extent // 3) if axis else unit or extent
            places = [*range(0, extent, step), extent]
            parts.append(slice(*sorted(places[place % len(places)] for place in cut)))
        return tile[tuple(parts)]


Step = bool | Memory | list[Use]  # open (True) or close a scope, make a tensor, submit a task

memories = st.builds(
    Memory,
    shape=st.one_of(
        st.tuples(st.integers(1, 7), st.sampled_from([1, 6, 40, 150, 300, 900])),
        st.tuples(st.integers(1, 5), st.integers(1, 4), st.sampled_from([1, 6, 100, 250])),
    ),
    unit=st.integers(0, 4),
)
works = st.lists(
    st.builds(
        Use,
        tag=st.sampled_from(list(Tag)),
        which=st.integers(0, 5),
        cuts=st.tuples(*[st.tuples(st.integers(0, 3), st.integers(0, 3))] * 3),
    ),
    min_size=1,
    max_size=2,
)


@st.composite
def programs(draw: st.DrawFn) -> list[Step]:
    """Scopes, some in each other and some gone through again, with tensors and tasks; and tasks outside of them."""
    steps: list[Step] = []
    for _ in range(draw(st.integers(0, 12))):  # lists of any length alike
        opened = draw(st.sampled_from([1, 1, 1, 2, 0]))
        made = draw(st.lists(memories, min_size=1, max_size=2)) if opened else []
        body = [*made, *draw(st.lists(works, min_size=1, max_size=4))]
        steps += [*[True] * opened, *body, *[False] * opened] * draw(st.sampled_from([1, 1, 2]))
    return steps


def capture(
    builder: type[GraphBuilder], named: tuple[Memory, Memory], program: list[Step], sizes: RingSizes, *, track_war: bool
) -> TaskGraph:
    graph = builder("g", sizes, track_war=track_war)
    bound, made = named
    there = [
        [
            (bound, graph.bound("a", "float32", *bound.shape, row_unit=bound.unit)),
            (made, graph.intermediate("b", "uint8", *made.shape, row_unit=made.unit)),
        ]
    ]
    scopes: list[ExitStack] = []
    for step in program:
        if step is True:
            scopes.append(ExitStack())
            scopes[-1].enter_context(graph.scope())
            there.append([])
        elif step is False:
            scopes.pop().close()
            there.pop()
        else:
            with suppress(NumberedError):  # what does not fit in the rings is left out
                if isinstance(step, Memory):
                    there[-1].append((step, graph.tensor("uint8", *step.shape, row_unit=step.unit)))
                else:
                    mine = [each for scope in reversed(there) for each in scope]
                    used = [(use, *mine[use.which % len(mine)]) for use in step]
                    graph.submit("k", *((use.tag, use.of(tile, memory.unit)) for use, memory, tile in used))
    return graph.build()


ROOMY = RingSizes(task_window=(4096,) * 4, heap=(1 << 22,) * 4, dep_pool=(4096,) * 4)


@settings(deadline=None, print_blob=True)
@given(st.tuples(memories, memories), programs(), st.booleans())
def test_edges_with_units_are_those_of_every_byte(
    named: tuple[Memory, Memory], program: list[Step], track_war: bool
) -> None:
    in_units, exact = (
        capture(builder, named, program, ROOMY, track_war=track_war) for builder in (GraphBuilder, Exact)
    )
    assert len(in_units.tasks) == len([step for step in program if isinstance(step, list)])
    assert in_units.edges == exact.edges


@settings(deadline=None, print_blob=True, max_examples=200)
@given(st.tuples(memories, memories), programs(), st.sampled_from([2048, 4096, 8192]), st.booleans())
@pytest.mark.slow
def test_memory_in_units_is_given_out_again_in_order(
    named: tuple[Memory, Memory], program: list[Step], heap: int, track_war: bool
) -> None:
    sizes = attrs.evolve(ROOMY, heap=(heap,) * 4)
    in_units, exact = (
        capture(builder, named, program, sizes, track_war=track_war) for builder in (GraphBuilder, Exact)
    )
    assert_orders_all_of(in_units, exact)
    before = ancestors(in_units)
    users: dict[tuple[int, int], dict[int, set[int]]] = {}  # of each byte of the rings: buffer → tasks
    for number, task in enumerate(in_units.tasks):
        for _, tile in task.args:
            if tile.buffer.place is not None:
                ring, offset = tile.buffer.place
                for byte in itertools.chain.from_iterable(itertools.starmap(range, tile.byte_ranges())):
                    users.setdefault((ring, offset + byte), {}).setdefault(tile.buffer.index, set()).add(number)
    for tasks in {tuple(map(frozenset, by_buffer.values())) for by_buffer in users.values()}:
        for earlier, later in itertools.combinations(tasks, 2):
            assert all(earlier - {number} <= before[number] for number in later)


# What is promised is checked


@pytest.mark.parametrize("unit", [4, 0])
def test_a_tile_that_takes_part_of_a_unit_is_refused(unit: int) -> None:
    graph = GraphBuilder("g")
    tiles = graph.bound("a", "int32", 10, 6, row_unit=4), graph.tensor("int32", 3, 6, row_unit=unit)
    for tile, where in (
        (tiles[0][2:4], "rows 2 to 4 of a, which has 10 in units of 4"),
        (tiles[0][4:9, 2:], "rows 4 to 9 of a"),
        (tiles[0][8], "rows 8 to 9 of a"),
        (tiles[0][1:, 3], "rows 1 to 10 of a"),
        (tiles[1][:2], f"rows 0 to 2 of tensor.1, which has 3 in units of {unit or 3}"),
    ):
        with pytest.raises(InvalidArgs, match=f"a tile takes {where}.*; tiles begin and end where units do"):
            graph.submit("k", (Tag.NO_DEP, tile))
    graph.submit("k", (Tag.OUTPUT, tiles[0][4:8]), (Tag.OUTPUT, tiles[0][8:, 3]), (Tag.OUTPUT, tiles[1]))
    graph.submit("k", (Tag.INPUT, tiles[0][:, 3]), (Tag.INPUT, tiles[0][1:1]))
    built = graph.build()
    assert built.edges == {(0, 1)}
    assert [buffer.row_unit for buffer in built.buffers] == [4, unit or 3]


def test_units_belong_to_the_declaration() -> None:
    graph = GraphBuilder("g")
    assert graph.bound("a", "int32", 8, 2, row_unit=0) == graph.bound("a", "int32", 8, 2, row_unit=8)
    with pytest.raises(ValueError, match=r"buffer a is declared twice, .* in units of 8 and 1 rows"):
        graph.bound("a", "int32", 8, 2)
    for shape, unit in (((8, 2), -1), ((), 2), ((), 0)):
        with pytest.raises(InvalidArgs, match=f"declared in units of {unit} rows"):
            graph.tensor("int32", *shape, row_unit=unit)
    graph.submit("k", (Tag.OUTPUT, graph.tensor("int32", 0, 2, row_unit=0)))
    assert len(graph.build().buffers) == 2


# Memory that is given out again


def test_memory_is_given_out_again_without_edges_where_all_its_users_have_ended_anyway() -> None:
    graph = GraphBuilder("g", attrs.evolve(ROOMY, heap=(2048,) * 4))
    parts = graph.intermediate("parts", "uint8", 2)
    for _ in range(3):
        with graph.scope():
            old = graph.tensor("uint8", 2, 1024)
            for part in range(2):
                graph.submit("write", (Tag.OUTPUT, old[part]), (Tag.OUTPUT, parts[part]))
        with graph.scope():
            new = graph.tensor("uint8", 2, 1024)
            for part in range(2):
                graph.submit("gather", (Tag.INPUT, parts), (Tag.OUTPUT, new[part]))  # waits for both writers
            graph.submit("use", (Tag.INPUT, new[0]))
    edges = graph.build().edges
    first = {(0, 2), (1, 2), (0, 3), (1, 3), (2, 4)}
    assert {edge for edge in edges if edge[1] < 5} == first
    # The next writers wait for nobody else, so for the last users of their memory they do.
    again = {(before + 5 * turn, after + 5 * turn) for turn in range(3) for before, after in first}
    assert edges - again == {(4, 5), (3, 6), (9, 10), (8, 11)}


@pytest.mark.parametrize("somebody_waits_for_both", [False, True])
def test_who_waits_for_some_users_of_memory_still_waits_for_the_others(somebody_waits_for_both: bool) -> None:
    graph = GraphBuilder("g", attrs.evolve(ROOMY, heap=(2048,) * 4))
    parts = graph.intermediate("parts", "uint8", 3)
    with graph.scope():
        old = graph.tensor("uint8", 2, 1024)
        writers = [graph.submit("write", (Tag.OUTPUT, old[part]), (Tag.OUTPUT, parts[part])) for part in range(2)]
    if somebody_waits_for_both:
        graph.submit("gather", (Tag.INPUT, parts[:2]))
    with graph.scope():
        new = graph.tensor("uint8", 2, 1024)
        step = graph.submit("step", (Tag.INPUT, parts[0]), (Tag.OUTPUT, parts[2]))
        other = graph.submit("use", (Tag.INPUT, parts[2]), (Tag.OUTPUT, new[1, 8:]))
        first = graph.submit("use", (Tag.INPUT, parts[0]), (Tag.OUTPUT, new[1, :8]))
    within = {(writers[0], step), (step, other), (writers[0], first)}
    both = {(writer, 2) for writer in writers if somebody_waits_for_both}
    assert graph.build().edges == within | both | {(writers[1], other), (writers[1], first)}


# The programs of Qwen3

STATIC: dict[str, Any] = {
    "num_layers": 4, "hidden_size": 64, "intermediate_size": 96, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16,
    "vocab_size": 300, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "attention_bias": True, "max_model_len": 256,
    "page_size": 16, "num_pages": 16, "max_num_seqs": 8, "dtype": "bfloat16",
}  # fmt: skip
TILINGS = {
    "coarse": COARSE,
    "fine": Tiling(tokens=16, columns=16, head_columns=100, kv_heads=1, query_tokens=16, query_rows=1),
    "rows": Tiling(columns=16, kv_heads=1, query_tokens=8, query_rows=4),
    "odd": Tiling(tokens=24, columns=40, head_columns=100, kv_heads=1, query_tokens=40, query_rows=3),
}


def static(tiling: Tiling) -> dict[str, Any]:
    return STATIC | dict(tiling.static)


@pytest.mark.slow
@pytest.mark.parametrize("trace", [graphs.trace_prefill, graphs.trace_decode], ids=["prefill", "decode"])
@pytest.mark.parametrize("tiling", TILINGS.values(), ids=TILINGS)
def test_tiled_graphs_have_the_edges_of_every_byte(tiling: Tiling, trace: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    in_units = trace(static(tiling), 56)
    monkeypatch.setattr(graphs, "GraphBuilder", Exact)
    exact = trace(static(tiling), 56)

    def within_buffers(graph: TaskGraph) -> set[tuple[int, int]]:
        touched = [{tile.buffer.index for _, tile in task.args} for task in graph.tasks]
        return {(before, after) for before, after in graph.edges if touched[before] & touched[after]}

    assert within_buffers(in_units) == within_buffers(exact)
    assert_orders_all_of(in_units, exact)
    assert find_races(run_of_capture(in_units)) == find_races(run_of_capture(exact))


@pytest.mark.parametrize("trace", [graphs.trace_prefill, graphs.trace_decode], ids=["prefill", "decode"])
def test_tiled_graphs_keep_a_byte_range_per_tile_and_not_per_row(trace: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_module, "_MAX_MAP_ENTRIES", 1_000)
    tiling = attrs.evolve(TILINGS["fine"], query_rows=16)
    trace(static(tiling), 64)
    monkeypatch.setattr(graphs, "GraphBuilder", Exact)
    with pytest.raises(TensorMapOverflow):
        trace(static(tiling), 64)
