"""Runs, programs and tensors of an L3 worker, in one process on the virtual clock."""

from __future__ import annotations

from typing import Any

import attrs
import numpy as np
import pytest
from l3_local import ADD, BOOM, BUMP, FILL, MIX, AddingChip, LocalWorker, Plan, vector

from chipbus.actors.l3 import RunConfig
from chipbus.errors import (
    ChipbusError,
    CoreException,
    DeadlineExceeded,
    EngineClosed,
    EngineDead,
    KernelError,
    MemoryExhausted,
    SchedulerTimeout,
    TaskAborted,
    UnknownProgram,
)
from chipbus.kernels import Arg, Direction, Param, Program
from chipbus.kernels.diagnosis import run_graph_from_json, to_json

NEW = Program("bump again", "test.bump", (), (Param("x", "float32", ("N",), Direction.INOUT, resident=None),))
STRANGE = Program("strange", "other.kind", (), (Param("x", "float32", ("N",)),))

# One run.


def test_a_program_writes_the_arrays_it_is_given() -> None:
    worker = LocalWorker()
    out = vector(0, 0)

    assert worker.run(ADD, vector(1, 2), vector(3, 4), out) is None

    assert out.tolist() == [4, 6]
    worker.check_nothing_leaks()


def test_a_number_stands_for_an_array_without_axes() -> None:
    worker = LocalWorker()
    out = vector(0, 0)

    worker.run(FILL, out, 2.5)

    assert out.tolist() == [2.5, 2.5]


@pytest.mark.guarantee("W4")
def test_a_chain_on_one_chip_goes_in_one_message() -> None:
    worker = LocalWorker()
    x = worker.alloc_tensor((3,), "float32")

    def chain(orch: Any) -> None:
        for _ in range(10):
            orch.submit_next_level(BUMP, x, worker=0)

    worker.run(chain)

    assert worker.copy_from(x).tolist() == [10, 10, 10]
    assert worker.commands["chip.0"].count("launch") == 1
    worker.check_nothing_leaks()


def test_values_pass_through_host_arrays_from_chip_to_chip() -> None:
    worker = LocalWorker(chips=2)
    a, b, c = vector(1, 2), vector(0, 0), vector(0, 0)

    def through(orch: Any) -> None:
        orch.submit_next_level(ADD, a, a, b, worker=0)
        orch.submit_next_level(ADD, b, b, c, worker=1)
        orch.submit_next_level(BUMP, c, worker=0)

    worker.run(through)

    assert c.tolist() == [5, 9]
    worker.check_nothing_leaks()


def test_a_part_of_an_array_is_ordered_against_the_whole() -> None:
    worker = LocalWorker(chips=2)
    whole = vector(1, 2, 3, 4)

    def parts(orch: Any) -> None:
        orch.submit_next_level(BUMP, whole, worker=0)
        orch.submit_next_level(BUMP, whole[2:], worker=1)
        orch.submit_next_level(BUMP, whole[:2], worker=0)

    handle = worker.submit(parts)
    handle.result()

    assert whole.tolist() == [3, 4, 5, 6]
    assert [(edge.before, edge.after) for edge in handle.graph().edges] == [(0, 1), (0, 2)]


@pytest.mark.guarantee("W5")
def test_a_failed_task_takes_along_what_depends_on_it_and_nothing_else() -> None:
    worker = LocalWorker()
    x, y = worker.alloc_tensor((2,), "float32"), worker.alloc_tensor((2,), "float32")

    def half(orch: Any) -> None:
        orch.submit_next_level(BOOM, x, worker=0)
        orch.submit_next_level(BUMP, x, worker=0)
        orch.submit_next_level(BUMP, y, worker=0)

    handle = worker.submit(half)
    with pytest.raises(CoreException, match=r"run 1, task 0 \(boom\) on worker 0 \(null:0\)"):
        handle.result()

    assert [type(error) for error in handle.errors] == [CoreException, TaskAborted]
    assert handle.errors[1].first_cause.startswith("CORE_EXCEPTION (507015): run 1, task 0")  # type: ignore[attr-defined]
    assert worker.copy_from(x).tolist() == [0, 0]
    assert worker.copy_from(y).tolist() == [1, 1]
    worker.run(BUMP, y)
    assert worker.copy_from(y).tolist() == [2, 2]
    worker.check_nothing_leaks()


def test_the_record_of_a_run_says_what_ran_where_and_when() -> None:
    worker = LocalWorker(chips=2)
    x = worker.alloc_tensor((2,), "float32")

    def mixed(orch: Any) -> None:
        orch.submit_next_level(BUMP, x, worker=0)
        orch.submit_next_level(BUMP, vector(1), worker=1)
        orch.submit_sub(lambda: None)

    handle = worker.submit(mixed, config=RunConfig())
    handle.result()
    graph = handle.graph()

    assert [(task.label, task.lane) for task in graph.tasks] == [
        ("bump", "chip.0"),
        ("bump", "chip.1"),
        ("<lambda>", "sub"),
    ]
    assert all(task.duration_ns >= 1_000_000 for task in graph.tasks[:2])
    assert run_graph_from_json(to_json(graph)) == graph
    assert graph.high_water == handle.high_water


# Handles.


@pytest.mark.guarantee("W6")
def test_a_wait_that_ends_too_early_leaves_the_run_going() -> None:
    worker = LocalWorker()
    x = vector(0)

    handle = worker.submit(BUMP, x)

    assert not handle.done
    assert not handle.wait(0.0001)
    with pytest.raises(DeadlineExceeded, match=r"run 1 of bump has not ended within 0.0001 s"):
        handle.result(0.0001)
    assert handle.wait(10)
    assert handle.result() is None
    assert handle.done
    assert x.tolist() == [1]


def test_every_wait_sees_the_same_outcome() -> None:
    worker = LocalWorker()

    handle = worker.submit(BOOM, vector(0))
    errors = []
    for _ in range(3):
        with pytest.raises(CoreException) as caught:
            handle.result()
        errors.append(caught.value)

    assert errors[0] is errors[1] is errors[2] is handle.error
    assert "failed" in repr(handle)


# Many runs.


@pytest.mark.guarantee("W7")
def test_runs_start_in_order_and_the_one_too_many_waits_for_the_oldest() -> None:
    worker = LocalWorker(depth=2)
    x = vector(0)

    handles = []
    for n in range(1, 5):
        handles.append(worker.submit(MIX, x, vector(n)))
        assert len(worker.dispatcher.runs) <= 2
        assert [handle.number for handle in handles] == list(range(1, n + 1))
        if n > 2:
            assert handles[n - 3].done
    for handle in handles:
        handle.result()

    assert x.tolist() == [26]
    worker.check_nothing_leaks()


def test_a_run_is_queued_on_its_chip_behind_the_one_before() -> None:
    worker = LocalWorker()
    x = worker.alloc_tensor((1,), "float32")

    first, second = worker.submit(BUMP, x), worker.submit(BUMP, x)
    worker.system.run_until(lambda: worker.commands["chip.0"].count("launch") == 2)

    assert not first.done
    assert not second.done
    second.result()
    assert first.done
    assert worker.copy_from(x).tolist() == [2]


@pytest.mark.guarantee("W8")
@pytest.mark.parametrize("seed", range(10))
def test_a_failed_run_does_not_touch_the_next(seed: int) -> None:
    worker = LocalWorker(seed=seed)
    x = worker.alloc_tensor((1,), "float32")

    failing, fine = worker.submit(BOOM, x), worker.submit(BUMP, x)
    with pytest.raises(CoreException):
        failing.result()

    fine.result()
    assert fine.errors == ()
    assert worker.copy_from(x).tolist() == [1]
    worker.check_nothing_leaks()


def test_operations_on_tensors_take_their_turn_behind_accepted_runs() -> None:
    worker = LocalWorker()
    x = worker.alloc_tensor((1,), "float32")

    worker.submit(BUMP, x)
    worker.submit(BUMP, x)
    assert worker.copy_from(x).tolist() == [2]
    worker.submit(BUMP, x)
    worker.copy_to(x, vector(10))
    worker.submit(BUMP, x)
    worker.free_tensor(x)

    assert all(handle is None for handle in [worker.dispatcher.subs.close()])
    assert worker.book.live() == []
    worker.check_nothing_leaks()


# Programs.


def test_a_program_may_be_registered_while_the_worker_runs_and_forgotten() -> None:
    worker = LocalWorker(chips=2)
    x = vector(0)
    running = worker.submit(BUMP, x)

    registration = worker.register(NEW)
    again = worker.register(NEW)

    assert registration == again
    assert registration.digest == NEW.digest
    running.result()
    with pytest.raises(KernelError):  # the chips of this test run programs by name
        worker.run(registration, vector(0))
    worker.unregister(registration)
    with pytest.raises(UnknownProgram):
        worker.run(NEW, x)
    worker.check_nothing_leaks()


@pytest.mark.guarantee("W9")
def test_a_program_one_chip_refuses_is_left_on_none() -> None:
    worker = LocalWorker(chips=3, plans={"chip.1": Plan("fail", "register", nth=6)})

    with pytest.raises(CoreException, match=r"worker 1 \(null:1\): injected"):
        worker.register(NEW)
    worker.pass_time(1.0)

    assert all(NEW.digest not in chip.chip.programs for chip in worker.chips.values())
    with pytest.raises(UnknownProgram):
        worker.run(NEW, vector(0))
    worker.register(NEW)
    assert all(NEW.digest in chip.chip.programs for chip in worker.chips.values())
    worker.check_nothing_leaks()


def test_a_program_no_chip_knows_is_refused_with_the_chips_words() -> None:
    worker = LocalWorker()

    with pytest.raises(KernelError, match=r"other\.kind"):
        worker.register(STRANGE)
    worker.run(BUMP, vector(0))
    worker.check_nothing_leaks()


def test_a_restarted_chip_has_every_program_again() -> None:
    worker = LocalWorker()
    worker.register(NEW)
    worker.kill("chip.0", "signal 9 (SIGKILL)")
    worker.pass_time(1.0)

    assert set(worker.chips["chip.0"].chip.programs) == {p.digest for p in worker.programs}


# Tensors.


def test_what_goes_to_a_tensor_comes_back() -> None:
    worker = LocalWorker(chips=2)
    x = worker.alloc_tensor((2, 3), "float32", worker_id=1)
    values = np.arange(6, dtype=np.float32).reshape(2, 3)

    assert worker.copy_from(x).tolist() == [[0, 0, 0], [0, 0, 0]]
    worker.copy_to(x, values)

    assert worker.copy_from(x).tolist() == values.tolist()
    assert worker.committed_device_memory(1) == 24
    assert worker.committed_device_memory(0) == 0
    worker.free_tensor(x)
    assert worker.committed_device_memory(1) == 0


@pytest.mark.guarantee("W15")
@pytest.mark.parametrize("fault", ["refuse_alloc", "die", "hang"])
def test_a_stacked_tensor_is_on_all_its_chips_or_on_none(fault: str) -> None:
    worker = LocalWorker(chips=3, plans={"chip.1": Plan(fault, "alloc")})

    with pytest.raises(ChipbusError):
        worker.alloc_stacked_tensor(np.zeros((3, 2), np.float32), [0, 1, 2])
    worker.pass_time(1.0)

    assert worker.book.live() == []
    assert all(chip.chip.residents == {} for chip in worker.chips.values())
    stacked = worker.alloc_stacked_tensor(np.ones((3, 2), np.float32), [0, 1, 2])
    assert worker.copy_stacked_from(stacked).tolist() == [[1, 1]] * 3
    worker.check_nothing_leaks()


def test_a_tensor_whose_first_value_cannot_be_copied_is_not_left_behind() -> None:
    worker = LocalWorker(plans={"chip.0": Plan("fail", "copy_to")})

    with pytest.raises(CoreException):
        worker.alloc_tensor((2,), "float32", init=vector(1, 2))
    worker.pass_time(1.0)

    assert worker.chips["chip.0"].chip.residents == {}
    assert worker.book.live() == []


# The end.


@pytest.mark.guarantee("W16")
def test_close_lets_accepted_runs_end_and_frees_what_is_left() -> None:
    worker = LocalWorker()
    x, y = worker.alloc_tensor((1,), "float32"), vector(0)

    handles = [worker.submit(BUMP, x), worker.submit(BUMP, y)]
    worker.close()

    assert [handle.result() for handle in handles] == [None, None]
    assert y.tolist() == [1]
    assert worker.commands["chip.0"][-1] == "free"
    assert worker.book.live() == []
    assert worker.state.value == "closed"
    worker.check_nothing_leaks()


def test_a_closed_worker_refuses_everything_but_close() -> None:
    worker = LocalWorker()
    report = worker.close()

    assert worker.close() == report
    assert worker.stops == 2
    for call in (
        lambda: worker.run(BUMP, vector(0)),
        lambda: worker.submit(BUMP, vector(0)),
        lambda: worker.register(NEW),
        lambda: worker.alloc_tensor((1,), "float32"),
    ):
        with pytest.raises(EngineClosed, match="this worker is closed"):
            call()


@pytest.mark.guarantee("W17")
def test_a_close_that_failed_can_be_tried_again() -> None:
    worker = LocalWorker()
    stop, attempts = worker.stop_processes, []

    def failing() -> str:
        attempts.append(1)
        if len(attempts) == 1:
            raise TimeoutError("a child is still there")
        return stop()

    worker.stop_processes = failing  # type: ignore[method-assign]
    with pytest.raises(TimeoutError):
        worker.close()
    with pytest.raises(EngineClosed):
        worker.run(BUMP, vector(0))
    worker.close()

    assert worker.state.value == "closed"
    worker.check_nothing_leaks()


def test_a_run_that_does_not_end_is_cut_off_by_close() -> None:
    worker = LocalWorker(plans={"chip.0": Plan("hang", "launch")})
    handle = worker.submit(BUMP, vector(0))

    worker.close()

    with pytest.raises(EngineClosed):
        handle.result()
    worker.check_nothing_leaks()


def test_a_chip_that_does_not_answer_costs_a_close_one_deadline_however_many_tensors_it_holds() -> None:
    worker = LocalWorker(plans={"chip.0": Plan("hang", "free")}, command_timeout_s=300.0)
    for _ in range(5):
        worker.alloc_tensor((1,), "float32")
    began_ns = worker.system.clock.now_ns()

    worker.close()

    assert (worker.system.clock.now_ns() - began_ns) / 1e9 <= worker.core.settings.close_timeout_s + 0.1
    assert worker.state.value == "closed"


@pytest.mark.guarantee("W18")
def test_when_the_processes_are_gone_everything_that_waits_hears_of_it() -> None:
    worker = LocalWorker(plans={"chip.0": Plan("hang", "launch")})
    handle = worker.submit(BUMP, vector(0))
    worker.pass_time(1.0)

    worker.dispatcher.fail_all(EngineDead("the supervisor ended"))

    with pytest.raises(EngineDead):
        handle.result()
    for call in (lambda: worker.run(BUMP, vector(0)), lambda: worker.alloc_tensor((1,), "float32")):
        with pytest.raises(EngineDead, match="the supervisor ended"):
            call()
    assert worker.state.value == "failed"
    worker.close()
    assert worker.state.value == "closed"
    worker.check_nothing_leaks()


def test_a_question_under_way_ends_when_the_processes_are_gone() -> None:
    worker = LocalWorker(plans={"chip.0": Plan("hang", "alloc")})
    worker.dispatcher.ctx.after(1.0, lambda: worker.dispatcher.fail_all(EngineDead("the supervisor ended")))

    with pytest.raises(EngineDead):
        worker.alloc_tensor((1,), "float32")
    worker.close()
    worker.check_nothing_leaks()


def test_a_start_that_fails_leaves_a_worker_that_can_only_be_closed() -> None:
    worker = LocalWorker(plans={"chip.0": Plan("refuse_alloc", "register")}, start=False)

    with pytest.raises(MemoryExhausted):
        worker.core.start(worker.start_processes)

    with pytest.raises(EngineClosed, match="this worker is failed"):
        worker.run(BUMP, vector(0))
    worker.close()
    worker.check_nothing_leaks()


def test_a_launch_whose_answer_is_lost_ends_at_its_deadline_and_the_chip_is_replaced() -> None:
    worker = LocalWorker(plans={"chip.0": Plan("lost", "launch")})

    with pytest.raises(SchedulerTimeout, match=r"run 1, task 0 \(bump\) on worker 0 .*an answer was lost"):
        worker.run(BUMP, vector(0))

    assert worker.keeper.deaths["chip.0"] == 0
    worker.pass_time(1.0)
    assert worker.keeper.deaths["chip.0"] == 1
    worker.run(BUMP, vector(0))


@pytest.mark.parametrize(
    "wrong",
    [Arg(dtype="float32", shape=(3,), data=bytes(12)), Arg(dtype="float64", shape=(2,), data=bytes(16)),
     Arg(dtype="float32", shape=(2,), data=bytes(7)), Arg(dtype="nothing", shape=(2,), data=bytes(8))],
)  # fmt: skip
def test_an_answer_that_does_not_fit_the_arrays_is_an_error_and_writes_nothing(
    wrong: Arg, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = LocalWorker()
    out = vector(7, 7)
    launch = AddingChip.launch

    def spoilt(chip: AddingChip, dispatch: Any, *, digest: bool = False) -> Any:
        return attrs.evolve(launch(chip, dispatch, digest=digest), outputs=(wrong,))

    monkeypatch.setattr(AddingChip, "launch", spoilt)
    with pytest.raises(CoreException, match="the chip gave back"):
        worker.run(ADD, vector(1, 2), vector(3, 4), out)

    assert out.tolist() == [7, 7]
    worker.check_nothing_leaks()
