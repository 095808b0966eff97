"""Places the nodes of a graph in rows, so that edges run downwards, rarely cross, and are mostly straight.

Owns nothing. The method is Sugiyama's: rows by longest path, edges over several rows through points in each, order
within rows by barycentre, positions by least squares under the order.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence

import attrs

from .folding import Repeat

__all__ = ["Layout", "lay_out"]

_SWEEPS = 12
# How much an item insists on its place: points of a long edge more than nodes, which keeps it straight.
_POINT_WEIGHT, _SPINE_WEIGHT = 8.0, 1000.0


@attrs.frozen
class Layout:
    """``rows[node]`` counts from 0 at the top; ``xs[node]`` are centres, the leftmost edge of anything at 0.

    ``points[source, row]`` is where the long edges of a source cross a row.
    """

    rows: tuple[int, ...]
    xs: tuple[float, ...]
    points: Mapping[tuple[int, int], float]
    width: float


def lay_out(
    count: int,
    edges: Sequence[tuple[int, int]],
    repeats: Sequence[Repeat],
    spine: Collection[int],
    *,
    node_width: float,
    gap: float,
) -> Layout:
    """Place ``count`` nodes; ``edges`` lead from lower to higher numbers.

    A repeat gets rows of its own, to be framed; nodes of the spine are kept in a straight line as far as possible.
    Nodes are ``node_width`` wide and at least ``gap`` apart.
    """
    rows = _rows(count, edges, repeats)
    # Items of the picture: nodes by number, then one point per source and row that its long edges cross.
    points: dict[tuple[int, int], int] = {}
    above: list[list[int]] = [[] for _ in range(count)]
    for source, target in sorted(edges):
        upper = source
        for row in range(rows[source] + 1, rows[target]):
            if (source, row) not in points:
                points[source, row] = len(above)
                above.append([upper])
            upper = points[source, row]
        if upper not in above[target]:
            above[target].append(upper)
    below: list[list[int]] = [[] for _ in above]
    for item, uppers in enumerate(above):
        for upper in uppers:
            below[upper].append(item)
    row_of = [*rows, *(row for _, row in points)]
    levels: list[list[int]] = [[] for _ in range(max(row_of, default=-1) + 1)]
    for item, row in enumerate(row_of):
        levels[row].append(item)
    for item in spine:
        for sides in (above, below):
            sides[item] = [other for other in sides[item] if other in spine] or sides[item]
    widths = [node_width] * count + [gap / 2] * len(points)
    weights = [_SPINE_WEIGHT if item in spine else 1.0 for item in range(count)] + [_POINT_WEIGHT] * len(points)
    xs = [0.0] * len(row_of)
    for level in levels:
        _place(level, [0.0] * len(level), widths, weights, gap, xs)
    for sweep in range(_SWEEPS):
        is_down = sweep % 2 == 0
        neighbours = above if is_down else below
        for level in levels if is_down else reversed(levels):
            wanted = {item: _mean([xs[other] for other in neighbours[item]], xs[item]) for item in level}
            if sweep < _SWEEPS // 2:
                level.sort(key=lambda item: (wanted[item], item))
            _place(level, [wanted[item] for item in level], widths, weights, gap, xs)
    left = min((x - widths[item] / 2 for item, x in enumerate(xs)), default=0.0)
    right = max((x + widths[item] / 2 for item, x in enumerate(xs)), default=0.0)
    return Layout(
        rows=tuple(rows),
        xs=tuple(x - left for x in xs[:count]),
        points={key: xs[item] - left for key, item in points.items()},
        width=right - left,
    )


def _rows(count: int, edges: Sequence[tuple[int, int]], repeats: Sequence[Repeat]) -> list[int]:
    before: list[list[int]] = [[] for _ in range(count)]
    after: list[list[int]] = [[] for _ in range(count)]
    for source, target in edges:
        before[target].append(source)
        after[source].append(target)
    fresh = {repeat.first for repeat in repeats} | {repeat.last + 1 for repeat in repeats}  # start below all before
    rows: list[int] = []
    floor = 0
    for node in range(count):
        if node in fresh:
            floor = max(rows, default=-1) + 1
        rows.append(max([floor, *(rows[other] + 1 for other in before[node])]))
    if not repeats:  # what waits for nothing belongs just above what waits for it
        for node in reversed(range(count)):
            if not before[node] and after[node]:
                rows[node] = min(rows[other] for other in after[node]) - 1
    return rows


def _place(
    level: Sequence[int],
    wanted: Sequence[float],
    widths: Sequence[float],
    weights: Sequence[float],
    gap: float,
    xs: list[float],
) -> None:
    """Give the items of a row, in this order, the places nearest to those wanted: pool adjacent violators."""
    offsets = [0.0]
    for left, right in itertools.pairwise(level):
        offsets.append(offsets[-1] + (widths[left] + widths[right]) / 2 + gap)
    middle = offsets[-1] / 2
    blocks: list[tuple[float, float, int]] = []  # (mean, weight, items)
    for item, want, offset in zip(level, wanted, offsets, strict=True):
        mean, weight, size = want - (offset - middle), weights[item], 1
        while blocks and blocks[-1][0] >= mean:
            other, other_weight, other_size = blocks.pop()
            mean = (mean * weight + other * other_weight) / (weight + other_weight)
            weight, size = weight + other_weight, size + other_size
        blocks.append((mean, weight, size))
    means = [mean for mean, _, size in blocks for _ in range(size)]
    for item, mean, offset in zip(level, means, offsets, strict=True):
        xs[item] = mean + offset - middle


def _mean(values: Sequence[float], otherwise: float) -> float:
    return sum(values) / len(values) if values else otherwise
