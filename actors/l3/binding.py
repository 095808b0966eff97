"""Whether arguments fit a program, and what they become in a launch: everything that can be checked before it is sent.

Owns nothing but what it has worked out once per program. Any thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs
import numpy as np
from numpy.typing import NDArray

from ...errors import InvalidArgs, WrongArity
from ...kernels.dispatch import Arg
from ...kernels.engine import Access
from ...kernels.program import Direction, Param, Program
from ...kernels.tags import Tag
from .runs import BoundArgs
from .tensors import DeviceTensor, Entry, StackedTensor, TensorBook, host_dtype

__all__ = ["HOST_SPACE", "Binding", "DeferredTensor", "Tagged", "host_access", "host_range"]

HOST_SPACE = "host"
"""Address space of arrays in the host application: bytes by their own addresses."""

TAGS = {Direction.IN: Tag.INPUT, Direction.OUT: Tag.OUTPUT_EXISTING, Direction.INOUT: Tag.INOUT}
"""What a program's parameter does to memory that is the caller's."""


@attrs.define(eq=False)
class DeferredTensor:
    """A chip tensor that is allocated inside an orchestration. Made by ``Orchestrator.deferred``."""

    name: str
    tensor: DeviceTensor
    host: NDArray[Any] | None = None
    _upload: NDArray[Any] | None = None

    def take_upload(self) -> NDArray[Any] | None:
        """What the first task that uses the tensor has to bring, once."""
        upload, self._upload = self._upload, None
        return upload


@attrs.frozen(eq=False)
class Tagged:
    """An argument with a tag of its own, instead of the one its parameter (or a host callable) implies."""

    tag: Tag
    value: Any


def host_range(array: NDArray[Any]) -> tuple[int, int]:
    """First and last byte (exclusive) of a contiguous array, as addresses."""
    begin = array.__array_interface__["data"][0]
    return begin, begin + array.nbytes


def host_access(tag: Tag, array: NDArray[Any]) -> Access:
    """What the tensor map is told about a host array."""
    return Access(tag, HOST_SPACE, (host_range(array),) if array.size else ())


class Binding:
    """One program as its launches need it. ``bind`` raises ``WrongArity`` or ``InvalidArgs`` and changes nothing."""

    def __init__(self, program: Program, book: TensorBook) -> None:
        self.program = program
        self._book = book
        self._params = [(param, TAGS[param.direction], host_dtype(param.dtype)) for param in program.params]
        self._places = [f"{program.name}, argument {i} ({param.name})" for i, param in enumerate(program.params)]
        self._signature = ", ".join(
            f"{p.name}: {p.direction.value} {p.dtype} {'[' + ', '.join(map(str, p.shape)) + ']'}"
            for p in program.params
        )

    def bind(
        self, values: Sequence[Any], worker: int, accesses: list[Access], *, in_orchestration: bool = True
    ) -> BoundArgs:
        """The arguments of a launch on ``worker``; what they touch is appended to ``accesses``."""
        if len(values) != len(self._params):
            raise WrongArity(
                f"{self.program.name}: {len(values)} arguments given; expected {len(self._params)} ({self._signature})"
            )
        bound = BoundArgs([], [], [])
        symbols: dict[str, int] = {}
        for index, (param, tag, dtype) in enumerate(self._params):
            value = values[index]
            if type(value) is Tagged:
                tag, value = value.tag, value.value
            kind = type(value)
            if kind is DeferredTensor:
                if (upload := value.take_upload()) is not None:
                    bound.uploads.append((value.tensor, upload))
                if value.host is not None and param.direction is not Direction.IN:
                    bound.downloads.append((value.tensor, value.host))
                value, kind = value.tensor, DeviceTensor
            elif kind is StackedTensor:
                value, kind = self._shard(index, param, value, worker), DeviceTensor
            if kind is DeviceTensor:
                entry = self._resident(index, param, value, worker)
                self._fit(index, param, value.dtype, value.shape, symbols)
                bound.args.append(entry.arg)
                bound.residents.append(value)
                if tag is not Tag.NO_DEP:
                    accesses.append(entry.access(tag))
            else:
                if kind is not np.ndarray:
                    value = self._array(index, param, value)
                if value.dtype != dtype:
                    self._refuse(index, param, f"dtype is {value.dtype}; expected {dtype}")
                if param.resident:
                    self._refuse(index, param, "given by value; expected a resident tensor")
                self._fit(index, param, param.dtype, value.shape, symbols)
                self._by_value(index, param, value, bound)
                if tag is not Tag.NO_DEP:
                    accesses.append(host_access(tag, value))
        return bound

    def _shard(self, index: int, param: Param, stacked: StackedTensor, worker: int) -> DeviceTensor:
        shard = stacked.shard(worker)
        if shard is None:
            ids = ", ".join(map(str, stacked.worker_ids))
            self._refuse(index, param, f"the stacked tensor has no shard on worker {worker}, only on {ids}")
        assert shard is not None
        return shard

    def _resident(self, index: int, param: Param, tensor: DeviceTensor, worker: int) -> Entry:
        entry = self._book.check(tensor, self._places[index])
        if tensor.worker_id != worker:
            self._refuse(index, param, f"{tensor} given; the program runs on worker {worker}")
        if param.resident is False:
            self._refuse(index, param, f"{tensor} given; expected an array by value")
        return entry

    def _array(self, index: int, param: Param, value: object) -> NDArray[Any]:
        """A scalar becomes an array without axes; anything else that is no array is refused."""
        if isinstance(value, np.ndarray):
            return value
        if isinstance(value, int | float | np.generic) and not param.shape and param.direction is Direction.IN:
            return np.asarray(value, host_dtype(param.dtype))
        expected = "a resident tensor" if param.resident else "a numpy array or a tensor of this worker"
        raise WrongArity(f"{self._places[index]}: {type(value).__name__} given; expected {expected}")

    def _fit(self, index: int, param: Param, dtype: str, shape: tuple[int, ...], symbols: dict[str, int]) -> None:
        if dtype != param.dtype:
            self._refuse(index, param, f"dtype is {dtype}; expected {param.dtype}")
        wanted = param.shape
        if shape == wanted and not symbols:
            return
        if len(shape) == len(wanted):
            for extent, want in zip(shape, wanted, strict=True):
                if extent != (symbols.setdefault(want, extent) if type(want) is str else want):
                    break
            else:
                return
        given = {name: value for name, value in symbols.items() if name in wanted}
        self._refuse(
            index, param, f"shape is {list(shape)}; expected {list(wanted)}" + (f" with {given}" if given else "")
        )

    def _by_value(self, index: int, param: Param, value: NDArray[Any], bound: BoundArgs) -> None:
        if not value.flags.c_contiguous:
            self._refuse(index, param, "the array is not contiguous; pass a copy in row-major order")
        if param.direction is Direction.OUT:
            bound.args.append(Arg(dtype=param.dtype, shape=value.shape))
        else:
            bound.args.append(value)
            bound.reads_host = True
        if param.direction is not Direction.IN:
            if not value.flags.writeable:
                self._refuse(index, param, f"the array is read-only; its direction is {param.direction.value}")
            bound.outputs.append(value)

    def _refuse(self, index: int, param: Param, why: str) -> None:
        raise InvalidArgs(f"{self._places[index]}: {why}")
