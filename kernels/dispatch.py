"""One program handed to one chip, and what came back, as pure data: the unit that is sent, recorded and replayed."""

from __future__ import annotations

from itertools import zip_longest
from typing import Any

import attrs
import numpy as np
from numpy.typing import NDArray

__all__ = ["Arg", "Completion", "Dispatch", "LaunchConfig", "Usage"]


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
    def of(cls, array: NDArray[Any], dtype: str = "") -> Arg:
        """By value; dtype and shape are the array's, or converted to ``dtype``.

        numpy lacks bfloat16: numbers are rounded to the nearest one, ties to even.
        """
        if dtype == "bfloat16":
            bits = np.ascontiguousarray(array, np.float32).view(np.uint32).astype(np.uint64)
            rounded = np.where(np.isnan(array), 0x7FC0, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
            return cls(dtype=dtype, shape=array.shape, data=rounded.tobytes())
        if dtype:
            array = array.astype(dtype, copy=False)
        return cls(dtype=array.dtype.name, shape=array.shape, data=array.tobytes())

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
class LaunchConfig:
    """What one dispatch asks for beyond its arguments. It applies to this dispatch only.

    ``rings`` are task window, heap bytes and dependency pool of the four rings (``topology.RingSizes``), empty for the
    worker's own. ``timeline`` asks for ``Completion.task_times``.
    """

    task_window: tuple[int, ...] = ()
    heap: tuple[int, ...] = ()
    dep_pool: tuple[int, ...] = ()
    timeline: bool = False


@attrs.frozen(kw_only=True)
class Dispatch:
    """Run ``program`` (a digest) with ``args`` in the order of its parameters.

    ``step_id`` ties it to the replica core's batch decision or to a run of an L3 worker, ``dispatch_id`` counts from 1
    per incarnation of the sender.
    """

    dispatch_id: int
    step_id: int
    program: bytes
    args: tuple[Arg, ...]
    config: LaunchConfig | None = None


@attrs.frozen(kw_only=True)
class Usage:
    """What graphs took of their chip, counted whenever one runs; no part of what a replay compares.

    All zero where nothing is counted: on a null chip, and for programs that run no graph.
    """

    tasks: int = 0
    run_ns: int = 0
    """Inside the engine that runs the tasks: the kernels' own time, nothing around them."""
    busy_ns: tuple[int, ...] = ()
    """Of it, per core, what did not pass waiting for a task. Of torch, whose threads are its own, all is core 0's."""
    bytes_read: int = 0
    """Weights, and keys and values, each once per window of a dispatch (a tile that reads them again finds them in a
    cache); 0 if not known. Embedding rows, norms and activations are not counted."""

    def __add__(self, other: Usage) -> Usage:
        """Of both, one after the other."""
        return Usage(
            tasks=self.tasks + other.tasks,
            run_ns=self.run_ns + other.run_ns,
            busy_ns=tuple(map(sum, zip_longest(self.busy_ns, other.busy_ns, fillvalue=0))),
            bytes_read=self.bytes_read + other.bytes_read,
        )

    @property
    def busy_shares(self) -> tuple[float, ...]:
        """Per core, the part of ``run_ns`` it was busy."""
        return tuple(busy / max(self.run_ns, 1) for busy in self.busy_ns)


@attrs.frozen(kw_only=True)
class Completion:
    """A dispatch ran to its end. ``device_ns`` is time on the chip (modelled on a null chip)."""

    dispatch_id: int
    outputs: tuple[Arg, ...] = ()  # OUT and INOUT parameters passed by value, in parameter order
    device_ns: int = 0
    digests: tuple[bytes, ...] = ()  # with recording on: one 16-byte digest per OUT or INOUT parameter
    task_times: bytes = b""  # with ``timeline``: int64 pairs (begin, end) in ns since the launch began, one per task
    task_cores: bytes = b""  # with ``timeline``: int16, the core each task ran on
    graph: str = ""  # with ``timeline``: names of the captured graphs the times belong to, joined by spaces
    fault: str = ""  # what a null chip did wrong on purpose without ending the launch
    usage: Usage = Usage()
