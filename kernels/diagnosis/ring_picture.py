"""What the rings of a run held, as a picture: a row per ring, a panel per resource, from scope to scope.

Owns nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from ...topology.rings import RINGS, suggest_rings
from ..rings import RingMark, ScopeRecord
from .run_graph import RunGraph
from .svg import MUTED, document, element, text

__all__ = ["held_by_ring", "to_rings_svg"]

_RESOURCES = ("task window", "heap", "dependency pool")
_UNITS = ("tasks", "bytes", "entries")
_WIDTH, _HEIGHT, _GAP, _MARGIN, _HEADER = 300.0, 96.0, 36.0, 28.0, 76.0
_PITCH = _HEIGHT + 70.0  # from row to row
_LINE, _FILL, _MOST = "#0969da", "#ddf4ff", "#d9480f"


def held_by_ring(scopes: Sequence[ScopeRecord]) -> list[list[tuple[int, int, int]]]:
    """Per ring, (tasks, heap bytes, dependency entries) held at each begin and end of its scopes, in order of time."""
    held: list[list[tuple[int, int, int]]] = [[] for _ in range(RINGS)]
    open_scopes: list[ScopeRecord] = []

    def note(ring: int, mark: RingMark | None) -> None:
        if mark is not None:
            tasks, heap, deps = (taken - given for taken, given in zip(mark[0::2], mark[1::2], strict=True))
            held[ring].append((tasks, heap, deps))

    for scope in scopes:
        while open_scopes and open_scopes[-1].depth >= scope.depth:
            ended = open_scopes.pop()
            note(ended.ring, ended.end)
        note(scope.ring, scope.begin)
        open_scopes.append(scope)
    for scope in reversed(open_scopes):
        note(scope.ring, scope.end)
    return held


def to_rings_svg(run: RunGraph) -> str:
    """A self-contained SVG of the rings that were used, with the sizes that would have been enough."""
    held = held_by_ring(run.scopes)
    most = [(use.tasks, use.heap_bytes, use.dep_entries) for use in run.high_water]
    used = [ring for ring in range(len(most)) if any(most[ring])]
    enough = _enough(run)
    parts = [
        text(f"{run.name}: rings", _MARGIN, 34, font_size=18, font_weight=700),
        text("held at each begin and end of a scope · orange: the most at any time", _MARGIN, 56, fill=MUTED),
    ]
    if not used:
        parts.append(text("no ring was used", _MARGIN, _HEADER + 30, font_size=14))
    for row, ring in enumerate(used):
        for column, resource in enumerate(_RESOURCES):
            x, y = _MARGIN + column * (_WIDTH + _GAP), _HEADER + 40 + row * _PITCH
            parts.append(
                text(f"ring {ring}: {resource}", x, y - 24, font_size=13, font_weight=600)
                + text(_said(run, ring, column, most[ring][column]), x, y - 8, fill=MUTED)
            )
            samples = [sample[column] for sample in held[ring]]
            parts += _panel(samples, most[ring][column], x, y)
            below = f"size {enough[column][ring]:,} is enough · {len(samples)} scope begins and ends"
            parts.append(text(below, x, y + _HEIGHT + 16, fill=MUTED, font_size=11))
    width = 2 * _MARGIN + 3 * _WIDTH + 2 * _GAP
    return document(width, _HEADER + 40 + max(len(used), 1) * _PITCH, f"rings of {run.name}", parts)


def _said(run: RunGraph, ring: int, column: int, most: int) -> str:
    capacity = _capacity(run, ring, column)
    of = f" of {capacity:,} ({100 * most / capacity:.1f} %)" if capacity else ""
    return f"{most:,}{of} {_UNITS[column]}"


def _capacity(run: RunGraph, ring: int, column: int) -> int:
    if run.rings is None:
        return 0
    return (run.rings.task_window[ring] - 1, run.rings.heap[ring], run.rings.dep_pool[ring])[column]


def _enough(run: RunGraph) -> list[Sequence[int]]:
    """The suggested value of each parameter, per ring."""
    if not run.high_water:
        return []
    request = suggest_rings(run.high_water)
    asked = (request.ring_task_window, request.ring_heap, request.ring_dep_pool)
    return [[value] * RINGS if isinstance(value, int) else value or () for value in asked]


def _panel(samples: Sequence[int], most: int, x: float, y: float) -> list[str]:
    """Steps from sample to sample; the highest line of the panel is the most there was."""
    bottom = y + _HEIGHT
    parts = [element("rect", x=x, y=y, width=_WIDTH, height=_HEIGHT, fill="#f6f8fa", stroke="#d1d9e0")]
    scale = (_HEIGHT - 8) / max(most, 1)
    if samples:
        step = _WIDTH / max(len(samples) - 1, 1)
        way = f"M{x:.1f},{bottom - samples[0] * scale:.1f}"
        for number, sample in enumerate(samples[1:], start=1):
            way += f"H{x + number * step:.1f}V{bottom - sample * scale:.1f}"
        parts.append(element("path", d=f"{way}V{bottom:.1f}H{x:.1f}Z", fill=_FILL))
        parts.append(element("path", d=way, fill="none", stroke=_LINE, stroke_width=1.4))
    high = bottom - most * scale
    parts.append(
        element("path", d=f"M{x:.1f},{high:.1f}h{_WIDTH:.1f}", stroke=_MOST, stroke_width=1.4, stroke_dasharray="4 3")
    )
    label = high + 14 if most else high - 4  # below the line, unless that is the bottom
    parts.append(text(f"{most:,}", x + 6, label, font_size=11))
    return parts
