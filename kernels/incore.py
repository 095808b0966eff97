"""In-core functions: what a task computes on its tiles, written by the user in Python. No torch here.

Owns nothing. The body gets one array view per tile (a torch tensor on the chips that compute) and writes in place.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import attrs

from ..errors import InvalidArgs
from .program import Direction

__all__ = ["InCore", "incore"]


@attrs.frozen(eq=False)
class InCore:
    """A function on tiles. ``directions``: one per positional parameter; ``settings``: keyword-only name → has default.

    Calling it calls the function: a body can be tried on plain tensors.
    """

    function: Callable[..., None]
    directions: tuple[Direction, ...]
    settings: Mapping[str, bool]

    @property
    def name(self) -> str:
        """What its tasks are called in graphs, traces and errors."""
        return self.function.__name__

    def __call__(self, *args: Any, **settings: Any) -> None:
        """The body, at once."""
        self.function(*args, **settings)

    def check_call(self, tiles: int, settings: Mapping[str, Any]) -> None:
        """Whether a task may be made of ``tiles`` tiles and these settings; ``InvalidArgs`` in one sentence if not."""
        if tiles != len(self.directions):
            raise InvalidArgs(f"{self.name} takes {len(self.directions)} tiles; {tiles} given")
        for name, value in settings.items():
            if name not in self.settings:
                known = ", ".join(self.settings) or "none"
                raise InvalidArgs(f"{self.name} has no setting {name}; its settings: {known}")
            if not isinstance(value, int | float | str):
                raise InvalidArgs(f"{self.name}: setting {name} is a {type(value).__name__}; expected a number or text")
        missing = [name for name, has_default in self.settings.items() if not has_default and name not in settings]
        if missing:
            raise InvalidArgs(f"{self.name}: setting {missing[0]} is missing")


def incore(**directions: Direction) -> Callable[[Callable[..., None]], InCore]:
    """Make an in-core function: ``@incore(x=IN, y=OUT)`` names every positional parameter, in order, and its direction.

    Keyword-only parameters are settings: numbers or texts, fixed for each task. An OUT tile's old content is gone.
    """

    def decorate(function: Callable[..., None]) -> InCore:
        positional, settings = split_parameters(function)
        if positional != list(directions):
            raise InvalidArgs(
                f"@incore of {function.__name__} names {', '.join(directions) or 'nothing'}; its positional parameters"
                f" are {', '.join(positional) or 'none'}, and each needs its direction, in order"
            )
        has_default = {name: default is not inspect.Parameter.empty for name, default in settings.items()}
        return InCore(function, tuple(directions.values()), has_default)

    return decorate


def split_parameters(function: Callable[..., Any]) -> tuple[list[str], dict[str, Any]]:
    """Names of the positional parameters, and keyword-only name → default. No ``*args``, no ``**more``."""
    positional, settings = [], {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise InvalidArgs(f"{function.__name__} has the parameter {parameter}; each parameter needs a name")
        if parameter.kind is parameter.KEYWORD_ONLY:
            settings[name] = parameter.default
        else:
            positional.append(name)
    return positional, settings
