"""What a launch took of its chip is counted, the same by either engine, and where each task ran is told on request."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import attrs
import msgspec
import numpy as np
import pytest
from kernel_runs import LIMITS, RunningModel, table
from native_runs import ENGINES, ISAS

from chipbus.kernels.cpu import CpuChip
from chipbus.kernels.diagnosis import run_graph_from_json, run_of_launch, to_trace_events
from chipbus.kernels.dispatch import Completion, LaunchConfig, Usage
from chipbus.kernels.qwen3.rows import plan_rows
from chipbus.kernels.qwen3.step import DecodeRow, PrefillRow, SampleRow

LAYER = 256 * 64 + 64 * 128 + 3 * 128 * 64  # elements of a layer's matrices, of the checkpoint "tied"
POSITION = 2 * 2 * 2 * 32 * 2  # bytes: keys and values, layers, heads, dims, bf16
VOCABULARY = 515


def model(checkpoint: Path, isa: str, threads: int) -> RunningModel:
    return RunningModel(checkpoint, "bfloat16", chip=CpuChip(threads, isa=isa))


@pytest.mark.parametrize("isa", ENGINES)
@pytest.mark.guarantee("K55")
def test_a_launch_counts_its_tasks_the_time_of_its_cores_and_what_it_read(
    isa: str, checkpoint: Callable[[str], Path]
) -> None:
    running = model(checkpoint("tied"), isa, 2)
    prompts = tuple(
        PrefillRow(tokens=np.ones(length, np.int32), start=0, block_table=table(*range(8 * row, 8 * row + 8)), row=row)
        for row, length in enumerate((10, 70))
    )
    running.step(prefills=prompts)
    decodes = [
        DecodeRow(token=1, position=length, block_table=prompt.block_table, row=row)
        for row, (prompt, length) in enumerate(zip(prompts, (10, 70), strict=True))
    ]
    running.step(decodes=decodes, samples=[SampleRow(row=0)])

    prefill, decode, _, head, sample = (completion.usage for completion in running.completions)
    matrices = 2 * LAYER * 2
    assert prefill.bytes_read == matrices + 80 * POSITION
    assert decode.bytes_read == matrices + (11 + 71) * POSITION
    assert VOCABULARY * 64 * 2 <= head.bytes_read <= (VOCABULARY + 63) * 64 * 2  # panels of 64
    assert sample == Usage()
    for completion in running.completions[:-1]:
        usage = completion.usage
        assert usage.tasks > 0
        assert len(usage.busy_ns) == (1 if isa == "none" else 2)
        assert sum(usage.busy_ns) > 0
        assert max(usage.busy_ns) <= usage.run_ns <= completion.device_ns
        assert all(0 <= share <= 1 for share in usage.busy_shares)
    timed = running.chip.launch(attrs.evolve(running.dispatches[1], config=LaunchConfig(timeline=True)))
    assert (
        timed.usage.tasks == decode.tasks == len(run_graph_from_json(running.chip.describe(timed.graph).encode()).tasks)
    )
    running.chip.close()


@pytest.mark.parametrize("isa", ENGINES)
def test_a_prompt_of_several_windows_reads_weights_and_context_once_in_each(
    isa: str, checkpoint: Callable[[str], Path]
) -> None:
    running = model(checkpoint("tied"), isa, 1)
    pages = np.arange(128, dtype=np.int32)
    for row in range(2):
        prompt = PrefillRow(
            tokens=np.ones(1000, np.int32), start=0, block_table=pages[64 * row : 64 * row + 64], row=row
        )
        running.step(prefills=[prompt])
    both = [
        PrefillRow(tokens=np.ones(20, np.int32), start=1000, block_table=pages[64 * row : 64 * row + 64], row=row)
        for row in range(2)
    ]
    running.step(prefills=both)
    first, _, last = (completion.usage.bytes_read for completion in running.completions)
    assert first == 2 * LAYER * 2 + 1000 * POSITION
    assert last == 2 * LAYER * 2 + 2 * 1020 * POSITION
    running.chip.close()


def test_the_context_of_a_window_is_that_of_its_own_tokens() -> None:
    static = attrs.asdict(LIMITS) | {"vocab_size": 9}
    lengths, starts = np.array([3, 1, 4], np.int32), np.array([0, 7, 2], np.int32)
    tables = np.array([[0], [1], [2]], np.int32)
    plan = plan_rows("here", static, np.ones(8, np.int32), starts, lengths, tables, np.arange(3, dtype=np.int32))
    ends = [[start + at + 1 for at in range(length)] for start, length in zip(starts, lengths, strict=True)]
    for begin, end in itertools.combinations(range(9), 2):
        tokens = [(row, last) for row, own in enumerate(ends) for last in own][begin:end]
        assert plan.context(begin, end) == sum(dict(tokens).values())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.guarantee("K56")
def test_a_launch_with_a_timeline_tells_the_core_of_each_task_and_its_trace_has_a_row_per_core(
    isa: str, checkpoint: Callable[[str], Path]
) -> None:
    running = model(checkpoint("tied"), isa, 3)
    prompt = PrefillRow(tokens=np.ones(500, np.int32), start=0, block_table=table(*range(32)), row=0)
    running.step(prefills=[prompt])
    timed = running.chip.launch(attrs.evolve(running.dispatches[0], config=LaunchConfig(timeline=True)))
    run = run_of_launch(timed, running.chip.describe)
    running.chip.close()

    cores = np.frombuffer(timed.task_cores, "<i2").tolist()
    assert [task.lane for task in run.tasks] == [f"core.{core}" for core in cores]
    assert {0} <= set(cores) <= {0, 1, 2}
    events = json.loads(to_trace_events(run))["traceEvents"]
    rows = {event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert rows == {f"core.{core}" for core in cores}  # tasks of one core never overlap


def test_usages_add_up() -> None:
    one = Usage(tasks=2, run_ns=10, busy_ns=(4, 6), bytes_read=100)
    assert one + Usage() == Usage() + one == one
    assert one + Usage(tasks=1, run_ns=30, busy_ns=(16,), bytes_read=1) == Usage(
        tasks=3, run_ns=40, busy_ns=(20, 6), bytes_read=101
    )
    assert one.busy_shares == (0.4, 0.6)
    assert Usage().busy_shares == ()


def test_a_completion_recorded_before_usage_was_counted_is_read() -> None:
    fields = msgspec.msgpack.decode(msgspec.msgpack.encode(Completion(dispatch_id=3, device_ns=5)))
    del fields["usage"]
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(fields), type=Completion).usage == Usage()
