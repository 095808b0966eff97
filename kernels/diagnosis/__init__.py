"""What a run did and why it took as long as it did: pure functions over its record, for tests, tools and people.

Owns nothing, no torch. ``RunGraph`` is the record; everything else reads one.
"""

from .captured import run_of_capture, run_of_launch, run_of_launches, with_times
from .critical_path import CriticalPath, critical_path, scheduled
from .dump import DUMP_LEVELS, DumpedArg, DumpLevel, dump_arguments
from .graph_picture import to_graph_svg
from .hazards import Race, find_races, with_reasons
from .ring_picture import to_rings_svg
from .run_graph import (
    Edge,
    Memory,
    Operand,
    Reason,
    RunGraph,
    RunTask,
    run_graph_from_json,
    to_json,
)
from .trace_events import to_trace_events

__all__ = [
    "DUMP_LEVELS",
    "CriticalPath",
    "DumpLevel",
    "DumpedArg",
    "Edge",
    "Memory",
    "Operand",
    "Race",
    "Reason",
    "RunGraph",
    "RunTask",
    "critical_path",
    "dump_arguments",
    "find_races",
    "run_graph_from_json",
    "run_of_capture",
    "run_of_launch",
    "run_of_launches",
    "scheduled",
    "to_graph_svg",
    "to_json",
    "to_rings_svg",
    "to_trace_events",
    "with_reasons",
    "with_times",
]
