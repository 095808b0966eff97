"""The conversation between the owner of a chip and its worker: programs, resident tensors, launches.

All are asks, executed in order of arrival by the chip worker's compute thread (so malloc → copy → launch needs no wait
in between); ``ChipReportRequest`` alone is answered at once by the bus thread.
"""

from __future__ import annotations

import attrs

from ...bus import Failure, Lane, message
from ...kernels.dispatch import Arg, Completion, Dispatch
from ...kernels.program import Program, TensorSpec
from ...topology.rings import RingUse

__all__ = [
    "AllocTensor",
    "ChipReport",
    "ChipReportRequest",
    "Completion",
    "Copied",
    "CopyFrom",
    "CopyTo",
    "DescribeGraph",
    "Described",
    "Dispatch",
    "Done",
    "FreeTensor",
    "Launch",
    "Launched",
    "RegisterProgram",
    "UnregisterProgram",
]


@message(0x0301, lane=Lane.WORK)
@attrs.frozen
class RegisterProgram:
    """Make a program known on the chip under its digest. Registering it again is harmless. Reply: ``Done``."""

    program: Program


@message(0x0302, lane=Lane.WORK)
@attrs.frozen
class AllocTensor:
    """Make a tensor (or a checkpoint's set of weights) resident under an id of the asker's choice. Reply: ``Done``.

    Items: ``bus.Progress`` while weights load.
    """

    tensor: TensorSpec


@message(0x0303, lane=Lane.WORK)
@attrs.frozen
class FreeTensor:
    """Free a resident tensor. Unknown ids are a ``KernelError``. Reply: ``Done``."""

    resident: int


@message(0x0304, lane=Lane.WORK)
@attrs.frozen
class Done:
    """The command was carried out; ``seconds`` of the compute thread's time."""

    seconds: float = 0.0
    resident_bytes: int = 0  # memory the chip holds now
    is_uniform: bool = False  # see ``Chip.is_uniform``


@message(0x0305, lane=Lane.WORK)
@attrs.frozen
class Launch:
    """Run dispatches one after another: one message however many there are. Reply: ``Launched``.

    ``after[i]`` are the positions, all below ``i``, of dispatches in this message that ``i`` must not run without: if
    one of them failed, ``i`` is not run and fails, too. Shorter than ``dispatches`` or empty: no such positions.
    """

    dispatches: tuple[Dispatch, ...]
    after: tuple[tuple[int, ...], ...] = ()


@message(0x0306, lane=Lane.WORK)
@attrs.frozen
class Launched:
    """Every dispatch of a ``Launch`` has ended: completions in order of position, of those that are in no failure."""

    completions: tuple[Completion, ...]
    failures: tuple[tuple[int, Failure], ...] = ()  # (position, why)


@message(0x0307, lane=Lane.WORK)
@attrs.frozen
class UnregisterProgram:
    """Forget a program. An unknown digest is refused. Reply: ``Done``."""

    program: bytes


@message(0x0308, lane=Lane.WORK)
@attrs.frozen
class CopyTo:
    """Overwrite a resident tensor. Reply: ``Done``."""

    resident: int
    value: Arg


@message(0x0309, lane=Lane.WORK)
@attrs.frozen
class CopyFrom:
    """Read a resident tensor. Reply: ``Copied``."""

    resident: int


@message(0x030A, lane=Lane.WORK)
@attrs.frozen
class Copied:
    """A resident tensor by value."""

    value: Arg


@message(0x030B, lane=Lane.HEALTH)
@attrs.frozen
class ChipReportRequest:
    """What is the chip at? Answered by the bus thread, so it never waits behind a launch. Reply: ``ChipReport``."""


@message(0x030C, lane=Lane.HEALTH)
@attrs.frozen
class ChipReport:
    """One chip worker at this moment."""

    committed_bytes: int  # of resident tensors and weights, scratch included, as of the last command that ended
    running: str  # the command or dispatch on the compute thread; empty: idle
    running_s: float
    engine: str = ""  # what computes the programs of its model, see ``Chip.engine``; empty: it has no weights
    busy: tuple[tuple[str, float], ...] = ()  # per program, the share of the last minute it ran, 0 to 1
    rings: tuple[RingUse, ...] = ()  # see ``Chip.rings``, as of the last launch that ended


@message(0x030D, lane=Lane.WORK)
@attrs.frozen
class DescribeGraph:
    """What is in a captured graph, by the name in ``Completion.graph``? Reply: ``Described``."""

    graph: str


@message(0x030E, lane=Lane.WORK)
@attrs.frozen
class Described:
    """A captured graph as ``kernels.diagnosis`` writes it."""

    json: str
