"""Tile programs on a null chip: the graph of a real chip, modelled times, known numbers, and faults on demand."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from typing import Any

import attrs
import numpy as np
import pytest
import tile_programs as programs

from chipbus.errors import ConfigError, CoreException, HeapRingDeadlock, KernelError, MemoryExhausted
from chipbus.kernels.chips import open_chip
from chipbus.kernels.cpu import CpuChip
from chipbus.kernels.dispatch import Arg, Completion, Dispatch, LaunchConfig
from chipbus.kernels.faults import Fault
from chipbus.kernels.null import CostTable, NullChip
from chipbus.kernels.null_tiles import null_values
from chipbus.kernels.program import TensorSpec
from chipbus.kernels.tiles import TileProgram
from chipbus.topology.rings import most_of

X = np.arange(35, dtype=np.float32).reshape(5, 7)
TIMED = LaunchConfig(timeline=True)


def launch(chip: Any, made: TileProgram, *args: Arg, config: LaunchConfig | None = None) -> Completion:
    chip.register(made.program)
    dispatch = Dispatch(dispatch_id=3, step_id=1, program=made.program.digest, args=args, config=config)
    completion: Completion = chip.launch(dispatch, digest=True)
    return completion


def staged(chip: Any, **more: Any) -> Completion:
    return launch(chip, programs.staged, Arg.of(X), Arg.out("float32", X.shape), **more)


def test_the_graph_is_that_of_the_cpu_chip() -> None:
    null, cpu = NullChip(), CpuChip(1)
    completions = [staged(chip, config=TIMED) for chip in (null, cpu)]
    assert completions[0].graph == completions[1].graph
    assert null.describe(completions[0].graph) == cpu.describe(completions[1].graph)
    with pytest.raises(HeapRingDeadlock, match="dispatch 3 of staged: ring 0"):
        staged(null, config=LaunchConfig(heap=(1024,) * 4))


@pytest.mark.guarantee("P10")
def test_time_is_a_launch_and_its_tasks_one_after_another() -> None:
    cost = CostTable(launch_ns=1000, task_ns=10, bytes_per_s=1e9)
    completion = staged(NullChip(cost=cost), config=TIMED)
    first, last = 10 + 2 * 3 * 7 * 4, 10 + 2 * 2 * 7 * 4  # two tiles of 3, then of 2 rows
    times = np.frombuffer(completion.task_times, "<i8").reshape(-1, 2)
    assert (times[:, 1] - times[:, 0]).tolist() == [first, first, last, last]
    assert times[0, 0] == 1000
    assert times[-1, 1] == completion.device_ns == 1000 + 2 * first + 2 * last
    assert staged(NullChip(cost=cost)).task_times == b""


def test_arithmetic_counts_where_it_is_known() -> None:
    slow = CostTable(launch_ns=0, task_ns=0, bytes_per_s=1e18, flop_per_s=1e9)
    args = [np.ones(shape, np.float32) for shape in ((4, 8), (8,), (3, 8))]
    completion = launch(NullChip(cost=slow), programs.normed_product, *map(Arg.of, args), Arg.out("float32", (4, 3)))
    assert completion.device_ns == 2 * 4 * 8 * 3


@pytest.mark.guarantee("P11")
def test_numbers_are_known_and_depend_on_all_that_is_read() -> None:
    chip = NullChip()
    chip.alloc(TensorSpec(1, "float32", (5, 7)))
    (y,) = staged(chip).outputs
    assert y.data == null_values("staged", "y", [X.tobytes()], "float32", (5, 7))
    launch(chip, programs.staged, Arg.of(X), Arg(resident=1))
    assert chip.copy_from(1).data == y.data
    assert launch(chip, programs.staged.with_settings(tile=1), y, Arg.out("float32", (5, 7))).outputs != (y,)
    assert launch(chip, programs.staged.with_settings(tile=1), Arg.of(X), Arg.out("float32", (5, 7))).outputs == (y,)
    launch(chip, programs.add_up, y, Arg(resident=1))  # INOUT: its old content counts
    assert chip.copy_from(1).data == null_values("add_up", "total", [y.data, y.data], "float32", (5, 7))
    for dtype in ("uint8", "int32", "int64", "float16", "float32", "float64", "bfloat16"):
        values = Arg(dtype=dtype, shape=(20,), data=null_values("p", "y", [b"x"], dtype, (20,))).numpy()
        assert values.astype(int).tolist() == Arg.of(values).numpy().astype(int).tolist()
        assert values[:4].tolist() == values[16:].tolist()
        assert 0 <= values.min() <= values.max() <= 255


def test_equal_commands_give_equal_completions() -> None:
    assert staged(NullChip(), config=TIMED) == staged(NullChip(), config=TIMED)


def test_a_task_fails_by_name_and_nothing_is_written() -> None:
    chip = NullChip([Fault(kind="fail", task=2)])
    chip.alloc(TensorSpec(1, "float32", (5, 7)))
    with pytest.raises(CoreException, match=r"dispatch 3 of staged: task 2 of staged\[M=5,N=7\] \(scale\): injected"):
        launch(chip, programs.staged, Arg.of(X), Arg(resident=1))
    assert not chip.copy_from(1).numpy().any()
    launch(chip, programs.staged, Arg.of(X), Arg(resident=1))
    assert chip.copy_from(1).numpy().any()


@pytest.mark.guarantee("P12")
def test_a_corrupted_tile_is_wrong_in_one_byte_and_told() -> None:
    plain = staged(NullChip())
    for task, byte in ((None, 0), (0, 0), (1, 0), (2, 3 * 7 * 4), (99, 3 * 7 * 4)):
        wrong = staged(NullChip([Fault(kind="corrupt", task=task)]))
        ours, theirs = (np.frombuffer(completion.outputs[0].data, np.uint8) for completion in (wrong, plain))
        assert np.flatnonzero(ours != theirs).tolist() == [byte]
        assert wrong.digests != plain.digests
        assert wrong.fault == "corrupt" + (f" at task {task}" if task is not None else "")
    assert plain.fault == ""


def test_a_slow_task_or_launch_takes_its_factor() -> None:
    plain = staged(NullChip())
    base = CostTable()
    one = (plain.device_ns - base.launch_ns) // 4
    task = staged(NullChip([Fault(kind="slow", task=0, factor=100)]))
    whole = staged(NullChip([Fault(kind="slow", factor=100)]))
    assert plain.device_ns + 90 * one < task.device_ns < whole.device_ns
    assert (task.fault, whole.fault) == ("slow at task 0 by 100", "slow by 100")


def test_a_task_hangs_until_the_chip_is_closed() -> None:
    chip = NullChip([Fault(kind="hang", task=1)])
    ended: list[str] = []

    def run() -> None:
        try:
            staged(chip)
        except KernelError as error:
            ended.append(str(error))

    thread = threading.Thread(target=run)
    thread.start()
    chip.close()
    thread.join(5)
    assert not thread.is_alive()
    assert len(ended) == 1


def test_dying_and_stopping_are_what_the_process_does(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[object] = []
    monkeypatch.setattr(os, "_exit", done.append)
    monkeypatch.setattr(signal, "raise_signal", done.append)
    assert staged(NullChip([Fault(kind="stop", task=1), Fault(kind="die", task=2)])).fault
    assert done == [signal.SIGSTOP, 13]


def test_memory_is_refused_by_fault_or_by_capacity() -> None:
    chip = open_chip("null:0", 1, [Fault(kind="refuse_alloc", dispatch=2)])
    chip.alloc(TensorSpec(1, "float32", (4,)))
    with pytest.raises(MemoryExhausted, match=r"resident 2 of uint8 .* is refused: injected fault at allocation 2"):
        chip.alloc(TensorSpec(2, "uint8", (4,)))
    chip.alloc(TensorSpec(2, "uint8", (4,)))
    assert chip.resident_bytes == 20
    small = NullChip(memory_bytes=100)
    small.alloc(TensorSpec(1, "float32", (20,)))
    with pytest.raises(MemoryExhausted, match=r"resident 2 of uint8 \[21\] needs 21 bytes; 20 are free"):
        small.alloc(TensorSpec(2, "uint8", (21,)))
    small.free(1)
    small.alloc(TensorSpec(2, "uint8", (100,)))


@pytest.mark.guarantee("P13")
def test_a_schedule_of_faults_is_its_seed() -> None:
    first = Fault.schedule(7, launches=100, count=10, kinds=("fail", "slow", "hang"), tasks=5)
    assert first == Fault.schedule(7, launches=100, count=10, kinds=("fail", "slow", "hang"), tasks=5)
    assert first != Fault.schedule(8, launches=100, count=10, kinds=("fail", "slow", "hang"), tasks=5)
    assert len({fault.dispatch for fault in first}) == 10
    assert all(1 <= fault.dispatch <= 100 and fault.task in range(5) for fault in first)
    assert all(fault.task is None for fault in Fault.schedule(7, launches=3, count=3))
    for wrong in (
        lambda: Fault.schedule(1, launches=3, count=4),
        lambda: Fault(kind="slow", factor=0),
        lambda: Fault(kind="fail", task=-1),
        lambda: Fault(kind="refuse_alloc", task=1),
    ):
        with pytest.raises(ConfigError):
            wrong()


@pytest.mark.guarantee("M28")
@pytest.mark.parametrize("open_it", [NullChip, lambda: CpuChip(1)])
def test_a_chip_tells_the_most_that_any_of_its_graphs_has_held_of_each_ring(open_it: Callable[[], Any]) -> None:
    chip = open_it()
    assert chip.rings == ()
    small, large = np.zeros((5, 7), np.float32), np.zeros((50, 7), np.float32)
    held = []
    for rows in (small, large, small):
        launch(chip, programs.staged, Arg.of(rows), Arg.out("float32", rows.shape))
        held.append(chip.rings)
    chip.unregister(programs.staged.program.digest)

    assert len(held[0]) == 4
    assert held[1] != held[0]
    assert held[2] == held[1] == chip.rings
    for before, after in zip(held[0], held[1], strict=True):
        assert attrs.astuple(most_of(before, after)) == attrs.astuple(after)
