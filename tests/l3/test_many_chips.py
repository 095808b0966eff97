"""Chips of one worker side by side: none waits for another's trouble, there may be more than cores, ends are quick."""

from __future__ import annotations

import os
import signal
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from l3_local import BUMP, LocalWorker, Plan
from l3_programs import bump

from chipbus.actors.l3 import L3Worker
from chipbus.errors import WorkerLost
from chipbus.kernels.engine import TaskState
from chipbus.kernels.faults import Fault
from support import descriptors, eventually, our_processes


@pytest.mark.parametrize("kind", ["launch", "alloc"])
@pytest.mark.guarantee("D12")
def test_a_slow_launch_or_command_holds_up_no_other_chip(kind: str) -> None:
    worker = LocalWorker(chips=2, plans={"chip.0": Plan("slow", kind)})
    y = worker.alloc_tensor((2,), "float32", worker_id=1)
    began_ns = worker.system.clock.now_ns()

    def beside(orch: Any) -> None:
        if kind == "launch":
            orch.submit_next_level(BUMP, np.zeros(2, np.float32), worker=0)
        else:
            orch.deferred("d", (2,), "float32", worker=0)
        for _ in range(5):
            orch.submit_next_level(BUMP, y, worker=1)

    handle = worker.submit(beside)
    handle.result()

    ends_ns = [task.end_ns or 0 for task in handle.graph().tasks if task.lane == "chip.1"]
    assert len(ends_ns) == 5
    assert max(ends_ns) < 1e9
    assert worker.system.clock.now_ns() - began_ns > 2e9
    worker.check_nothing_leaks()


def test_a_group_that_cannot_start_for_five_seconds_is_told_with_what_it_waits_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    worker = LocalWorker(chips=2, plans={"chip.0": Plan("hang", "launch")})

    def blocked(orch: Any) -> None:
        for _ in range(2):  # launch messages, as many as chip 0 may have under way
            orch.submit_next_level(BUMP, np.zeros(2, np.float32), worker=0)
            orch.flush()
            worker.pass_time(0.01)
        orch.submit_group(BUMP, [[np.zeros(2, np.float32)] for _ in range(2)], workers=[0, 1])

    told: list[tuple[str, dict[str, Any]]] = []
    log = SimpleNamespace(warning=lambda event, **facts: told.append((event, facts)))
    monkeypatch.setattr(worker.core.dispatcher.ctx, "log", log)
    handle = worker.submit(blocked)
    worker.pass_time(4.9)
    assert told == []
    worker.pass_time(0.3)
    assert told == [("group.stalled", {"group": "bump", "waits_for": ["worker 0 (null:0)"], "seconds": 5.0})]
    monkeypatch.undo()
    assert handle.wait(100)


def test_committed_memory_is_told_per_chip() -> None:
    worker = LocalWorker(chips=2)
    before = [worker.committed_device_memory(chip) for chip in range(2)]
    x = worker.alloc_tensor((1000,), "float32", worker_id=1)
    assert [worker.committed_device_memory(chip) for chip in range(2)] == [before[0], before[1] + 4000]
    worker.free_tensor(x)
    worker.pass_time(1.0)
    assert [worker.committed_device_memory(chip) for chip in range(2)] == before


@pytest.mark.slow
@pytest.mark.guarantee("D13")
def test_more_null_chips_than_cores_each_do_their_share() -> None:
    chips = 3 * len(os.sched_getaffinity(0)) + 2
    arrays = [np.zeros(4, np.float32) for _ in range(chips)]
    with L3Worker(bump, devices=[f"null:{chip}" for chip in range(chips)]) as worker:

        def everywhere(orch: Any) -> None:
            for _ in range(10):
                for chip, array in enumerate(arrays):
                    orch.submit_next_level(bump, array, worker=chip)

        handle = worker.submit(everywhere)
        handle.result(timeout=30)
        run = handle.graph()
        assert [sum(task.lane == f"chip.{chip}" for task in run.tasks) for chip in range(chips)] == [10] * chips
    eventually(lambda: our_processes() == set(), "every process is gone")


@pytest.mark.slow
@pytest.mark.guarantee("D14")
def test_a_killed_chip_fails_what_it_had_in_flight_at_once_and_not_at_a_deadline() -> None:
    before = descriptors()
    with L3Worker(bump, devices=["null:0", "null:1"], faults={0: [Fault(kind="hang")]}, run_timeout_s=3600) as worker:
        for _ in range(2):
            handle = worker.submit(bump, np.zeros(2, np.float32))
            eventually(
                lambda handle=handle: any(task.state is TaskState.RUNNING for task in handle.graph().tasks),
                "the launch is on its way",
            )
            pid = next(record.pid for record in worker.tree() if record.name == "chip.0")
            os.kill(pid, signal.SIGKILL)
            assert handle.wait(10)
            assert isinstance(handle.error, WorkerLost)
        worker.run(bump, np.zeros(2, np.float32), worker=1)
    eventually(lambda: our_processes() == set(), "every process is gone")
    assert descriptors() <= before
