"""What a chip is to its owner: four verbs (register, alloc and free, copy, launch), and how to open one.

Owns nothing. No torch at import: ``open_chip`` loads it only for a chip that computes with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import attrs

from ..errors import ConfigError
from .dispatch import Arg, Completion, Dispatch
from .program import Program, TensorSpec

if TYPE_CHECKING:
    from ..topology.rings import RingUse
    from .faults import Fault

__all__ = ["CHIP_KINDS", "Chip", "Kept", "Report", "open_chip"]

CHIP_KINDS = ("cpu", "cuda", "null")
"""Kinds ``open_chip`` knows, as in the device name "cpu:0"."""

Report = Callable[[float, float], None]
"""Told (bytes done, bytes in total) while something long is loaded; called on the thread that called the chip."""


@attrs.frozen
class Kept:
    """A memory file that somebody keeps for a chip, empty or as an earlier chip left it: in it packed weights live on.

    ``tell`` hears, on the thread that uses the chip, whether a model's weights were there ("mapped") and if not, why.
    """

    file: int
    tell: Callable[[str], None]


class Chip(Protocol):
    """One device with its own memory. Used from one thread, the one that opened it; commands run in order.

    Everything refused raises ``KernelError`` naming dispatch or resident, argument, what was expected and found, and
    changes nothing on the chip.
    """

    @property
    def engine(self) -> str:
        """What computes a model's programs, for people: "null", "native, avx512bf16", or "torch: " and why not native.

        Final once weights have been loaded: not every engine takes every model.
        """
        ...

    @property
    def is_uniform(self) -> bool:
        """Whether a token's keys, values and logits have the same bits whether ``prefill`` or ``decode`` computes it.

        Final once weights have been loaded.
        """
        ...

    @property
    def resident_bytes(self) -> int:
        """Memory held by residents now, scratch included."""
        ...

    @property
    def progress(self) -> int:
        """A number that changes with every task that ends and with every piece of weights that is loaded.

        The one thing that other threads may read while a command runs: does it still get on?
        """
        ...

    @property
    def rings(self) -> tuple[RingUse, ...]:
        """Per ring, the most that a graph captured on this chip has held; empty before the first one."""
        ...

    def register(self, program: Program) -> None:
        """Make ``program`` known under its digest. Again is harmless. An unknown kind is refused.

        A tile program's code is loaded from the file it was made from; if that is gone or has changed, it is refused.
        """
        ...

    def unregister(self, digest: bytes) -> None:
        """Forget a program and the graphs made of it. An unknown digest is refused."""
        ...

    def alloc(self, tensor: TensorSpec, report: Report | None = None) -> None:
        """Make a tensor of zeros, or a checkpoint's weights, resident. An id in use or not above 0 is refused.

        Raises ``MemoryExhausted`` with both numbers if more is asked for than is free, ``CheckpointError`` if the
        weights cannot be read or are not those of ``tensor.fingerprint``.
        """
        ...

    def free(self, resident: int) -> None:
        """Forget a resident. An id that is unknown or freed already is refused."""
        ...

    def copy_to(self, resident: int, value: Arg) -> None:
        """Overwrite a resident tensor with an array by value of the same dtype and shape. Weights are refused."""
        ...

    def copy_from(self, resident: int) -> Arg:
        """A resident tensor by value. Weights are refused."""
        ...

    def launch(self, dispatch: Dispatch, *, digest: bool = False) -> Completion:
        """Run a registered program to its end. If a task raises, later ones do not run: ``CoreException`` naming it.

        ``dispatch.config`` holds for this launch: the rings its graph is captured with, whether tasks are timed.
        With ``digest``, ``Completion.digests`` holds one blake2b-16 for each OUT or INOUT parameter, in order, over
        exactly the bytes this dispatch wrote: for a KV cache the rows of its tokens, never the whole cache.
        """
        ...

    def describe(self, graph: str) -> str:
        """A graph by its name in ``Completion.graph``, as JSON (``diagnosis.RunGraph``). One not kept is refused."""
        ...

    def close(self) -> None:
        """Free everything. Idempotent; any other verb is refused from then on."""
        ...


def open_chip(
    device: str,
    threads: int,
    faults: Sequence[Fault] = (),
    *,
    check_numerics: bool = False,
    kept: Kept | None = None,
) -> Chip:
    """Open "cpu:0", "cuda:0" or "null:0"; ``threads`` is how many a cpu chip computes with. Raises ``ConfigError``.

    ``faults``: what goes wrong and when, on a null chip; no other has any to give. ``check_numerics``: a task that
    writes NaN is a ``CoreException`` that names it; on a null chip there is none. ``kept``: for a cpu chip.
    """
    kind, _, index = device.partition(":")
    if kind not in CHIP_KINDS or not index.isdecimal():
        raise ConfigError(f"device is {device!r}; it must be one of {', '.join(CHIP_KINDS)}, a colon and a number")
    if threads < 1:
        raise ConfigError(f"threads is {threads}; a chip computes with at least 1")
    if kind == "null":
        from .null import NullChip

        return NullChip(faults)
    if faults:
        raise ConfigError(f"faults were given for {device}; only a null chip has any")
    if kind == "cuda":
        from .cuda import CudaChip  # imports torch

        return CudaChip(int(index), check_numerics=check_numerics)
    from .cpu import CpuChip

    return CpuChip(threads, check_numerics=check_numerics, kept=kept)
