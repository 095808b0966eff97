"""A captured graph, with the times of one launch of it, as a run.

Owns nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import reduce

import attrs
import numpy as np

from ...errors import ConfigError
from ..dispatch import Completion
from ..engine import TaskState
from ..graph import Buffer, TaskGraph
from .hazards import with_reasons
from .run_graph import Edge, Memory, Operand, RunGraph, RunTask, run_graph_from_json

__all__ = ["run_of_capture", "run_of_launch", "run_of_launches", "with_times"]


def run_of_capture(graph: TaskGraph) -> RunGraph:
    """The graph as a run on one core that was not timed."""
    places = {buffer.index: at for at, buffer in enumerate(graph.buffers)}
    return with_reasons(
        RunGraph(
            name=graph.name,
            memory=tuple(_memory(buffer) for buffer in graph.buffers),
            tasks=tuple(
                RunTask(
                    label=task.kernel,
                    lane="core.0",
                    operands=tuple(
                        Operand(tag, places[tile.buffer.index], tile.offset, tile.shape, tile.strides)
                        for tag, tile in task.args
                    ),
                )
                for task in graph.tasks
            ),
            edges=tuple(Edge(before, after) for before, after in sorted(graph.edges)),
            high_water=graph.high_water,
            scopes=graph.scopes,
        )
    )


def run_of_launch(completion: Completion, describe: Callable[[str], str]) -> RunGraph:
    """What one launch with ``LaunchConfig.timeline`` did on its chip; ``describe`` is the chip's.

    A launch that ran several graphs, or one several times, is one run: a window's tasks after those of the one before.
    Raises ``ConfigError`` if the completion has no timeline.
    """
    if not completion.graph:
        raise ConfigError(f"dispatch {completion.dispatch_id} was launched without timeline")
    names = completion.graph.split(" ")
    runs = {name: run_graph_from_json(describe(name).encode()) for name in dict.fromkeys(names)}
    joined = runs[names[0]]
    for name in names[1:]:
        joined = _joined(joined, runs[name])
    return with_times(joined, completion.task_times, completion.task_cores)


def run_of_launches(name: str, launches: Iterable[tuple[int, Completion]], describe: Callable[[str], str]) -> RunGraph:
    """Launches one after another as one run, each with the ns at which it began; those that ran no graph have no part.

    Raises ``ConfigError`` if none ran one, or without ``LaunchConfig.timeline``.
    """
    runs = [_later(run_of_launch(completion, describe), at) for at, completion in launches if completion.graph]
    if not runs:
        raise ConfigError(f"{name}: no launch has a timeline")
    return attrs.evolve(reduce(_joined, runs), name=name)


def _later(run: RunGraph, ns: int) -> RunGraph:
    tasks = (
        attrs.evolve(task, begin_ns=ns + (task.begin_ns or 0), end_ns=ns + (task.end_ns or 0)) for task in run.tasks
    )
    return attrs.evolve(run, tasks=tuple(tasks))


def _joined(first: RunGraph, second: RunGraph) -> RunGraph:
    shift = len(first.memory)
    tasks = (
        attrs.evolve(task, operands=tuple(attrs.evolve(one, memory=one.memory + shift) for one in task.operands))
        for task in second.tasks
    )
    count = len(first.tasks)
    edges = (Edge(edge.before + count, edge.after + count, edge.reasons) for edge in second.edges)
    return attrs.evolve(
        first,
        memory=first.memory + second.memory,
        tasks=(*first.tasks, *tasks),
        edges=(*first.edges, *edges),
    )


def with_times(run: RunGraph, task_times: bytes, task_cores: bytes = b"") -> RunGraph:
    """The run as one launch of it went: ``Completion.task_times``, a pair of int64 ns per task, and ``task_cores``.

    Where cores are not told all tasks were on one. Raises ``ConfigError`` if there are not as many as tasks.
    """
    if len(task_times) != 16 * len(run.tasks):
        raise ConfigError(f"run {run.name} has {len(run.tasks)} tasks; {len(task_times)} bytes of times given")
    if len(task_cores) not in (0, 2 * len(run.tasks)):
        raise ConfigError(f"run {run.name} has {len(run.tasks)} tasks; {len(task_cores)} bytes of cores given")
    times = np.frombuffer(task_times, "<i8").reshape(-1, 2).tolist()
    cores = np.frombuffer(task_cores or bytes(2 * len(run.tasks)), "<i2").tolist()
    tasks = (
        attrs.evolve(task, lane=f"core.{core}", begin_ns=begin, end_ns=end, state=TaskState.COMPLETED)
        for task, (begin, end), core in zip(run.tasks, times, cores, strict=True)
    )
    return attrs.evolve(run, clock="wall", tasks=tuple(tasks))


def _memory(buffer: Buffer) -> Memory:
    if buffer.place is None:
        return Memory(buffer.name, buffer.dtype, buffer.shape, buffer.name)
    ring, offset = buffer.place
    return Memory(buffer.name, buffer.dtype, buffer.shape, f"heap.{ring}", offset)
