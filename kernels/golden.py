"""Golden checks: a tile program on a chip against a plain reference, over shapes, within a tolerance.

Owns: the chip it opens, for one check. Inputs are drawn by seed, so a check says the same every time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError, KernelError
from .chips import open_chip
from .dispatch import Arg, Dispatch
from .program import Direction, Param
from .tiles import TileProgram, shape_of

__all__ = ["GoldenReport", "golden"]

Array = NDArray[Any]
Draw = tuple[int, int] | Callable[[np.random.Generator, Mapping[str, int]], Array]


@attrs.frozen
class GoldenReport:
    """What a check that passed has seen; ``str`` is one line."""

    name: str
    shapes: int
    max_error: float

    def __str__(self) -> str:
        return f"{self.name}: {self.shapes} shape{'s' * (self.shapes != 1)}, max error {self.max_error:.1e}"


def golden(
    program: TileProgram,
    reference: Callable[..., Array | tuple[Array, ...]],
    shapes: Sequence[Sequence[int]],
    *,
    inputs: Mapping[str, Draw] | None = None,
    rtol: float = 1e-5,
    atol: float = 1e-6,
    seed: int = 0,
    device: str = "cpu:0",
    frozen: Path | None = None,
) -> GoldenReport:
    """Run ``program`` for each of ``shapes`` (a size per symbol, in ``program.symbols``) and compare what it writes.

    ``reference`` gets the IN and INOUT arrays by name, floats as float64, and returns what is expected, in parameter
    order. Arrays are normally distributed, unless ``inputs`` has for the parameter the range [low, high) of integers
    or a function of (generator, sizes).
    ``frozen``: a directory of .npz files, one per shape, with inputs and expectations; missing ones are written, and
    those there are used instead of seed and reference. A difference above ``atol + rtol · |expected|`` is a
    ``KernelError`` naming shape, parameter and element.
    """
    chip = open_chip(device, 1)
    try:
        chip.register(program.program)
        worst = 0.0
        for number, shape in enumerate(shapes):
            sizes = dict(zip(program.symbols, shape, strict=True))
            drawn = _drawn(program, sizes, np.random.default_rng((seed, number)), inputs or {})
            given, expected = _frozen(frozen, program, sizes, drawn, reference)
            args = tuple(
                Arg.out(param.dtype, shape_of(param, sizes))
                if param.direction is Direction.OUT
                else Arg.of(given[param.name], param.dtype)
                for param in program.params
            )
            dispatch = Dispatch(dispatch_id=number + 1, step_id=1, program=program.program.digest, args=args)
            found = [arg.numpy() for arg in chip.launch(dispatch).outputs]
            for param, ours, theirs in zip(_written(program), found, expected, strict=True):
                worst = max(
                    worst, _compared(f"{program.name} at {dict(sizes)}, {param.name}", ours, theirs, rtol, atol)
                )
        return GoldenReport(program.name, len(shapes), worst)
    finally:
        chip.close()


def _written(program: TileProgram) -> list[Param]:
    return [param for param in program.params if param.direction is not Direction.IN]


def _drawn(
    program: TileProgram, sizes: Mapping[str, int], chance: np.random.Generator, inputs: Mapping[str, Draw]
) -> dict[str, Array]:
    """Inputs by name, already rounded to what their dtype can hold."""
    drawn = {}
    for param in program.params:
        if param.direction is Direction.OUT:
            continue
        shape = shape_of(param, sizes)
        if param.name not in inputs and param.dtype.startswith(("int", "uint")):
            raise ConfigError(f"{program.name}: parameter {param.name} is {param.dtype}; say in inputs how it is drawn")
        draw = inputs.get(param.name)
        array: Array
        if isinstance(draw, tuple):
            array = chance.integers(*draw, size=shape)
        else:
            array = draw(chance, sizes) if draw is not None else chance.standard_normal(shape)
        drawn[param.name] = Arg.of(np.asarray(array).reshape(shape), param.dtype).numpy().copy()
    return drawn


def _frozen(
    directory: Path | None,
    program: TileProgram,
    sizes: Mapping[str, int],
    drawn: dict[str, Array],
    reference: Callable[..., Any],
) -> tuple[dict[str, Array], list[Array]]:
    """Inputs and expectations, from the file of this shape if there is one."""
    named = ".".join(f"{name}{size}" for name, size in sorted(sizes.items()))
    path = directory / f"{program.name}.{named}.npz" if directory is not None else None
    if path is not None and path.exists():
        with np.load(path) as file:
            given = {name.removeprefix("in."): file[name] for name in file.files if name.startswith("in.")}
            return given, [file[f"out.{param.name}"] for param in _written(program)]
    floats = {name: array.astype(np.float64) if array.dtype.kind == "f" else array for name, array in drawn.items()}
    answer = reference(**floats)
    expected = [np.asarray(array) for array in (answer if isinstance(answer, tuple) else (answer,))]
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        stored = {f"in.{name}": array for name, array in drawn.items()}
        stored |= {f"out.{param.name}": array for param, array in zip(_written(program), expected, strict=True)}
        np.savez(path, allow_pickle=False, **stored)
    return drawn, expected


def _compared(where: str, ours: Array, theirs: Array, rtol: float, atol: float) -> float:
    if ours.shape != theirs.shape:
        raise KernelError(f"{where}: the reference has shape {list(theirs.shape)}; expected {list(ours.shape)}")
    if not ours.size:
        return 0.0
    errors = np.abs(ours.astype(np.float64) - theirs)
    excess = np.where(np.isfinite(errors), errors - rtol * np.abs(theirs) - atol, np.inf)
    excess[(ours == theirs)] = -1.0  # also where both are infinite
    worst = np.unravel_index(int(excess.argmax()), ours.shape)
    if excess[worst] > 0:
        at = [int(index) for index in worst]
        raise KernelError(
            f"{where}{at} is {ours[worst]:g}; expected {theirs[worst]:g} within {rtol:g} · |x| + {atol:g}"
        )
    return float(np.where(np.isfinite(errors), errors, 0.0).max())
