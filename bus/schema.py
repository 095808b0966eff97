"""A message class as text that changes exactly when its meaning on the wire changes. Pure functions."""

from __future__ import annotations

import types
import typing
from enum import Enum
from typing import Any

import attrs

__all__ = ["describe"]


def describe(cls: type) -> str:
    """Name, field names and field types of an attrs class, nested classes and enums spelled out once each."""
    seen: dict[type, str] = {}
    _visit(cls, seen)
    return ";".join(seen.values())


def _visit(kind: Any, seen: dict[type, str]) -> str:
    """The name of a type inside a description; classes it mentions are added to ``seen``."""
    origin = typing.get_origin(kind)
    if origin is not None:
        arguments = ",".join(_visit(argument, seen) for argument in typing.get_args(kind))
        name = "Union" if origin in (typing.Union, types.UnionType) else getattr(origin, "__name__", str(origin))
        return f"{name}[{arguments}]"
    if isinstance(kind, type) and attrs.has(kind):
        if kind not in seen:
            seen[kind] = ""  # ends the recursion of a class that mentions itself
            hints = typing.get_type_hints(kind, include_extras=True)
            fields = ",".join(f"{field.name}:{_visit(hints[field.name], seen)}" for field in attrs.fields(kind))
            seen[kind] = f"{kind.__name__}({fields})"
        return kind.__name__
    if isinstance(kind, type) and issubclass(kind, Enum):
        seen[kind] = f"{kind.__name__}({','.join(f'{member.name}={member.value!r}' for member in kind)})"
        return kind.__name__
    if isinstance(kind, type):
        return kind.__name__
    return repr(kind)
