"""Whether a dispatch fits its program: arity, direction, dtype, shape and residency of every argument.

Owns nothing, no torch. Every chip checks with this before it touches anything, so a refusal changes nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from ..errors import InvalidArgs, UnknownProgram, WrongArity
from .dispatch import Arg, Dispatch
from .program import DTYPE_BYTES, Direction, Param, Program, TensorSpec, nbytes

__all__ = ["check_arguments", "check_copy", "check_kind", "check_tensor", "find_program", "find_resident"]


def check_kind(program: Program, known: Collection[str]) -> None:
    """Whether the chip runs programs of this kind."""
    if program.kind not in known:
        raise InvalidArgs(f"program {program.name} is of kind {program.kind!r}; known are {', '.join(sorted(known))}")


def find_program(programs: Mapping[bytes, Program], digest: bytes, where: str) -> Program:
    """A registered program, or ``UnknownProgram`` naming those that are registered."""
    program = programs.get(digest)
    if program is None:
        known = ", ".join(f"{p.name} ({digest.hex()[:12]})" for digest, p in programs.items()) or "none"
        raise UnknownProgram(f"{where}: program {digest.hex()[:12]} is not registered; registered: {known}")
    return program


def check_arguments(program: Program, dispatch: Dispatch, residents: Mapping[int, TensorSpec]) -> dict[str, int]:
    """Check every argument against its parameter; returns what each symbol of the shapes stands for.

    Raises ``InvalidArgs`` with dispatch, program, argument, what was expected and what was found.
    """
    where = f"dispatch {dispatch.dispatch_id} of {program.name}"
    if len(dispatch.args) != len(program.params):
        raise WrongArity(f"{where}: {len(dispatch.args)} arguments given; expected {len(program.params)}")
    symbols: dict[str, int] = {}
    users: dict[int, Param] = {}
    for index, (param, arg) in enumerate(zip(program.params, dispatch.args, strict=True)):
        is_resident = bool(arg.resident) if param.resident is None else param.resident
        if is_resident:
            dtype, shape = _resident(f"{where}, argument {index} ({param.name})", param, arg, residents)
        else:
            dtype, shape = arg.dtype, arg.shape
        if dtype != param.dtype:
            raise InvalidArgs(
                f"{where}, argument {index} ({param.name}): dtype is {dtype or 'absent'}; expected {param.dtype}"
            )
        fits = len(shape) == len(param.shape) and all(
            extent >= 0 and extent == (symbols.setdefault(wanted, extent) if isinstance(wanted, str) else wanted)
            for extent, wanted in zip(shape, param.shape, strict=True)
        )
        if not fits:
            given = {name: value for name, value in symbols.items() if name in param.shape}
            raise InvalidArgs(
                f"{where}, argument {index} ({param.name}): shape is {list(shape)}; expected {list(param.shape)}"
                + (f" with {given}" if given else "")
            )
        if not is_resident:
            _given(f"{where}, argument {index} ({param.name})", param, arg)
            continue
        other = users.setdefault(arg.resident, param)
        if other is not param and not (other.direction is param.direction is Direction.IN):
            raise InvalidArgs(
                f"{where}, argument {index} ({param.name}): resident {arg.resident} is also {other.name}; a tensor that"
                " is written is given once"
            )
    return symbols


def check_tensor(tensor: TensorSpec, residents: Mapping[int, TensorSpec]) -> None:
    """Whether a resident may be allocated: its id is free and above 0, its dtype and shape make sense."""
    where = f"resident {tensor.resident}"
    if tensor.resident < 1:
        raise InvalidArgs(f"{where}: ids are integers above 0")
    if tensor.resident in residents:
        raise InvalidArgs(f"{where} is allocated already, as {_described(residents[tensor.resident])}; free it first")
    if tensor.dtype not in DTYPE_BYTES:
        raise InvalidArgs(f"{where}: dtype is {tensor.dtype!r}; expected one of {', '.join(DTYPE_BYTES)}")
    if tensor.weights not in ("", "int8") or (tensor.weights and not tensor.source):
        raise InvalidArgs(f"{where}: weights is {tensor.weights!r}; expected 'int8' or '', and '' without a source")
    if any(extent < 0 for extent in tensor.shape):
        raise InvalidArgs(f"{where}: shape is {list(tensor.shape)}; extents are at least 0")


def find_resident(residents: Mapping[int, TensorSpec], resident: int) -> TensorSpec:
    """The description of a resident, or ``InvalidArgs`` if there is none (never allocated, or freed)."""
    if resident not in residents:
        known = ", ".join(map(str, sorted(residents))) or "none"
        raise InvalidArgs(f"resident {resident} is unknown or was freed; allocated: {known}")
    return residents[resident]


def check_copy(tensor: TensorSpec, value: Arg | None) -> None:
    """Whether a resident may be copied from, or, with ``value``, be overwritten with it."""
    if tensor.source:
        raise InvalidArgs(f"resident {tensor.resident} is a set of weights; it cannot be copied")
    if value is None:
        return
    if value.resident or (value.dtype, value.shape) != (tensor.dtype, tensor.shape):
        found = f"resident {value.resident}" if value.resident else f"{value.dtype} {list(value.shape)}"
        raise InvalidArgs(f"copy to resident {tensor.resident}: value is {found}; expected {_described(tensor)}")
    _check_bytes(f"copy to resident {tensor.resident}", value)


def _resident(where: str, param: Param, arg: Arg, residents: Mapping[int, TensorSpec]) -> tuple[str, tuple[int, ...]]:
    if not arg.resident:
        raise InvalidArgs(f"{where}: given by value; expected a resident tensor")
    if arg.resident not in residents:
        raise InvalidArgs(f"{where}: resident {arg.resident} is unknown or was freed")
    tensor = residents[arg.resident]
    takes_weights = param.resident is True and param.shape == ()
    if bool(tensor.source) != takes_weights:
        raise InvalidArgs(
            f"{where}: resident {arg.resident} is {_described(tensor)}; expected"
            f" {'weights' if takes_weights else 'a tensor'}"
        )
    return tensor.dtype, tensor.shape


def _given(where: str, param: Param, arg: Arg) -> None:
    if arg.resident:
        raise InvalidArgs(f"{where}: resident {arg.resident} given; expected an array by value")
    if param.direction is Direction.OUT:
        if arg.data:
            raise InvalidArgs(f"{where}: {len(arg.data)} bytes given; its direction is out, so expected none")
    else:
        _check_bytes(where, arg)


def _check_bytes(where: str, arg: Arg) -> None:
    expected = nbytes(arg.dtype, arg.shape)
    if len(arg.data) != expected:
        raise InvalidArgs(
            f"{where}: {len(arg.data)} bytes given; expected {expected} for {arg.dtype} {list(arg.shape)}"
        )


def _described(tensor: TensorSpec) -> str:
    return f"weights of {tensor.source}" if tensor.source else f"{tensor.dtype} {list(tensor.shape)}"
