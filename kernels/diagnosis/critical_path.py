"""How long a run must take at least, which tasks make it so long, and how much later each other one could have ended.

Owns nothing. Cores without number are assumed: what is on the path can only be made faster, never moved aside.
"""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from ..engine import TaskState
from .run_graph import RunGraph

__all__ = ["CriticalPath", "critical_path", "scheduled"]


@attrs.frozen
class CriticalPath:
    """The longest chain of tasks that wait for one another."""

    tasks: tuple[int, ...]
    length_ns: int
    slack_ns: tuple[int, ...]
    """Per task of the run, by how much it may be longer before the path gets longer; 0 on the path."""


def critical_path(graph: RunGraph, durations_ns: Sequence[int] | None = None) -> CriticalPath:
    """By the measured durations, or by those given, one per task. Of equal chains, that through the lowest indices."""
    took = [task.duration_ns for task in graph.tasks] if durations_ns is None else durations_ns
    before = graph.predecessors()
    ends: list[int] = []  # earliest, per task
    for task, waits_for in enumerate(before):
        ends.append(max((ends[other] for other in waits_for), default=0) + took[task])
    length = max(ends, default=0)
    latest = [length] * len(took)
    for task in reversed(range(len(took))):
        for other in before[task]:
            latest[other] = min(latest[other], latest[task] - took[task])
    path: list[int] = []
    task = next((task for task, end in enumerate(ends) if end == length), -1)
    while task >= 0:
        path.append(task)
        start = ends[task] - took[task]
        task = next((other for other in before[task] if ends[other] == start), -1)
    slack = tuple(late - early for late, early in zip(latest, ends, strict=True))
    return CriticalPath(tuple(reversed(path)), length, slack)


def scheduled(graph: RunGraph, durations_ns: Sequence[int], cores: int = 1) -> RunGraph:
    """The run as ``cores`` cores would do it that take tasks in submission order, each as soon as it may start.

    A model of time, for a graph that did not run: ``clock`` is "modelled", lanes are "core.0" and so on.
    """
    free = [0] * cores
    ends: list[int] = []
    tasks = []
    for task, waits_for, took in zip(graph.tasks, graph.predecessors(), durations_ns, strict=True):
        core = min(range(cores), key=free.__getitem__)
        begin = max([free[core], *(ends[other] for other in waits_for)])
        free[core] = begin + took
        ends.append(begin + took)
        tasks.append(
            attrs.evolve(task, lane=f"core.{core}", begin_ns=begin, end_ns=begin + took, state=TaskState.COMPLETED)
        )
    return attrs.evolve(graph, clock="modelled", tasks=tuple(tasks))
