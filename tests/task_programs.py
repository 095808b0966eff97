"""Random task programs, and a byte-by-byte bookkeeper that says which edges they have and which they would need."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import attrs
from hypothesis import strategies as st

from chipbus.kernels.tags import Tag
from chipbus.topology.rings import RingSizes

ROWS, COLUMNS = 4, 6  # every space a program works on is a row-major array of so many bytes, heap blocks are larger
READING, WRITING = (Tag.INPUT, Tag.INOUT), (Tag.OUTPUT, Tag.INOUT, Tag.OUTPUT_EXISTING)


@attrs.frozen
class Open:
    manual: bool


@attrs.frozen
class Close:
    pass


@attrs.frozen
class Alloc:
    columns: int  # of uint8, in 4 rows; the first 6 columns are worked on


@attrs.frozen
class Use:
    """A rectangle of a space: one of two, or, twice as often, one of the blocks of open scopes."""

    tag: Tag
    space: int
    top: int
    height: int
    left: int
    width: int

    def block(self, count: int) -> int | None:
        """Which of ``count`` blocks, if any."""
        index = self.space % (2 + 2 * count)
        return None if index < 2 else (index - 2) // 2

    def cells(self) -> list[tuple[int, int]]:
        return [
            (row, column)
            for row in range(self.top, min(ROWS, self.top + self.height))
            for column in range(self.left, min(COLUMNS, self.left + self.width))
        ]

    def ranges(self, columns: int = COLUMNS) -> tuple[tuple[int, int], ...]:
        """Byte ranges in a space with so many columns; ascending and disjoint, not joined where they touch."""
        right = min(COLUMNS, self.left + self.width)
        rows = range(self.top, min(ROWS, self.top + self.height))
        return tuple((row * columns + self.left, row * columns + right) for row in rows if right > self.left)


@attrs.frozen
class Work:
    uses: tuple[Use, ...]
    after: tuple[int, ...]  # how many tasks ago
    members: int
    fails: bool


Step = Open | Close | Alloc | Work

_uses = st.builds(
    Use,
    tag=st.sampled_from(list(Tag)),
    space=st.integers(0, 11),
    top=st.sampled_from([0, 0, 1, 2, 3]),
    height=st.sampled_from([4, 2, 1, 0]),
    left=st.sampled_from([0, 0, 2, 3, 5]),
    width=st.sampled_from([6, 3, 1, 0]),
)


def steps(*, may_fail: bool, may_be_manual: bool = True) -> st.SearchStrategy[list[Step]]:
    work = st.builds(
        Work,
        uses=st.lists(_uses, max_size=4).map(tuple),
        after=st.lists(st.integers(1, 6), max_size=2).map(tuple),
        members=st.sampled_from([1, 1, 1, 2, 3]),
        fails=st.integers(0, 5).map(lambda number: may_fail and number == 5),
    )
    alloc = st.builds(Alloc, columns=st.sampled_from([6, 6, 300, 700]))
    opened = st.builds(Open, manual=st.sampled_from([False, False, may_be_manual]))
    loop = st.builds(
        lambda opened, body, times: [opened, *body, Close()] * times,
        opened,
        st.lists(st.one_of(alloc, work, work), min_size=1, max_size=5),
        st.integers(1, 5),
    )
    parts = st.one_of(loop, loop, st.tuples(st.one_of(work, alloc, opened, st.just(Close()))).map(list))
    # Lists of any length alike: by itself hypothesis makes most of them shorter than five.
    lists = st.integers(0, 12).flatmap(lambda length: st.lists(parts, min_size=length, max_size=length))
    return lists.map(lambda lists: [step for part in lists for step in part])


def sizes(*, heap: Sequence[int] = (1024, 2048, 4096)) -> st.SearchStrategy[RingSizes]:
    def four(values: Sequence[int]) -> st.SearchStrategy[tuple[int, ...]]:
        return st.tuples(*(st.sampled_from(values) for _ in range(4)))

    return st.builds(RingSizes, task_window=four((4, 8, 64)), heap=four(heap), dep_pool=four((4, 5, 64)))


Byte = tuple[object, int, int]


@attrs.define
class Bookkeeper:
    """Per byte: who wrote it last and who has read it since. Once as things are, once as far as tags tell."""

    track_war: bool
    writer: dict[Byte, int] = attrs.field(factory=dict)
    readers: dict[Byte, set[int]] = attrs.field(factory=lambda: defaultdict(set))
    told_writer: dict[Byte, int] = attrs.field(factory=dict)
    told_readers: dict[Byte, set[int]] = attrs.field(factory=lambda: defaultdict(set))

    def edges(self, uses: Sequence[tuple[Tag, list[Byte]]], *, manual: bool) -> tuple[set[int], set[int]]:
        """(those tags give, those any order needs that must give what program order gives)."""
        given: set[int] = set()
        needed: set[int] = set()
        for tag, touched in uses:
            for byte in touched:
                if tag in READING:
                    needed |= {self.writer[byte]} if byte in self.writer else set()
                    given |= {self.told_writer[byte]} if byte in self.told_writer else set()
                if tag in WRITING:
                    needed |= self.readers[byte]
                    needed |= {self.writer[byte]} if byte in self.writer else set()
                    if self.track_war:
                        given |= self.told_readers[byte]
        return (set() if manual else given), needed

    def add(self, task: int, uses: Sequence[tuple[Tag, list[Byte]]], *, manual: bool) -> None:
        views = [(self.writer, self.readers)]
        if not manual:
            views.append((self.told_writer, self.told_readers))
        for writer, readers in views:
            for tag, touched in uses:
                if tag in WRITING:
                    for byte in touched:
                        writer[byte] = task
                        if writer is self.writer or tag is Tag.INOUT:  # who only overwrites is waited for by nobody
                            readers[byte] = set()
            for tag, touched in uses:
                if tag in READING:
                    for byte in touched:
                        readers[byte].add(task)
