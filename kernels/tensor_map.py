"""Which task wrote each byte last, and who has read it since: where the edges of a task graph come from.

Owns: the byte ranges of one graph; forgotten with it. Spaces are any hashable names of disjoint address ranges.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any, Generic, TypeVar

__all__ = ["ByteRange", "RangeMap", "TensorMap"]

ByteRange = tuple[int, int]
"""``[begin, end)``; an empty one touches nothing."""

V = TypeVar("V")


class RangeMap(Generic[V]):
    """Values of disjoint byte ranges of one address space, in ascending order. Values are never changed in place."""

    __slots__ = ("_begins", "_ends", "_values")

    def __init__(self) -> None:
        self._begins: list[int] = []
        self._ends: list[int] = []
        self._values: list[V] = []

    def __len__(self) -> int:
        return len(self._begins)

    def over(self, begin: int, end: int) -> list[V]:
        """The values of all pieces that share a byte with ``[begin, end)``."""
        if begin >= end:
            return []
        first = bisect.bisect_right(self._ends, begin)
        return self._values[first : bisect.bisect_left(self._begins, end, first)]

    def put(self, begin: int, end: int, value: V) -> None:
        """``[begin, end)`` has ``value`` from now on; what sticks out of overlapped pieces stays."""
        if begin >= end:
            return
        first = bisect.bisect_right(self._ends, begin)
        last = bisect.bisect_left(self._begins, end, first)
        if last == first:
            self._begins.insert(first, begin)
            self._ends.insert(first, end)
            self._values.insert(first, value)
        elif last == first + 1 and self._begins[first] == begin and self._ends[first] == end:
            self._values[first] = value
        else:
            self._splice(first, last, begin, end, [(begin, end, value)])

    def drop(self, begin: int, end: int) -> None:
        """Nothing in ``[begin, end)`` has a value from now on."""
        if begin < end:
            first = bisect.bisect_right(self._ends, begin)
            self._splice(first, bisect.bisect_left(self._begins, end, first), begin, end, [])

    def pieces(self, begin: int, end: int) -> list[tuple[int, int, V | None]]:
        """What makes up ``[begin, end)``: ascending pieces with their values, None where there is none."""
        found: list[tuple[int, int, V | None]] = []
        at = begin
        piece = bisect.bisect_right(self._ends, begin)
        while at < end:
            left = min(self._begins[piece], end) if piece < len(self._begins) else end
            if at < left:
                found.append((at, left, None))
            if left < end:
                found.append((max(left, at), min(self._ends[piece], end), self._values[piece]))
                left = self._ends[piece]
            at = left
            piece += 1
        return found

    def update(self, begin: int, end: int, change: Callable[[int, int, V | None], V]) -> None:
        """Give every piece of ``[begin, end)`` the ``change`` of its begin, end and value, None where it has none."""
        first = bisect.bisect_right(self._ends, begin)
        if first < len(self._begins) and self._begins[first] == begin and self._ends[first] == end:
            self._values[first] = change(begin, end, self._values[first])
        elif begin < end:
            changed = [(left, right, change(left, right, value)) for left, right, value in self.pieces(begin, end)]
            self._splice(first, bisect.bisect_left(self._begins, end, first), begin, end, changed)

    def copy(self) -> RangeMap[V]:
        """Another map of the same ranges and values."""
        other = RangeMap[V]()
        other._begins, other._ends, other._values = self._begins[:], self._ends[:], self._values[:]
        return other

    def _splice(self, first: int, last: int, begin: int, end: int, pieces: list[tuple[int, int, V]]) -> None:
        """Put ``pieces`` in the place of what pieces ``first`` to ``last`` have in ``[begin, end)``."""
        if first < last and self._begins[first] < begin:
            pieces = [(self._begins[first], begin, self._values[first]), *pieces]
        if first < last and self._ends[last - 1] > end:
            pieces = [*pieces, (end, self._ends[last - 1], self._values[last - 1])]
        self._begins[first:last] = [piece[0] for piece in pieces]
        self._ends[first:last] = [piece[1] for piece in pieces]
        self._values[first:last] = [piece[2] for piece in pieces]


_Readers = tuple[int, Any]  # the youngest reader and the _Readers before it, or (): shared by pieces that were one


class TensorMap:
    """The last writers of every byte, and, if asked to, its readers since. Tasks are numbers."""

    def __init__(self, *, track_readers: bool = False) -> None:
        self.entries = 0
        """Byte ranges with a writer of their own, plus byte ranges with readers of their own."""
        self._writers: dict[Hashable, RangeMap[int]] = {}
        self._readers: dict[Hashable, RangeMap[_Readers]] = {}
        self._track_readers = track_readers

    def producers(self, space: Hashable, begin: int, end: int) -> Iterator[int]:
        """The last writers of any byte in ``[begin, end)``."""
        if space in self._writers:
            yield from self._writers[space].over(begin, end)

    def find_writers(self, space: Hashable, ranges: Sequence[ByteRange], found: dict[int, None]) -> None:
        """Add the last writers of any byte in ``ranges`` to ``found``."""
        pieces = self._writers.get(space)
        if pieces is not None:
            for begin, end in ranges:
                for task in pieces.over(begin, end):
                    found[task] = None

    def find_readers(self, space: Hashable, ranges: Sequence[ByteRange], found: dict[int, None]) -> None:
        """Add all tasks that have read any byte in ``ranges`` and must not see a new writer's bytes there."""
        pieces = self._readers.get(space)
        if pieces is not None:
            for begin, end in ranges:
                for readers in pieces.over(begin, end):
                    while readers:
                        task, readers = readers
                        found[task] = None

    def produced(self, space: Hashable, begin: int, end: int, task: int) -> None:
        """``task`` is from now on the last writer of ``[begin, end)``."""
        self.written(space, ((begin, end),), task)

    def written(self, space: Hashable, ranges: Sequence[ByteRange], task: int, *, forget_readers: bool = True) -> None:
        """``task`` is from now on the last writer of ``ranges``.

        Earlier readers are forgotten, unless later writers may come without waiting for ``task``, as it waits for them.
        """
        pieces = self._writers.get(space)
        if pieces is None:
            pieces = self._writers[space] = RangeMap()
        before = len(pieces)
        for begin, end in ranges:
            pieces.put(begin, end, task)
        self.entries += len(pieces) - before
        if forget_readers and space in self._readers:
            readers = self._readers[space]
            before = len(readers)
            for begin, end in ranges:
                readers.drop(begin, end)
            self.entries += len(readers) - before

    def read(self, space: Hashable, ranges: Sequence[ByteRange], task: int) -> None:
        """``task`` reads ``ranges`` as they are now."""
        if not self._track_readers:
            return
        readers = self._readers.get(space)
        if readers is None:
            readers = self._readers[space] = RangeMap()
        before = len(readers)
        for begin, end in ranges:
            readers.update(begin, end, lambda _begin, _end, older: (task, older or ()))
        self.entries += len(readers) - before

    def forget(self, space: Hashable) -> None:
        """Nobody will name ``space`` again."""
        self.entries -= len(self._writers.pop(space, ())) + len(self._readers.pop(space, ()))

    def save(self, spaces: Iterable[Hashable]) -> Callable[[], None]:
        """Remember what is known of ``spaces``; calling the result brings it back."""
        names = tuple(spaces)
        entries = self.entries
        writers = {space: self._writers[space].copy() for space in names if space in self._writers}
        readers = {space: self._readers[space].copy() for space in names if space in self._readers}

        def restore() -> None:
            for space in names:
                self.forget(space)
            self._writers.update(writers)
            self._readers.update(readers)
            self.entries = entries

        return restore
