"""Observations by size: what is reported of them, and what fills it.

Owns: nothing; whoever observes owns its ``Series``, and what that gives to read is frozen.
"""

from __future__ import annotations

from bisect import bisect_left

import attrs

__all__ = ["UNOBSERVED", "Histogram", "Series"]


@attrs.frozen
class Histogram:
    """``counts[i]`` are the observations in (bounds[i - 1], bounds[i]]; the last one is above all bounds.

    Without bounds it says that nothing was observed.
    """

    bounds: tuple[float, ...] = ()
    counts: tuple[int, ...] = (0,)  # one more than bounds; not cumulative
    total: float = 0.0  # sum of all observations

    def since(self, earlier: Histogram) -> Histogram:
        """What was observed after ``earlier``, a former state of the same histogram."""
        counts = tuple(now - then for now, then in zip(self.counts, earlier.counts, strict=True))
        return Histogram(self.bounds, counts, max(0.0, self.total - earlier.total))

    def __add__(self, other: Histogram) -> Histogram:
        """Both together. Their bounds are the same, or one of them has observed nothing."""
        if not (self.bounds and other.bounds):
            return self if self.bounds else other
        counts = tuple(one + another for one, another in zip(self.counts, other.counts, strict=True))
        return Histogram(self.bounds, counts, self.total + other.total)


UNOBSERVED = Histogram()
"""Of something that nobody has observed, or been told of."""


class Series:
    """A histogram that is being filled."""

    __slots__ = ("_bounds", "_counts", "_total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._total = 0.0

    def observe(self, value: float) -> None:
        """One more."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._total += value

    def read(self) -> Histogram:
        """All so far."""
        return Histogram(self._bounds, tuple(self._counts), self._total)
