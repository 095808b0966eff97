"""The captured graphs of one chip: tile programs it has loaded, and what they and the built-in programs were traced to.

Owns: loaded programs until they are unregistered, a bounded number of graphs (least recently used goes first), and the
most that any of them has held of each ring.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping

import attrs

from ..errors import KernelError, NumberedError
from ..topology.rings import RingRequest, RingUse, most_of, resolve_rings
from .dispatch import LaunchConfig
from .graph import TaskGraph
from .incore import InCore
from .program import Program
from .tiles import TileProgram, load

__all__ = ["Capture", "Captures"]


@attrs.frozen(eq=False)
class Capture:
    """A graph as one chip knows it. ``name`` is unique on the chip and equal on equal chips."""

    name: str
    graph: TaskGraph
    incores: Mapping[str, InCore] = attrs.field(factory=dict)


class Captures:
    """Traces at first use; the same program, shapes and ring sizes give the same graph from then on."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._programs: dict[bytes, TileProgram] = {}
        self._captures: OrderedDict[str, Capture] = OrderedDict()
        self.rings: tuple[RingUse, ...] = ()
        """See ``Chip.rings``; also of graphs that have gone."""

    def register(self, program: Program) -> None:
        """Load a tile program; others need nothing here. ``InvalidArgs`` if its code cannot be had."""
        if program.kind == "tile" and program.digest not in self._programs:
            self._programs[program.digest] = load(program)

    def unregister(self, program: Program) -> None:
        """Forget a program and its graphs."""
        self._programs.pop(program.digest, None)
        for name in [name for name in self._captures if name.endswith(_suffix(program))]:
            del self._captures[name]

    def of_tile(self, where: str, program: Program, sizes: Mapping[str, int], config: LaunchConfig | None) -> Capture:
        """The graph of a tile program. ``where`` begins the text of whatever its tracing is refused with."""
        asked = (config.task_window, config.heap, config.dep_pool) if config is not None else ((), (), ())
        named = ",".join(f"{name}={size}" for name, size in sorted(sizes.items()))
        rings = "".join(f"/{','.join(map(str, values))}" for values in asked) if any(asked) else ""
        name = f"{program.name}[{named}]{rings}{_suffix(program)}"
        found = self._find(name)
        if found is not None:
            return found
        window, heap, pool = (values or None for values in asked)
        request = RingRequest(ring_task_window=window, ring_heap=heap, ring_dep_pool=pool)
        try:
            graph, incores = self._programs[program.digest].trace(sizes, resolve_rings(request))
        except NumberedError as error:
            raise type(error)(f"{where}: {error.detail}") from error
        return self._keep(Capture(name, graph, incores))

    def of_builtin(self, program: Program, bucket: str, trace: Callable[[], TaskGraph]) -> Capture:
        """The graph of a built-in program for one of its shape buckets."""
        name = f"{program.name}.{bucket}{_suffix(program)}"
        return self._find(name) or self._keep(Capture(name, trace()))

    def describe(self, name: str) -> str:
        """See ``Chip.describe``."""
        from .diagnosis import run_of_capture, to_json  # only a chip that is asked needs it

        found = self._find(name)
        if found is None:
            raise KernelError(f"graph {name} is unknown; known: {', '.join(self._captures) or 'none'}")
        return to_json(run_of_capture(found.graph)).decode()

    def clear(self) -> None:
        """Forget everything."""
        self._programs.clear()
        self._captures.clear()

    def _find(self, name: str) -> Capture | None:
        found = self._captures.get(name)
        if found is not None:
            self._captures.move_to_end(name)
        return found

    def _keep(self, capture: Capture) -> Capture:
        self._captures[capture.name] = capture
        uses = capture.graph.high_water
        self.rings = tuple(map(most_of, self.rings, uses)) if self.rings else uses
        if len(self._captures) > self._limit:
            self._captures.popitem(last=False)
        return capture


def _suffix(program: Program) -> str:
    return f"@{program.digest.hex()[:12]}"
