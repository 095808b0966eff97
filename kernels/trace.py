"""Tracing a tile program: its loops run once, in Python, and every submit becomes a task of the graph. No torch here.

Owns: the loops and scopes that are open while one program is traced for one set of shapes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

import attrs

from ..errors import InvalidArgs
from .graph import GraphBuilder, Setting, Tag, TensorMap, Tile
from .incore import InCore
from .program import DTYPE_BYTES, Direction

__all__ = ["BUILT_IN", "NoDep", "Trace"]

BUILT_IN = frozenset({"linear", "load_rows", "rotary_table"})
"""Built-in tile kernels a program may submit by name: those that read nothing but their tiles."""


@attrs.frozen
class NoDep:
    """A tile a task uses without waiting for anyone, or making anyone wait: constants, memory ordered by hand."""

    tile: Tile


@attrs.define
class _Loop:
    """An open loop whose iterations must not depend on each other."""

    number: int
    iteration: int = 0


@attrs.define(eq=False)
class _Stage:
    """The tensors of one pipeline stage, used again by every ``stages``-th iteration."""

    tiles: list[Tile] = attrs.field(factory=list)
    cursor: int = 0
    users: dict[int, list[int]] = attrs.field(factory=dict)  # buffer → tasks of this iteration that use it
    earlier: dict[int, list[int]] = attrs.field(factory=dict)  # likewise, of the iteration that had the stage before

    def restart(self) -> None:
        self.cursor, self.users, self.earlier = 0, {}, self.users


_Steps = range  # in the class below, the name is taken by the loop


class Trace:
    """What a program sees while it is traced: loops over tiles, scopes with tensors of their own, and ``submit``."""

    def __init__(self, builder: GraphBuilder, read_only: Collection[str] = ()) -> None:
        self.incores: dict[str, InCore] = {}
        """In-core functions submitted so far, by the name of their tasks."""
        self._builder = builder
        self._read_only = read_only  # names of IN parameters
        self._loops: list[_Loop] = []
        self._num_loops = 0
        self._frames: list[_Stage | None] = []  # who owns a tensor made now: a pipeline stage, or (None) the scope
        self._stages: dict[int, _Stage] = {}  # buffer → the stage that owns it
        self._written_buffers: set[int] = set()
        self._written = TensorMap()  # inside parallel loops: who wrote what,
        self._made_by: list[tuple[str, tuple[tuple[int, int], ...]]] = []  # with kernel and (loop, iteration) path

    def range(self, begin: int, end: int, step: int = 1) -> Iterator[int]:
        """Iterations in order: each may use what the ones before wrote."""
        return iter(_steps("range", begin, end, step))

    def parallel(self, begin: int, end: int, step: int = 1) -> Iterator[int]:
        """Iterations that are independent, which is checked: none reads or overwrites what another one wrote."""
        return self._independent(_steps("parallel", begin, end, step))

    def spmd(self, instances: int) -> Iterator[int]:
        """The same program ``instances`` times, independently; yields the number of the instance, from 0."""
        if instances < 1:
            raise InvalidArgs(f"spmd of {instances} instances; it needs at least 1")
        return self._independent(range(instances))

    def pipeline(self, begin: int, end: int, step: int = 1, *, stages: int = 2) -> Iterator[int]:
        """Iterations of which at most ``stages`` are under way at once.

        A tensor made in the loop's body is shared by every ``stages``-th iteration: whoever writes it waits for those
        who used it before. So a loop of any length takes the memory of ``stages`` iterations.
        """
        if stages < 1:
            raise InvalidArgs(f"pipeline of {stages} stages; it needs at least 1")
        ring = [_Stage() for _ in range(stages)]
        for turn, index in enumerate(_steps("pipeline", begin, end, step)):
            stage = ring[turn % stages]
            stage.restart()
            self._frames.append(stage)
            try:
                yield index
            finally:
                self._frames.pop()

    @contextmanager
    def scope(self, *, manual: bool = False) -> Iterator[None]:
        """Memory made inside is given back at the end. ``manual``: no edges are found, only those of ``after``."""
        self._frames.append(None)
        try:
            with self._builder.scope(manual=manual):
                yield
        finally:
            self._frames.pop()

    def tensor(self, dtype: str, *shape: int) -> Tile:
        """New memory of the innermost scope (or pipeline stage), undefined until written."""
        if dtype not in DTYPE_BYTES:
            raise InvalidArgs(f"dtype is {dtype!r}; expected one of {', '.join(DTYPE_BYTES)}")
        stage = self._frames[-1] if self._frames else None
        if stage is None:
            return self._builder.tensor(dtype, *shape)
        position, stage.cursor = stage.cursor, stage.cursor + 1
        if position < len(stage.tiles):
            tile = stage.tiles[position]
            if (tile.buffer.dtype, tile.shape) == (dtype, shape):
                return tile
        tile = self._builder.tensor(dtype, *shape)
        stage.tiles[position : position + 1] = [tile]
        self._stages[tile.buffer.index] = stage
        return tile

    @staticmethod
    def no_dep(tile: Tile) -> NoDep:
        """The tile as an argument that makes no edges."""
        return NoDep(tile)

    def submit(
        self,
        kernel: InCore | str,
        *tiles: Tile | NoDep | tuple[Tag, Tile],
        after: Sequence[int] = (),
        **settings: Setting,
    ) -> int:
        """Append a task and return its id, for ``after``.

        ``kernel``: an in-core function, whose directions give the tags (OUT is OUTPUT on the program's own tensors,
        OUTPUT_EXISTING on parameters), or the name of a built-in kernel with (tag, tile) pairs.
        """
        if isinstance(kernel, InCore):
            kernel.check_call(len(tiles), settings)
            name, args = self._name(kernel), tuple(map(_tagged, kernel.directions, tiles))
        else:
            if kernel not in BUILT_IN:
                raise InvalidArgs(f"{kernel!r} is no built-in kernel; those are {', '.join(sorted(BUILT_IN))}")
            name, args = kernel, tuple(_pair(kernel, tile) for tile in tiles)
        for tag, tile in args:
            if tag.writes and tile.buffer.name in self._read_only and tile.buffer.is_bound:
                raise InvalidArgs(f"{name} writes {tile.buffer.name}, which is an IN parameter")
        before = list(after)
        for tag, tile in args:
            stage = self._stages.get(tile.buffer.index)
            if stage is not None and tag.writes:
                before += stage.earlier.get(tile.buffer.index, ())
        if self._loops:
            self._check_independence(name, args)
        task = self._builder.submit(name, *args, after=tuple(dict.fromkeys(before)), **settings)
        for _, tile in args:
            stage = self._stages.get(tile.buffer.index)
            if stage is not None:
                stage.users.setdefault(tile.buffer.index, []).append(task)
        return task

    def _independent(self, steps: _Steps) -> Iterator[int]:
        self._num_loops += 1
        loop = _Loop(self._num_loops)
        for loop.iteration, index in enumerate(steps):
            self._loops.append(loop)
            try:
                yield index
            finally:
                self._loops.pop()

    def _check_independence(self, name: str, args: Sequence[tuple[Tag, Tile]]) -> None:
        path = tuple((loop.number, loop.iteration) for loop in self._loops)
        ranges = [
            (tag, tile.buffer, tile.byte_ranges())
            for tag, tile in args
            if tag.writes or (tag.reads and tile.buffer.index in self._written_buffers)
        ]
        for _, buffer, pieces in ranges:
            for begin, end in pieces:
                for writer in self._written.producers(buffer.index, begin, end):
                    other, other_path = self._made_by[writer]
                    both = zip(path, other_path, strict=False)
                    ours, theirs = next((pair for pair in both if pair[0] != pair[1]), (None, None))
                    if ours and theirs and ours[0] == theirs[0]:
                        raise InvalidArgs(
                            f"{name} in iteration {ours[1]} of a parallel loop uses what {other} wrote to {buffer.name}"
                            f" in iteration {theirs[1]}; where iterations depend on each other, use range"
                        )
        for tag, buffer, pieces in ranges:
            if tag.writes:
                self._written_buffers.add(buffer.index)
                for begin, end in pieces:
                    self._written.produced(buffer.index, begin, end, len(self._made_by))
        self._made_by.append((name, path))

    def _name(self, kernel: InCore) -> str:
        known = self.incores.setdefault(kernel.name, kernel)
        if known is not kernel or kernel.name in BUILT_IN:
            raise InvalidArgs(f"two kernels of one program are called {kernel.name}; rename one")
        return kernel.name


def _steps(loop: str, begin: int, end: int, step: int) -> range:
    if step < 1:
        raise InvalidArgs(f"{loop} in steps of {step}; loops go forwards, in steps of at least 1")
    return range(begin, end, step)


def _tagged(direction: Direction, given: Tile | NoDep | tuple[Tag, Tile]) -> tuple[Tag, Tile]:
    if isinstance(given, NoDep):
        return Tag.NO_DEP, given.tile
    if not isinstance(given, Tile):
        raise InvalidArgs(f"{given!r} is no tile; in-core functions take tiles, and settings by keyword")
    if direction is Direction.IN:
        return Tag.INPUT, given
    if direction is Direction.INOUT:
        return Tag.INOUT, given
    return (Tag.OUTPUT_EXISTING if given.buffer.is_bound else Tag.OUTPUT), given


def _pair(kernel: str, given: Tile | NoDep | tuple[Tag, Tile]) -> tuple[Tag, Tile]:
    if isinstance(given, tuple) and len(given) == 2 and isinstance(given[0], Tag):
        return given
    raise InvalidArgs(f"{kernel} is a built-in kernel; each of its tiles is given as (tag, tile)")
