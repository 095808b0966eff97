"""What an L3 worker can be asked to run: single programs, and orchestration functions that submit many.

Owns nothing; values and their checks.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs

from ...errors import ConfigError, InvalidArgs, TopologyError, WrongArity
from ...kernels.program import Program
from ...kernels.tiles import TileProgram
from ...topology import parse_devices

__all__ = [
    "Orchestration",
    "Registration",
    "as_program",
    "check_devices",
    "check_programs",
    "check_subs",
    "orchestration",
]


@attrs.frozen(eq=False)
class Orchestration:
    """A function ``(orchestrator, *args)`` with what it needs of its worker. Made by ``@orchestration``."""

    function: Callable[..., Any]
    subs: Mapping[str, int]
    devices: tuple[str, ...]

    @property
    def name(self) -> str:
        """The function's name."""
        return self.function.__name__


def orchestration(
    *, subs: Mapping[str, int] | None = None, devices: Sequence[str] = ()
) -> Callable[[Callable[..., Any]], Orchestration]:
    """Make an orchestration that says what it needs, so that a worker can refuse it before anything runs.

    subs: host callables it submits by name, and how many arguments it gives each. devices: the only ones it runs on.
    """
    return lambda function: Orchestration(function, dict(subs or {}), tuple(devices))


@attrs.frozen
class Registration:
    """A program that every chip of a worker has."""

    name: str
    digest: bytes
    abi_fingerprint: str  # equal where the same arguments fit


def as_program(given: object) -> Program | None:
    """The program to send to chips, or None if it is none."""
    if isinstance(given, TileProgram):
        return given.program
    return given if isinstance(given, Program) else None


def check_programs(given: object) -> tuple[object, ...]:
    """One program or a sequence of them, as a tuple. Text is a sequence, too, and is refused."""
    if isinstance(given, Program | TileProgram | Orchestration):
        return (given,)
    if isinstance(given, str | bytes) or not isinstance(given, Sequence):
        raise WrongArity(f"programs is {given!r}; expected a program or a sequence of programs")
    if not given:
        raise ConfigError("programs is empty; a worker needs at least one")
    for index, program in enumerate(given):
        if not isinstance(program, Program | TileProgram | Orchestration):
            raise WrongArity(f"program {index} is a {type(program).__name__}; expected a program or an orchestration")
    return tuple(given)


def check_devices(devices: object, programs: Sequence[object]) -> tuple[str, ...]:
    """The chips of a worker: at least one, distinct, of one kind, and those that its orchestrations were made for."""
    if isinstance(devices, str | bytes) or not isinstance(devices, Sequence):
        raise WrongArity(f"devices is {devices!r}; expected a sequence such as ['cpu:0', 'cpu:1']")
    if not all(isinstance(device, str) for device in devices):
        raise WrongArity(f"devices is {list(devices)!r}; expected names such as 'cpu:0'")
    if not devices:
        raise ConfigError("devices is empty; a worker needs at least one chip")
    try:
        names = tuple(map(str, parse_devices(devices)))
    except TopologyError as error:
        raise InvalidArgs(str(error)) from None
    for program in programs:
        if isinstance(program, Orchestration) and program.devices and program.devices != names:
            raise InvalidArgs(
                f"{program.name} was made for {', '.join(program.devices)}; the worker has {', '.join(names)}"
            )
    return names


def check_subs(subs: object, programs: Sequence[object]) -> dict[str, Callable[..., object]]:
    """The host callables of a worker: every one an orchestration asks for, and able to take what it is given."""
    if not isinstance(subs, Mapping):
        raise WrongArity(f"subs is {subs!r}; expected a mapping of names to callables")
    for name, function in subs.items():
        if not isinstance(name, str) or not callable(function):
            raise WrongArity(f"subs maps {name!r} to {function!r}; expected a name and a callable")
    for program in programs:
        if isinstance(program, Orchestration):
            for name, count in program.subs.items():
                if name not in subs:
                    known = ", ".join(subs) or "none"
                    raise InvalidArgs(f"{program.name} needs the host callable {name!r}; given: {known}")
                check_call(name, subs[name], [None] * count)
    return dict(subs)


def check_call(name: str, function: Callable[..., object], values: Sequence[Any]) -> None:
    """Raise ``WrongArity`` if a host callable does not take these arguments."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some builtins have none
        return
    try:
        signature.bind(*values)
    except TypeError as error:
        raise WrongArity(f"{name}{signature}: {len(values)} arguments given: {error}") from None
