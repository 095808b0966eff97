"""What lives on the chips of one L3 worker: handles of tensors, and the book of which of them are still good.

Owns: the book (addresses given out, freed, lost). Any thread; every method holds the book's lock only for itself.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from typing import Any

import attrs
import numpy as np
from numpy.typing import NDArray

from ...errors import ChipbusError, InvalidArgs, WrongArity
from ...kernels.dispatch import Arg
from ...kernels.engine import Access
from ...kernels.program import DTYPE_BYTES, nbytes
from ...kernels.tags import Tag

__all__ = [
    "DeviceTensor",
    "Entry",
    "StackedTensor",
    "TensorBook",
    "check_array",
    "check_dtype",
    "check_shape",
    "host_dtype",
]


@attrs.frozen(eq=False)
class DeviceTensor:
    """A tensor that stays on one chip between runs. Made by ``L3Worker.alloc_tensor``; the host has no copy of it.

    ``address`` is unique on its worker and never used twice, so a freed handle can never name another tensor.
    """

    address: int
    dtype: str  # torch's name without prefix: "float32", "bfloat16"
    shape: tuple[int, ...]  # () for a checkpoint's weights
    worker_id: int  # index of its chip in the worker's ``devices``
    owner: str  # id of the L3 worker that made it

    @property
    def nbytes(self) -> int:
        """Bytes of its elements; 0 for weights."""
        return nbytes(self.dtype, self.shape) if self.shape else 0

    def __str__(self) -> str:
        return f"tensor {self.address} ({self.dtype} {list(self.shape)} on worker {self.worker_id})"


@attrs.frozen(eq=False)
class StackedTensor:
    """One tensor per chip: slice ``i`` along the first axis of a host array lives on ``worker_ids[i]``."""

    shards: tuple[DeviceTensor, ...]

    @property
    def worker_ids(self) -> tuple[int, ...]:
        """Where the shards live, in order."""
        return tuple(shard.worker_id for shard in self.shards)

    def shard(self, worker_id: int) -> DeviceTensor | None:
        """The shard on one chip."""
        return next((shard for shard in self.shards if shard.worker_id == worker_id), None)


class Entry:
    """One live tensor, with what every launch that uses it needs of it."""

    __slots__ = ("_accesses", "arg", "lost", "name", "tensor")

    def __init__(self, tensor: DeviceTensor, name: str) -> None:
        self.tensor = tensor
        self.name = name  # of a deferred tensor; else empty
        self.lost: ChipbusError | None = None  # why its content is gone
        self.arg = Arg(resident=tensor.address)
        self._accesses: dict[Tag, Access] = {}

    def access(self, tag: Tag) -> Access:
        """What the tensor map is told."""
        access = self._accesses.get(tag)
        if access is None:
            tensor = self.tensor
            whole = ((0, max(1, tensor.nbytes)),)
            access = self._accesses[tag] = Access(tag, (tensor.worker_id, tensor.address), whole)
        return access


class TensorBook:
    """The tensors one L3 worker gave out. An address is live from ``opened`` until ``closed``; lost in between."""

    def __init__(self, owner: str) -> None:
        self._owner = owner
        self._lock = threading.Lock()
        self._addresses = itertools.count(1)
        self._entries: dict[int, Entry] = {}
        self._named: dict[tuple[int, str], DeviceTensor] = {}

    def make(self, dtype: str, shape: tuple[int, ...], worker_id: int) -> DeviceTensor:
        """A handle with a fresh address; not live yet."""
        return DeviceTensor(next(self._addresses), dtype, shape, worker_id, self._owner)

    def opened(self, tensor: DeviceTensor, name: str = "") -> None:
        """It is allocated. ``name``: under which later runs find it again, per chip."""
        with self._lock:
            self._entries[tensor.address] = Entry(tensor, name)
            if name:
                self._named[tensor.worker_id, name] = tensor

    def closed(self, tensor: DeviceTensor) -> bool:
        """It is to be freed; whether its chip still holds it. Raises ``InvalidArgs`` as ``check`` does."""
        with self._lock:
            entry = self._find(tensor, "free")
            del self._entries[tensor.address]
            if entry.name:
                self._named.pop((tensor.worker_id, entry.name), None)
            return entry.lost is None

    def discard(self, tensor: DeviceTensor) -> None:
        """It was entered, but its chip refused it."""
        with self._lock:
            entry = self._entries.pop(tensor.address, None)
            if entry is not None and entry.name:
                self._named.pop((tensor.worker_id, entry.name), None)

    def lose(self, worker_id: int, cause: ChipbusError) -> None:
        """Its chip died: what lived there is gone, but not forgotten, so that its use can be explained."""
        with self._lock:
            for entry in self._entries.values():
                if entry.tensor.worker_id == worker_id and entry.lost is None:
                    entry.lost = cause
            for key in [key for key in self._named if key[0] == worker_id]:
                del self._named[key]

    def check(self, tensor: DeviceTensor, where: str) -> Entry:
        """Its entry. ``InvalidArgs``, after ``where``, for a tensor of another worker, freed, or lost with its chip."""
        entry = self._entries.get(tensor.address)
        if entry is None or entry.tensor is not tensor or entry.lost is not None:
            entry = self._find(tensor, where)
            if entry.lost is not None:
                error = InvalidArgs(
                    f"{where}: {tensor} was lost when its chip worker ended; allocate and fill it again"
                )
                raise error.caused_by(entry.lost)
        return entry

    def lost(self, tensor: DeviceTensor) -> ChipbusError | None:
        """Why the content of a live tensor is gone, or None."""
        entry = self._entries.get(tensor.address)
        return None if entry is None else entry.lost

    def named(self, worker_id: int, name: str) -> DeviceTensor | None:
        """The tensor an earlier run left on a chip under ``name``."""
        return self._named.get((worker_id, name))

    def live(self) -> list[DeviceTensor]:
        """Everything that chips hold now, oldest first."""
        with self._lock:
            return [entry.tensor for entry in self._entries.values() if entry.lost is None]

    def _find(self, tensor: DeviceTensor, where: str) -> Entry:
        entry = self._entries.get(tensor.address)
        if tensor.owner != self._owner:
            raise InvalidArgs(f"{where}: {tensor} belongs to another L3 worker ({tensor.owner}), not to this one")
        if entry is None or entry.tensor is not tensor:
            raise InvalidArgs(f"{where}: {tensor} was freed before")
        return entry


def check_dtype(dtype: object, where: str) -> str:
    """A dtype by name; numpy's dtype objects are named. Raises ``InvalidArgs`` for one no chip has."""
    name = dtype if isinstance(dtype, str) else getattr(dtype, "name", None) or getattr(dtype, "__name__", repr(dtype))
    if name not in DTYPE_BYTES:
        raise InvalidArgs(f"{where}: dtype is {name!r}; expected one of {', '.join(DTYPE_BYTES)}")
    return name


def check_shape(shape: Sequence[int], where: str) -> tuple[int, ...]:
    """A shape of at least one axis and one element. Raises ``InvalidArgs``, or ``WrongArity`` if it is no sequence."""
    if isinstance(shape, str | bytes) or not isinstance(shape, Sequence):
        raise WrongArity(f"{where}: shape is {shape!r}; expected a sequence of integers")
    if not all(isinstance(extent, int | np.integer) and not isinstance(extent, bool) for extent in shape):
        raise WrongArity(f"{where}: shape is {list(shape)}; expected integers")
    extents = tuple(int(extent) for extent in shape)
    if not extents or min(extents) < 1:
        raise InvalidArgs(f"{where}: shape is {list(extents)}; expected at least one axis, extents of at least 1")
    return extents


def host_dtype(dtype: str) -> np.dtype[Any]:
    """What a tensor of ``dtype`` is in numpy: the same, but bfloat16, which numpy lacks, is float32 there."""
    return np.dtype("float32" if dtype == "bfloat16" else dtype)


def check_array(value: object, dtype: str, shape: tuple[int, ...], where: str) -> NDArray[Any]:
    """A host array that holds exactly ``dtype`` and ``shape``. Raises ``WrongArity`` or ``InvalidArgs``."""
    if not isinstance(value, np.ndarray):
        raise WrongArity(f"{where}: {type(value).__name__} given; expected a numpy array")
    if value.dtype != host_dtype(dtype):
        raise InvalidArgs(f"{where}: dtype is {value.dtype}; expected {host_dtype(dtype)}")
    if value.shape != shape:
        raise InvalidArgs(f"{where}: shape is {list(value.shape)}; expected {list(shape)}")
    return value
