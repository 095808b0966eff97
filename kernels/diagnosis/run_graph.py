"""What a run did, as one value: its tasks, why each waited for which, where and when each ran, what the rings held.

Owns nothing. A captured graph with a launch's times (``captured.py``) and a run of an L3 worker become the same value,
so every view of a run in this package is written once.

JSON (``to_json``, ``run_graph_from_json``): an object with ``format`` and the fields of ``RunGraph`` by name; tuples
are lists, enumerations their values. Every field is present, and one that is unknown or missing is refused.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from typing import Any, Literal

import attrs
import msgspec

from ...errors import ConfigError
from ...topology.rings import RingSizes, RingUse
from ..engine import TaskState
from ..graph import Buffer, Tag, Tile
from ..program import nbytes
from ..rings import ScopeRecord

__all__ = [
    "FORMAT",
    "Edge",
    "Memory",
    "Operand",
    "Reason",
    "RunGraph",
    "RunTask",
    "run_graph_from_json",
    "to_json",
]

FORMAT = 1
"""Of the JSON; another number is refused."""


class Reason(enum.Enum):
    """Why one task waits for another."""

    RAW = "raw"  # reads bytes the other wrote
    WAW = "waw"  # updates bytes the other wrote
    WAR = "war"  # overwrites bytes the other read
    EXPLICIT = "explicit"  # was told to
    REUSE = "reuse"  # gets heap memory that a closed scope gave back


@attrs.frozen
class Memory:
    """A dense array that tasks work on: ``begin`` is the byte at which it starts in its address space."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    space: str  # arrays in one space may share bytes: "heap.1", "chip.0"; an array apart has a space of its own
    begin: int = 0

    @property
    def nbytes(self) -> int:
        """From its first byte to its last."""
        return nbytes(self.dtype, self.shape)


@attrs.frozen
class Operand:
    """One argument of a task: a strided piece of ``RunGraph.memory[memory]``, offset and strides in elements."""

    tag: Tag
    memory: int
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@attrs.frozen(kw_only=True)
class RunTask:
    """One task. Times are ns since the run began, both None where nothing was timed; a task that never ran has none."""

    label: str  # the kernel on a chip, the program or callable on a host
    lane: str  # where it ran, or would: one row of a swimlane, "core.0" or "chip.1"
    operands: tuple[Operand, ...] = ()
    state: TaskState = TaskState.PENDING
    begin_ns: int | None = None
    end_ns: int | None = None
    ring: int = 0
    error: str = ""

    @property
    def duration_ns(self) -> int:
        """0 for a task that was not timed."""
        return 0 if self.begin_ns is None or self.end_ns is None else self.end_ns - self.begin_ns


@attrs.frozen
class Edge:
    """``after`` did not start before ``before`` had ended; no reasons where they are not known."""

    before: int
    after: int
    reasons: tuple[Reason, ...] = ()


@attrs.frozen(kw_only=True)
class RunGraph:
    """A run. Tasks are in the order of their submission, so every edge leads from a lower index to a higher one."""

    name: str
    clock: Literal["none", "wall", "modelled"] = "none"
    memory: tuple[Memory, ...] = ()
    tasks: tuple[RunTask, ...] = ()
    edges: tuple[Edge, ...] = ()
    rings: RingSizes | None = None  # None where no rings bounded it
    high_water: tuple[RingUse, ...] = ()  # per ring, for ``suggest_rings``
    scopes: tuple[ScopeRecord, ...] = ()  # in order of opening
    errors: tuple[str, ...] = ()  # the first is the cause the run is blamed on

    def __attrs_post_init__(self) -> None:
        for edge in self.edges:
            if not 0 <= edge.before < edge.after < len(self.tasks):
                raise ConfigError(f"run {self.name}: edge {edge.before} -> {edge.after} among {len(self.tasks)} tasks")
        for index, task in enumerate(self.tasks):
            if any(not 0 <= operand.memory < len(self.memory) for operand in task.operands):
                raise ConfigError(f"run {self.name}: task {index} names memory that is not listed")
            if (task.begin_ns is None) != (task.end_ns is None) or task.duration_ns < 0:
                raise ConfigError(f"run {self.name}: task {index} runs from {task.begin_ns} to {task.end_ns} ns")

    @property
    def wall_ns(self) -> int:
        """From the first begin to the last end; 0 if nothing was timed."""
        timed = [task for task in self.tasks if task.begin_ns is not None and task.end_ns is not None]
        begins = [task.begin_ns for task in timed if task.begin_ns is not None]
        ends = [task.end_ns for task in timed if task.end_ns is not None]
        return max(ends) - min(begins) if timed else 0

    def predecessors(self) -> list[list[int]]:
        """Per task, those it waited for, ascending."""
        found: list[list[int]] = [[] for _ in self.tasks]
        for edge in self.edges:
            found[edge.after].append(edge.before)
        return [sorted(before) for before in found]

    def byte_ranges(self, operand: Operand) -> list[tuple[int, int]]:
        """The bytes of its memory's address space that an operand covers: disjoint, ascending ``[begin, end)``."""
        memory = self.memory[operand.memory]
        buffer = Buffer(operand.memory, memory.name, memory.dtype, memory.shape, is_bound=True)
        tile = Tile(buffer, operand.offset, operand.shape, operand.strides)
        return [(memory.begin + begin, memory.begin + end) for begin, end in tile.byte_ranges()]


def to_json(graph: RunGraph) -> bytes:
    """One line of JSON, for ``run_graph_from_json`` and other programs."""
    return msgspec.json.encode({"format": FORMAT, **msgspec.to_builtins(graph)})


def run_graph_from_json(data: bytes) -> RunGraph:
    """The run in ``to_json``'s form. Anything else is a ``ConfigError`` that says what is wrong, and where."""
    try:
        found = msgspec.json.decode(data)
    except msgspec.DecodeError as error:
        raise ConfigError(f"run graph: {error}") from None
    if not isinstance(found, dict) or found.pop("format", None) != FORMAT:
        raise ConfigError(f"run graph: expected an object with format {FORMAT}")
    try:
        graph = msgspec.convert(found, RunGraph)
    except msgspec.ValidationError as error:
        raise ConfigError(f"run graph: {error}") from None
    for path in _differences(found, msgspec.to_builtins(graph), "$"):
        raise ConfigError(f"run graph: unknown or missing field at {path}")
    return graph


def _differences(found: Any, meant: Any, path: str) -> Iterator[str]:
    """Where a document differs from what was understood of it: msgspec ignores unknown fields of attrs classes."""
    if isinstance(meant, dict) and isinstance(found, dict):
        for name in sorted(found.keys() ^ meant.keys()):
            yield f"{path}.{name}"
        for name in found.keys() & meant.keys():
            yield from _differences(found[name], meant[name], f"{path}.{name}")
    elif isinstance(meant, list | tuple) and isinstance(found, list):
        for index, pair in enumerate(zip(found, meant, strict=True)):
            yield from _differences(*pair, f"{path}[{index}]")
