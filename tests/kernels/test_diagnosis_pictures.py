"""Pictures are well-formed, show every task once, and put nothing on top of anything else."""

from __future__ import annotations

import itertools
import re
import xml.etree.ElementTree as ET

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chipbus.kernels.diagnosis import (
    Edge,
    Memory,
    Operand,
    Reason,
    RunGraph,
    RunTask,
    run_of_capture,
    scheduled,
    to_graph_svg,
    to_rings_svg,
)
from chipbus.kernels.diagnosis.folding import Repeat, fold
from chipbus.kernels.diagnosis.layers import lay_out
from chipbus.kernels.diagnosis.ring_picture import held_by_ring
from chipbus.kernels.engine import Access, TaskEngine, TaskState
from chipbus.kernels.graph import GraphBuilder, Tag
from chipbus.topology.rings import RingRequest, resolve_rings

SVG = "{http://www.w3.org/2000/svg}"


def run_of(labels: str, edges: list[tuple[int, int]] | None = None) -> RunGraph:
    """One task per letter; by default each waits for the one before it."""
    pairs = list(itertools.pairwise(range(len(labels)))) if edges is None else edges
    tasks = tuple(RunTask(label=letter, lane="core.0") for letter in labels)
    return RunGraph(name="r", tasks=tasks, edges=tuple(Edge(*pair) for pair in pairs))


@settings(deadline=None, print_blob=True, max_examples=100)
@given(st.text("ab", max_size=40), st.integers(1, 6))
def test_folding_keeps_every_task_once_and_like_with_like(labels: str, limit: int) -> None:
    run = run_of(labels)
    folded = fold(run, limit)
    assert sorted(itertools.chain(*folded.nodes)) == list(range(len(labels)))
    for tasks in folded.nodes:
        assert len({labels[task] for task in tasks}) == 1
        assert list(tasks) == sorted(tasks)
    firsts = [tasks[0] for tasks in folded.nodes]
    assert firsts == sorted(firsts)
    for repeat in folded.repeats:
        assert 0 <= repeat.first <= repeat.last < len(folded.nodes)
        assert repeat.count >= 2
        assert all(len(folded.nodes[node]) % repeat.count == 0 for node in range(repeat.first, repeat.last + 1))
    for one, other in itertools.combinations(folded.repeats, 2):
        apart = one.last < other.first or other.last < one.first
        inside = one.first <= other.first and other.last <= one.last
        around = other.first <= one.first and one.last <= other.last
        assert apart or inside or around
    if len(labels) <= limit and not re.search(r"(.)\1{8}", labels):
        assert not folded.repeats


def test_equal_layers_fold_into_one_and_loops_inside_them_too() -> None:
    assert fold(run_of("x" + "abc" * 28 + "y"), 10).repeats == (Repeat(1, 3, 28),)
    nested = fold(run_of("x" + ("a" + "bc" * 5 + "d") * 7 + "y"), 8)
    assert set(nested.repeats) == {Repeat(1, 4, 7), Repeat(2, 3, 5)}
    assert [len(tasks) for tasks in nested.nodes] == [1, 7, 35, 35, 7, 1]
    shaped = [RunTask(label="a", lane="l", operands=(Operand(Tag.INPUT, 0, 0, (n,), (1,)),)) for n in (1, 2, 1, 2)]
    assert [len(tasks) for tasks in fold(run_of("a" * 9 + "b" * 8), 99).nodes] == [9, *[1] * 8]
    differ = RunGraph(name="r", memory=(Memory("m", "uint8", (2,), "m"),), tasks=tuple(shaped))
    assert [len(tasks) for tasks in fold(differ, 1).nodes] == [2, 2]


@st.composite
def graphs(draw: st.DrawFn) -> tuple[int, list[tuple[int, int]]]:
    count = draw(st.integers(1, 14))
    return count, [pair for pair in itertools.combinations(range(count), 2) if draw(st.integers(0, 3)) == 0]


@settings(deadline=None, print_blob=True, max_examples=100)
@given(graphs(), st.data())
def test_no_two_nodes_overlap_and_every_edge_runs_down(
    graph: tuple[int, list[tuple[int, int]]], data: st.DataObject
) -> None:
    count, edges = graph
    repeats = []
    if count > 2 and data.draw(st.booleans()):
        first = data.draw(st.integers(0, count - 1))
        repeats.append(Repeat(first, data.draw(st.integers(first, count - 1)), 2))
    spine = data.draw(st.sets(st.integers(0, count - 1)))
    layout = lay_out(count, edges, repeats, spine, node_width=100, gap=20)
    for one, other in itertools.combinations(range(count), 2):
        if layout.rows[one] == layout.rows[other]:
            assert abs(layout.xs[one] - layout.xs[other]) >= 120 - 1e-6
    for (_, row), x in layout.points.items():  # an edge that passes a row passes between its nodes
        assert all(abs(x - layout.xs[node]) >= 50 for node in range(count) if layout.rows[node] == row)
    for before, after in edges:
        assert layout.rows[before] < layout.rows[after]
        for row in range(layout.rows[before] + 1, layout.rows[after]):
            assert (before, row) in layout.points
    for repeat in repeats:  # a frame around its rows has nothing else in it
        inside = set(range(repeat.first, repeat.last + 1))
        rows = {layout.rows[node] for node in inside}
        assert {node for node in range(count) if min(rows) <= layout.rows[node] <= max(rows)} == inside
    assert all(50 - 1e-6 <= x <= layout.width - 50 + 1e-6 for x in layout.xs)


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in ET.fromstring(svg).iter(f"{SVG}text")]


def test_a_picture_shows_every_task_and_what_failed() -> None:
    run = run_of("abcdef", [(0, 1), (0, 2), (1, 3), (2, 3), (0, 5)])
    failed = attrs.evolve(run.tasks[4], state=TaskState.FAILED, error="CORE_EXCEPTION (507015): <x> & y\nhint: fix")
    run = attrs.evolve(run, tasks=(*run.tasks[:4], failed, run.tasks[5]), errors=(failed.error,))
    shown = texts(to_graph_svg(run))
    assert [letter for letter in "abcdef" if shown.count(letter) != 1] == []
    assert "failed: 1" in shown
    assert "failed: CORE_EXCEPTION (507015): <x> & y" in shown
    assert "6 tasks · 5 edges · longest chain 3 tasks · not timed" in shown


def test_a_node_tells_the_chip_a_task_ran_on_but_not_the_core() -> None:
    a = Memory("a", "uint8", (4,), "a")
    for lane, told in (("core", "a"), ("chip", "chip.1")):
        tasks = tuple(
            RunTask(label="t", lane=f"{lane}.{number}", operands=(Operand(Tag.OUTPUT, 0, 0, (4,), (1,)),))
            for number in range(2)
        )
        assert told in texts(to_graph_svg(RunGraph(name="r", memory=(a,), tasks=tasks)))


@pytest.mark.guarantee("D6")
def test_a_picture_of_300_tasks_is_folded_until_a_screen_holds_it() -> None:
    run = scheduled(run_of("in" + "abcdefghi" * 33 + "o"), [1000] * 300)
    svg = to_graph_svg(run)
    root = ET.fromstring(svg)
    assert float(root.attrib["width"]) < 1000
    assert float(root.attrib["height"]) < 1300
    shown = texts(svg)
    assert shown.count("33 ×") == 10  # nine nodes and their frame
    assert "300 tasks · 299 edges · critical path 300 tasks, 300.0 µs of 300.0 µs · modelled clock" in shown[1]
    assert not [element for element in root.iter() if element.tag.removeprefix(SVG) in ("script", "image", "use")]


def test_a_run_without_tasks_has_a_picture_too() -> None:
    assert "0 tasks · 0 edges · longest chain 0 tasks · not timed" in texts(to_graph_svg(RunGraph(name="empty")))
    assert "no ring was used" in texts(to_rings_svg(RunGraph(name="empty")))


def test_what_a_ring_held_is_told_in_order_of_time_from_scope_to_scope() -> None:
    engine = TaskEngine(resolve_rings(environ={}))
    expected: list[list[tuple[int, int, int]]] = [[], [], [], []]

    def note(ring: int) -> None:
        use = engine.occupancy()[ring]
        expected[ring].append((use.tasks, use.heap_bytes, use.dep_entries))

    note(0)
    for turn in range(3):
        note(1)
        engine.open_scope()
        block = engine.alloc(100 + 2000 * turn)
        first = engine.submit([Access(Tag.OUTPUT, block, ((0, 100),))])
        note(2)
        engine.open_scope()
        engine.submit([Access(Tag.INPUT, block, ((0, 100),))])
        engine.close_scope()
        note(2)
        if turn == 1:
            engine.start(first)
            engine.complete(first)
        engine.close_scope()
        note(1)
    engine.finish()
    note(0)
    assert held_by_ring(engine.scopes) == expected


def test_the_picture_of_rings_names_use_capacity_and_a_size_that_is_enough() -> None:
    sizes = resolve_rings(RingRequest(ring_task_window=32, ring_heap=8192), environ={})
    graph = GraphBuilder("g", sizes)
    out = graph.bound("out", "float32", 256)
    for step in range(3):
        with graph.scope():
            tile = graph.tensor("float32", 256)
            graph.submit("make", (Tag.OUTPUT, tile))
            graph.submit("keep", (Tag.INPUT, tile), (Tag.INOUT, out[: 64 * step + 64]))
    run = attrs.evolve(run_of_capture(graph.build()), rings=sizes)
    shown = texts(to_rings_svg(run))
    assert "ring 1: heap" in shown
    assert "6 of 31 (19.4 %) tasks" in shown
    assert "3,072 of 8,192 (37.5 %) bytes" in shown
    assert "size 4,096 is enough · 6 scope begins and ends" in shown
    assert not [words for words in shown if "ring 3" in words]


def test_lines_from_copy_to_copy_are_not_taken_for_lines_inside_one() -> None:
    """Task b of each copy waits for task a of the one before: a is above b, and yet no line goes down from it."""
    run = run_of("ab" * 20, [(2 * copy, 2 * copy + 3) for copy in range(19)] + [(38, 39)])
    took = [1] * 38 + [5, 100]  # the critical path is within the last copy
    for reason, left_out in ((Reason.WAR, True), (Reason.RAW, False)):
        carried = (attrs.evolve(edge, reasons=(reason,)) for edge in run.edges)
        svg = to_graph_svg(scheduled(attrs.evolve(run, edges=tuple(carried)), took, 40))
        assert any("left out" in words for words in texts(svg)) == left_out
        along = [path for path in ET.fromstring(svg).iter(f"{SVG}path") if "H" in path.attrib["d"]]
        assert bool(along) != left_out
