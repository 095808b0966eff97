"""What a task does to a piece of memory, which decides the edges it gets in a task graph.

Owns nothing; values only, the same for tasks on a chip and for chip programs on a host.
"""

from __future__ import annotations

import enum

__all__ = ["Tag"]


class Tag(enum.Enum):
    """What a task does to a tile, and therefore which edges it gets.

    ============ ================== ==================
    tag          looks up producers becomes producer
    ============ ================== ==================
    INPUT        yes                no
    OUTPUT       no                 yes (memory is the executor's, its old content is gone)
    INOUT        yes                yes
    OUTPUT_EXISTING  no             yes (memory is the caller's)
    NO_DEP       no                 no
    ============ ================== ==================

    So read-after-write is tracked for INPUT and INOUT, write-after-write for INOUT only, and write-after-read only on
    request: else a task that overwrites what an earlier one reads must depend on it through another tile or explicitly.
    """

    INPUT = "input"
    OUTPUT = "output"
    INOUT = "inout"
    OUTPUT_EXISTING = "output_existing"
    NO_DEP = "no_dep"

    @property
    def reads(self) -> bool:
        """Whether the task waits for the tile's producers."""
        return self in (Tag.INPUT, Tag.INOUT)

    @property
    def writes(self) -> bool:
        """Whether later readers of the tile wait for the task."""
        return self in (Tag.OUTPUT, Tag.INOUT, Tag.OUTPUT_EXISTING)
