"""The task graph engine, rule by rule: hazards, states, groups, failures, scopes, rings and their errors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from chipbus.errors import (
    DepPoolOverflow,
    FlowControlDeadlock,
    HeapRingDeadlock,
    InvalidArgs,
    NumberedError,
    ScopeDeadlock,
    TaskAborted,
    TensorMapOverflow,
)
from chipbus.kernels.engine import INLINE_FAN_IN, MAX_SCOPE_DEPTH, Access, HeapBlock, RingFull, TaskEngine, TaskState
from chipbus.kernels.tags import Tag
from chipbus.topology import RingSizes, suggest_rings


def engine(*, window: int = 64, heap: int = 8192, pool: int = 64, **options: Any) -> TaskEngine:
    return TaskEngine(RingSizes(task_window=(window,) * 4, heap=(heap,) * 4, dep_pool=(pool,) * 4), **options)


def use(tag: Tag, space: object = "x", begin: int = 0, end: int = 8) -> Access:
    return Access(tag, space, ((begin, end),))


def write(space: object = "x", begin: int = 0, end: int = 8) -> list[Access]:
    return [use(Tag.OUTPUT, space, begin, end)]


def read(space: object = "x", begin: int = 0, end: int = 8) -> list[Access]:
    return [use(Tag.INPUT, space, begin, end)]


def run(graph: TaskEngine, *tasks: int) -> None:
    for task in tasks:
        graph.start(task)
        graph.complete(task)


def run_all(graph: TaskEngine) -> None:
    while ready := graph.take_ready():
        run(graph, *ready)


# Tags and hazards


@pytest.mark.guarantee("G7")
def test_each_tag_asks_and_tells_the_tensor_map_as_the_table_says() -> None:
    table = {  # tag: (waits for the producer, becomes the producer)
        Tag.INPUT: (True, False),
        Tag.OUTPUT: (False, True),
        Tag.INOUT: (True, True),
        Tag.OUTPUT_EXISTING: (False, True),
        Tag.NO_DEP: (False, False),
    }
    for tag, (waits, produces) in table.items():
        graph = engine()
        producer = graph.submit(write())
        task = graph.submit([use(tag)])
        reader = graph.submit(read())
        assert graph.predecessors(task) == ((producer,) if waits else ())
        assert graph.predecessors(reader) == ((task,) if produces else (producer,))


def test_read_after_write_is_by_byte_range_and_by_space() -> None:
    graph = engine()
    first, second = graph.submit(write("x", 0, 8)), graph.submit(write("x", 8, 16))
    assert graph.predecessors(graph.submit(read("x", 0, 8))) == (first,)
    assert graph.predecessors(graph.submit(read("x", 7, 9))) == (first, second)
    assert graph.predecessors(graph.submit(read("x", 16, 20))) == ()
    assert graph.predecessors(graph.submit(read("x", 8, 8))) == ()
    assert graph.predecessors(graph.submit(read("y", 0, 8))) == ()
    strided = Access(Tag.INPUT, "x", ((2, 4), (10, 12)))
    assert graph.predecessors(graph.submit([strided])) == (first, second)


def test_an_existing_output_replaces_its_producer_for_good() -> None:
    graph = engine()
    graph.open_scope()
    older = graph.submit(write())
    younger = graph.submit([use(Tag.OUTPUT_EXISTING)])
    graph.close_scope()
    run(graph, younger, older)  # the older one ends last and is consumed: the entry is not its own any more
    assert graph.state(older) is TaskState.FREE
    assert graph.predecessors(graph.submit(read())) == (younger,)


@pytest.mark.guarantee("G8")
def test_write_after_read_makes_edges_only_on_request() -> None:
    for tag in (Tag.OUTPUT, Tag.OUTPUT_EXISTING, Tag.INOUT):
        for track_war in (False, True):
            graph = engine(track_war=track_war)
            readers = [graph.submit(read(begin=0, end=4)), graph.submit(read(begin=2, end=8))]
            writer = graph.submit([use(tag, begin=3)])
            assert set(graph.predecessors(writer)) == (set(readers) if track_war else set())
            again = graph.submit([use(tag, begin=3)])
            behind = {writer} if tag is Tag.INOUT else set(readers) if track_war else set()
            assert set(graph.predecessors(again)) == behind
            untouched = graph.submit([use(Tag.OUTPUT, begin=0, end=2)])
            assert graph.predecessors(untouched) == ((readers[0],) if track_war else ())


def test_who_reads_and_writes_is_a_reader_too() -> None:
    graph = engine(track_war=True)
    update = graph.submit([use(Tag.INOUT)])
    assert graph.predecessors(graph.submit([use(Tag.OUTPUT_EXISTING)])) == (update,)


def test_two_runs_never_see_each_other() -> None:
    engine().submit(write())
    assert engine().predecessors(engine().submit(read())) == ()


def test_explicit_dependencies_join_those_of_tags_each_once() -> None:
    graph = engine()
    first, second = graph.submit(write("a")), graph.submit([])
    task = graph.submit([*read("a"), *read("a")], after=[second, first, second])
    assert graph.predecessors(task) == (second, first)
    assert graph.successors(first) == (task,)
    for unknown in (first + 99, (1 << 32), -1, 5 << 32):
        with pytest.raises(InvalidArgs, match=f"after task {unknown}"):
            graph.submit([], after=[unknown])


# States


@pytest.mark.guarantee("G9")
def test_a_task_goes_through_its_states_in_order() -> None:
    graph = engine()
    seen: dict[str, list[TaskState]] = {"producer": [], "task": []}
    graph.open_scope()
    producer = graph.submit(write())
    task = (1 << 32) | 1

    def look() -> None:
        seen["producer"].append(graph.state(producer))
        seen["task"].append(graph.state(task))

    look()
    assert graph.submit(read()) == task
    look()
    graph.start(producer)
    look()
    graph.complete(producer)
    look()
    graph.start(task)
    look()
    graph.complete(task)
    look()
    graph.close_scope()
    look()
    S = TaskState  # noqa: N806
    assert seen["producer"] == [S.READY, S.READY, S.RUNNING, S.COMPLETED, S.COMPLETED, S.COMPLETED, S.FREE]
    assert seen["task"] == [S.FREE, S.PENDING, S.PENDING, S.READY, S.RUNNING, S.COMPLETED, S.FREE]
    assert {state.name for state in TaskState} == {
        "FREE", "BUILDING", "PENDING", "READY", "RUNNING", "COMPLETED", "FAILED", "CONSUMED",
    }  # fmt: skip


def test_a_task_is_consumed_when_its_scope_and_all_its_successors_have_let_go_and_free_in_order() -> None:
    graph = engine()
    graph.open_scope()
    head, tail = graph.submit(write("a")), graph.submit(write("b"))
    graph.close_scope()
    reader = graph.submit(read("b"))
    run(graph, tail)
    assert graph.state(tail) is TaskState.COMPLETED  # its reader has not ended
    run(graph, reader)
    assert graph.state(tail) is TaskState.CONSUMED  # but the older one still holds the ring
    run(graph, head)
    assert (graph.state(head), graph.state(tail)) == (TaskState.FREE, TaskState.FREE)
    assert graph.consumed == 2


def test_a_task_is_seen_only_when_all_its_edges_exist() -> None:
    graph = engine()
    producers = [graph.submit(write(number)) for number in range(2)]
    graph.take_ready()
    task = 2

    def accesses() -> Iterator[Access]:
        yield use(Tag.INPUT, 0)
        assert graph.state(task) is TaskState.FREE
        run(graph, *producers)  # both end while the task is being wired
        assert graph.take_ready() == []
        yield use(Tag.INPUT, 1)
        assert graph.state(task) is TaskState.FREE

    assert graph.submit(accesses()) == task
    assert graph.take_ready() == [task]
    assert graph.predecessors(task) == tuple(producers)


def test_a_refused_submit_changes_nothing() -> None:
    graph = engine(max_map_entries=1)
    graph.submit(write("x"))
    block = graph.alloc(100)
    before = (graph.occupancy(), graph.submitted, graph.take_ready())
    with pytest.raises(TensorMapOverflow):
        graph.submit([use(Tag.INOUT, "x"), use(Tag.OUTPUT, block)])
    with pytest.raises(InvalidArgs):
        graph.submit([use(Tag.OUTPUT, "x")], members=0)
    assert (graph.occupancy(), graph.submitted, graph.take_ready()) == (*before[:2], [])
    assert graph.predecessors(graph.submit(read("x"))) == (0,)


def test_ready_tasks_come_first_come_first() -> None:
    graph = engine()
    first = graph.submit(write())
    second, third, other = graph.submit(read()), graph.submit(read()), graph.submit([])
    assert graph.take_ready() == [first, other]
    assert graph.take_ready() == []
    run(graph, first)
    assert graph.take_ready() == [second, third]


def test_a_task_cannot_skip_a_state() -> None:
    graph = engine()
    first, second = graph.submit(write()), graph.submit(read())
    with pytest.raises(AssertionError, match="completed, but it is ready"):
        graph.complete(first)
    with pytest.raises(AssertionError, match="started, but it is pending"):
        graph.start(second)
    run(graph, first)
    with pytest.raises(AssertionError, match="fails, but it is completed"):
        graph.fail(first, ValueError())


def test_task_ids_hold_the_ring_and_the_number_on_it() -> None:
    graph = engine()
    ids = [graph.submit([])]
    for _ in range(5):
        graph.open_scope()
        ids.append(graph.submit([]))
    assert [task >> 32 for task in ids] == [0, 1, 2, 3, 3, 3]
    assert [task & 0xFFFF_FFFF for task in ids] == [0, 0, 0, 0, 1, 2]


# Groups


def test_a_group_is_one_task_that_ends_when_all_members_have() -> None:
    graph = engine()
    group = graph.submit(write(), members=3)
    reader = graph.submit(read())
    assert graph.take_ready() == [group]
    graph.start(group)
    for member in (2, 0):
        graph.complete(group, member)
        assert graph.state(group) is TaskState.RUNNING
    with pytest.raises(KeyError):
        graph.complete(group, 2)
    graph.complete(group, 1)
    assert graph.take_ready() == [reader]
    assert graph.submitted == 2


@pytest.mark.guarantee("G10")
def test_a_group_fails_with_the_first_member_that_failed_after_the_others_have_ended() -> None:
    graph = engine()
    group = graph.submit(write(), members=4)
    reader = graph.submit(read())
    graph.start(group)
    graph.complete(group, 3)
    first = ValueError("first")
    graph.fail(group, first, 1)
    graph.fail(group, ValueError("second"), 0)
    assert graph.state(group) is TaskState.RUNNING
    assert graph.take_failed() == []
    graph.complete(group, 2)
    assert graph.state(group) is TaskState.FAILED
    assert graph.error(group) is first
    assert graph.first_error is first
    assert graph.take_failed() == [reader]


# Failures


@pytest.mark.guarantee("G11")
def test_what_depends_on_a_failed_task_never_runs_and_names_the_first_cause() -> None:
    graph = engine()
    bad, good = graph.submit(write("a"), label="bad"), graph.submit(write("b"))
    direct = graph.submit([*read("a"), *read("b"), *write("c")], label="direct")
    indirect, fine = graph.submit(read("c")), graph.submit(read("b"))
    graph.take_ready()
    graph.start(bad)
    error = ValueError("broken on purpose")
    graph.fail(bad, error)
    assert graph.take_failed() == [direct, indirect]
    later = graph.submit(read("c"), label="later")  # its producer has failed before it exists
    assert graph.take_failed() == [later]
    run(graph, good)
    assert graph.take_ready() == [fine]
    for task in (direct, indirect, later):
        aborted = graph.error(task)
        assert graph.state(task) is TaskState.FAILED
        assert isinstance(aborted, TaskAborted)
        assert aborted.code == 107022
        assert aborted.first_cause == "broken on purpose"
    assert "'direct' was not run" in str(graph.error(direct))
    assert graph.error(bad) is graph.first_error is error
    run(graph, fine)
    graph.finish()
    assert graph.is_drained
    assert (graph.submitted, graph.completed, graph.failed, graph.consumed) == (6, 2, 4, 6)


def test_a_failure_is_remembered_when_its_slot_is_not() -> None:
    graph = engine()
    graph.open_scope()
    bad = graph.submit(write())
    graph.close_scope()
    graph.start(*graph.take_ready())
    graph.fail(bad, ValueError("gone"))
    assert graph.state(bad) is TaskState.FREE
    by_data, by_name, other = graph.submit(read()), graph.submit([], after=[bad]), graph.submit([])
    assert graph.take_failed() == [by_data, by_name]
    assert graph.take_ready() == [other]
    graph.submit(write())  # overwritten without looking: from here on the data is good
    assert graph.state(graph.submit(read())) is TaskState.PENDING


@pytest.mark.guarantee("G12")
def test_the_first_error_wins_and_later_ones_are_kept_in_order_up_to_a_bound() -> None:
    graph = engine(window=1024)
    errors = [ValueError(str(number)) for number in range(200)]
    for error in errors:
        task = graph.submit([])
        graph.start(task)
        graph.fail(task, error)
    assert graph.first_error is errors[0]
    assert graph.errors == errors[:64]
    assert graph.failed == 200


def test_the_next_run_is_not_touched_by_a_failed_one() -> None:
    failed = engine()
    task = failed.submit(write())
    failed.fail(task, ValueError())
    graph = engine()
    graph.submit(write())
    graph.submit(read())
    run_all(graph)
    assert (graph.completed, graph.failed, graph.first_error) == (2, 0, None)


def test_a_task_that_has_not_started_can_fail_as_a_whole() -> None:
    graph = engine()
    ready, group = graph.submit(write("a")), graph.submit(write("b"), members=3)
    pending = graph.submit(read("a"))
    for task in (pending, ready, group):
        graph.fail(task, ValueError(str(task)))
        assert graph.state(task) is TaskState.FAILED
    assert graph.take_ready() == []
    assert graph.take_failed() == []
    graph.finish()
    assert graph.is_drained


def test_a_task_two_failures_reach_fails_once() -> None:
    graph = engine()
    producers = [graph.submit(write(number)) for number in range(2)]
    task = graph.submit([*read(0), *read(1)])
    for number, producer in enumerate(producers):
        graph.start(producer)
        graph.fail(producer, ValueError(f"producer {number}"))
    assert graph.take_failed() == [task]
    assert "producer 0" in str(graph.error(task))
    assert graph.failed == 3


# Scopes


@pytest.mark.guarantee("G13")
def test_memory_is_free_when_its_scope_has_ended_and_its_users_have() -> None:
    graph = engine(heap=2048)
    graph.open_scope()
    block = graph.alloc(2048)
    task = graph.submit([use(Tag.NO_DEP, block)])
    assert graph.occupancy()[1].heap_bytes == 2048
    graph.close_scope()
    graph.open_scope()
    with pytest.raises(RingFull) as full:
        graph.alloc(1)
    assert (full.value.ring, full.value.resource, full.value.parameter) == (1, "heap", "ring_heap")
    assert (full.value.occupancy, full.value.capacity) == (2048, 2048)
    run(graph, task)
    again = graph.alloc(1)
    assert (again.ring, again.offset) == (1, 0)
    assert again != block


def test_memory_is_not_freed_at_its_last_use_but_at_the_end_of_its_scope() -> None:
    graph = engine(heap=1024)
    graph.open_scope()
    run(graph, graph.submit(write(graph.alloc(1024))))
    with pytest.raises(HeapRingDeadlock):
        graph.alloc(1)
    graph.close_scope()
    graph.open_scope()
    assert graph.alloc(1).offset == 0


def test_one_long_lived_block_holds_everything_behind_it() -> None:
    graph = engine(heap=2048)
    for _ in range(3):
        graph.open_scope()
    keeper = graph.submit(write(graph.alloc(1024)))
    graph.open_scope()
    graph.alloc(1024)
    graph.close_scope()
    graph.close_scope()
    graph.open_scope()
    with pytest.raises(RingFull):
        graph.alloc(1024)  # the block of the inner scope is needed by nobody, but younger
    run(graph, keeper)
    graph.alloc(1024)


def test_memory_of_a_scope_that_has_ended_cannot_be_used() -> None:
    graph = engine()
    graph.open_scope()
    block = graph.alloc(8)
    graph.close_scope()
    for tag in Tag:
        with pytest.raises(InvalidArgs, match="whose scope has ended"):
            graph.submit([use(tag, block)], label="late")


def test_who_gets_memory_again_is_no_reader_of_what_was_there() -> None:
    graph = engine(heap=1024, max_map_entries=3)
    for _ in range(5):
        graph.open_scope()
        block = graph.alloc(1024)
        task = graph.submit([use(Tag.INOUT, block)])
        assert graph.predecessors(task) == ()
        graph.close_scope()
        run(graph, task)
    assert graph.occupancy()[1].heap_bytes == 0


def test_in_a_manual_scope_only_named_tasks_are_waited_for_and_the_tensor_map_learns_nothing() -> None:
    graph = engine()
    outside = graph.submit(write())
    graph.open_scope(manual=True)
    first = graph.submit([use(Tag.INOUT)])
    second = graph.submit([use(Tag.INOUT)], after=[first])
    graph.open_scope()
    assert graph.predecessors(graph.submit(read())) == (outside,)
    graph.close_scope()
    graph.close_scope()
    assert graph.predecessors(first) == ()
    assert graph.predecessors(second) == (first,)
    assert graph.predecessors(graph.submit(read())) == (outside,)


def test_scopes_nest_64_deep_on_the_ring_of_their_depth_and_the_last() -> None:
    graph = engine()
    rings = [graph.alloc(1).ring]
    for _ in range(MAX_SCOPE_DEPTH):
        graph.open_scope()
        if len(rings) < 6:
            rings.append(graph.alloc(1).ring)
    assert rings == [0, 1, 2, 3, 3, 3]
    with pytest.raises(InvalidArgs, match="depth 65"):
        graph.open_scope()
    for _ in range(MAX_SCOPE_DEPTH):
        graph.close_scope()
    with pytest.raises(InvalidArgs, match="close_scope without open_scope"):
        graph.close_scope()


def test_finish_closes_all_scopes_and_ends_submission() -> None:
    graph = engine()
    graph.open_scope()
    task = graph.submit([])
    graph.finish()
    graph.finish()
    assert not graph.is_drained
    for late in (lambda: graph.submit([]), lambda: graph.alloc(1), graph.open_scope):
        with pytest.raises(InvalidArgs, match="finish was called"):
            late()
    run(graph, task)
    assert graph.is_drained


def test_each_scope_leaves_a_record_also_when_the_run_fails() -> None:
    graph = engine()
    kept = graph.submit([])
    graph.open_scope()
    graph.alloc(1000)
    for _ in range(3):
        graph.submit([])
    graph.open_scope()
    graph.close_scope()
    graph.close_scope()
    graph.fail(kept, ValueError())
    graph.finish()
    run_all(graph)
    outer, scope, inner = graph.scopes
    assert [(record.depth, record.ring) for record in graph.scopes] == [(0, 0), (1, 1), (2, 2)]
    assert (scope.high_water(), scope.live_at_exit(), scope.allocated()) == ((3, 1024, 0), (3, 0, 0), (3, 1024, 0))
    assert outer.allocated() == (1, 0, 0)
    assert inner.allocated() == (0, 0, 0)


# Rings: full, stuck, and what the difference is


def provoke_1() -> TaskEngine:
    graph = engine(window=4)
    graph.open_scope()
    for _ in range(8):
        graph.submit([])
    return graph


def provoke_2() -> TaskEngine:
    graph = engine(heap=1024)
    graph.alloc(32 << 10)
    return graph


def provoke_3() -> TaskEngine:
    graph = engine(window=4)
    for _ in range(8):
        graph.open_scope()
        for _ in range(3):
            graph.submit([])
    return graph


def provoke_4() -> TaskEngine:
    graph = engine(window=256, pool=4)
    for number in range(128):
        graph.submit(write(number))
    graph.submit([use(Tag.INPUT, number) for number in range(128)], label="all of them")
    return graph


def provoke_11() -> TaskEngine:
    graph = engine(window=256, max_map_entries=100)
    for number in range(101):
        graph.submit(write(number))
    return graph


@pytest.mark.parametrize(
    ("provoke", "error", "code", "parts"),
    [
        (provoke_1, ScopeDeadlock, 1, ["ring 1", "task window", "3 of 3", "ring_task_window"]),
        (provoke_2, HeapRingDeadlock, 2, ["ring 0", "heap", "0 of 1,024", "32,768", "ring_heap"]),
        (provoke_3, FlowControlDeadlock, 3, ["ring 3", "task window", "3 of 3", "ring_task_window", "depth 3"]),
        (provoke_4, DepPoolOverflow, 4, ["ring 0", "dependency pool", "0 of 4", "128", "64", "ring_dep_pool"]),
        (provoke_11, TensorMapOverflow, 11, ["tensor map", "100 of 100", "101"]),
    ],
)
@pytest.mark.guarantee("G14")
def test_the_smallest_way_to_provoke_each_error_gets_its_number_at_once_with_ring_occupancy_capacity_and_parameter(
    provoke: Any, error: type[NumberedError], code: int, parts: list[str]
) -> None:
    with pytest.raises(error) as caught:
        provoke()
    assert caught.value.code == code
    for part in parts:
        assert part in caught.value.detail


@pytest.mark.guarantee("G15")
def test_a_full_ring_that_running_tasks_will_free_is_back_pressure_and_no_error() -> None:
    graph = engine(window=4)
    graph.open_scope()
    tasks = [graph.submit([]) for _ in range(3)]
    graph.close_scope()
    graph.open_scope()
    for task in tasks:
        for _ in range(2):
            with pytest.raises(RingFull) as full:
                graph.submit([])
            assert (full.value.ring, full.value.resource) == (1, "task window")
            assert (full.value.occupancy, full.value.capacity) == (3, 3)
        run(graph, task)
        graph.submit([])
    with pytest.raises(ScopeDeadlock):
        graph.submit([])


def test_a_window_holds_one_task_less_than_its_size_and_no_more_however_often_it_has_turned() -> None:
    graph = engine(window=4)
    for _ in range(10):
        graph.open_scope()
        tasks = [graph.submit([]) for _ in range(3)]
        with pytest.raises(ScopeDeadlock):
            graph.submit([])
        assert graph.occupancy()[1].tasks == 3
        graph.close_scope()
        run(graph, *tasks)
        assert graph.occupancy()[1].tasks == 0


def test_a_heap_whose_space_an_enclosing_scope_holds_is_stuck_and_says_how_much() -> None:
    graph = engine(heap=4096)
    for _ in range(3):
        graph.open_scope()
    graph.alloc(2048)
    graph.open_scope()
    block = graph.alloc(2048)
    task = graph.submit([use(Tag.OUTPUT, block)])
    with pytest.raises(HeapRingDeadlock, match=r"ring 3.*4,096 of 4,096 bytes, 4,096 of them.*1,024"):
        graph.alloc(1024)
    graph.close_scope()
    graph.open_scope()
    with pytest.raises(HeapRingDeadlock):
        graph.alloc(1024)  # the block of depth 3 is older and stays
    run(graph, task)


def test_a_dependency_pool_that_will_be_free_is_waited_for() -> None:
    graph = engine(window=256, pool=4)
    sources = [graph.submit(write(number)) for number in range(INLINE_FAN_IN + 4)]
    everything = [use(Tag.INPUT, number) for number in range(INLINE_FAN_IN + 4)]
    graph.open_scope()
    inline = graph.submit(everything[:INLINE_FAN_IN])
    consumer = graph.submit(everything)
    assert graph.occupancy()[1].dep_entries == 4
    graph.submit(everything[:INLINE_FAN_IN])
    graph.close_scope()
    graph.open_scope()
    with pytest.raises(RingFull) as full:
        graph.submit(everything)
    assert (full.value.resource, full.value.occupancy, full.value.capacity) == ("dependency pool", 4, 4)
    assert full.value.parameter == "ring_dep_pool"
    run(graph, *sources, inline, consumer)
    assert graph.occupancy()[1].dep_entries == 0
    graph.submit(everything)
    with pytest.raises(DepPoolOverflow, match="4 of 4 entries, 4 of them"):
        graph.submit(everything)


def test_rings_are_apart() -> None:
    graph = engine(window=4, heap=1024)
    for _ in range(3):
        graph.submit([])
    graph.alloc(1024)
    graph.open_scope()
    for _ in range(3):
        graph.submit([])
    assert graph.alloc(1024).ring == 1


@pytest.mark.guarantee("G16")
def test_a_run_fits_in_the_sizes_suggested_from_its_high_water() -> None:
    def program(graph: TaskEngine) -> None:
        waiting: list[int] = []

        def patiently(action: Any) -> Any:
            while True:
                try:
                    return action()
                except RingFull:
                    run(graph, waiting.pop(0))

        for turn in range(6):
            graph.open_scope()
            blocks = [patiently(lambda size=size: graph.alloc(size)) for size in (3000, 1024 * (turn % 3), 700)]
            for block in blocks:
                waiting += [patiently(lambda block=block: graph.submit([use(Tag.INOUT, block)]))]
            graph.close_scope()
        graph.finish()
        run(graph, *waiting)
        assert graph.is_drained

    roomy = engine(heap=1 << 20)
    program(roomy)
    suggested = suggest_rings(roomy.high_water())
    use_1 = roomy.high_water()[1]
    assert (use_1.tasks, use_1.heap_largest, use_1.heap_bytes) == (18, 3072, use_1.heap_allocated)
    assert (suggested.ring_task_window, suggested.ring_dep_pool) == ((4, 32, 4, 4), (4, 4, 4, 4))
    assert suggested.ring_heap[1] == 1 << (use_1.heap_bytes - 1).bit_length()  # type: ignore[index]
    tight = TaskEngine(
        RingSizes(task_window=suggested.ring_task_window, heap=suggested.ring_heap, dep_pool=suggested.ring_dep_pool)  # type: ignore[arg-type]
    )
    program(tight)
    tighter = TaskEngine(RingSizes(task_window=(4, 4, 4, 4), heap=(1024, 8192, 1024, 1024), dep_pool=(4,) * 4))
    program(tighter)
    use_1 = tighter.high_water()[1]
    assert (use_1.tasks, use_1.heap_bytes <= 8192) == (3, True)


def test_blocks_are_equal_to_themselves_alone() -> None:
    graph = engine(heap=1024)
    graph.open_scope()
    first = graph.alloc(10)
    graph.close_scope()
    graph.open_scope()
    second = graph.alloc(10)
    assert (first.ring, first.offset, first.nbytes) == (second.ring, second.offset, second.nbytes)
    assert first != second
    assert isinstance(first, HeapBlock)
    with pytest.raises(InvalidArgs, match="-1 bytes"):
        graph.alloc(-1)
