"""Task graphs: what a program does to which tiles of memory, in which order, as pure data.

Owns nothing once built. A builder traces a program once per shape bucket, through the same engine that runs tasks on a
host, so scopes, rings and their errors mean the same; executors replay the graph any number of times with refilled
inputs. No torch: a graph names kernels and memory by value, so that any executor can take it whole.

    buffer ──tile──▶ task ──tile──▶ buffer        edges: task → task, found in the tensor map by byte range
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

import attrs

from ..errors import InvalidArgs
from ..topology.rings import RINGS, RingSizes, RingUse
from .engine import Access, HeapBlock, RingFull, TaskEngine
from .program import DTYPE_BYTES
from .rings import ScopeRecord
from .tags import Tag
from .tensor_map import ByteRange, RangeMap, TensorMap

__all__ = ["Buffer", "GraphBuilder", "Setting", "Tag", "Task", "TaskGraph", "TensorMap", "Tile"]

Setting = int | float | str

T = TypeVar("T")


@attrs.frozen
class Buffer:
    """Memory of one graph, row-major. ``is_bound``: given by name when the graph is bound; else an intermediate."""

    index: int  # unique within its graph
    name: str
    dtype: str
    shape: tuple[int, ...]
    is_bound: bool
    place: tuple[int, int] | None = None
    """(ring, byte offset) in the executor's arenas, for memory of a scope; others may have the same bytes before and
    after, and the graph's edges keep them apart."""
    row_unit: int = 1
    """Every tile takes the rows, those of axis 0, in whole units of so many, counted from row 0; the last may be
    smaller. Edges are then found per unit: a tile of columns is one byte range for each unit, not for each row."""

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
        for part, extent, stride in zip(parts, self.shape, self.strides, strict=False):
            if isinstance(part, int):
                if not 0 <= part < extent:
                    raise IndexError(f"index {part} on an axis of {extent}")
                offset += part * stride
                continue
            begin, end, step = part.indices(extent)
            if step != 1 or end < begin:
                raise IndexError(f"{part} on an axis of {extent}; a tile is cut in steps of 1, forwards")
            offset += begin * stride
            shape.append(end - begin)
            strides.append(stride)
        uncut = len(parts)
        return Tile(self.buffer, offset, (*shape, *self.shape[uncut:]), (*strides, *self.strides[uncut:]))

    @property
    def is_whole(self) -> bool:
        """Whether this is all of its buffer, in its own shape."""
        return self == self.buffer.whole

    def byte_ranges(self) -> list[tuple[int, int]]:
        """The bytes of the buffer this tile covers: exact, disjoint, ascending ``[begin, end)`` pairs."""
        return _byte_ranges(self.offset, self.shape, self.strides, DTYPE_BYTES[self.buffer.dtype])


def _byte_ranges(offset: int, shape: Sequence[int], strides: Sequence[int], item: int) -> list[ByteRange]:
    """The bytes of a strided piece of an array of elements of ``item`` bytes, as in ``Tile.byte_ranges``."""
    if 0 in shape:
        return []
    axes = sorted([(stride, extent) for stride, extent in zip(strides, shape, strict=True) if extent > 1])
    run = 1  # elements in one contiguous piece
    while axes and axes[0][0] == run:
        run *= axes.pop(0)[1]
    starts = [offset]
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
    heap_bytes: tuple[int, ...] = (0,) * RINGS
    """Bytes an executor needs in the arena of each ring, for buffers with a place."""
    high_water: tuple[RingUse, ...] = (RingUse(),) * RINGS
    """The most each ring held while the graph was captured; ``topology.suggest_rings`` makes sizes of it."""
    scopes: tuple[ScopeRecord, ...] = attrs.field(default=(), eq=False)
    """What each scope did to its ring, the last 4,096."""

    @property
    def edges(self) -> frozenset[tuple[int, int]]:
        """(producer, consumer) pairs of task indices."""
        return frozenset((before, after) for after, task in enumerate(self.tasks) for before in task.predecessors)


_MAX_MAP_ENTRIES = 1 << 20  # a strided tile takes one for each of its rows; about 100 bytes each


class GraphBuilder:
    """Traces one program for one shape bucket: declare buffers, submit tasks, then ``build``.

    Nothing runs while a graph is captured. So where a ring is full, the oldest tasks count as done; what does not fit
    then never would, and is the error (codes 1 to 4) that a run of it would end with.

    Memory may be declared in row units, see ``Buffer.row_unit``; 0 makes all rows one unit. A task with a tile that
    takes part of a unit is refused. Edges are the same with units and without, except that users of memory that is
    given out again wait for all earlier users of the units they touch.
    """

    def __init__(self, name: str, sizes: RingSizes | None = None, *, track_war: bool = False) -> None:
        self._name = name
        self._buffers: list[Buffer] = []
        self._named: dict[str, Buffer] = {}
        self._blocks: dict[int, HeapBlock] = {}  # by index of the buffer
        self._tasks: list[Task] = []
        self._engine = TaskEngine(sizes or RingSizes(), track_war=track_war, max_map_entries=_MAX_MAP_ENTRIES)
        self._ids: list[int] = []  # the engine's, by index of the task
        self._indices: dict[int, int] = {}
        self._done = 0
        self._arenas = [_Arena() for _ in range(RINGS)]
        self._past = _Past()

    def bound(self, name: str, dtype: str, *shape: int, row_unit: int = 1) -> Tile:
        """Memory given by name when the graph is bound: arguments, residents, weights. Again: the same memory."""
        return self._declare(name, dtype, shape, row_unit, is_bound=True)

    def intermediate(self, name: str, dtype: str, *shape: int, row_unit: int = 1) -> Tile:
        """Memory of the graph itself, undefined until written, outliving every scope. Again: the same memory."""
        return self._declare(name, dtype, shape, row_unit, is_bound=False)

    def tensor(self, dtype: str, *shape: int, row_unit: int = 1) -> Tile:
        """New memory of the innermost scope, undefined until written. No task may name it once the scope has ended."""
        unit = _row_unit(shape, row_unit)
        block = self._patiently(lambda: self._engine.alloc(math.prod(shape) * DTYPE_BYTES[dtype]))
        index = len(self._buffers)
        buffer = Buffer(index, f"tensor.{index}", dtype, shape, False, (block.ring, block.offset), unit)
        self._buffers.append(buffer)
        self._blocks[index] = block
        self._arenas[block.ring].give(block)
        return buffer.whole

    @contextmanager
    def scope(self, *, manual: bool = False) -> Iterator[None]:
        """Tensors made inside are given back at the end. ``manual``: only ``after`` makes edges between its tasks."""
        self._engine.open_scope(manual=manual)
        try:
            yield
        finally:
            self._engine.close_scope()

    def submit(self, kernel: str, *args: tuple[Tag, Tile], after: Sequence[int] = (), **settings: Setting) -> int:
        """Append a task; its edges follow from the tags of its tiles and from ``after``. Returns its index.

        Raises ``InvalidArgs`` for a tile that takes part of a row unit, for memory of a scope that has ended and for an
        ``after`` that is not there, and what ``TaskEngine.submit`` raises when waiting would not help.
        """
        accesses: list[Access] = []
        used: list[tuple[HeapBlock, tuple[ByteRange, ...], Tag]] = []
        for tag, tile in args:
            if tile.buffer.row_unit == 1:
                tracked = taken = tuple(tile.byte_ranges())
            else:
                tracked, taken = _in_units(tile)
            block = self._blocks.get(tile.buffer.index)
            if block is None:
                accesses.append(Access(tag, tile.buffer.index, tracked))
            else:
                accesses.append(Access(tag, block, tracked))
                used.append((block, taken, tag))
        for earlier in after:
            if not 0 <= earlier < len(self._tasks):
                raise InvalidArgs(f"task {kernel!r} comes after task {earlier}, which this graph does not have")
        ids = [self._ids[earlier] for earlier in after]
        task = self._patiently(lambda: self._engine.submit(accesses, after=ids, label=kernel))
        before = {self._indices[producer] for producer in self._engine.predecessors(task)}
        index = len(self._tasks)
        ended = self._past.add(before)
        for block, taken, tag in used:
            before |= self._arenas[block.ring].use(block, taken, tag, index, before, ended)
        self._ids.append(task)
        self._indices[task] = index
        self._tasks.append(Task(kernel, args, tuple(settings.items()), tuple(sorted(before))))
        return index

    def build(self) -> TaskGraph:
        """The finished graph. Ends the capture: all scopes are closed."""
        self._engine.finish()
        return TaskGraph(
            self._name,
            tuple(self._buffers),
            tuple(self._tasks),
            tuple(arena.nbytes for arena in self._arenas),
            self._engine.high_water(),
            self._engine.scopes,
        )

    def _declare(self, name: str, dtype: str, shape: tuple[int, ...], row_unit: int, *, is_bound: bool) -> Tile:
        unit = _row_unit(shape, row_unit)
        buffer = self._named.get(name)
        if buffer is None:
            buffer = self._named[name] = Buffer(len(self._buffers), name, dtype, shape, is_bound, row_unit=unit)
            self._buffers.append(buffer)
        if (buffer.dtype, buffer.shape, buffer.is_bound, buffer.row_unit) != (dtype, shape, is_bound, unit):
            raise ValueError(
                f"buffer {name} is declared twice, as {buffer.dtype} {buffer.shape} and {dtype} {shape},"
                f" in units of {buffer.row_unit} and {unit} rows"
            )
        return buffer.whole

    def _patiently(self, attempt: Callable[[], T]) -> T:
        while True:
            try:
                return attempt()
            except RingFull:
                oldest = self._ids[self._done]
                self._done += 1
                self._engine.start(oldest)
                self._engine.complete(oldest)
                self._engine.take_ready()


def _row_unit(shape: tuple[int, ...], row_unit: int) -> int:
    """The unit in rows, at least 1; 0 stands for all. ``InvalidArgs`` if there can be none."""
    if row_unit < 0 or (row_unit != 1 and not shape):
        raise InvalidArgs(f"memory of shape {shape} is declared in units of {row_unit} rows")
    return row_unit or max(1, shape[0])


def _in_units(tile: Tile) -> tuple[tuple[ByteRange, ...], tuple[ByteRange, ...]]:
    """Two lists of byte ranges: what stands for the tile in the tensor map, and the bytes of its units as wholes.

    Tiles that share a byte share its column in all rows of the unit. So among tiles of one buffer one row can stand for
    a unit: unit 3 is tracked as row 3. Against buffers of other shapes in the same memory only the bytes themselves
    count; whole units are more of those than the tile has, but one range.
    """
    if 0 in tile.shape:
        return (), ()
    buffer = tile.buffer
    rows, unit, width, item = buffer.shape[0], buffer.row_unit, math.prod(buffer.shape[1:]), DTYPE_BYTES[buffer.dtype]
    first, column = divmod(tile.offset, width)
    axis = 1 if tile.strides[:1] == (width,) else 0  # the first within a row: an index drops the axis of rows
    last = first + (tile.shape[0] if axis else 1)
    if first % unit or (last % unit and last != rows):
        raise InvalidArgs(
            f"a tile takes rows {first} to {last} of {buffer.name}, which has {rows} in units of {unit}; tiles begin"
            " and end where units do"
        )
    begin, end = first // unit, -(-last // unit)
    shape, strides = (end - begin, *tile.shape[axis:]), (width, *tile.strides[axis:])
    tracked = _byte_ranges(begin * width + column, shape, strides, item)
    return tuple(tracked), ((first * width * item, last * width * item),)


class _Past:
    """How far back all tasks have ended when one starts: memory they used is given out again without an edge to them.

    Known for a task that waits for every task nobody had waited for until then, for later ones that wait for all of the
    same (the other tiles of an attention, say), and for those that wait for one it is known of.
    """

    def __init__(self) -> None:
        self._ended: list[int] = []  # by task
        self._loose: set[int] = set()  # nobody waits for them yet
        self._cut: set[int] = set()  # those of the last task that waited for all of them:
        self._cut_at = 0  # all tasks below this one have ended when these have

    def add(self, before: set[int]) -> int:
        """One more task, which waits for ``before``. All tasks below the index returned have ended when it starts."""
        task = len(self._ended)
        if self._loose <= before:
            self._cut, self._cut_at, self._loose = self._loose, task, set()
        self._loose -= before
        self._loose.add(task)
        waits_for_cut = self._cut <= before
        self._ended.append(self._cut_at if waits_for_cut else max((self._ended[other] for other in before), default=0))
        return self._ended[-1]


_MAX_EACH = 8  # so many tasks every user of reused memory waits for itself; for more, the first user does


class _Chain(NamedTuple):
    """Tasks, the youngest first. Made longer without a copy, so that pieces of one chunk of memory share it."""

    task: int
    older: _Chain | None
    length: int

    @classmethod
    def joined(cls, task: int, older: _Chain | None) -> _Chain:
        return cls(task, older, older.length + 1 if older else 1)

    def tasks(self) -> Iterator[int]:
        chain: _Chain | None = self
        while chain is not None:
            yield chain.task
            chain = chain.older


class _Users(NamedTuple):
    """Which tasks use some bytes of a block. Whoever waits for the last writer waits for all before the block, too."""

    writer: int  # -1: none
    users: _Chain  # but for those that younger ones waited for


class _Arena:
    """Who uses which bytes of one ring's heap, so that a new block's users wait for those of the block before."""

    def __init__(self) -> None:
        self.nbytes = 0
        self._users: RangeMap[_Users] = RangeMap()
        self._earlier: RangeMap[_Chain] = RangeMap()  # users of blocks that had the bytes before
        self._gates: dict[int, tuple[int, _Chain]] = {}  # who waited for all of a long chain, by the chain's identity

    def give(self, block: HeapBlock) -> None:
        """The bytes are a new block's from now on."""
        end = block.offset + block.nbytes
        self.nbytes = max(self.nbytes, end)
        for left, right, found in self._users.pieces(block.offset, end):
            if found is not None:
                self._earlier.put(left, right, found.users)
        self._users.drop(block.offset, end)

    def use(
        self, block: HeapBlock, ranges: Sequence[ByteRange], tag: Tag, task: int, before: set[int], ended: int
    ) -> set[int]:
        """``task``, which waits for ``before`` and so for all below ``ended``, uses bytes of a block.

        Returns whom it must wait for besides.
        """
        besides: set[int] = set()
        writes = tag.writes

        def join(left: int, right: int, found: _Users | None) -> _Users:
            if found is None or found.writer not in before:
                for earlier in self._earlier.over(left, right):
                    if earlier.task >= ended:  # the youngest of them
                        besides.update(self._ends_of(earlier, task))
            users = found.users if found else None
            while users is not None and (users.task in before or users.task == task):
                users = users.older
            return _Users(task if writes else found.writer if found else -1, _Chain.joined(task, users))

        for begin, end in ranges:
            self._users.update(block.offset + begin, block.offset + end, join)
        return besides

    def _ends_of(self, earlier: _Chain, task: int) -> Iterable[int]:
        """Whom to wait for so that all of ``earlier`` have ended: each user for each would be a product of edges."""
        if earlier.length <= _MAX_EACH:
            return earlier.tasks()
        gate, _ = self._gates.setdefault(id(earlier), (task, earlier))
        return earlier.tasks() if gate == task else (gate,)
