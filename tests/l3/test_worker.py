"""The L3 worker with real chip processes: what it computes, what faults do to it, and that nothing is left after it."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from l3_programs import add, boom, bump

from chipbus.actors.l3 import L3Worker, RunConfig
from chipbus.errors import (
    ChipbusError,
    ConfigError,
    CoreException,
    DeviceUnusable,
    EngineClosed,
    EngineDead,
    InvalidArgs,
    KernelError,
    MemoryExhausted,
    SchedulerTimeout,
    WorkerLost,
    WrongArity,
)
from chipbus.kernels.faults import Fault
from chipbus.tools.replay import Dump, open_record, replay_dispatches
from support import descriptors, eventually, our_processes, run_directories

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """No process, thread, descriptor or run directory outlives its worker."""
    before = descriptors(), {thread.name for thread in threading.enumerate()}, run_directories()
    yield
    eventually(lambda: our_processes() == set(), "every process is gone")
    eventually(lambda: {thread.name for thread in threading.enumerate()} <= before[1], "every thread is gone")
    assert descriptors() <= before[0]
    assert run_directories() <= before[2]


def pid_of(worker: L3Worker, chip: int = 0) -> int:
    return next(record.pid for record in worker.tree() if record.name == f"chip.{chip}")


def run_until_refused(worker: L3Worker, x: Any) -> None:
    for _ in range(10_000):
        worker.run(bump, x)


def test_programs_on_cpu_chips_compute_and_share_tensors() -> None:
    a, b = np.arange(10, dtype=np.float32), np.full(10, 2, np.float32)
    out = np.zeros(10, np.float32)
    with L3Worker([add, bump], devices=["cpu:0", "cpu:1"], threads=1) as worker:
        x = worker.alloc_tensor((10,), "float32", init=a)
        half = worker.alloc_tensor((2,), "bfloat16", init=np.array([1.0, 1.00390625], np.float32), worker_id=1)

        def both(orch: Any) -> None:
            orch.submit_next_level(bump, x, worker=0)
            orch.submit_next_level(add, x, b, out, worker=0)
            orch.submit_next_level(bump, out, worker=1)
            orch.submit_sub(np.negative, orch.no_dep(b), out)

        worker.run(both)
        assert out.tolist() == (-b).tolist()
        assert worker.copy_from(x).tolist() == (a + 1).tolist()
        assert worker.copy_from(half).tolist() == [1.0, 1.0]  # a tie goes to the even one
        assert worker.committed_device_memory() >= 40
        with pytest.raises(WrongArity, match="several programs"):
            worker(x)
    report = worker.close()

    assert [end.how for end in report.children] == ["stopped", "stopped"]
    assert report.left == ()


def test_a_kernel_that_raises_is_named_and_the_worker_goes_on() -> None:
    x = np.zeros(3, np.float32)
    with L3Worker([bump, boom], devices=["cpu:0"], threads=1) as worker:
        with pytest.raises(CoreException, match=r"run 1, task 0 \(boom\) on worker 0 \(cpu:0\).*raise_error") as caught:
            worker.run(boom, x)
        assert caught.value.code == 507015
        worker.run(bump, x)

    assert x.tolist() == [1, 1, 1]


FAULTS: dict[str, tuple[Fault, type[ChipbusError] | None]] = {
    "fail": (Fault(kind="fail"), CoreException),
    "die": (Fault(kind="die"), WorkerLost),
    "hang": (Fault(kind="hang"), SchedulerTimeout),
    "stop": (Fault(kind="stop"), SchedulerTimeout),
    "slow": (Fault(kind="slow", factor=3.0), None),
}


@pytest.mark.guarantee("W31")
@pytest.mark.parametrize("state", ["running", "queued", "closing"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_a_real_chip_ends_with_the_right_error_and_nothing_left(fault: str, state: str) -> None:
    planned, kind = FAULTS[fault]
    settings: dict[str, Any] = {"run_timeout_s": 0.7, "close_timeout_s": 3.0}
    with L3Worker(bump, devices=["null:0"], faults={0: [planned]}, **settings) as worker:
        handles = [worker.submit(bump, np.zeros(2, np.float32))]
        if state == "queued":
            handles.append(worker.submit(bump, np.zeros(2, np.float32)))
        if state != "closing":
            assert all(handle.wait(20.0) for handle in handles)
            assert (handles[0].error is None) == (kind is None)
            if kind is not None:
                assert isinstance(handles[0].error, kind)
                assert "run 1, task 0 (bump) on worker 0 (null:0)" in str(handles[0].error)
            if fault not in ("fail", "slow"):  # the next life has the same fault at its first launch
                eventually(lambda: worker.tree()[-1].restarts == 1, "the chip was replaced")
    report = worker.close()

    assert all(handle.done for handle in handles)
    assert report.left == ()


def test_an_allocation_the_chip_refuses_is_an_error_of_that_call_alone() -> None:
    with L3Worker(bump, devices=["null:0"], faults={0: [Fault(kind="refuse_alloc", dispatch=2)]}) as worker:
        x = worker.alloc_tensor((4,), "float32")
        with pytest.raises(MemoryExhausted, match=r"MEMORY_ALLOCATION \(207001\): worker 0"):
            worker.alloc_tensor((4,), "float32")
        worker.alloc_tensor((4,), "float32")
        worker.run(bump, x)


@pytest.mark.guarantee("W32")
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSTOP])
def test_a_chip_killed_or_stopped_from_outside_is_replaced_and_its_tensors_are_lost(signum: int) -> None:
    with L3Worker(bump, devices=["null:0"], run_timeout_s=0.7) as worker:
        x = worker.alloc_tensor((4,), "float32")
        os.kill(pid_of(worker), signum)
        with pytest.raises(KernelError):  # lost, timed out, or refused, by when the death is noticed
            run_until_refused(worker, x)
        with pytest.raises((InvalidArgs, DeviceUnusable, WorkerLost)):
            run_until_refused(worker, x)
        y = worker.alloc_tensor((4,), "float32")
        worker.run(bump, y)
        worker.free_tensor(x)
        assert worker.tree()[-1].restarts == 1


def test_a_start_that_fails_leaves_nothing() -> None:
    from chipbus.kernels import Param, Program

    strange = Program("strange", "no.such.kind", (), (Param("x", "float32", ("N",)),))

    with pytest.raises(KernelError, match=r"no\.such\.kind"):
        L3Worker([bump, strange], devices=["null:0", "null:1"])


@pytest.mark.guarantee("W33")
def test_when_the_supervisor_dies_the_worker_says_so_and_can_be_closed() -> None:
    with L3Worker(bump, devices=["null:0"]) as worker:
        os.kill(next(record.pid for record in worker.tree() if record.kind == "supervisor"), signal.SIGKILL)
        with pytest.raises(EngineDead, match="signal 9"):
            run_until_refused(worker, np.zeros(2, np.float32))
        with pytest.raises(EngineDead):
            worker.alloc_tensor((2,), "float32")


def test_close_from_several_threads_at_once_gives_each_the_same_report() -> None:
    worker = L3Worker(bump, devices=["null:0"])
    reports: list[Any] = []
    threads = [threading.Thread(target=lambda: reports.append(worker.close())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)

    assert len(reports) == 3
    assert all(report == reports[0] for report in reports)
    with pytest.raises(EngineClosed):
        worker.run(bump, np.zeros(2, np.float32))


@pytest.mark.guarantee("S27")
def test_a_chip_that_is_stuck_in_a_kernel_is_replaced_and_the_log_says_where(capfd: pytest.CaptureFixture[str]) -> None:
    with (
        L3Worker(bump, devices=["null:0"], faults={0: [Fault(kind="hang")]}, stall_timeout_s=0.5) as worker,
        pytest.raises(WorkerLost, match=r"ended with signal 9 \(SIGKILL\), busy without progress for 0\.5 s"),
    ):
        worker.run(bump, np.zeros(2, np.float32))

    said = capfd.readouterr().err
    assert "child.stalled" in said
    assert "kernels/null.py" in said


def test_close_is_refused_on_the_workers_own_threads() -> None:
    refused: list[BaseException] = []

    def try_close(worker: L3Worker) -> None:
        try:
            worker.close()
        except InvalidArgs as error:
            refused.append(error)

    with L3Worker(bump, devices=["null:0"]) as worker:
        worker.run(lambda orch: orch.submit_sub(try_close, worker))
        worker.run(lambda orch: try_close(worker))

    assert len(refused) == 2


def test_a_submitter_that_waits_for_its_turn_is_refused_when_the_worker_closes() -> None:
    outcomes: list[BaseException] = []
    planned = {0: [Fault(kind="hang")]}
    with L3Worker(bump, devices=["null:0"], faults=planned, close_timeout_s=1.0) as worker:

        def third() -> None:
            try:
                worker.submit(bump, np.zeros(2, np.float32))
            except EngineClosed as error:
                outcomes.append(error)

        handles = [worker.submit(bump, np.zeros(2, np.float32)) for _ in range(2)]
        thread = threading.Thread(target=third)
        thread.start()
        eventually(lambda: len(worker._core._queue) == 1, "the third submit waits")
        worker.close()
        thread.join(10)

    assert len(outcomes) == 1
    assert all(isinstance(handle.error, EngineClosed) for handle in handles)


def test_a_host_tensor_is_an_array_of_zeros_and_its_shape_and_dtype_are_checked() -> None:
    with L3Worker(bump, devices=["null:0"]) as worker:
        for dtype, kind in (("int32", np.int32), ("bfloat16", np.float32)):
            array = worker.host_tensor((2, 3), dtype)
            assert (array.shape, array.dtype, array.any()) == ((2, 3), kind, False)
        for shape, dtype in (((2, -1), "int32"), ((2,), "int33")):
            with pytest.raises(InvalidArgs, match="host_tensor"):
                worker.host_tensor(shape, dtype)


def test_a_worker_that_is_forgotten_is_closed() -> None:
    worker = L3Worker(bump, devices=["null:0"])
    worker.run(bump, np.zeros(2, np.float32))
    assert our_processes()

    del worker
    gc.collect()

    eventually(lambda: our_processes() == set(), "its processes are gone")


def test_a_forked_copy_can_neither_use_nor_close_the_worker() -> None:
    with L3Worker(bump, devices=["null:0"]) as worker:
        pid = os.fork()
        if not pid:
            refused = 0
            for call in (worker.close, lambda: worker.run(bump, np.zeros(2, np.float32))):
                try:
                    call()
                except EngineClosed:
                    refused += 1
            os._exit(refused)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 2
        worker.run(bump, np.zeros(2, np.float32))


def test_many_threads_run_and_wait_at_once() -> None:
    arrays = [np.zeros(4, np.float32) for _ in range(4)]
    with L3Worker(bump, devices=["null:0", "null:1"], depth=3) as worker:
        x = worker.alloc_tensor((4,), "float32")

        def work(array: Any) -> None:
            for turn in range(25):
                if turn % 5 == 0:
                    y = worker.alloc_tensor((4,), "float32", init=array)
                    worker.copy_from(y)
                    worker.free_tensor(y)
                worker.run(bump, array, worker=turn % 2)
                worker.submit(bump, x)

        threads = [threading.Thread(target=work, args=(array,)) for array in arrays]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads)
        worker.copy_from(x)


def test_the_processes_end_with_the_host_application() -> None:
    code = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from l3_programs import bump
from chipbus.actors.l3 import L3Worker, RunConfig
worker = L3Worker(bump, devices=["null:0"])
print(*(record.pid for record in worker.tree()), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(ROOT / "tests")], capture_output=True, text=True, timeout=30, check=False
    )

    pids = [int(word) for word in done.stdout.split()]
    assert len(pids) == 2
    eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), "supervisor and chip are gone")


def test_prefill_and_decode_share_a_cache_on_one_worker() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "multi_program_kv.py")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd="/",
    )

    assert done.returncode == 0, done.stderr
    assert "equal to a full recomputation of each" in done.stdout


@pytest.mark.guarantee("W35")
def test_a_recorded_worker_replays_and_what_a_dispatch_was_given_can_be_written_down(tmp_path: Path) -> None:
    a, b, out = np.arange(9, dtype=np.float32), np.ones(9, np.float32), np.zeros(9, np.float32)
    with L3Worker([add, bump], devices=["cpu:0"], threads=1, record=tmp_path / "run") as worker:
        kept = worker.alloc_tensor((9,), "float32", init=b)
        worker.run(bump, kept)
        worker.run(add, a, kept, out)

    outcome = replay_dispatches(open_record(tmp_path / "run"), dump=Dump(directory=tmp_path / "dump", level="values"))

    assert outcome.difference is None
    assert outcome.dispatches == 2
    second = tmp_path / "dump" / "chip.0.1" / "000002_add"
    for name, array in (("00_a", a), ("01_b", b + 1), ("02_out", out)):
        assert np.load(second / f"{name}.npy").tolist() == array.tolist()
    assert out.tolist() == (a + b + 1).tolist()
    with pytest.raises(ConfigError, match="a directory of its own"):
        L3Worker(bump, devices=["null:0"], record=tmp_path / "run")


@pytest.mark.guarantee("W36")
def test_a_run_with_a_timeline_tells_what_each_launch_did_on_its_chip() -> None:
    a, out = np.arange(9, dtype=np.float32), np.zeros(9, np.float32)
    with L3Worker([add, bump], devices=["cpu:0"], threads=1) as worker:
        timed = worker.submit(add, a, a, out, config=RunConfig(timeline=True))
        timed.result()
        [graph] = timed.chip_graphs()
        plain = worker.submit(bump, out)
        plain.result()
        none = plain.chip_graphs()

    assert [task.label for task in graph.tasks] == ["add_tiles"] * 3
    times = [(task.begin_ns, task.end_ns) for task in graph.tasks]
    assert all(begin is not None and end is not None and begin <= end for begin, end in times)
    assert none == ()
