"""The tile language: programs that cut tensors into tiles and submit in-core functions on them. No torch here.

Owns nothing. Source order is not execution order: a task waits for those whose tiles it uses, found by byte range.

    @incore(x=IN, y=OUT)
    def scale(x, y, *, by: float):                              # gets torch views, writes in place
        torch.mul(x, by, out=y)

    @program(x=tensor("float32", "N"), y=tensor("float32", "N", direction=OUT))
    def double(t: Trace, x: Tile, y: Tile, *, tile: int = 256):  # runs once per set of shapes, makes the graph
        for n in t.parallel(0, x.shape[0], tile):
            t.submit(scale, x[n : n + tile], y[n : n + tile], by=2.0)
"""

from __future__ import annotations

import inspect
import sys
import traceback
from collections.abc import Callable, Mapping
from functools import cached_property

import attrs

from ..errors import ChipbusError, InvalidArgs
from ..topology.rings import RingSizes
from .graph import GraphBuilder, TaskGraph, Tile
from .incore import InCore, incore, split_parameters
from .program import DTYPE_BYTES, Direction, Param, Program
from .tile_source import Source, find_in_module
from .trace import Trace

__all__ = ["IN", "INOUT", "OUT", "InCore", "Tile", "TileProgram", "Trace", "incore", "load", "program", "tensor"]

IN, OUT, INOUT = Direction.IN, Direction.OUT, Direction.INOUT

_Setting = int | float | str | bool


def tensor(dtype: str, *shape: int | str, direction: Direction = IN) -> Param:
    """A parameter of a program; names in ``shape`` are dynamic. It takes a resident tensor or an array by value."""
    if dtype not in DTYPE_BYTES:
        raise InvalidArgs(f"dtype is {dtype!r}; expected one of {', '.join(DTYPE_BYTES)}")
    if not all(isinstance(extent, str) or extent >= 0 for extent in shape):
        raise InvalidArgs(f"shape is {list(shape)}; extents are names or numbers of at least 0")
    return Param("", dtype, shape, direction, resident=None)


def program(**params: Param) -> Callable[[Callable[..., None]], TileProgram]:
    """Make a program: ``@program(x=tensor(…), …)`` describes every parameter after the first, which is the ``Trace``.

    Keyword-only parameters with a default are settings (tile shapes), part of the program's identity.
    """
    caller = sys._getframe(1).f_globals.get("__name__")

    def decorate(function: Callable[..., None]) -> TileProgram:
        name = function.__name__
        if function.__module__ != caller:
            raise InvalidArgs(
                f"{name} is defined in {function.__module__}, not in {caller}; make programs where they are"
            )
        positional, settings = split_parameters(function)
        if positional[1:] != list(params) or not positional:
            raise InvalidArgs(
                f"@program of {name} describes {', '.join(params) or 'nothing'}; its parameters after the trace are"
                f" {', '.join(positional[1:]) or 'none'}, and each needs its description, in order"
            )
        for setting, value in settings.items():
            _check_setting(name, setting, value)
        described = tuple(attrs.evolve(param, name=name) for name, param in params.items())
        return TileProgram(function, described, settings, Source.of(function))

    return decorate


@attrs.frozen(slots=False, eq=False)
class TileProgram:
    """A program in the tile language. Register it on a worker, or hand ``program`` to a chip."""

    function: Callable[..., None]
    params: tuple[Param, ...]
    settings: Mapping[str, _Setting]
    source: Source

    @property
    def name(self) -> str:
        """The function's name."""
        return self.function.__name__

    @property
    def symbols(self) -> tuple[str, ...]:
        """The dynamic dimensions, in order of first appearance."""
        return tuple(dict.fromkeys(name for param in self.params for name in param.shape if isinstance(name, str)))

    @cached_property
    def program(self) -> Program:
        """What travels to chips: parameters, settings, and where the code is, with the digest of its file."""
        source = (("module", self.source.module), ("qualname", self.source.qualname),
                  ("file", self.source.file), ("sha256", self.source.sha256))  # fmt: skip
        return Program(self.name, "tile", (*source, *_encoded(self.settings)), self.params)

    def with_settings(self, **changes: _Setting) -> TileProgram:
        """The same program with other settings, which is another program."""
        for name, value in changes.items():
            if name not in self.settings:
                raise InvalidArgs(
                    f"{self.name} has no setting {name}; its settings: {', '.join(self.settings) or 'none'}"
                )
            _check_setting(self.name, name, value)
        return attrs.evolve(self, settings={**self.settings, **changes})

    def trace(self, sizes: Mapping[str, int], rings: RingSizes | None = None) -> tuple[TaskGraph, dict[str, InCore]]:
        """The graph for shapes in which each symbol is a number, and the in-core functions its tasks name.

        Raises what the program did wrong: the proven deadlocks of ``rings``, else ``InvalidArgs`` with file and line.
        """
        named = ",".join(f"{name}={size}" for name, size in sorted(sizes.items()))
        builder = GraphBuilder(f"{self.name}[{named}]", rings)
        trace = Trace(builder, {param.name for param in self.params if param.direction is IN})
        tiles = [builder.bound(param.name, param.dtype, *shape_of(param, sizes)) for param in self.params]
        try:
            self.function(trace, *tiles, **self.settings)
            return builder.build(), trace.incores
        except ChipbusError:
            raise
        except Exception as error:
            lines = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == self.source.file]
            at = f"{self.source.file}:{lines[-1].lineno}: " if lines else ""
            raise InvalidArgs(f"{at}tracing {self.name} failed: {type(error).__name__}: {error}") from error


def shape_of(param: Param, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of a parameter once its symbols are known."""
    return tuple(sizes[extent] if isinstance(extent, str) else extent for extent in param.shape)


def load(described: Program) -> TileProgram:
    """The program a description of kind "tile" stands for, from the file it was made from. Else ``InvalidArgs``."""
    static = dict(described.static)
    try:
        source = Source(**{name: str(static.pop(name)) for name in ("module", "qualname", "file", "sha256")})
    except KeyError as missing:
        raise InvalidArgs(
            f"program {described.name} of kind tile lacks {missing} in its static configuration"
        ) from None
    found = find_in_module(source)
    if not isinstance(found, TileProgram):
        raise InvalidArgs(f"{source.module}:{source.qualname} is no tile program, but a {type(found).__name__}")
    changes = {name.removeprefix(_PREFIX): value for name, value in static.items()}
    if found.params != described.params:
        raise InvalidArgs(f"{source.module}:{source.qualname} has other parameters here than where it was made")
    return found.with_settings(**changes)


def _check_setting(program: str, name: str, value: object) -> None:
    if not isinstance(value, int | float | str):
        found = "without default" if value is inspect.Parameter.empty else f"{value!r}"
        raise InvalidArgs(f"{program}: setting {name} is {found}; expected a number or text")


_PREFIX = "setting."  # so that a setting may be called "file"


def _encoded(settings: Mapping[str, _Setting]) -> tuple[tuple[str, _Setting], ...]:
    return tuple((_PREFIX + name, value) for name, value in settings.items())
