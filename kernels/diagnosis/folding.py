"""Makes a large run small enough to look at: tasks that repeat in the same order become one node that counts them.

Owns nothing. A model of 28 equal layers folds into the tasks of one layer, marked "28 ×".
"""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import numpy as np
from numpy.typing import NDArray

from .run_graph import RunGraph

__all__ = ["Folded", "Repeat", "fold"]

_LONGEST_PERIOD = 2048  # tasks; longer blocks would be no clearer when folded
_LONGEST_RUN = 8  # tasks alike one after another that are still drawn one by one


@attrs.frozen
class Repeat:
    """Nodes ``first`` to ``last``, both included, stand for ``count`` copies of such a block, one after another."""

    first: int
    last: int
    count: int


@attrs.frozen
class Folded:
    """Nodes in submission order, each the tasks it stands for; repeats are disjoint or nested."""

    nodes: tuple[tuple[int, ...], ...]
    repeats: tuple[Repeat, ...] = ()


def fold(graph: RunGraph, limit: int) -> Folded:
    """Fold until at most ``limit`` nodes are left or nothing repeats; long runs of tasks that are alike in any case.

    Tasks are alike by label, tags and shapes.
    """
    kinds: dict[object, int] = {}
    nodes: list[tuple[int, ...]] = []
    alike: list[int] = []
    for index, task in enumerate(graph.tasks):
        looks = (task.label, tuple((operand.tag, operand.shape) for operand in task.operands))
        nodes.append((index,))
        alike.append(kinds.setdefault(looks, len(kinds)))
    repeats: list[Repeat] = []
    while True:
        start, period, count = _best_repeat(np.array(alike))
        is_run = period == 1 and count > _LONGEST_RUN
        if count < 2 or (len(nodes) <= limit and not is_run):
            break
        end = start + period * count
        merged = [
            tuple(sorted(task for copy in range(count) for task in nodes[start + copy * period + at]))
            for at in range(period)
        ]
        # A node that counts tasks is like another only if it counts as many.
        marks = [kinds.setdefault((alike[start + at], count), len(kinds)) for at in range(period)]
        nodes[start:end], alike[start:end] = merged, marks
        removed = period * (count - 1)
        repeats = [moved for repeat in repeats if (moved := _moved(repeat, start, period, end, removed))]
        repeats.append(Repeat(start, start + period - 1, count))
    return Folded(tuple(nodes), tuple(repeats))


def _best_repeat(alike: NDArray[np.int64]) -> tuple[int, int, int]:
    """Start, period and count of the repetition that saves most nodes; of equal ones the shortest period."""
    best, saved = (0, 1, 1), 0
    for period in range(1, min(len(alike) // 2, _LONGEST_PERIOD) + 1):
        same = np.concatenate([[False], alike[:-period] == alike[period:], [False]])
        turns = np.flatnonzero(same[1:] != same[:-1])
        begins, ends = turns[::2], turns[1::2]
        if len(begins) == 0:
            continue
        longest = int(np.argmax(ends - begins))
        count = int(ends[longest] - begins[longest]) // period + 1
        if period * (count - 1) > saved:
            best, saved = (int(begins[longest]), period, count), period * (count - 1)
    return best


def _moved(repeat: Repeat, start: int, period: int, end: int, removed: int) -> Repeat | None:
    """Where an earlier repeat is after nodes ``start`` to ``end`` were folded; None if only a copy of it was there."""
    if repeat.last < start or (start <= repeat.first and repeat.last < start + period):
        return repeat
    if repeat.first >= end:
        return Repeat(repeat.first - removed, repeat.last - removed, repeat.count)
    if repeat.first <= start and end <= repeat.last + 1:
        return Repeat(repeat.first, repeat.last - removed, repeat.count)
    return None


def positions(nodes: Sequence[Sequence[int]]) -> dict[int, int]:
    """The node of every task."""
    return {task: at for at, tasks in enumerate(nodes) for task in tasks}
