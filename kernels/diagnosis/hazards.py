"""Which tasks of a run touch the same bytes: the hazards an edge guards against, and those no order guards against.

Owns nothing. A hazard is between two tasks in the order of their submission; two that only read have none.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator, Sequence

import attrs

from ..graph import Tag
from .run_graph import Edge, Reason, RunGraph

__all__ = ["Race", "find_races", "with_reasons"]

_Pieces = dict[str, list[tuple[int, int, int]]]  # per address space, ascending (begin, end, memory)


@attrs.frozen(kw_only=True)
class Race:
    """Two tasks that touch the bytes ``[begin, end)`` of ``space``, one of them writing, and no path orders them.

    The answer then depends on the executor: one that keeps to the order of submission is safe, another need not be.
    """

    first: int  # submitted before ``second``
    second: int
    reason: Reason  # RAW, WAW or WAR: what ``second`` does to what ``first`` did; REUSE if the arrays are different
    memory: str  # the array ``second`` touches
    space: str
    begin: int  # of the lowest common piece, in bytes
    end: int
    ran_together: bool  # whether their times overlap, so that this very run may have gone wrong


def with_reasons(graph: RunGraph) -> RunGraph:
    """The same run with the reasons of every edge: the hazards between its tasks, or EXPLICIT if there are none.

    An edge between tasks on other parts of memory that was given out again is REUSE, too: it is given out whole.
    """
    reads, writes = _touched(graph, writing=False), _touched(graph, writing=True)
    edges = []
    for edge in graph.edges:
        hazards = _hazards(reads, writes, edge.before, edge.after)
        found = {_reason(kind, first, second) for kind, first, second in hazards}
        if not found:
            found = {Reason.REUSE if _share_memory(graph, edge) else Reason.EXPLICIT}
        reasons = tuple(reason for reason in Reason if reason in found)
        edges.append(Edge(edge.before, edge.after, reasons))
    return attrs.evolve(graph, edges=tuple(edges))


def find_races(graph: RunGraph) -> list[Race]:
    """Every pair of tasks with a hazard and no ordering path, by index; one entry per pair and reason.

    Arguments tagged NO_DEP are not looked at: they are ordered by hand, and do not say whether they are written.
    """
    ancestors: list[int] = []  # per task a set of bits: those that have ended before it starts
    for before in graph.predecessors():
        reached = 0
        for task in before:
            reached |= ancestors[task] | 1 << task
        ancestors.append(reached)
    reads, writes = _touched(graph, writing=False), _touched(graph, writing=True)
    races = []
    for first, second in sorted(_meetings(reads, writes)):
        if ancestors[second] >> first & 1:
            continue
        by_reason: dict[Reason, tuple[int, int, int]] = {}
        for kind, one, other in _hazards(reads, writes, first, second):
            common = (max(one[0], other[0]), min(one[1], other[1]), other[2])
            by_reason.setdefault(_reason(kind, one, other), common)
        for reason, (begin, end, memory) in by_reason.items():
            array = graph.memory[memory]
            races.append(
                Race(
                    first=first, second=second, reason=reason, memory=array.name, space=array.space,
                    begin=begin, end=end, ran_together=_overlap_in_time(graph, first, second),
                )
            )  # fmt: skip
    return races


def _share_memory(graph: RunGraph, edge: Edge) -> bool:
    """Whether the tasks work on different arrays that have bytes in common, be it not on those."""
    ones, others = ({operand.memory for operand in graph.tasks[task].operands} for task in (edge.before, edge.after))
    for one, other in ((graph.memory[a], graph.memory[b]) for a in ones for b in others if a != b):
        if one.space == other.space and one.begin < other.begin + other.nbytes and other.begin < one.begin + one.nbytes:
            return True
    return False


def _touched(graph: RunGraph, *, writing: bool) -> list[_Pieces]:
    """Per task, what it reads, or writes. An INOUT argument is in both."""
    found = []
    for task in graph.tasks:
        pieces: _Pieces = {}
        for operand in task.operands:
            if operand.tag is not Tag.NO_DEP and (operand.tag.writes if writing else operand.tag.reads):
                space = graph.memory[operand.memory].space
                ranges = graph.byte_ranges(operand)
                pieces.setdefault(space, []).extend((begin, end, operand.memory) for begin, end in ranges)
        found.append({space: sorted(ranges) for space, ranges in pieces.items()})
    return found


_Piece = tuple[int, int, int]


def _hazards(
    reads: Sequence[_Pieces], writes: Sequence[_Pieces], first: int, second: int
) -> Iterator[tuple[Reason, _Piece, _Piece]]:
    """The hazards between two tasks: kind, and the pieces that share bytes."""
    for kind, ones, others in (
        (Reason.RAW, writes[first], reads[second]),
        (Reason.WAW, writes[first], writes[second]),
        (Reason.WAR, reads[first], writes[second]),
    ):
        for space in ones.keys() & others.keys():
            for one, other in _common(ones[space], others[space]):
                yield kind, one, other


def _reason(kind: Reason, first: _Piece, second: _Piece) -> Reason:
    return kind if first[2] == second[2] else Reason.REUSE


def _common(ones: Sequence[_Piece], others: Sequence[_Piece]) -> Iterator[tuple[_Piece, _Piece]]:
    """Pieces of two ascending lists that share bytes. Pieces of one task may overlap each other, so none is dropped
    before its end is passed."""
    widest = max((end - begin for begin, end, _ in others), default=0)
    for one in ones:
        at = bisect.bisect_left(others, (one[0] - widest, 0, 0))
        while at < len(others) and others[at][0] < one[1]:
            if others[at][1] > one[0]:
                yield one, others[at]
            at += 1


def _meetings(reads: Sequence[_Pieces], writes: Sequence[_Pieces]) -> set[tuple[int, int]]:
    """Pairs of tasks, lower index first, that share a byte which at least one of them writes: one sweep per space."""
    spaces: dict[str, list[tuple[int, int, int, bool]]] = {}
    for is_write, touched in ((False, reads), (True, writes)):
        for task, pieces in enumerate(touched):
            for space, ranges in pieces.items():
                spaces.setdefault(space, []).extend((begin, end, task, is_write) for begin, end, _ in ranges)
    met: set[tuple[int, int]] = set()
    for intervals in spaces.values():
        readers: list[tuple[int, int]] = []  # (end, task) of what the sweep is inside of
        writers: list[tuple[int, int]] = []
        for begin, end, task, is_write in sorted(intervals):
            writers = [open_ for open_ in writers if open_[0] > begin]
            if is_write:
                readers = [open_ for open_ in readers if open_[0] > begin]
                met.update(_pairs(task, readers))
            met.update(_pairs(task, writers))
            (writers if is_write else readers).append((end, task))
    return met


def _pairs(task: int, others: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    return ((min(task, other), max(task, other)) for _, other in others if other != task)


def _overlap_in_time(graph: RunGraph, first: int, second: int) -> bool:
    one, other = graph.tasks[first], graph.tasks[second]
    if one.begin_ns is None or one.end_ns is None or other.begin_ns is None or other.end_ns is None:
        return False
    return one.begin_ns < other.end_ns and other.begin_ns < one.end_ns
