"""Counters of processes that die: each life counts from zero, and what is told to the outside never goes down.

Owns: of each process, the sum of its past lives and the latest of the present one. What a life did after it was last
heard is not known and not guessed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

import attrs

from ..bus import NodeReport
from .messages.tree import ProgramStatistics, ReplicaStatistics
from .report import ProcessTotals

__all__ = ["NodeLives", "ReplicaLives"]

T = TypeVar("T")

_COUNTERS = (
    "steps", "tokens_generated", "prompt_tokens", "step_ns", "device_ns", "preemptions", "prefix_queries",
    "prefix_hits", "step_tokens",
)  # fmt: skip


class _Lives(Generic[T]):
    """Totals of one kind by process. ``plus`` adds a later life to an earlier one."""

    def __init__(self, plus: Callable[[T, T], T]) -> None:
        self._plus = plus
        self._past: dict[str, T] = {}
        self._present: dict[str, tuple[int, T]] = {}

    def saw(self, name: str, life: int, value: T) -> None:
        """What a life has counted so far. A late word of an earlier one is ignored."""
        known = self._present.get(name)
        if known is not None and life < known[0]:
            return
        if known is not None and life > known[0]:
            self._past[name] = self._total(name)
        self._present[name] = (life, value)

    def totals(self) -> dict[str, T]:
        """Over all lives, by process."""
        return {name: self._total(name) for name in sorted(self._present)}

    def _total(self, name: str) -> T:
        _, value = self._present[name]
        return self._plus(self._past[name], value) if name in self._past else value


class ReplicaLives:
    """Statistics of replica cores."""

    def __init__(self) -> None:
        self._lives = _Lives[ReplicaStatistics](_add_replica)

    def saw(self, rows: Iterable[ReplicaStatistics]) -> None:
        """What they answered."""
        for row in rows:
            self._lives.saw(f"replica.{row.replica}", row.incarnation, row)

    def totals(self, living: set[str]) -> tuple[ReplicaStatistics, ...]:
        """One row per replica ever heard; one whose core is not in ``living`` has nothing now."""
        rows = (row if name in living else _emptied(row) for name, row in self._lives.totals().items())
        return tuple(sorted(rows, key=lambda row: row.replica))


class NodeLives:
    """What the nodes of processes count."""

    def __init__(self) -> None:
        self._lives = _Lives[ProcessTotals](_add_node)

    def saw(self, name: str, life: int, node: NodeReport) -> None:
        """What one answered."""
        totals = ProcessTotals(
            name=name,
            counters=dict(node.counters),
            ledger_bytes=node.ledger_bytes,
            ledger_failures=node.ledger_failures,
            credit_waits=node.credit_waits,
        )
        self._lives.saw(name, life, totals)

    def totals(self) -> tuple[ProcessTotals, ...]:
        """Of every process ever heard, by name."""
        return tuple(self._lives.totals().values())


def _emptied(row: ReplicaStatistics) -> ReplicaStatistics:
    return attrs.evolve(
        row, pages_total=0, pages_free=0, pages_cached=0, running=0, waiting=0, pending_tokens=0, poisoned_lanes=0
    )


def _add_replica(past: ReplicaStatistics, now: ReplicaStatistics) -> ReplicaStatistics:
    sums = {name: getattr(past, name) + getattr(now, name) for name in _COUNTERS}
    return attrs.evolve(now, programs=_add_programs(past.programs, now.programs), **sums)


def _add_programs(
    past: tuple[ProgramStatistics, ...], now: tuple[ProgramStatistics, ...]
) -> tuple[ProgramStatistics, ...]:
    sums: dict[str, ProgramStatistics] = {}
    for row in (*past, *now):
        so_far = sums.get(row.program, ProgramStatistics(row.program, 0, 0, 0))
        sums[row.program] = ProgramStatistics(
            row.program,
            so_far.dispatches + row.dispatches,
            so_far.tokens + row.tokens,
            so_far.device_ns + row.device_ns,
        )
    return tuple(sums.values())


def _add_node(past: ProcessTotals, now: ProcessTotals) -> ProcessTotals:
    return ProcessTotals(
        name=now.name,
        counters=dict(Counter(past.counters) + Counter(now.counters)),
        ledger_bytes=past.ledger_bytes + now.ledger_bytes,
        ledger_failures=past.ledger_failures + now.ledger_failures,
        credit_waits=past.credit_waits + now.credit_waits,
    )
