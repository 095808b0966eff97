"""Runs as swimlanes for chrome://tracing and ui.perfetto.dev: one row per lane, an arrow per edge.

Owns nothing. The form is the JSON object of the Trace Event Format: complete events ("X") for tasks, flow events
("s" and "f" of one id) for edges, metadata ("M") for names. Times in it are microseconds.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

from .critical_path import CriticalPath, critical_path
from .run_graph import RunGraph, RunTask

__all__ = ["to_trace_events"]

_NUMBER = re.compile(r"(\d+)")


def to_trace_events(*graphs: RunGraph) -> bytes:
    """JSON of the tasks that were timed, each run a process of its own whose time begins at 0.

    Tasks of one lane that overlap are spread over rows "lane", "lane (2)" …
    """
    events: list[dict[str, Any]] = []
    runs: list[dict[str, Any]] = []
    arrow = 1  # ids of arrows hold over all processes
    for process, graph in enumerate(graphs, start=1):
        path = critical_path(graph)
        events += _events(graph, path, process, arrow)
        arrow += len(graph.edges)
        runs.append({"run": graph.name, "critical_path_us": _us(path.length_ns), "errors": graph.errors})
    return msgspec.json.encode({"traceEvents": events, "displayTimeUnit": "ns", "otherData": {"runs": runs}})


def _events(graph: RunGraph, path: CriticalPath, process: int, first_arrow: int) -> list[dict[str, Any]]:
    rows = _rows(graph)
    names = sorted(set(rows.values()), key=lambda row: (_natural(row[0]), row[1]))
    threads = {row: number for number, row in enumerate(names, start=1)}
    events = [_named("process_name", 0, name=f"{graph.name} ({graph.clock} clock)")]
    for (lane, copy), thread in threads.items():
        events.append(_named("thread_name", thread, name=f"{lane} ({copy})" if copy > 1 else lane))
        events.append(_named("thread_sort_index", thread, sort_index=thread))
    for index, row in rows.items():
        events.append(_slice(graph, index, threads[row], path))
    for number, edge in enumerate(graph.edges, start=first_arrow):
        if edge.before in rows and edge.after in rows:
            flow = {
                "name": ", ".join(reason.value for reason in edge.reasons) or "dependency",
                "cat": "dependency",
                "id": number,
            }
            # An arrow belongs to the slice that is open at its time, so it leaves just before its slice ends.
            task = graph.tasks[edge.before]
            leaves = _us(max(_begin(task), _begin(task) + task.duration_ns - 1))
            enters = _us(_begin(graph.tasks[edge.after]))
            events.append({"ph": "s", **flow, "tid": threads[rows[edge.before]], "ts": leaves})
            events.append({"ph": "f", "bp": "e", **flow, "tid": threads[rows[edge.after]], "ts": enters})
    return [{**event, "pid": process} for event in events]


def _rows(graph: RunGraph) -> dict[int, tuple[str, int]]:
    """Lane and copy of it for every timed task: in one row of a swimlane slices may not overlap."""
    ends: dict[str, list[int]] = {}
    rows = {}
    timed = [index for index, task in enumerate(graph.tasks) if task.begin_ns is not None]
    for index in sorted(timed, key=lambda index: (_begin(graph.tasks[index]), index)):
        task = graph.tasks[index]
        copies = ends.setdefault(task.lane, [])
        copy = next((number for number, end in enumerate(copies) if end <= _begin(task)), len(copies))
        copies[copy : copy + 1] = [_begin(task) + task.duration_ns]
        rows[index] = (task.lane, copy + 1)
    return rows


def _slice(graph: RunGraph, index: int, thread: int, path: CriticalPath) -> dict[str, Any]:
    task = graph.tasks[index]
    arguments = {f"{at} {operand.tag.value}": _shown(graph, index, at) for at, operand in enumerate(task.operands)}
    facts: dict[str, Any] = {"task": index, "state": task.state.value, "ring": task.ring, **arguments}
    facts["slack_us"] = _us(path.slack_ns[index])
    if task.error:
        facts["error"] = task.error
    return {
        "ph": "X", "name": task.label, "cat": "task,critical" if index in path.tasks else "task",
        "tid": thread, "ts": _us(_begin(task)), "dur": _us(task.duration_ns), "args": facts,
    }  # fmt: skip


def _shown(graph: RunGraph, index: int, at: int) -> str:
    operand = graph.tasks[index].operands[at]
    memory = graph.memory[operand.memory]
    return f"{memory.name}: {memory.dtype}{list(operand.shape)}"


def _named(kind: str, thread: int, **facts: Any) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "tid": thread, "args": facts}


def _begin(task: RunTask) -> int:
    return task.begin_ns or 0


def _us(ns: int) -> float:
    return ns / 1000


def _natural(name: str) -> list[Any]:
    """ "core.10" after "core.9"."""
    return [int(part) if part.isdecimal() else part for part in _NUMBER.split(name)]
