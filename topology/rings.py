"""Sizes of the four rings that bound a task graph: asked for, checked, resolved, suggested, compared with free memory.

Owns nothing; values only. Names, bounds and defaults follow the simpler and pypto runtimes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from ..errors import ConfigError, MemoryExhausted

__all__ = [
    "DEFAULT_DEP_POOL",
    "DEFAULT_HEAP",
    "DEFAULT_TASK_WINDOW",
    "HEAP_ALIGNMENT",
    "RINGS",
    "RingRequest",
    "RingSizes",
    "RingUse",
    "check_reservation",
    "most_of",
    "resolve_rings",
    "suggest_rings",
]

RINGS = 4
"""Scopes nested deeper than three share the last ring."""

DEFAULT_TASK_WINDOW = 16_384
DEFAULT_HEAP = 256 << 20  # bytes
DEFAULT_DEP_POOL = 16_384

HEAP_ALIGNMENT = 1_024
"""Bytes every heap block starts at a multiple of, and is rounded up to."""

# What one entry costs this implementation, by tracemalloc over 16,000 tasks of three arguments (810 bytes each, with
# their byte ranges) and over tasks of 200 dependencies (26 bytes each); CPython 3.11.
_TASK_BYTES = 1_024
_DEP_BYTES = 32

_MAX_DEP_POOL = 2**31 - 1

Four = tuple[int, int, int, int]


@attrs.frozen
class _Rule:
    """One ring parameter: its default and what values it takes."""

    name: str
    default: int
    least: int
    is_power: bool

    @property
    def text(self) -> str:
        if self.is_power:
            return f"a power of two of at least {self.least:,}"
        return f"an integer from {self.least} to {_MAX_DEP_POOL:,}"

    @property
    def variable(self) -> str:
        return f"CHIPBUS_{self.name.upper()}"

    def is_met(self, value: Any) -> bool:
        if not isinstance(value, int) or isinstance(value, bool) or value < self.least:
            return False
        return value & (value - 1) == 0 if self.is_power else value <= _MAX_DEP_POOL

    def check(self, value: Any, where: str) -> int | Four:
        """``value`` as an integer or four of them (0: the default), or ``ConfigError`` naming field, rule, value."""
        if isinstance(value, Sequence) and not isinstance(value, str | bytes):
            if len(value) != RINGS:
                raise ConfigError(
                    f"{where} is {list(value)!r}, {len(value)} values; a list has one for each of 4 rings"
                )
            for ring, entry in enumerate(value):
                if not (self.is_met(entry) or (type(entry) is int and entry == 0)):
                    raise ConfigError(f"{where}[{ring}] is {entry!r}; it must be {self.text}, or 0 for the default")
            first, second, third, fourth = (int(entry) for entry in value)
            return first, second, third, fourth
        if not self.is_met(value):
            raise ConfigError(f"{where} is {value!r}; it must be {self.text}, or a list of 4 such numbers")
        return int(value)

    def parse(self, text: str) -> int | Four:
        """The value of the environment variable, ``65536`` or ``0,65536,0,0``, or ``ConfigError``."""
        try:
            numbers = [int(part) for part in text.split(",")]
        except ValueError:
            raise ConfigError(
                f"{self.variable} is {text!r}; it must be {self.text}, or 4 of them with commas"
            ) from None
        return self.check(numbers[0] if len(numbers) == 1 else numbers, self.variable)


_TASK_WINDOW = _Rule("ring_task_window", DEFAULT_TASK_WINDOW, least=4, is_power=True)
_HEAP = _Rule("ring_heap", DEFAULT_HEAP, least=HEAP_ALIGNMENT, is_power=True)
_DEP_POOL = _Rule("ring_dep_pool", DEFAULT_DEP_POOL, least=4, is_power=False)


def _checked(rule: _Rule) -> Any:
    return attrs.field(default=None, converter=lambda value: None if value is None else rule.check(value, rule.name))


@attrs.frozen(kw_only=True)
class RingRequest:
    """Ring sizes somebody asks for. One number: for all four rings; four: one each, 0 for the default; None: not asked.

    Raises ``ConfigError`` naming field, rule and value.
    """

    ring_task_window: int | Sequence[int] | None = _checked(_TASK_WINDOW)
    """Task slots: a power of two of at least 4; a ring holds one task less."""
    ring_heap: int | Sequence[int] | None = _checked(_HEAP)
    """Bytes for tensors of scopes: a power of two of at least 1,024."""
    ring_dep_pool: int | Sequence[int] | None = _checked(_DEP_POOL)
    """Dependencies beyond a task's first 64: 4 to 2³¹ - 1."""


@attrs.frozen(kw_only=True)
class RingSizes:
    """The sizes of four rings as they are used, and where each came from. Made by ``resolve_rings``."""

    task_window: Four = (DEFAULT_TASK_WINDOW,) * 4
    """Task slots; a ring holds one task less."""
    heap: Four = (DEFAULT_HEAP,) * 4
    """Bytes."""
    dep_pool: Four = (DEFAULT_DEP_POOL,) * 4
    """Entries."""
    sources: tuple[tuple[str, ...], ...] = attrs.field(default=(("default",) * 4,) * 3, eq=False)
    """For task window, heap and dependency pool, the source of each ring's value."""

    def explain(self) -> str:
        """Value and source of every entry, one a line."""
        lines = []
        for rule, values, sources in zip(
            (_TASK_WINDOW, _HEAP, _DEP_POOL), (self.task_window, self.heap, self.dep_pool), self.sources, strict=True
        ):
            lines += [
                f"{rule.name}[{ring}] = {value:,} ({source})"
                for ring, (value, source) in enumerate(zip(values, sources, strict=True))
            ]
        return "\n".join(lines)

    @property
    def reserved_bytes(self) -> int:
        """What all four rings take when they are full: heaps, and this implementation's own records."""
        return sum(self.heap) + sum(self.task_window) * _TASK_BYTES + sum(self.dep_pool) * _DEP_BYTES


@attrs.frozen(kw_only=True)
class RingUse:
    """The most one ring has held at once. ``suggest_rings`` makes sizes of four of them."""

    tasks: int = 0
    heap_bytes: int = 0
    """Bytes of heap blocks, each rounded up to ``HEAP_ALIGNMENT``."""
    heap_largest: int = 0
    """Bytes of the largest block."""
    heap_allocated: int = 0
    """Bytes of all blocks there have been, one after another."""
    dep_entries: int = 0


def most_of(one: RingUse, other: RingUse) -> RingUse:
    """Field by field, the larger one: the use of a ring that both would have fitted into."""
    names = [field.name for field in attrs.fields(RingUse)]
    return RingUse(**{name: max(getattr(one, name), getattr(other, name)) for name in names})


def resolve_rings(
    dispatch: RingRequest | None = None,
    worker: RingRequest | None = None,
    environ: Mapping[str, str] = os.environ,
) -> RingSizes:
    """The sizes to use: what the dispatch asks for, else the worker, else ``CHIPBUS_RING_*``, else the defaults.

    The first of them that says something about a parameter decides it for all rings: a 0 in its list means the default,
    not the next one's opinion. Raises ``ConfigError`` for an environment variable that is not understood.
    """
    values: list[Four] = []
    sources: list[tuple[str, ...]] = []
    for rule in (_TASK_WINDOW, _HEAP, _DEP_POOL):
        asked: int | Four | None = None
        source = "default"
        for request, name in ((dispatch, "dispatch"), (worker, "worker")):
            if asked is None and request is not None:
                asked, source = getattr(request, rule.name), name
        if asked is None and environ.get(rule.variable, "").strip():
            asked, source = rule.parse(environ[rule.variable]), f"environment {rule.variable}"
        if asked is None:
            asked, source = rule.default, "default"
        four = (asked,) * RINGS if isinstance(asked, int) else asked
        first, second, third, fourth = (entry or rule.default for entry in four)
        values.append((first, second, third, fourth))
        sources.append(tuple(source if entry else f"default, by 0 of {source}" for entry in four))
    return RingSizes(task_window=values[0], heap=values[1], dep_pool=values[2], sources=tuple(sources))


def suggest_rings(high_water: Sequence[RingUse]) -> RingRequest:
    """The smallest valid sizes with which the recorded use fits, whatever the timing; one ``RingUse`` for each ring."""
    if len(high_water) != RINGS:
        raise ConfigError(f"high water is given for {len(high_water)} rings; there are {RINGS}")
    return RingRequest(
        ring_task_window=[_power(use.tasks + 1, 4) for use in high_water],
        ring_heap=[_heap(use) for use in high_water],
        ring_dep_pool=[max(use.dep_entries, 4) for use in high_water],
    )


def check_reservation(sizes: RingSizes, free_bytes: int, chips: int) -> None:
    """Refuse sizes that ``chips`` chips cannot hold in ``free_bytes``: ``MemoryExhausted``, before any allocation."""
    needed = sizes.reserved_bytes * chips
    if needed <= free_bytes:
        return
    parts = {
        "ring_heap": sum(sizes.heap),
        "ring_task_window": sum(sizes.task_window) * _TASK_BYTES,
        "ring_dep_pool": sum(sizes.dep_pool) * _DEP_BYTES,
    }
    largest = max(parts, key=lambda name: parts[name])
    raise MemoryExhausted(
        f"the rings of {chips} chip{'s' if chips > 1 else ''} would take {needed:,} bytes, {free_bytes:,} are free;"
        f" {largest} takes {parts[largest] * chips:,} of them: make it smaller"
    )


def _power(number: int, least: int) -> int:
    """The smallest power of two that is at least ``number`` and ``least``."""
    return max(least, 1 << max(0, number - 1).bit_length())


def _heap(use: RingUse) -> int:
    size = _power(use.heap_bytes, HEAP_ALIGNMENT)
    if use.heap_bytes > use.heap_largest and use.heap_allocated > size:
        # The ring wraps around while it holds something, and no block is torn in two: the end of the ring stays unused.
        size = _power(use.heap_bytes + use.heap_largest - HEAP_ALIGNMENT, HEAP_ALIGNMENT)
    return size
