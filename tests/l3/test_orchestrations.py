"""Orchestrations, in one process on the virtual clock: groups, host callables, scopes, deferred tensors, waiting."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from l3_local import ADD, BOOM, BUMP, FILL, MIX, LocalWorker, Plan, vector

from chipbus.actors.l3 import RunConfig, orchestration
from chipbus.errors import (
    CoreException,
    DepPoolOverflow,
    ExplicitFatal,
    FlowControlDeadlock,
    HeapRingDeadlock,
    InvalidArgs,
    KernelError,
    NumberedError,
    SchedulerTimeout,
    ScopeDeadlock,
    TaskAborted,
    TensorWaitTimeout,
    WorkerLost,
)
from chipbus.kernels.engine import TaskState
from chipbus.kernels.tags import Tag
from chipbus.topology.rings import RingRequest


def small(**sizes: int) -> RunConfig:
    return RunConfig(rings=RingRequest(**sizes))


# Groups.


def test_a_group_runs_on_all_its_chips_as_one_task() -> None:
    worker = LocalWorker(chips=3)
    arrays = [vector(n) for n in range(3)]
    total = vector(0)

    def grouped(orch: Any) -> None:
        orch.submit_group(BUMP, [[array] for array in arrays], workers=[2, 0, 1])
        orch.submit_next_level(ADD, arrays[0], arrays[2], total, worker=1)

    handle = worker.submit(grouped)
    handle.result()

    assert [array.tolist() for array in arrays] == [[1], [2], [3]]
    assert total.tolist() == [4]
    assert [task.lane for task in handle.graph().tasks] == ["chip.2+chip.0+chip.1", "chip.1"]
    worker.check_nothing_leaks()


def test_a_stacked_tensor_gives_each_member_its_shard() -> None:
    worker = LocalWorker(chips=2)
    stacked = worker.alloc_stacked_tensor(np.array([[1, 2], [3, 4]], np.float32), [1, 0])

    worker.run(lambda orch: orch.submit_group(BUMP, [[stacked], [stacked]], workers=[0, 1]))

    assert stacked.worker_ids == (1, 0)
    assert worker.copy_stacked_from(stacked).tolist() == [[2, 3], [4, 5]]
    worker.free_stacked_tensor(stacked)
    assert worker.book.live() == []


@pytest.mark.guarantee("W10")
@pytest.mark.parametrize("seed", range(5))
def test_a_group_starts_on_all_chips_or_on_none_and_its_chips_take_nothing_else_before(seed: int) -> None:
    worker = LocalWorker(chips=2, seed=seed)
    x, y = worker.alloc_tensor((1,), "float32"), worker.alloc_tensor((1,), "float32", worker_id=1)
    for name in worker.commands:
        worker.commands[name].clear()

    def busy(orch: Any) -> None:
        for _ in range(6):  # chip 0 has more than it may take at once
            orch.submit_next_level(BUMP, x, worker=0, after=())
            orch.flush()
        orch.submit_group(BUMP, [[x], [y]], workers=[0, 1])
        orch.flush()
        for _ in range(3):
            orch.submit_next_level(FILL, vector(0), 1.0, worker=1)
            orch.flush()

    worker.run(busy)

    assert worker.copy_from(x).tolist() == [7]
    assert worker.copy_from(y).tolist() == [1]
    worker.check_nothing_leaks()


def test_the_first_member_that_fails_is_the_groups_error_and_the_others_end() -> None:
    worker = LocalWorker(chips=3)
    arrays = [vector(0) for _ in range(3)]
    worker.plans["chip.1"] = Plan("fail", "launch")

    def grouped(orch: Any) -> None:
        orch.submit_group(BUMP, [[array] for array in arrays], workers=[0, 1, 2])
        orch.submit_next_level(BUMP, arrays[0], worker=0)

    handle = worker.submit(grouped)
    with pytest.raises(CoreException, match="on worker 1"):
        handle.result()

    assert [type(error) for error in handle.errors] == [CoreException, TaskAborted]
    assert [array.tolist() for array in arrays] == [[1], [0], [1]]
    worker.check_nothing_leaks()


# Host callables.


def test_host_callables_take_their_turn_between_chip_programs() -> None:
    def double(x: np.ndarray, by: float) -> None:
        x *= by

    worker = LocalWorker(subs={"double": double})
    x = vector(1)

    def mixed(orch: Any) -> None:
        orch.submit_next_level(BUMP, x, worker=0)
        orch.submit_sub("double", x, 10.0)
        orch.submit_next_level(BUMP, x, worker=0)
        orch.submit_sub(double, x, 2.0)

    worker.run(mixed)

    assert x.tolist() == [42]
    worker.check_nothing_leaks()


def test_a_group_of_host_callables_runs_once_per_list_of_arguments() -> None:
    seen: list[int] = []
    worker = LocalWorker(sub_workers=2)

    worker.run(lambda orch: orch.submit_sub_group(seen.append, [[1], [2], [3]]))

    assert sorted(seen) == [1, 2, 3]
    worker.check_nothing_leaks()


def test_a_host_callable_that_raises_fails_what_depends_on_it() -> None:
    def wrong(_: object) -> None:
        raise ZeroDivisionError("by zero")

    worker = LocalWorker()
    x = vector(1)

    def mixed(orch: Any) -> None:
        orch.submit_sub(wrong, x)
        orch.submit_next_level(BUMP, x, worker=0)

    handle = worker.submit(mixed)
    with pytest.raises(CoreException, match=r"task 0 \(wrong\) on a sub worker: ZeroDivisionError: by zero") as caught:
        handle.result()

    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert x.tolist() == [1]
    worker.check_nothing_leaks()


def test_a_host_callable_that_hangs_ends_at_its_deadline_and_gives_its_place_up() -> None:
    worker = LocalWorker()

    with pytest.raises(SchedulerTimeout, match="the host callable did not end within 10 s"):
        worker.run(lambda orch: orch.submit_sub(lambda: 1e6))

    worker.run(lambda orch: orch.submit_sub(lambda: None))
    worker.check_nothing_leaks()


def test_a_sub_task_that_only_reads_does_not_hold_up_others_that_read() -> None:
    worker = LocalWorker(sub_workers=2)
    x = vector(1)

    def reading(orch: Any) -> None:
        orch.submit_sub(lambda a: 1.0, orch.tagged(Tag.INPUT, x))
        orch.submit_sub(lambda a: 1.0, orch.tagged(Tag.INPUT, x))

    handle = worker.submit(reading)
    began_ns = worker.system.clock.now_ns()
    handle.result()

    assert handle.graph().edges == ()
    assert worker.system.clock.now_ns() - began_ns < 1.5e9


# Dependencies.


def test_no_dep_makes_no_edge_and_after_makes_one() -> None:
    worker = LocalWorker()
    x = vector(1)

    def ordered(orch: Any) -> None:
        first = orch.submit_next_level(BUMP, x, worker=0)
        orch.submit_next_level(BUMP, orch.no_dep(x), worker=0)
        orch.submit_next_level(FILL, vector(0), 1.0, worker=0, after=[first])

    handle = worker.submit(ordered)
    handle.result()

    assert [(edge.before, edge.after) for edge in handle.graph().edges] == [(0, 2)]


def test_in_a_manual_scope_only_after_counts() -> None:
    worker = LocalWorker()
    x = worker.alloc_tensor((1,), "float32")

    def manual(orch: Any) -> None:
        with orch.scope(manual=True):
            first = orch.submit_next_level(BUMP, x, worker=0)
            orch.submit_next_level(BUMP, x, worker=0)
            orch.submit_next_level(BUMP, x, worker=0, after=[first])

    handle = worker.submit(manual)
    handle.result()

    assert [(edge.before, edge.after) for edge in handle.graph().edges] == [(0, 2)]


@pytest.mark.guarantee("W11")
@settings(deadline=None, max_examples=60, print_blob=True)
@given(
    seed=st.integers(0, 2**32),
    chips=st.integers(1, 3),
    window=st.sampled_from([4, 16, 16_384]),
    runs=st.lists(
        st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 2), st.booleans()), max_size=12),
        min_size=1,
        max_size=3,
    ),
)
def test_any_orchestration_gives_what_its_tasks_give_one_after_another(
    seed: int, chips: int, window: int, runs: list[list[tuple[int, int, int, bool]]]
) -> None:
    """Mixes over two host arrays and two tensors per chip, on any chip, with runs queued behind one another."""
    worker = LocalWorker(chips=chips, seed=seed, track_war=True, rings=RingRequest(ring_task_window=window))
    hosts = [vector(1, 2), vector(3, 4)]
    tensors = [
        [worker.alloc_tensor((2,), "float32", init=vector(c, i), worker_id=c) for i in (5, 6)] for c in range(chips)
    ]
    expected_hosts = [array.copy() for array in hosts]
    expected = [[vector(c, i) for i in (5, 6)] for c in range(chips)]

    def build(orch: Any, tasks: list[tuple[int, int, int, bool]]) -> None:
        for left, right, chip, as_sub in tasks:
            chip %= chips
            memory, model = [*hosts, *tensors[chip]], [*expected_hosts, *expected[chip]]
            with orch.scope():
                if as_sub and max(left, right) < 2:
                    orch.submit_sub(_mix, memory[left], orch.tagged(Tag.INPUT, memory[right]))
                else:
                    orch.submit_next_level(MIX, memory[left], memory[right], worker=chip)
            _mix(model[left], model[right])

    for handle in [worker.submit(build, tasks) for tasks in runs]:
        handle.result()

    assert [array.tolist() for array in hosts] == [array.tolist() for array in expected_hosts]
    for chip in range(chips):
        assert [worker.copy_from(t).tolist() for t in tensors[chip]] == [a.tolist() for a in expected[chip]]
    worker.check_nothing_leaks()
    worker.close()
    worker.check_nothing_leaks()


def _mix(x: np.ndarray, a: np.ndarray) -> None:
    x[...] = (2 * x + a) % 1009


# Rings.


def test_a_full_window_makes_the_submitter_wait_and_nothing_else() -> None:
    worker = LocalWorker(rings=RingRequest(ring_task_window=4))
    x = worker.alloc_tensor((1,), "float32")

    def many(orch: Any) -> None:
        for _ in range(40):
            with orch.scope():
                orch.submit_next_level(BUMP, x, worker=0)

    handle = worker.submit(many)
    handle.result()

    assert worker.copy_from(x).tolist() == [40]
    assert handle.high_water[1].tasks <= 3
    worker.check_nothing_leaks()


def test_heap_memory_of_scopes_is_used_again() -> None:
    worker = LocalWorker(rings=RingRequest(ring_heap=1024))
    total = vector(0)

    def many(orch: Any) -> None:
        for step in range(10):
            with orch.scope():
                part = orch.alloc((1,), "float32")
                orch.submit_next_level(FILL, part, float(step), worker=0)
                orch.submit_next_level(MIX, total, part, worker=0)

    handle = worker.submit(many)
    handle.result()

    expected = 0
    for step in range(10):
        expected = (2 * expected + step) % 1009
    assert total.tolist() == [expected]
    assert handle.high_water[1].heap_bytes == 1024
    worker.check_nothing_leaks()


def _scoped(orch: Any, depth: int) -> None:
    with orch.scope():
        for _ in range(3):
            orch.submit_next_level(BUMP, vector(0), worker=0)
        if depth:
            _scoped(orch, depth - 1)


def _one_scope(orch: Any) -> None:
    for _ in range(8):
        orch.submit_next_level(BUMP, vector(0), worker=0)


def _large_block(orch: Any) -> None:
    orch.alloc((8192,), "float32")


def _many_producers(orch: Any) -> None:
    arrays = [orch.submit_next_level(BUMP, vector(0), worker=0) for _ in range(128)]
    orch.submit_next_level(BUMP, vector(0), worker=0, after=arrays)


DEADLOCKS: dict[str, tuple[Any, type[NumberedError], RunConfig, str]] = {
    "8 tasks in one scope": (_one_scope, ScopeDeadlock, small(ring_task_window=4), "ring_task_window"),
    "a block larger than the heap": (_large_block, HeapRingDeadlock, small(ring_heap=1024), "ring_heap"),
    "8 nested scopes": (
        lambda orch: _scoped(orch, 7),
        FlowControlDeadlock,
        small(ring_task_window=4),
        "ring_task_window",
    ),
    "128 producers": (_many_producers, DepPoolOverflow, small(ring_dep_pool=4), "ring_dep_pool"),
}


@pytest.mark.guarantee("W12")
@pytest.mark.parametrize("case", DEADLOCKS)
def test_a_proven_deadlock_is_raised_at_once_from_submit_and_the_next_run_is_clean(case: str) -> None:
    build, kind, config, parameter = DEADLOCKS[case]
    worker = LocalWorker()
    began_ns = worker.system.clock.now_ns()

    with pytest.raises(kind, match=parameter) as caught:
        worker.run(build, config=config)

    assert "ring " in str(caught.value)
    assert worker.system.clock.now_ns() - began_ns < 1e9
    worker.run(BUMP, vector(0))
    worker.check_nothing_leaks()


def test_ring_sizes_of_one_run_are_its_own() -> None:
    worker = LocalWorker()

    handle = worker.submit(BUMP, vector(0), config=small(ring_task_window=8))
    handle.result()

    assert handle.graph().rings.task_window == (8, 8, 8, 8)  # type: ignore[union-attr]
    assert "ring_task_window[0] = 16,384 (default)" in worker.rings.explain()


def test_memory_of_a_scope_that_was_left_is_refused() -> None:
    worker = LocalWorker()

    def late(orch: Any) -> None:
        with orch.scope():
            array = orch.alloc((4,), "float32")
        orch.submit_next_level(BUMP, array, worker=0)

    with pytest.raises(InvalidArgs, match="after its scope was left"):
        worker.run(late)
    worker.check_nothing_leaks()


# Deferred tensors.


@pytest.mark.guarantee("W13")
def test_a_deferred_tensor_is_allocated_filled_used_and_copied_back_in_this_order() -> None:
    worker = LocalWorker()
    worker.commands["chip.0"].clear()
    host = vector(0, 0)

    def deferred(orch: Any) -> None:
        cache = orch.deferred("cache", (2,), "float32", worker=0, upload=vector(5, 6), host=host)
        orch.submit_next_level(BUMP, cache, worker=0)

    worker.run(deferred)

    assert worker.commands["chip.0"] == ["alloc", "copy_to", "launch", "copy_from"]
    assert host.tolist() == [6, 7]
    worker.check_nothing_leaks()


def test_a_deferred_tensor_stays_for_the_next_run() -> None:
    worker = LocalWorker()

    def first(orch: Any) -> None:
        orch.submit_next_level(FILL, orch.deferred("hidden", (2,), "float32", worker=0), 3.0, worker=0)

    out = vector(0, 0)

    def second(orch: Any) -> None:
        hidden = orch.deferred("hidden", (2,), "float32", worker=0, must_exist=True)
        orch.submit_next_level(ADD, hidden, hidden, out, worker=0)

    worker.run(first)
    worker.run(second)

    assert out.tolist() == [6, 6]
    assert worker.commands["chip.0"].count("alloc") == 1


def test_a_second_upload_comes_after_the_tasks_that_used_the_first() -> None:
    worker = LocalWorker()
    outs = [vector(0), vector(0)]

    def twice(orch: Any) -> None:
        for value, out in zip((1, 10), outs, strict=True):
            x = orch.deferred("x", (1,), "float32", worker=0, upload=vector(value))
            orch.submit_next_level(BUMP, x, worker=0)
            orch.submit_next_level(ADD, x, x, out, worker=0)

    worker.run(twice)

    assert [out.tolist() for out in outs] == [[4], [22]]


def test_a_deferred_tensor_that_cannot_be_allocated_fails_the_run_and_is_not_there_later() -> None:
    worker = LocalWorker(plans={"chip.0": Plan("refuse_alloc", "alloc")})

    def deferred(orch: Any, *, must_exist: bool = False) -> None:
        x = orch.deferred("x", (1,), "float32", worker=0, must_exist=must_exist)
        orch.submit_next_level(BUMP, x, worker=0)

    with pytest.raises(MemoryError, match="no memory"):
        worker.run(deferred)
    with pytest.raises(InvalidArgs, match="does not exist"):
        worker.run(lambda orch: deferred(orch, must_exist=True))
    worker.run(deferred)
    worker.check_nothing_leaks()


def test_the_host_is_not_given_what_a_failed_task_left() -> None:
    worker = LocalWorker()
    host = vector(7)

    def deferred(orch: Any) -> None:
        orch.submit_next_level(BOOM, orch.deferred("x", (1,), "float32", worker=0, host=host), worker=0)

    with pytest.raises(CoreException):
        worker.run(deferred)

    assert host.tolist() == [7]
    worker.check_nothing_leaks()


# Waiting and ending.


def test_a_function_may_wait_for_data_and_decide_by_it() -> None:
    worker = LocalWorker()
    x = vector(0)

    def until_three(orch: Any) -> int:
        rounds = 0
        while x[0] < 3:
            orch.submit_next_level(BUMP, x, worker=0)
            orch.wait(x)
            rounds += 1
        return rounds

    assert worker.run(until_three) == 3
    worker.check_nothing_leaks()


def test_waiting_for_a_producer_that_hangs_names_it() -> None:
    worker = LocalWorker(plans={"chip.0": Plan("hang", "launch")})
    x = vector(0)

    def waiting(orch: Any) -> None:
        orch.submit_next_level(BUMP, x, worker=0)
        orch.wait(x, timeout_s=2.0)

    with pytest.raises(TensorWaitTimeout, match=r"within 2 s; its producer is task 0 \(bump\)"):
        worker.run(waiting)
    worker.pass_time(30)
    worker.check_nothing_leaks()
    worker.run(BUMP, x)


def test_waiting_for_a_producer_that_failed_raises_with_the_first_cause() -> None:
    worker = LocalWorker()
    x = vector(0)

    def waiting(orch: Any) -> None:
        orch.submit_next_level(BOOM, x, worker=0)
        orch.wait(x)

    with pytest.raises(TaskAborted) as caught:
        worker.run(waiting)
    assert "the in-core function raised" in caught.value.first_cause
    worker.check_nothing_leaks()


@pytest.mark.guarantee("W14")
def test_fatal_ends_the_run_and_what_comes_after_it_is_not_run() -> None:
    worker = LocalWorker()
    x, y = vector(0), vector(0)

    def giving_up(orch: Any) -> None:
        orch.submit_next_level(BUMP, x, worker=0)
        orch.wait(x)
        try:
            orch.fatal("no such page")
        except ExplicitFatal:
            assert orch.submit_next_level(BUMP, y, worker=0) == -1

    with pytest.raises(ExplicitFatal, match=r"EXPLICIT_ORCH_FATAL \(9\): run 1: no such page"):
        worker.run(giving_up)

    assert (x.tolist(), y.tolist()) == ([1], [0])
    worker.run(BUMP, y)
    worker.check_nothing_leaks()


def test_what_the_function_raises_is_raised_and_what_was_not_running_is_not_run() -> None:
    worker = LocalWorker()
    x = vector(0)

    def wrong(orch: Any) -> None:
        orch.submit_next_level(BUMP, x, worker=0)
        raise KeyError("page 7")

    with pytest.raises(KeyError, match="page 7"):
        worker.run(wrong)

    worker.check_nothing_leaks()
    assert x.tolist() == [0]
    worker.run(BUMP, x)


def test_an_orchestration_may_be_declared_and_returns_its_value() -> None:
    @orchestration(subs={"log": 1})
    def logged(orch: Any, x: Any) -> str:
        orch.submit_sub("log", x)
        return "logged"

    seen: list[Any] = []
    worker = LocalWorker(subs={"log": seen.append})

    assert worker.run(logged, 5) == "logged"
    assert seen == [5]


@pytest.mark.parametrize("verb", ["run", "submit", "close", "copy_from", "register"])
def test_what_would_wait_for_itself_is_refused_inside_a_run(verb: str) -> None:
    worker = LocalWorker()
    x = worker.alloc_tensor((1,), "float32")
    calls = {
        "run": lambda: worker.run(BUMP, x),
        "submit": lambda: worker.submit(BUMP, x),
        "close": worker.close,
        "copy_from": lambda: worker.copy_from(x),
        "register": lambda: worker.register(BUMP),
    }

    with pytest.raises(InvalidArgs, match="from inside a callback of this worker"):
        worker.run(lambda orch: calls[verb]())
    with pytest.raises(InvalidArgs, match="from inside a callback of this worker"):
        worker.run(lambda orch: orch.submit_sub(calls[verb]))
    worker.check_nothing_leaks()
    worker.close()


# Chips that die.


def test_a_chips_death_takes_its_tensors_and_the_tasks_that_need_them_and_no_others() -> None:
    worker = LocalWorker(chips=2, plans={"chip.0": Plan("die", "launch")})
    x, y = worker.alloc_tensor((1,), "float32"), worker.alloc_tensor((1,), "float32", worker_id=1)

    def both(orch: Any) -> None:
        orch.submit_next_level(BUMP, x, worker=0)
        orch.submit_next_level(BUMP, x, worker=0)
        orch.submit_next_level(BUMP, y, worker=1)

    handle = worker.submit(both)
    with pytest.raises(WorkerLost, match=r"chip\.0 ended with exit code 13"):
        handle.result()

    assert [task.state for task in handle.graph().tasks] == [TaskState.FAILED, TaskState.FAILED, TaskState.COMPLETED]
    assert worker.copy_from(y).tolist() == [1]
    with pytest.raises(InvalidArgs, match="was lost when its chip worker ended") as caught:
        worker.run(BUMP, x)
    assert "WORKER_LOST" in caught.value.first_cause
    worker.free_tensor(x)
    z = worker.alloc_tensor((1,), "float32")
    worker.run(BUMP, z)
    assert worker.copy_from(z).tolist() == [1]
    worker.check_nothing_leaks()


def test_a_chip_that_dies_too_often_stays_down_and_says_why() -> None:
    worker = LocalWorker(chips=2, max_restarts=0)
    worker.kill("chip.0", "signal 9 (SIGKILL)")
    worker.pass_time(1.0)

    with pytest.raises(KernelError, match=r"DEVICE_UNUSABLE \(-1\).*worker 0.*died too often") as caught:
        worker.run(BUMP, vector(0))

    assert isinstance(caught.value, NumberedError)
    assert "signal 9 (SIGKILL)" in caught.value.first_cause
    x = vector(0)
    worker.run(BUMP, x, worker=1)
    assert x.tolist() == [1]
    worker.check_nothing_leaks()
