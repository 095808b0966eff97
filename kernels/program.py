"""What a chip can be asked to run, and what it can be asked to keep: programs and resident tensors, as pure data.

No torch here: replica cores and tools describe programs, only chips execute them.
"""

from __future__ import annotations

import enum
import hashlib
import math
from collections.abc import Sequence
from functools import cached_property

import attrs
import msgspec

__all__ = ["DTYPE_BYTES", "INT8_GROUP", "Direction", "Param", "Program", "TensorSpec", "nbytes"]

DTYPE_BYTES = {"uint8": 1, "bfloat16": 2, "float16": 2, "float32": 4, "int32": 4, "float64": 8, "int64": 8}
"""Bytes of one element, by torch's dtype name without prefix: every dtype an argument or a resident may have."""

INT8_GROUP = 128
"""Inputs of an int8 matrix that share a scale."""


def nbytes(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of a dense tensor."""
    return DTYPE_BYTES[dtype] * math.prod(shape)


class Direction(enum.Enum):
    """What a program does to an argument."""

    IN = "in"
    OUT = "out"
    INOUT = "inout"


@attrs.frozen
class Param:
    """One named argument: dtype by torch's name without prefix ("int32", "bfloat16"), symbols in ``shape`` are dynamic.

    The same symbol stands for the same number in every parameter of one dispatch. ``resident``: True takes a tensor
    that lives on the chip, False an array by value, None either.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    direction: Direction = Direction.IN
    resident: bool | None = False


@attrs.frozen(slots=False)
class Program:
    """A compiled entry point: ``kind`` names the builder a chip uses ("qwen3.decode"), ``static`` its configuration.

    Identified by ``digest``, never by object identity, so a restarted chip or another process finds the same program.
    """

    name: str
    kind: str
    static: tuple[tuple[str, int | float | str | bool], ...]
    params: tuple[Param, ...]

    @cached_property
    def digest(self) -> bytes:
        """sha256 over name, kind, static configuration and parameter ABI: 32 bytes."""
        return hashlib.sha256(msgspec.msgpack.encode(self)).digest()

    @cached_property
    def abi_fingerprint(self) -> str:
        """sha256 over the parameters alone, in hexadecimal: equal where the same arguments fit."""
        return hashlib.sha256(msgspec.msgpack.encode(self.params)).hexdigest()


@attrs.frozen
class TensorSpec:
    """Something resident on a chip: a tensor of ``shape``, or, with ``source``, a checkpoint directory's weights.

    A tensor starts as zeros. ``resident`` is chosen by the owner (the replica core), unique per chip, above 0.
    Weights are refused if the directory no longer has ``fingerprint`` (``ModelSpec.fingerprint``; "" skips this).
    """

    resident: int
    dtype: str
    shape: tuple[int, ...] = ()
    source: str = ""
    fingerprint: str = ""
    weights: str = ""  # what matrices are kept in: "int8", or "" for ``dtype``
