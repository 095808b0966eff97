"""Each fault in each state, on the virtual clock: the right error or none, nothing left, and the next run is fine."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from l3_local import ADD, BUMP, LocalWorker, Plan, vector

from chipbus.errors import (
    ChipbusError,
    CoreException,
    EngineClosed,
    InvalidArgs,
    MemoryExhausted,
    SchedulerTimeout,
    WorkerLost,
)

FAULTS = ("fail", "hang", "die", "slow", "corrupt", "refuse_alloc", "lost", "stop", "delayed")
STATES = ("starting", "idle", "running", "queued", "copying", "closing")
ERRORS: dict[str, tuple[type[ChipbusError], ...]] = {
    "fail": (CoreException,),
    "hang": (SchedulerTimeout,),
    "die": (WorkerLost,),
    "slow": (),
    "corrupt": (CoreException,),
    "refuse_alloc": (MemoryExhausted,),
    "lost": (SchedulerTimeout,),
    "stop": (SchedulerTimeout,),
    "delayed": (),
}


def outcome_of_run(worker: LocalWorker) -> ChipbusError | None:
    """The error of one run that passes values through the host; its values are right if there is none."""
    out = vector(0, 0)
    try:
        worker.run(ADD, vector(1, 2), vector(3, 4), out)
    except ChipbusError as error:
        return error
    assert out.tolist() == [4, 6]
    return None


def check_error(fault: str, error: ChipbusError | None) -> None:
    if ERRORS[fault]:
        assert isinstance(error, ERRORS[fault]), error
        assert "chip.0" in str(error) or "worker 0 (null:0)" in str(error)
    else:
        assert error is None


def start(fault: str, state: str, seed: int) -> tuple[LocalWorker, ChipbusError | None]:
    """A worker whose chip 0 goes wrong in that state, and what the caller heard of it."""
    if state == "starting":
        worker = LocalWorker(chips=2, seed=seed, plans={"chip.0": Plan(fault, "register")}, start=False)
        try:
            worker.core.start(worker.start_processes)
        except ChipbusError as error:
            return worker, error
        return worker, None
    worker = LocalWorker(chips=2, seed=seed)
    if state == "idle":
        if fault == "die":
            worker.kill("chip.0", "exit code 13")
        elif fault in ("hang", "stop"):
            chip = worker.chips["chip.0"]
            chip.is_stuck, chip.is_stopped = True, fault == "stop"
        else:
            worker.plans["chip.0"] = Plan(fault, "launch")
        worker.pass_time(1.0)
        return worker, outcome_of_run(worker)
    if state == "copying":
        x = worker.alloc_tensor((4,), "float32")
        worker.plans["chip.0"] = Plan(fault, "alloc" if fault == "refuse_alloc" else "copy_to")
        try:
            if fault == "refuse_alloc":
                worker.alloc_tensor((4,), "float32")
            else:
                worker.copy_to(x, vector(1, 2, 3, 4))
        except ChipbusError as error:
            return worker, error
        return worker, None
    worker.plans["chip.0"] = Plan(fault, "launch")
    if state == "running":
        return worker, outcome_of_run(worker)
    first = worker.submit(ADD, vector(1), vector(2), vector(0))
    second = worker.submit(ADD, vector(1), vector(2), vector(0))
    if state == "queued":
        assert first.wait(100)
        assert second.wait(100)
        if fault not in ("hang", "stop", "die"):  # those take along what is queued on the same chip
            assert second.error is None
        return worker, first.error
    worker.close()
    assert first.done
    assert second.done
    return worker, first.error


@pytest.mark.guarantee("W30")
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_any_state_ends_with_the_right_error_and_nothing_left(fault: str, state: str, seed: int) -> None:
    worker, error = start(fault, state, seed)

    if state == "starting":
        if fault in ("fail", "refuse_alloc"):
            check_error(fault, error)
            assert worker.state.value == "failed"
        else:
            assert error is None  # the chip was replaced, or took its time
    elif state == "closing" and fault in ("hang", "lost", "stop"):
        assert isinstance(error, EngineClosed)  # the drain is shorter than the launch's own deadline
    elif (state, fault) == ("idle", "die") or (state, fault) == ("copying", "corrupt"):
        assert error is None  # nothing was in flight; a copy carries no arrays to be spoilt
    else:
        check_error(fault, error)
    if worker.state.value == "ready":
        worker.pass_time(30.0)
        worker.check_nothing_leaks()
        assert outcome_of_run(worker) is None
        x = worker.alloc_tensor((2,), "float32", init=vector(1, 2))
        worker.run(BUMP, x)
        assert worker.copy_from(x).tolist() == [2, 3]
    worker.close()
    worker.check_nothing_leaks()
    assert worker.book.live() == []

    again = LocalWorker(seed=seed)
    assert outcome_of_run(again) is None
    again.close()


@pytest.mark.guarantee("W34")
@settings(deadline=None, max_examples=60, print_blob=True)
@given(
    seed=st.integers(0, 2**32),
    deaths=st.lists(st.tuples(st.integers(0, 1), st.floats(0.0, 0.02)), max_size=3),
    tasks=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 1)), max_size=10),
    runs=st.integers(1, 4),
)
def test_chips_that_die_at_any_moment_leave_nothing_and_the_worker_usable(
    seed: int, deaths: list[tuple[int, float]], tasks: list[tuple[int, int]], runs: int
) -> None:
    """Host arrays, tensors, groups, host callables and deferred tensors are under way while chips die."""
    worker = LocalWorker(chips=2, seed=seed, max_restarts=10)
    shared = [worker.alloc_tensor((1,), "float32", worker_id=chip) for chip in (0, 1)]
    array = vector(0)
    refusals: list[InvalidArgs] = []

    def build(orch: Any) -> None:
        for kind, chip in tasks:
            with orch.scope():
                if kind == 0:
                    orch.submit_next_level(BUMP, shared[chip], worker=chip)
                elif kind == 1:
                    orch.submit_next_level(BUMP, array, worker=chip)
                elif kind == 2:
                    orch.submit_group(BUMP, [[shared[0]], [shared[1]]], workers=[0, 1])
                else:
                    x = orch.deferred("x", (1,), "float32", worker=chip, upload=vector(1), host=array)
                    orch.submit_next_level(BUMP, x, worker=chip)
                    orch.submit_sub(lambda values: None, array)

    for chip, delay_s in deaths:
        worker.keeper.ctx.after(delay_s, partial(worker.kill, f"chip.{chip}", "signal 9 (SIGKILL)"))
    for _ in range(runs):
        try:
            worker.submit(build)
        except InvalidArgs as error:  # a tensor was lost before
            refusals.append(error)
    worker.pass_time(60.0)

    assert all(error.first_cause for error in refusals)
    worker.check_nothing_leaks()
    for chip in (0, 1):
        x = worker.alloc_tensor((1,), "float32", worker_id=chip)
        worker.run(BUMP, x, worker=chip)
        assert worker.copy_from(x).tolist() == [1]
    worker.close()
    worker.check_nothing_leaks()
