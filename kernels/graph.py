"""Task graphs: what a program does to which tiles of memory, in which order, as pure data.

Owns nothing once built. A builder traces a program once per shape bucket; executors replay the graph any number of
times with refilled inputs. No torch: a graph names kernels and memory by value, so that any executor can take it whole.

    buffer ──tile──▶ task ──tile──▶ buffer        edges: task → task, found in the tensor map by byte range
"""

from __future__ import annotations

import bisect
import enum
import math
from collections.abc import Iterator, Sequence

import attrs

from .program import DTYPE_BYTES

__all__ = ["Buffer", "GraphBuilder", "Setting", "Tag", "Task", "TaskGraph", "TensorMap", "Tile"]

Setting = int | float | str


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

    So read-after-write is tracked for INPUT and INOUT, write-after-write for INOUT only, and write-after-read never:
    a task that overwrites what an earlier one reads must depend on it through another tile.
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


@attrs.frozen
class Buffer:
    """Memory of one graph, row-major. ``is_bound``: given by name when the graph is bound; else an intermediate."""

    index: int  # unique within its graph
    name: str
    dtype: str
    shape: tuple[int, ...]
    is_bound: bool

    @property
    def whole(self) -> Tile:
        """The buffer as one tile."""
        strides = [1] * len(self.shape)
        for axis in range(len(self.shape) - 2, -1, -1):
            strides[axis] = strides[axis + 1] * self.shape[axis + 1]
        return Tile(self, 0, self.shape, tuple(strides))


@attrs.frozen
class Tile:
    """A strided piece of a buffer. Offset and strides count elements of the buffer's dtype."""

    buffer: Buffer
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def __getitem__(self, index: int | slice | tuple[int | slice, ...]) -> Tile:
        """A piece of this piece: integers drop an axis, slices (step 1) narrow it. ``IndexError`` outside the tile."""
        parts = index if isinstance(index, tuple) else (index,)
        if len(parts) > len(self.shape):
            raise IndexError(f"{len(parts)} indices into a tile of shape {self.shape}")
        offset, shape, strides = self.offset, [], []
        for axis, extent in enumerate(self.shape):
            part = parts[axis] if axis < len(parts) else slice(None)
            if isinstance(part, int):
                if not 0 <= part < extent:
                    raise IndexError(f"index {part} on an axis of {extent}")
                offset += part * self.strides[axis]
                continue
            begin, end, step = part.indices(extent)
            if step != 1 or end < begin:
                raise IndexError(f"{part} on an axis of {extent}; a tile is cut in steps of 1, forwards")
            offset += begin * self.strides[axis]
            shape.append(end - begin)
            strides.append(self.strides[axis])
        return Tile(self.buffer, offset, tuple(shape), tuple(strides))

    @property
    def is_whole(self) -> bool:
        """Whether this is all of its buffer, in its own shape."""
        return self == self.buffer.whole

    def byte_ranges(self) -> list[tuple[int, int]]:
        """The bytes of the buffer this tile covers: exact, disjoint, ascending ``[begin, end)`` pairs."""
        if math.prod(self.shape) == 0:
            return []
        axes = sorted((stride, extent) for stride, extent in zip(self.strides, self.shape, strict=True) if extent > 1)
        run = 1  # elements in one contiguous piece
        while axes and axes[0][0] == run:
            run *= axes.pop(0)[1]
        item = DTYPE_BYTES[self.buffer.dtype]
        starts = [self.offset]
        for stride, extent in reversed(axes):
            starts = [start + stride * step for start in starts for step in range(extent)]
        return [(start * item, (start + run) * item) for start in starts]


@attrs.frozen
class Task:
    """One in-core function on tiles: ``kernel`` names it, ``settings`` configure it, both by value."""

    kernel: str
    args: tuple[tuple[Tag, Tile], ...]
    settings: tuple[tuple[str, Setting], ...]
    predecessors: tuple[int, ...]
    """Indices of the tasks that must have ended before this one starts, ascending; always below its own index."""


@attrs.frozen
class TaskGraph:
    """Tasks in submission order, which is one valid order of execution, over the buffers they name."""

    name: str
    buffers: tuple[Buffer, ...]
    tasks: tuple[Task, ...]

    @property
    def edges(self) -> frozenset[tuple[int, int]]:
        """(producer, consumer) pairs of task indices."""
        return frozenset((before, after) for after, task in enumerate(self.tasks) for before in task.predecessors)


class TensorMap:
    """Which task wrote each byte of each buffer last. Owned by one builder; forgotten when the graph is built."""

    def __init__(self) -> None:
        # Per buffer, disjoint pieces in ascending order: begins, ends, producers.
        self._pieces: dict[int, tuple[list[int], list[int], list[int]]] = {}

    def producers(self, buffer: int, begin: int, end: int) -> Iterator[int]:
        """The last writers of any byte in ``[begin, end)``, which is not empty."""
        begins, ends, producers = self._pieces.get(buffer, ([], [], []))
        for at in range(bisect.bisect_right(ends, begin), bisect.bisect_left(begins, end)):
            yield producers[at]

    def produced(self, buffer: int, begin: int, end: int, task: int) -> None:
        """``task`` is from now on the last writer of ``[begin, end)``."""
        begins, ends, producers = self._pieces.setdefault(buffer, ([], [], []))
        first, last = bisect.bisect_right(ends, begin), bisect.bisect_left(begins, end)
        pieces = [(begin, end, task)]
        if first < last:  # what is left of pieces cut by the new one
            if begins[first] < begin:
                pieces.insert(0, (begins[first], begin, producers[first]))
            if ends[last - 1] > end:
                pieces.append((end, ends[last - 1], producers[last - 1]))
        begins[first:last] = [piece[0] for piece in pieces]
        ends[first:last] = [piece[1] for piece in pieces]
        producers[first:last] = [piece[2] for piece in pieces]


class GraphBuilder:
    """Traces one program for one shape bucket: declare buffers, submit tasks, then ``build``."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._buffers: dict[str, Buffer] = {}
        self._tasks: list[Task] = []
        self._map = TensorMap()

    def bound(self, name: str, dtype: str, *shape: int) -> Tile:
        """Memory given by name when the graph is bound: arguments, residents, weights. Again: the same memory."""
        return self._buffer(name, dtype, shape, is_bound=True)

    def intermediate(self, name: str, dtype: str, *shape: int) -> Tile:
        """Memory of the graph itself, undefined until written. Again: the same memory."""
        return self._buffer(name, dtype, shape, is_bound=False)

    def submit(self, kernel: str, *args: tuple[Tag, Tile], **settings: Setting) -> int:
        """Append a task; its edges follow from the tags of its tiles. Returns its index."""
        index = len(self._tasks)
        ranges = [(tag, tile.buffer.index, tile.byte_ranges()) for tag, tile in args if tag is not Tag.NO_DEP]
        before = {
            producer
            for tag, buffer, pieces in ranges
            if tag.reads
            for begin, end in pieces
            for producer in self._map.producers(buffer, begin, end)
        }
        for tag, buffer, pieces in ranges:
            if tag.writes:
                for begin, end in pieces:
                    self._map.produced(buffer, begin, end, index)
        self._tasks.append(Task(kernel, args, tuple(settings.items()), tuple(sorted(before))))
        return index

    def build(self) -> TaskGraph:
        """The finished graph."""
        return TaskGraph(self._name, tuple(self._buffers.values()), tuple(self._tasks))

    def _buffer(self, name: str, dtype: str, shape: Sequence[int], *, is_bound: bool) -> Tile:
        buffer = self._buffers.setdefault(name, Buffer(len(self._buffers), name, dtype, tuple(shape), is_bound))
        if (buffer.dtype, buffer.shape, buffer.is_bound) != (dtype, tuple(shape), is_bound):
            raise ValueError(f"buffer {name} is declared twice, as {buffer.dtype} {buffer.shape} and {dtype} {shape}")
        return buffer.whole
