"""A run's dependency graph as a picture: rows from top to bottom, the critical path in orange, repeats folded.

Owns nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape

import attrs

from ..engine import TaskState
from .critical_path import CriticalPath, critical_path
from .folding import Folded, fold, positions
from .layers import Layout, lay_out
from .run_graph import Reason, RunGraph
from .svg import MUTED, document, element, text

__all__ = ["shown_ns", "to_graph_svg"]

_MAX_NODES = 32  # more are folded, if they repeat
_WIDTH, _HEIGHT = 172.0, 40.0  # of a node
_GAP, _PITCH = 22.0, 76.0  # between nodes of a row, between rows
_MARGIN, _HEADER, _LOOP = 28.0, 96.0, 14.0
_CRITICAL = "#d9480f"
_FRAME = "#8250df"
_STYLES: Mapping[str, tuple[str, str, str]] = {  # style of an edge: colour, dashes, what the legend says
    "data": ("#6e7781", "none", "reads or updates what the other wrote"),
    "order": ("#1a7f6b", "7 4", "overwrites what the other used"),
    "explicit": ("#0969da", "2 4", "told to wait"),
}
_FILLS = ("#ddf4ff", "#dafbe1", "#fff8c5", "#fbefff", "#ffeff7", "#e6fffa", "#f6f8fa", "#fff1e5")
_MAX_TEXT = 20  # characters that fit into a node
_BOLD, _SMALL = 8.2, 6.6  # widths of characters, generously


@attrs.frozen
class _Line:
    """All edges between two nodes."""

    style: str
    critical: bool


def to_graph_svg(graph: RunGraph) -> str:
    """A self-contained SVG. More than 32 tasks are folded where they repeat; a node's tooltip says all about it."""
    path = critical_path(graph, None if graph.wall_ns else [1] * len(graph.tasks))
    folded = fold(graph, _MAX_NODES)
    down, every_back = _lines(graph, folded, path)
    # From copy to copy only what carries data is of interest: that memory is used again goes without saying.
    back = {ends: line for ends, line in every_back.items() if line.style != "order" or line.critical}
    node_of = positions(folded.nodes)
    spine = frozenset(node_of[task] for task in path.tasks)
    layout = lay_out(len(folded.nodes), list(down), folded.repeats, spine, node_width=_WIDTH, gap=_GAP)
    frames, right = _frames(folded, layout)
    parts = [*frames]
    # Critical lines last, so that they are never covered.
    parts += [_down(layout, ends, line) for ends, line in sorted(down.items(), key=lambda item: item[1].critical)]
    right += _LOOP
    for number, ((source, target), line) in enumerate(back.items()):
        parts.append(_back(layout, source, target, line, right, number))
        right += _LOOP
    fills = _fills(graph, folded)
    parts += [_node(graph, tasks, layout, node, path, fills) for node, tasks in enumerate(folded.nodes)]
    body_height = (max(layout.rows, default=0) + 1) * _PITCH
    header, header_width = _header(graph, path, folded, len(every_back) - len(back))
    width = max(right + 2 * _MARGIN, header_width)
    shifted = element("g", *parts, transform=f"translate({_MARGIN:.0f},{_HEADER + _MARGIN:.0f})")
    return document(width, _HEADER + body_height + 2 * _MARGIN, _title(graph), [*header, shifted])


def shown_ns(ns: int) -> str:
    """A duration for people: "420 ns", "17.3 µs", "1.25 ms", "2.40 s"."""
    for unit, size, digits in (("s", 1e9, 2), ("ms", 1e6, 2), ("µs", 1e3, 1)):
        if ns >= size:
            return f"{ns / size:.{digits}f} {unit}"
    return f"{ns} ns"


def _title(graph: RunGraph) -> str:
    return f"{graph.name}: {len(graph.tasks)} tasks, {len(graph.edges)} edges"


def _lines(
    graph: RunGraph, folded: Folded, path: CriticalPath
) -> tuple[dict[tuple[int, int], _Line], dict[tuple[int, int], _Line]]:
    """Lines between nodes: downwards, and those from one copy of a repeat to a later one."""
    node_of = positions(folded.nodes)
    copy_of = _copies(folded)
    on_path = set(zip(path.tasks, path.tasks[1:], strict=False))
    down: dict[tuple[int, int], _Line] = {}
    back: dict[tuple[int, int], _Line] = {}
    for edge in graph.edges:
        ends = (node_of[edge.before], node_of[edge.after])
        is_within = ends[0] < ends[1] and copy_of(edge.before, ends[1]) == copy_of(edge.after, ends[0])
        lines = down if is_within else back
        line = _Line(_style(edge.reasons), (edge.before, edge.after) in on_path)
        known = lines.get(ends)
        if known is not None:  # data tells more than order does
            styles = [style for style in _STYLES if style in (known.style, line.style)]
            line = _Line(styles[0], known.critical or line.critical)
        lines[ends] = line
    return down, back


def _copies(folded: Folded) -> Callable[[int, int], int]:
    """Which copy a task belongs to, of the outermost repeat that holds its node and the other one; 0 if none does."""
    node_of = positions(folded.nodes)
    place_of = {task: place for tasks in folded.nodes for place, task in enumerate(tasks)}
    outermost_first = sorted(folded.repeats, key=lambda repeat: repeat.first - repeat.last)

    def copy_of(task: int, other: int) -> int:
        node = node_of[task]
        for repeat in outermost_first:
            if repeat.first <= min(node, other) and max(node, other) <= repeat.last:
                return place_of[task] * repeat.count // len(folded.nodes[node])
        return 0

    return copy_of


def _style(reasons: Sequence[Reason]) -> str:
    if not reasons or Reason.RAW in reasons or Reason.WAW in reasons:
        return "data"
    return "explicit" if Reason.EXPLICIT in reasons else "order"


def _stroke(line: _Line) -> dict[str, object]:
    colour, dashes, _ = _STYLES[line.style]
    return {
        "fill": "none", "stroke": _CRITICAL if line.critical else colour,
        "stroke_width": 2.4 if line.critical else 1.2, "stroke_dasharray": dashes,
    }  # fmt: skip


def _top(row: int) -> float:
    return row * _PITCH


def _down(layout: Layout, ends: tuple[int, int], line: _Line) -> str:
    source, target = ends
    x, y = layout.xs[source], _top(layout.rows[source]) + _HEIGHT
    way = f"M{x:.1f},{y:.1f}"
    for row in range(layout.rows[source] + 1, layout.rows[target]):
        to_x, to_y = layout.points[source, row], _top(row)
        way += f"{_curve(x, y, to_x, to_y)}V{to_y + _HEIGHT:.1f}"
        x, y = to_x, to_y + _HEIGHT
    to_x, to_y = layout.xs[target], _top(layout.rows[target])
    way += _curve(x, y, to_x, to_y - 5)
    return element("path", d=way, **_stroke(line)) + _arrow(to_x, to_y, 0, line)


def _curve(x: float, y: float, to_x: float, to_y: float) -> str:
    middle = (y + to_y) / 2
    return f"C{x:.1f},{middle:.1f} {to_x:.1f},{middle:.1f} {to_x:.1f},{to_y:.1f}"


def _back(layout: Layout, source: int, target: int, line: _Line, at: float, number: int) -> str:
    """From the right of the source along a channel of its own, at ``at``, to the right of the target."""
    apart = 5.0 * (number % 3)  # so that lines of one node do not hide each other
    x, y = layout.xs[source] + _WIDTH / 2, _top(layout.rows[source]) + _HEIGHT - 6 - apart
    to_x, to_y = layout.xs[target] + _WIDTH / 2, _top(layout.rows[target]) + 6 + apart
    turn = 6.0 if to_y < y else -6.0
    way = f"M{x:.1f},{y:.1f}H{at - 6:.1f}Q{at:.1f},{y:.1f} {at:.1f},{y - turn:.1f}"
    way += f"V{to_y + turn:.1f}Q{at:.1f},{to_y:.1f} {at - 6:.1f},{to_y:.1f}H{to_x + 5:.1f}"
    return element("path", d=way, **_stroke(line)) + _arrow(to_x, to_y, 90, line)


def _arrow(x: float, y: float, degrees: int, line: _Line) -> str:
    colour = _CRITICAL if line.critical else _STYLES[line.style][0]
    return element("path", d="M0,0l-3.5,-7h7z", fill=colour, transform=f"translate({x:.1f},{y:.1f}) rotate({degrees})")


def _fills(graph: RunGraph, folded: Folded) -> Callable[[str], str]:
    """A colour per label, the same in every picture of the same run."""
    labels = dict.fromkeys(graph.tasks[tasks[0]].label for tasks in folded.nodes)
    numbers = {label: number for number, label in enumerate(labels)}
    return lambda label: _FILLS[numbers[label] % len(_FILLS)]


def _node(
    graph: RunGraph, tasks: Sequence[int], layout: Layout, node: int, path: CriticalPath, fills: Callable[[str], str]
) -> str:
    first = graph.tasks[tasks[0]]
    critical = sum(task in path.tasks for task in tasks)
    failed = [task for task in tasks if graph.tasks[task].state is TaskState.FAILED]
    took = sum(graph.tasks[task].duration_ns for task in tasks)
    x, y = layout.xs[node] - _WIDTH / 2, _top(layout.rows[node])
    result, shape = _distinction(graph, tasks[0])
    box = element(
        "rect", x=x, y=y, width=_WIDTH, height=_HEIGHT, rx=6,
        fill="#ffcecb" if failed else fills(first.label),
        stroke=_CRITICAL if critical else "#b6bdc4", stroke_width=2.4 if critical else 1.0,
    )  # fmt: skip
    detail = f"failed: {len(failed)}" if failed else shown_ns(took) if took else shape
    parts = [
        element("title", _tooltip(graph, tasks, path)),
        box,
        text(_cut(first.label, _MAX_TEXT), x + 9, y + 17, font_weight=600),
        text(_cut(detail, _MAX_TEXT), x + 9, y + 32, fill=MUTED, font_size=11),
    ]
    number = f"{len(tasks)} ×" if len(tasks) > 1 else f"#{tasks[0]}"
    parts.append(text(number, x + _WIDTH - 9, y + 32, fill=MUTED, font_size=11, text_anchor="end"))
    room = int((_WIDTH - 26 - _BOLD * len(first.label)) / _SMALL)
    if room >= 3:
        end = x + _WIDTH - 9
        parts.append(text(_cut(result, room), end, y + 17, fill=MUTED, font_size=11, text_anchor="end"))
    return element("g", *parts)


def _distinction(graph: RunGraph, task: int) -> tuple[str, str]:
    """What tells tasks of one kernel apart: name and shape of what one writes first, or where it ran, of several."""
    lanes = {other.lane for other in graph.tasks if not other.lane.startswith("core.")}  # which core is an accident
    for operand in graph.tasks[task].operands:
        if operand.tag.writes:
            name = graph.memory[operand.memory].name if len(lanes) < 2 else graph.tasks[task].lane
            return name, str(list(operand.shape))
    return "" if len(lanes) < 2 else graph.tasks[task].lane, ""


def _cut(words: str, length: int) -> str:
    return words if len(words) <= length else words[: max(length - 1, 0)] + "…"


def _tooltip(graph: RunGraph, tasks: Sequence[int], path: CriticalPath) -> str:
    task = graph.tasks[tasks[0]]
    took = [graph.tasks[index].duration_ns for index in tasks]
    lines = [f"{task.label}, task {tasks[0]}" + (f" and {len(tasks) - 1} like it" if len(tasks) > 1 else "")]
    for operand in task.operands:
        memory = graph.memory[operand.memory]
        lines.append(f"{operand.tag.value} {memory.name}: {memory.dtype}{list(operand.shape)}")
    if any(took):
        lines.append(f"{shown_ns(sum(took))} in all, {shown_ns(min(took))} to {shown_ns(max(took))} each")
    lines.append(f"{sum(index in path.tasks for index in tasks)} of {len(tasks)} on the critical path")
    lines += [graph.tasks[index].error for index in tasks if graph.tasks[index].error][:3]
    return escape("\n".join(lines))


def _frames(folded: Folded, layout: Layout) -> tuple[list[str], float]:
    """A frame around every repeat of more than one node, and where everything ends on the right."""
    parts = []
    widest = layout.width
    for repeat in sorted(folded.repeats, key=lambda repeat: repeat.first - repeat.last):
        if repeat.first == repeat.last:
            continue
        inside = range(repeat.first, repeat.last + 1)
        rows = [layout.rows[node] for node in inside]
        left = min(layout.xs[node] for node in inside) - _WIDTH / 2 - 14
        right = max(layout.xs[node] for node in inside) + _WIDTH / 2 + 14
        crossing = [x for (_, row), x in layout.points.items() if min(rows) < row < max(rows)]
        left, right = min([left, *crossing]), max([right, *crossing])
        top, bottom = _top(min(rows)) - 16, _top(max(rows)) + _HEIGHT + 16
        parts.append(
            element(
                "rect", x=left, y=top, width=right - left, height=bottom - top, rx=10, fill="#f6f1fe", stroke=_FRAME,
                stroke_dasharray="5 3",
            )
        )  # fmt: skip
        parts.append(text(f"{repeat.count} ×", left + 8, top - 5, fill=_FRAME, font_size=14, font_weight=700))
        widest = max(widest, right)
    return parts, widest


def _header(graph: RunGraph, path: CriticalPath, folded: Folded, hidden: int) -> tuple[list[str], float]:
    facts = [f"{len(graph.tasks)} tasks", f"{len(graph.edges)} edges"]
    if graph.wall_ns:
        facts.append(f"critical path {len(path.tasks)} tasks, {shown_ns(path.length_ns)} of {shown_ns(graph.wall_ns)}")
        facts.append(f"{graph.clock} clock")
    else:
        facts.append(f"longest chain {len(path.tasks)} tasks")
        facts.append("not timed")
    if len(folded.nodes) < len(graph.tasks):
        facts.append(f"folded to {len(folded.nodes)} nodes")
    if hidden:
        facts.append(f"{hidden} lines of memory used again by a later copy are left out")
    parts = [
        text(graph.name, _MARGIN, 34, font_size=18, font_weight=700),
        text(" · ".join(facts), _MARGIN, 56, fill=MUTED, font_size=13),
    ]
    if graph.errors:
        first = graph.errors[0].partition("\n")[0]
        parts.append(text(f"failed: {first}", _MARGIN + 240, 34, fill="#cf222e", font_size=13))
    x = _MARGIN
    used = {_style(edge.reasons) for edge in graph.edges}
    entries = [(_Line(style, critical=False), words) for style, (_, _, words) in _STYLES.items() if style in used]
    entries.append((_Line("data", critical=True), "critical path" if graph.wall_ns else "longest chain"))
    for line, words in entries:
        parts.append(element("path", d=f"M{x:.1f},78h30", **_stroke(line)))
        parts.append(text(words, x + 37, 82, fill=MUTED, font_size=12))
        x += 37 + 7 * len(words) + 24
    return parts, max(x, 2 * _MARGIN + 7.2 * len(" · ".join(facts)))
