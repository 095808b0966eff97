"""The resources of one ring: task slots, heap memory and dependency entries, taken and given back in one order each.

Owns: the accounts, not the memory. Occupancy is counted, never told from where cursors stand, so full and empty cannot
be mixed up; a heap that runs empty starts again at offset 0, so that a block as large as the heap fits then.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import attrs

from ..topology.rings import HEAP_ALIGNMENT

__all__ = ["HeapBlock", "HeapRing", "RingFull", "RingMark", "ScopeRecord"]


class RingFull(Exception):
    """A ring has no room until running tasks end; they will. Never reaches users: whoever submits waits and retries."""

    def __init__(self, ring: int, resource: str, occupancy: int, capacity: int, parameter: str) -> None:
        super().__init__(f"ring {ring}: {resource} holds {occupancy:,} of {capacity:,} ({parameter})")
        self.ring = ring
        self.resource = resource  # "task window", "heap" or "dependency pool"
        self.occupancy = occupancy
        self.capacity = capacity
        self.parameter = parameter  # what to enlarge to wait less


@attrs.define(eq=False)
class HeapBlock:
    """Memory of a scope: ``nbytes`` at ``offset`` in the heap of ``ring``. Equal to itself alone.

    A task that works on it names the block as its ``Access.space``: so the memory is not given away before the task
    has ended, and whoever gets it next is not taken for a reader of what was there.
    """

    ring: int
    offset: int
    nbytes: int
    position: int = attrs.field(repr=False)
    """Of all bytes this heap has ever given out, where the block begins: ``offset`` is its remainder."""
    is_open: bool = attrs.field(default=True, init=False)
    """Whether its scope is; a closed scope's memory can be named by no new task."""
    users: int = attrs.field(default=0, init=False, repr=False)
    """Accesses of tasks that have not ended."""

    @property
    def size(self) -> int:
        """Bytes taken from the heap: ``nbytes`` rounded up to ``HEAP_ALIGNMENT``."""
        return -(-max(self.nbytes, 1) // HEAP_ALIGNMENT) * HEAP_ALIGNMENT


class HeapRing:
    """First-in-first-out memory of ``capacity`` bytes. A block is never torn in two at the end of the ring."""

    def __init__(self, ring: int, capacity: int) -> None:
        self.capacity = capacity
        self.allocated = 0
        """Bytes of all blocks there have been."""
        self.freed = 0
        self.most = 0
        """The most bytes held at once."""
        self.largest = 0
        """Bytes of the largest block."""
        self._ring = ring
        self._blocks: deque[HeapBlock] = deque()
        self._head = 0

    @property
    def occupancy(self) -> int:
        """Bytes of blocks that are not free."""
        return self.allocated - self.freed

    def allocate(self, nbytes: int) -> HeapBlock | None:
        """A new block, or None if it does not fit now."""
        block = HeapBlock(self._ring, 0, nbytes, 0)
        position = self._place(block.size, self._blocks[0].position if self._blocks else None)
        if position is None:
            return None
        block.position, block.offset = position, position % self.capacity
        self._blocks.append(block)
        self._head = position + block.size
        self.allocated += block.size
        self.largest = max(self.largest, block.size)
        self.most = max(self.most, self.occupancy)
        return block

    def would_fit(self, nbytes: int, oldest: HeapBlock | None) -> bool:
        """Whether ``nbytes`` fit once everything older than ``oldest`` (all, if None) is free."""
        size = HeapBlock(self._ring, 0, nbytes, 0).size
        return self._place(size, None if oldest is None else oldest.position) is not None

    def held_since(self, oldest: HeapBlock | None) -> int:
        """Bytes of ``oldest`` and all younger blocks; 0 if None."""
        return sum(block.size for block in self._blocks if oldest is not None and block.position >= oldest.position)

    def reclaim(self) -> None:
        """Take back blocks that nobody needs, the oldest first, up to one that somebody does."""
        blocks = self._blocks
        while blocks and not blocks[0].is_open and not blocks[0].users:
            self.freed += blocks.popleft().size

    def _place(self, size: int, tail: int | None) -> int | None:
        capacity = self.capacity
        begin = self._head
        if tail is None or begin % capacity + size > capacity:
            begin = -(-begin // capacity) * capacity
        return begin if begin + size - (begin if tail is None else tail) <= capacity else None


class RingMark(NamedTuple):
    """How much a ring had taken and given back of each resource at one moment; both only ever grow."""

    tasks_taken: int
    tasks_given: int
    heap_taken: int
    heap_given: int
    deps_taken: int
    deps_given: int


@attrs.define
class ScopeRecord:
    """What one scope did to its ring, each as (tasks, heap bytes, dependency entries)."""

    depth: int
    ring: int
    begin: RingMark
    end: RingMark | None = None
    """None while the scope is open: then the three methods say nothing."""

    def high_water(self) -> tuple[int, int, int]:
        """Upper bound of what the ring held at once inside the scope; may exceed its capacity."""
        return self._apart(self.begin[1::2])

    def live_at_exit(self) -> tuple[int, int, int]:
        """Still held when the scope was left."""
        return self._apart((self.end or self.begin)[1::2])

    def allocated(self) -> tuple[int, int, int]:
        """Taken by the scope and all scopes within it on the same ring."""
        return self._apart(self.begin[0::2])

    def _apart(self, since: tuple[int, ...]) -> tuple[int, int, int]:
        if self.end is None:
            raise ValueError(f"the scope of depth {self.depth} is open")
        return self.end.tasks_taken - since[0], self.end.heap_taken - since[1], self.end.deps_taken - since[2]
