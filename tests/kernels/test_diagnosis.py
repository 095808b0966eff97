"""What is said about a run agrees with plain references: every path tried, every byte compared."""

from __future__ import annotations

import contextlib
import itertools
import json
from pathlib import Path
from typing import Any

import attrs
import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chipbus.errors import ConfigError, HeapRingDeadlock
from chipbus.kernels import Arg, Direction, Param, Program
from chipbus.kernels.diagnosis import (
    Edge,
    Memory,
    Operand,
    Reason,
    RunGraph,
    RunTask,
    critical_path,
    dump_arguments,
    find_races,
    run_graph_from_json,
    run_of_capture,
    run_of_launches,
    scheduled,
    to_json,
    to_trace_events,
    with_reasons,
    with_times,
)
from chipbus.kernels.dispatch import Completion
from chipbus.kernels.engine import TaskState
from chipbus.kernels.graph import GraphBuilder, Tag, Tile
from chipbus.kernels.rings import RingMark, ScopeRecord
from chipbus.topology.rings import RingRequest, RingUse, resolve_rings

MEMORY = (
    Memory("a", "uint8", (6, 4), "a"),
    Memory("b", "int32", (8,), "heap.0", 0),
    Memory("c", "uint8", (16,), "heap.0", 24),  # shares bytes 24 to 32 with b
)


@st.composite
def operands(draw: st.DrawFn) -> Operand:
    memory = draw(st.integers(0, 2))
    tag = draw(st.sampled_from(list(Tag)))
    if memory == 0:  # a block of rows and columns
        row, column = draw(st.integers(0, 5)), draw(st.integers(0, 3))
        shape = (draw(st.integers(1, 6 - row)), draw(st.integers(1, 4 - column)))
        return Operand(tag, 0, 4 * row + column, shape, (4, 1))
    extent = MEMORY[memory].shape[0]
    begin = draw(st.integers(0, extent - 1))
    return Operand(tag, memory, begin, (draw(st.integers(1, extent - begin)),), (1,))


@st.composite
def runs(draw: st.DrawFn) -> RunGraph:
    count = draw(st.integers(1, 8))
    tasks = []
    for _ in range(count):
        begin = draw(st.one_of(st.none(), st.integers(0, 50)))
        tasks.append(
            RunTask(
                label=draw(st.sampled_from(["add", "mul"])),
                lane=draw(st.sampled_from(["core.0", "core.1", "core.10"])),
                operands=tuple(draw(st.lists(operands(), max_size=3))),
                begin_ns=begin,
                end_ns=None if begin is None else begin + draw(st.integers(0, 9)),
            )
        )
    pairs = [pair for pair in itertools.combinations(range(count), 2) if draw(st.booleans())]
    return RunGraph(name="r", clock="wall", memory=MEMORY, tasks=tuple(tasks), edges=tuple(Edge(*p) for p in pairs))


def bytes_of(run: RunGraph, operand: Operand) -> set[tuple[str, int]]:
    """Element by element, by numpy's idea of strides."""
    memory = run.memory[operand.memory]
    item = np.dtype(memory.dtype).itemsize
    found = set()
    for index in np.ndindex(*operand.shape):
        element = operand.offset + sum(i * s for i, s in zip(index, operand.strides, strict=True))
        found |= {(memory.space, memory.begin + element * item + byte) for byte in range(item)}
    return found


def reaches(run: RunGraph, first: int, second: int) -> bool:
    after: dict[int, list[int]] = {}
    for edge in run.edges:
        after.setdefault(edge.before, []).append(edge.after)
    open_, seen = [first], {first}
    while open_:
        new = [task for task in after.get(open_.pop(), ()) if task not in seen]
        seen.update(new)
        open_ += new
    return second in seen


@settings(deadline=None, print_blob=True, max_examples=60)
@given(runs())
@pytest.mark.guarantee("D1")
def test_races_are_the_conflicting_pairs_that_no_path_orders(run: RunGraph) -> None:
    expected = set()
    for first, second in itertools.combinations(range(len(run.tasks)), 2):
        if reaches(run, first, second):
            continue
        for one, other in itertools.product(run.tasks[first].operands, run.tasks[second].operands):
            if Tag.NO_DEP in (one.tag, other.tag) or not bytes_of(run, one) & bytes_of(run, other):
                continue
            same = one.memory == other.memory
            if one.tag.writes and other.tag.reads:
                expected.add((first, second, Reason.RAW if same else Reason.REUSE))
            if one.tag.writes and other.tag.writes:
                expected.add((first, second, Reason.WAW if same else Reason.REUSE))
            if one.tag.reads and other.tag.writes:
                expected.add((first, second, Reason.WAR if same else Reason.REUSE))
    races = find_races(run)
    assert {(race.first, race.second, race.reason) for race in races} == expected
    assert len(races) == len(expected)
    for race in races:
        common = {(race.space, byte) for byte in range(race.begin, race.end)}
        for task in (race.first, race.second):
            assert common <= set().union(*(bytes_of(run, operand) for operand in run.tasks[task].operands))
        one, other = run.tasks[race.first], run.tasks[race.second]
        if None not in (one.begin_ns, other.begin_ns):
            assert race.ran_together == (one.begin_ns < other.end_ns and other.begin_ns < one.end_ns)
        assert race.memory in {memory.name for memory in MEMORY if memory.space == race.space}


def test_a_missing_write_after_read_edge_is_found_where_tracking_was_off() -> None:
    graph = GraphBuilder("g")
    a, b, c = (graph.bound(name, "float32", 8) for name in "abc")
    graph.submit("read", (Tag.INPUT, a), (Tag.OUTPUT_EXISTING, b))
    graph.submit("overwrite", (Tag.INPUT, c), (Tag.OUTPUT_EXISTING, a[4:]))
    [race] = find_races(run_of_capture(graph.build()))
    assert (race.first, race.second, race.reason, race.memory) == (0, 1, Reason.WAR, "a")
    assert (race.begin, race.end) == (16, 32)


@st.composite
def scoped_steps(draw: st.DrawFn) -> list[tuple[str, int, int]]:
    what = st.sampled_from(["open", "close", "make", "use", "use"])
    return draw(st.lists(st.tuples(what, st.integers(0, 9), st.integers(0, 9)), max_size=40))


@settings(deadline=None, print_blob=True, max_examples=60)
@given(scoped_steps(), st.booleans())
@pytest.mark.guarantee("D8")
def test_heap_memory_is_given_to_no_task_that_may_run_beside_those_that_had_it(
    steps: list[tuple[str, int, int]], manual: bool
) -> None:
    """The graph's own promise about ``place``, found by looking at every byte instead of at the rings."""
    graph = GraphBuilder("g", resolve_rings(RingRequest(ring_heap=4096), environ={}), track_war=not manual)
    tiles: list[list[Tile]] = [[]]
    with contextlib.ExitStack() as scopes:
        opened: list[contextlib.ExitStack] = []
        for what, one, other in steps:
            if what == "open" and len(opened) < 5:
                opened.append(scopes.enter_context(contextlib.ExitStack()))
                opened[-1].enter_context(graph.scope(manual=manual and one > 7))
                tiles.append([])
            elif what == "close" and opened:
                opened.pop().close()
                tiles.pop()
            elif what == "make":
                with contextlib.suppress(HeapRingDeadlock):
                    tiles[-1].append(graph.tensor("uint8", 1 + 300 * one))
            elif what == "use" and (live := [tile for level in tiles for tile in level]):
                graph.submit("k", (Tag.INPUT, live[one % len(live)]), (Tag.OUTPUT, live[other % len(live)]))
        while opened:
            opened.pop().close()
    run = run_of_capture(graph.build())
    assert [race for race in find_races(run) if race.reason is Reason.REUSE] == []


def longest(run: RunGraph, took: list[int]) -> tuple[int, set[tuple[int, ...]]]:
    """Every chain tried."""
    edges = {(edge.before, edge.after) for edge in run.edges}
    best, chains = 0, set()
    for size in range(1, len(took) + 1):
        for chain in itertools.combinations(range(len(took)), size):
            if all(pair in edges for pair in itertools.pairwise(chain)):
                length = sum(took[task] for task in chain)
                if length > best:
                    best, chains = length, set()
                if length == best:
                    chains.add(chain)
    return best, chains


@settings(deadline=None, print_blob=True, max_examples=60)
@given(runs(), st.data())
@pytest.mark.guarantee("D2")
def test_the_critical_path_is_the_longest_chain_and_slack_is_what_fits_beside_it(
    run: RunGraph, data: st.DataObject
) -> None:
    took = data.draw(st.lists(st.integers(0, 9), min_size=len(run.tasks), max_size=len(run.tasks)))
    path = critical_path(run, took)
    length, chains = longest(run, took)
    assert path.length_ns == length
    assert not chains or path.tasks in chains
    for task, slack in enumerate(path.slack_ns):  # a task longer by its slack changes nothing, by one more it does
        assert slack >= 0
        for more, expected in ((slack, length), (slack + 1, length + 1)):
            slower = [*took[:task], took[task] + more, *took[task + 1 :]]
            assert longest(run, slower)[0] == expected
    assert all(path.slack_ns[task] == 0 for task in path.tasks)


@settings(deadline=None, print_blob=True, max_examples=40)
@given(runs(), st.integers(1, 3), st.data())
def test_a_modelled_timeline_keeps_the_edges_and_never_runs_two_tasks_on_one_core(
    run: RunGraph, cores: int, data: st.DataObject
) -> None:
    took = data.draw(st.lists(st.integers(1, 9), min_size=len(run.tasks), max_size=len(run.tasks)))
    done = scheduled(run, took, cores)
    assert done.clock == "modelled"
    assert [task.duration_ns for task in done.tasks] == took
    for edge in done.edges:
        assert done.tasks[edge.before].end_ns <= done.tasks[edge.after].begin_ns
    for one, other in itertools.combinations(done.tasks, 2):
        if one.lane == other.lane:
            assert one.end_ns <= other.begin_ns or other.end_ns <= one.begin_ns
    assert len({task.lane for task in done.tasks}) <= cores
    assert critical_path(done).length_ns <= done.wall_ns <= sum(took)


FULL = RunGraph(
    name="full",
    clock="modelled",
    memory=MEMORY,
    tasks=(
        RunTask(label="a", lane="chip.0", operands=(Operand(Tag.INOUT, 1, 2, (3,), (1,)),), state=TaskState.COMPLETED,
                begin_ns=0, end_ns=5),
        RunTask(label="b", lane="sub.0", state=TaskState.FAILED, ring=2, error="CORE_EXCEPTION (507015): it raised"),
    ),
    edges=(Edge(0, 1, (Reason.RAW, Reason.EXPLICIT)),),
    rings=resolve_rings(RingRequest(ring_heap=[1024, 0, 2048, 0]), environ={}),
    high_water=(RingUse(tasks=2, heap_bytes=1024),) * 4,
    scopes=(ScopeRecord(1, 1, RingMark(0, 0, 0, 0, 0, 0), RingMark(2, 1, 1024, 0, 0, 0)),),
    errors=("CORE_EXCEPTION (507015): it raised",),
)  # fmt: skip


@settings(deadline=None, print_blob=True, max_examples=40)
@given(runs())
@pytest.mark.guarantee("D3")
def test_a_run_written_as_json_is_read_back_equal(run: RunGraph) -> None:
    for one in (run, FULL):
        assert run_graph_from_json(to_json(one)) == one
        assert run_graph_from_json(json.dumps(json.loads(to_json(one)), indent=2).encode()) == one


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where the objects of a document are."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    here = [path] if isinstance(value, dict) else []
    return here + [found for key, part in inner for found in places(part, (*path, key))]


@pytest.mark.parametrize("path", places(json.loads(to_json(FULL))), ids=str)
def test_an_unknown_or_a_missing_field_of_a_run_is_refused_by_its_place(path: tuple[Any, ...]) -> None:
    def at(document: Any) -> dict[str, Any]:
        for key in path:
            document = document[key]
        found: dict[str, Any] = document
        return found

    for name in ("strange", *at(json.loads(to_json(FULL)))):
        document = json.loads(to_json(FULL))
        if name == "strange":
            at(document)[name] = 1
        else:
            del at(document)[name]
        with pytest.raises(ConfigError, match="run graph: .*strange" if name == "strange" else "run graph: "):
            run_graph_from_json(json.dumps(document).encode())


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"{", "truncated"),
        (b"[1]", "expected an object with format 1"),
        (b'{"format": 2}', "expected an object with format 1"),
        (to_json(FULL).replace(b'"inout"', b'"sideways"'), "sideways"),
        (to_json(FULL).replace(b'"before":0', b'"before":1'), "edge 1 -> 1 among 2 tasks"),
        (to_json(FULL).replace(b'"memory":1', b'"memory":7'), "task 0 names memory that is not listed"),
        (to_json(FULL).replace(b'"end_ns":5', b'"end_ns":-5'), "task 0 runs from 0 to -5 ns"),
    ],
)
def test_a_document_that_is_no_run_is_refused_in_words(data: bytes, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        run_graph_from_json(data)


@settings(deadline=None, print_blob=True, max_examples=60)
@given(runs())
@pytest.mark.guarantee("D4")
def test_in_a_trace_slices_of_a_row_never_overlap_and_arrows_join_the_slices_of_their_edge(run: RunGraph) -> None:
    document = json.loads(to_trace_events(run))
    events = document["traceEvents"]
    rows: dict[int, list[dict[str, Any]]] = {}
    slices = {}
    for event in events:
        assert event["ph"] in "MXsf"
        assert event["pid"] == 1
        if event["ph"] == "X":
            rows.setdefault(event["tid"], []).append(event)
            slices[event["args"]["task"]] = event
    timed = {index for index, task in enumerate(run.tasks) if task.begin_ns is not None}
    assert slices.keys() == timed
    for index in timed:
        assert (slices[index]["ts"], slices[index]["dur"]) == pytest.approx(
            (run.tasks[index].begin_ns / 1000, run.tasks[index].duration_ns / 1000)
        )
    for row in rows.values():
        row.sort(key=lambda event: (event["ts"], event["dur"]))
        assert all(one["ts"] + one["dur"] <= other["ts"] + 1e-9 for one, other in itertools.pairwise(row))
    named = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    for index in timed:
        assert named[slices[index]["tid"]].split(" ")[0] == run.tasks[index].lane
    starts = {event["id"]: event for event in events if event["ph"] == "s"}
    ends = {event["id"]: event for event in events if event["ph"] == "f"}
    assert starts.keys() == ends.keys()
    drawn = [edge for edge in run.edges if {edge.before, edge.after} <= timed]
    assert len(starts) == len(drawn)
    for number, start in starts.items():
        edge, end = run.edges[number - 1], ends[number]
        assert (start["cat"], start["name"], end["bp"]) == (end["cat"], end["name"], "e")
        for arrow, task in ((start, edge.before), (end, edge.after)):
            assert arrow["tid"] == slices[task]["tid"]
            assert slices[task]["ts"] <= arrow["ts"] <= slices[task]["ts"] + slices[task]["dur"]


def test_rows_of_a_trace_are_in_natural_order_and_named_after_their_lanes() -> None:
    tasks = [RunTask(label="t", lane=lane, begin_ns=0, end_ns=9) for lane in ("core.10", "core.9", "core.9")]
    events = json.loads(to_trace_events(RunGraph(name="r", tasks=tuple(tasks))))["traceEvents"]
    named = [event["args"]["name"] for event in events if event["name"] == "thread_name"]
    assert named == ["core.9", "core.9 (2)", "core.10"]


def test_runs_in_one_trace_are_processes_with_rows_and_arrows_of_their_own() -> None:
    tasks = tuple(RunTask(label="t", lane=f"core.{core}", begin_ns=9 * core, end_ns=9 * core + 9) for core in (0, 1))
    run = RunGraph(name="first", clock="wall", tasks=tasks, edges=(Edge(0, 1),))
    events = json.loads(to_trace_events(run, attrs.evolve(run, name="second")))["traceEvents"]
    named = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert named == {1: "first (wall clock)", 2: "second (wall clock)"}
    for process in named:
        rows = [(e["tid"], e["ts"]) for e in events if e["ph"] == "X" and e["pid"] == process]
        assert rows == [(1, 0), (2, 0.009)]
    assert [(event["pid"], event["ph"], event["id"]) for event in events if event["ph"] in "sf"] == [
        (1, "s", 1), (1, "f", 1), (2, "s", 2), (2, "f", 2),
    ]  # fmt: skip


def test_a_capture_becomes_a_run_whose_edges_say_why() -> None:
    graph = GraphBuilder("g")
    a, b = graph.bound("a", "int32", 8), graph.intermediate("b", "int32", 8)
    graph.submit("write", (Tag.OUTPUT, b))
    graph.submit("update", (Tag.INOUT, b[2:]))
    graph.submit("read", (Tag.INPUT, b), (Tag.OUTPUT_EXISTING, a))
    run = run_of_capture(graph.build())
    assert [task.label for task in run.tasks] == ["write", "update", "read"]
    assert {(edge.before, edge.after): edge.reasons for edge in run.edges} == {
        (0, 1): (Reason.RAW, Reason.WAW), (0, 2): (Reason.RAW,), (1, 2): (Reason.RAW,),
    }  # fmt: skip
    assert [operand.shape for operand in run.tasks[1].operands] == [(6,)]

    other = attrs.evolve(run, memory=(*run.memory[:1], attrs.evolve(run.memory[1], space="a", begin=28)))
    assert {(edge.before, edge.after): edge.reasons for edge in with_reasons(other).edges}[0, 2] == (
        Reason.RAW, Reason.REUSE,
    )  # fmt: skip
    apart = attrs.evolve(run.tasks[2], operands=(Operand(Tag.OUTPUT_EXISTING, 0, 0, (4,), (1,)),))
    for memory, reason in ((other.memory, Reason.REUSE), (run.memory, Reason.EXPLICIT)):
        changed = attrs.evolve(run, memory=memory, tasks=(*run.tasks[:2], apart))
        assert with_reasons(changed).edges[-1].reasons == (reason,)

    times = np.array([[0, 5], [5, 9], [9, 20]], "<i8").tobytes()
    timed = with_times(run, times)
    assert [(task.begin_ns, task.end_ns, task.state) for task in timed.tasks] == [
        (0, 5, TaskState.COMPLETED), (5, 9, TaskState.COMPLETED), (9, 20, TaskState.COMPLETED),
    ]  # fmt: skip
    assert (timed.wall_ns, timed.clock, run.wall_ns, run.clock) == (20, "wall", 0, "none")
    assert {task.lane for task in timed.tasks} == {"core.0"}
    cores = np.array([1, 0, 11], "<i2").tobytes()
    assert [task.lane for task in with_times(run, times, cores).tasks] == ["core.1", "core.0", "core.11"]
    with pytest.raises(ConfigError, match="has 3 tasks; 32 bytes of times given"):
        with_times(run, times[:32])
    with pytest.raises(ConfigError, match="has 3 tasks; 4 bytes of cores given"):
        with_times(run, times, cores[:4])


def test_launches_one_after_another_are_one_run() -> None:
    graph = GraphBuilder("g")
    a = graph.bound("a", "int32", 8)
    for _ in range(2):
        graph.submit("update", (Tag.INOUT, a))
    described = to_json(run_of_capture(graph.build())).decode()
    times, cores = np.array([[1, 5], [5, 7]], "<i8").tobytes(), np.array([0, 1], "<i2").tobytes()
    first = Completion(dispatch_id=1, task_times=times, task_cores=cores, graph="g")
    launches = [(100, first), (150, Completion(dispatch_id=2)), (200, first)]
    run = run_of_launches("step", launches, lambda _: described)
    assert (run.name, run.clock) == ("step", "wall")
    assert [(task.lane, task.begin_ns, task.end_ns) for task in run.tasks] == [
        ("core.0", 101, 105), ("core.1", 105, 107), ("core.0", 201, 205), ("core.1", 205, 207),
    ]  # fmt: skip
    assert [(edge.before, edge.after) for edge in run.edges] == [(0, 1), (2, 3)]
    with pytest.raises(ConfigError, match="step: no launch has a timeline"):
        run_of_launches("step", launches[1:2], lambda _: described)


PROGRAM = Program(
    "p",
    "k",
    (),
    (
        Param("x", "float32", ("N",)),
        Param("half/way", "bfloat16", (2,), Direction.INOUT),
        Param("kept", "int32", (4,), resident=True),
        Param("out", "float32", ("N",), Direction.OUT),
    ),
)
X = np.arange(3, dtype=np.float32)
HALVES = Arg(dtype="bfloat16", shape=(2,), data=np.array([0x3F80, 0x4000], "<u2").tobytes())
ARGS = (Arg.of(X), HALVES, Arg(resident=5), Arg.out("float32", (3,)))


@pytest.mark.guarantee("D5")
def test_each_dump_level_writes_what_it_says_and_no_more(tmp_path: Path) -> None:
    assert dump_arguments(tmp_path / "none", PROGRAM, ARGS, level="none") == ()
    assert not (tmp_path / "none").exists()

    entries = dump_arguments(tmp_path / "shapes", PROGRAM, ARGS, level="shapes")
    assert [path.name for path in (tmp_path / "shapes").iterdir()] == ["index.json"]
    assert [(entry.name, entry.direction, entry.shape, entry.resident) for entry in entries] == [
        ("x", "in", (3,), 0), ("half/way", "inout", (2,), 0), ("kept", "in", (4,), 5), ("out", "out", (3,), 0),
    ]  # fmt: skip
    assert not any(entry.digest or entry.file or entry.left_out for entry in entries)

    digests = dump_arguments(tmp_path / "digests", PROGRAM, ARGS, level="digests")
    assert [path.name for path in (tmp_path / "digests").iterdir()] == ["index.json"]
    assert [len(entry.digest) for entry in digests] == [32, 32, 0, 0]
    assert [entry.left_out for entry in digests[2:]] == [
        "resident 5: its content was not read", "an output that is not there yet",
    ]  # fmt: skip

    kept = {5: Arg.of(np.arange(4, dtype=np.int32))}
    values = dump_arguments(tmp_path / "values", PROGRAM, ARGS, level="values", residents=kept)
    assert [entry.file for entry in values] == ["00_x.npy", "01_half_way.npy", "02_kept.npy", ""]
    assert np.array_equal(np.load(tmp_path / "values" / "00_x.npy"), X)
    assert np.load(tmp_path / "values" / "01_half_way.npy").tolist() == [1.0, 2.0]
    assert np.load(tmp_path / "values" / "02_kept.npy").tolist() == [0, 1, 2, 3]
    assert [entry.digest for entry in values[:2]] == [entry.digest for entry in digests[:2]]

    after = (attrs.evolve(HALVES, data=HALVES.data[::-1]), Arg.of(2 * X))
    done = dump_arguments(tmp_path / "after", PROGRAM, ARGS, level="values", outputs=after, residents=kept)
    assert [entry.file for entry in done] == ["00_x.npy", "01_half_way.npy", "02_kept.npy", "03_out.npy"]
    assert np.array_equal(np.load(tmp_path / "after" / "03_out.npy"), 2 * X)
    assert [one.digest == other.digest for one, other in zip(values, done, strict=True)] == [True, False, True, False]

    index = json.loads((tmp_path / "values" / "index.json").read_text())
    assert (index["format"], index["program"], index["level"]) == (1, "p", "values")
    assert index["digest"] == PROGRAM.digest.hex()
    assert index["arguments"] == json.loads(msgspec.json.encode([attrs.asdict(entry) for entry in values]))


def test_a_dump_stays_within_its_bytes_and_says_what_it_left_out(tmp_path: Path) -> None:
    big = Arg.of(np.zeros(1000, np.float32))
    small = Arg.of(np.zeros(2, np.float32))
    program = Program("p", "k", (), tuple(Param(name, "float32", ("N",)) for name in "abc"))
    entries = dump_arguments(tmp_path, program, (small, big, small), level="values", max_bytes=20)
    assert [entry.file for entry in entries] == ["00_a.npy", "", "02_c.npy"]
    assert entries[1].left_out == "4000 bytes; 12 of 20 are left"
    assert entries[1].digest
