"""One program handed to one chip, and what came back, as pure data: the unit that is sent, recorded and replayed."""

from __future__ import annotations

from typing import Any

import attrs
import numpy as np
from numpy.typing import NDArray

__all__ = ["Arg", "Completion", "Dispatch"]


@attrs.frozen
class Arg:
    """One argument: a resident tensor by id (``resident`` > 0), or a small array by value.

    For an OUT parameter passed by value, ``data`` is empty and the chip returns the array in ``Completion.outputs``.
    Values are row-major and little-endian.
    """

    resident: int = 0
    dtype: str = ""
    shape: tuple[int, ...] = ()
    data: bytes = b""

    @classmethod
    def of(cls, array: NDArray[Any]) -> Arg:
        """By value; dtype and shape are the array's."""
        return cls(dtype=array.dtype.name, shape=array.shape, data=np.ascontiguousarray(array).tobytes())

    @classmethod
    def out(cls, dtype: str, shape: tuple[int, ...]) -> Arg:
        """An output wanted back by value."""
        return cls(dtype=dtype, shape=shape)

    def numpy(self) -> NDArray[Any]:
        """The array, read-only, zero-copy; bfloat16, which numpy lacks, is widened to float32."""
        if self.dtype == "bfloat16":
            return (np.frombuffer(self.data, np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(self.shape)
        return np.frombuffer(self.data, dtype=self.dtype).reshape(self.shape)


@attrs.frozen(kw_only=True)
class Dispatch:
    """Run ``program`` (a digest) with ``args`` in the order of its parameters.

    ``step_id`` ties it to the replica core's batch decision, ``dispatch_id`` counts from 1 per incarnation of the core.
    """

    dispatch_id: int
    step_id: int
    program: bytes
    args: tuple[Arg, ...]


@attrs.frozen(kw_only=True)
class Completion:
    """A dispatch ran to its end. ``device_ns`` is time on the chip (modelled on a null chip)."""

    dispatch_id: int
    outputs: tuple[Arg, ...] = ()  # OUT parameters passed by value, in parameter order
    device_ns: int = 0
    digests: tuple[bytes, ...] = ()  # with recording on: one 16-byte digest per OUT or INOUT parameter
