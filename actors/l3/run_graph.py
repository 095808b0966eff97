"""A run of an L3 worker as the record that ``kernels.diagnosis`` reads.

Owns nothing.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from ...kernels.diagnosis import Edge, Memory, Operand, RunGraph, RunTask, with_reasons
from ...kernels.engine import HeapBlock, TaskState
from .runs import Run, Task, TaskKind

__all__ = ["run_graph"]


def run_graph(run: Run, devices: Sequence[str]) -> RunGraph:
    """Tasks in order of submission, a group as one; times in ns since the run's first launch. Any thread."""
    with run.lock:
        began_ns = min((task.began_ns or task.sent_ns for task in run.tasks if task.sent_ns), default=0)
        memory: dict[tuple[str, int, int], int] = {}
        tasks = tuple(_task(run, task, devices, began_ns, memory) for task in run.tasks)
        numbers = {task.id: task.number for task in run.tasks}
        edges = tuple(
            Edge(numbers[before], task.number)
            for task in run.tasks
            for before in sorted(task.before, key=numbers.get)  # type: ignore[arg-type]
        )
        found = RunGraph(
            name=f"run {run.number} of {run.name}",
            clock="wall",
            memory=tuple(
                Memory(f"{space}[{begin}:{end}]", "uint8", (end - begin,), space, begin) for space, begin, end in memory
            ),
            tasks=tasks,
            edges=edges,
            rings=run.sizes,
            high_water=run.engine.high_water(),
            scopes=run.engine.scopes,
            errors=tuple(map(str, run.errors)),
        )
    return with_reasons(found)


def _task(
    run: Run, task: Task, devices: Sequence[str], began_ns: int, memory: dict[tuple[str, int, int], int]
) -> RunTask:
    operands = []
    for access in task.accesses:
        for begin, end in access.ranges:
            place = memory.setdefault((_space(access.space), begin, max(begin, end)), len(memory))
            operands.append(Operand(access.tag, place, 0, (end - begin,), (1,)))
    lane = "host"
    if task.kind is TaskKind.CHIP:
        lane = f"chip.{task.members[0].worker}"
    elif task.kind is TaskKind.GROUP:
        lane = "+".join(f"chip.{member.worker}" for member in task.members)
    elif task.kind is TaskKind.SUB:
        lane = "sub"
    was_run = task.is_over and task.is_started
    return RunTask(
        label=task.label,
        lane=lane,
        operands=tuple(operands),
        state=_state(run, task),
        begin_ns=(task.began_ns or task.sent_ns) - began_ns if was_run else None,
        end_ns=task.ended_ns - began_ns if was_run else None,
        ring=task.id >> 32,
        error="" if task.error is None else str(task.error),
    )


def _state(run: Run, task: Task) -> TaskState:
    if task.is_over:
        return TaskState.COMPLETED if task.error is None else TaskState.FAILED
    return TaskState.RUNNING if task.is_sent else run.engine.state(task.id)


def _space(space: Hashable) -> str:
    if isinstance(space, HeapBlock):
        return f"heap.{space.ring}@{space.position}"
    if isinstance(space, tuple):
        worker, address = space
        return f"chip.{worker} tensor {address}"
    return str(space)
