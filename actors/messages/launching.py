"""The conversation between a replica core and its chip workers: programs, resident tensors, dispatches.

All are asks, executed in order of arrival by the chip worker's compute thread.
"""

from __future__ import annotations

import attrs

from ...bus import Lane, message, register
from ...kernels.dispatch import Completion, Dispatch
from ...kernels.program import Program, TensorSpec

__all__ = ["AllocTensor", "Completion", "Dispatch", "Done", "FreeTensor", "RegisterProgram"]


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


register(0x0305, Dispatch, lane=Lane.WORK)
register(0x0306, Completion, lane=Lane.WORK)
