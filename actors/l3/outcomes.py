"""What becomes of a chip's answer: values in the caller's arrays, or an error that says where it happened.

Owns nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray

from ...errors import ChipbusError, CoreException, KernelError, NumberedError
from ...kernels.dispatch import Arg, Completion
from ..lane import Outcome
from ..messages.launching import Copied
from .runs import BoundArgs, Task

__all__ = ["fill", "placed", "store"]


def fill(bound: BoundArgs | None, completion: Completion) -> Outcome:
    """Write what a program gave back into the caller's arrays; an error if that is not what was asked for."""
    if bound is None:
        return completion
    outputs = completion.outputs
    if len(outputs) != len(bound.outputs):
        return CoreException(f"the chip gave back {len(outputs)} arrays; expected {len(bound.outputs)}")
    for array, output in zip(bound.outputs, outputs, strict=True):
        if (error := _put(array, output)) is not None:
            return error
    return completion


def store(array: NDArray[Any], writers: Sequence[Task], reply: object) -> CoreException | None:
    """A post-submit copy arrived: the host gets it if everything that was to write the tensor did."""
    assert isinstance(reply, Copied)
    return None if any(task.error for task in writers) else _put(array, reply.value)


def _put(array: NDArray[Any], value: Arg) -> CoreException | None:
    try:
        given = value.numpy()
    except (TypeError, ValueError) as error:  # dtype, shape and bytes that do not belong together
        return CoreException(f"the chip gave back no {value.dtype} {list(value.shape)}: {error}")
    if (given.dtype, given.shape) != (array.dtype, array.shape):
        return CoreException(
            f"the chip gave back {given.dtype} {list(given.shape)}; expected {array.dtype} {list(array.shape)}"
        )
    array[...] = given
    return None


def placed(where: str, error: ChipbusError) -> ChipbusError:
    """The same error, with where it happened in front of its detail."""
    if not isinstance(error, KernelError):
        return error
    found = type(error)(f"{where}: {error.detail if isinstance(error, NumberedError) else error}")
    found.__cause__ = error.__cause__
    if isinstance(found, NumberedError) and isinstance(error, NumberedError) and error.first_cause:
        found = found.caused_by(error.first_cause)
    return found
