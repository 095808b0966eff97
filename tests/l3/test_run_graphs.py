"""What a handle tells about its run afterwards: every view of it comes from this one run, no second one is needed."""

from __future__ import annotations

import pytest
from l3_local import ADD, BOOM, BUMP, LocalWorker, vector

from chipbus.errors import CoreException
from chipbus.kernels.diagnosis import (
    Reason,
    critical_path,
    find_races,
    run_graph_from_json,
    to_graph_svg,
    to_json,
    to_rings_svg,
    to_trace_events,
)
from chipbus.kernels.engine import TaskState
from chipbus.topology.rings import suggest_rings


@pytest.mark.guarantee("D10")
def test_a_run_tells_its_tasks_lanes_edges_and_times_without_having_been_asked_before() -> None:
    worker = LocalWorker(chips=2)
    a, b, c = vector(1, 2), vector(0, 0), vector(0, 0)

    def through(orch) -> None:
        orch.submit_next_level(ADD, a, a, b, worker=0)
        orch.submit_next_level(ADD, b, b, c, worker=1)
        orch.submit_sub(lambda values: None, c)
        orch.submit_group(BUMP, [[b], [a]], workers=[0, 1])

    handle = worker.submit(through)
    handle.result()
    run = handle.graph()

    assert [task.label for task in run.tasks][:2] == ["add", "add"]
    assert [task.lane for task in run.tasks] == ["chip.0", "chip.1", "sub", "chip.0+chip.1"]
    assert all(task.state is TaskState.COMPLETED for task in run.tasks)
    assert {(0, 1), (1, 2)} <= {(edge.before, edge.after) for edge in run.edges}
    for edge in run.edges:
        before, after = run.tasks[edge.before], run.tasks[edge.after]
        assert before.end_ns is not None
        assert after.begin_ns is not None
        assert before.end_ns <= after.begin_ns
    assert run.errors == ()
    assert set(critical_path(run).tasks) >= {0, 1}
    assert run_graph_from_json(to_json(run)) == run
    for view in (to_graph_svg, to_rings_svg, to_trace_events):
        assert view(run)
    worker.check_nothing_leaks()


def test_the_graph_of_a_failed_run_says_what_failed_and_what_was_not_run_for_it() -> None:
    worker = LocalWorker()
    x, y = worker.alloc_tensor((2,), "float32"), worker.alloc_tensor((2,), "float32")

    def half(orch) -> None:
        orch.submit_next_level(BOOM, x, worker=0)
        orch.submit_next_level(BUMP, x, worker=0)
        orch.submit_next_level(BUMP, y, worker=0)

    handle = worker.submit(half)
    with pytest.raises(CoreException):
        handle.result()
    run = handle.graph()

    assert [task.state for task in run.tasks] == [TaskState.FAILED, TaskState.FAILED, TaskState.COMPLETED]
    assert run.tasks[0].error.startswith("CORE_EXCEPTION (507015)")
    assert run.tasks[1].error.startswith("TASK_ABORT (107022)")
    assert run.tasks[1].begin_ns is None
    assert run.errors[0] == run.tasks[0].error
    assert "failed: 1" in to_graph_svg(run)
    worker.check_nothing_leaks()


@pytest.mark.parametrize("track_war", [False, True])
@pytest.mark.guarantee("D11")
def test_the_race_check_finds_the_overwrite_that_only_tracking_orders(track_war: bool) -> None:
    worker = LocalWorker(chips=2, track_war=track_war)
    a, b, c = vector(1, 2), vector(0, 0), vector(3, 4)

    def overwrite(orch) -> None:
        orch.submit_next_level(ADD, a, a, b, worker=0)  # reads a
        orch.submit_next_level(ADD, c, c, a, worker=1)  # overwrites it, on another chip

    handle = worker.submit(overwrite)
    handle.result()
    found = find_races(handle.graph())

    if track_war:
        assert found == []
    else:
        assert [(race.first, race.second, race.reason) for race in found] == [(0, 1, Reason.WAR)]
    worker.check_nothing_leaks()


def test_the_sizes_suggested_from_a_run_hold_the_same_run() -> None:
    def chain(orch) -> None:
        for _ in range(3):
            with orch.scope():
                x = orch.alloc((300,), "float32")
                orch.submit_next_level(BUMP, x, worker=0)
                orch.submit_next_level(BUMP, x, worker=0)

    worker = LocalWorker()
    handle = worker.submit(chain)
    handle.result()
    asked = suggest_rings(handle.high_water)
    again = LocalWorker(rings=asked)
    second = again.submit(chain)
    second.result()

    assert second.graph().rings is not None
    assert second.graph().rings.heap[1] < 65_536
    assert len(second.graph().tasks) == 6
    assert len(second.graph().scopes) == 4
    for one in (worker, again):
        one.check_nothing_leaks()
