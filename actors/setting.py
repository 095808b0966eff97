"""How a setting is declared: its default, its help, what it must be, and how it is spelled on a command line.

Owns: nothing. Flags, variables, TOML keys and the page of settings derive from fields made here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import attrs

from ..errors import ConfigError

__all__ = ["one_of", "seconds", "setting", "text", "whole", "yes_or_no"]

Check = Callable[[Any, "attrs.Attribute[Any]", Any], None]


def _refuse(field: attrs.Attribute[Any], value: object, rule: str) -> None:
    raise ConfigError(f"setting {field.name} is {value!r}; it must be {rule}")


def whole(low: int) -> Check:
    """An integer of at least ``low``; True is none."""

    def check(_: Any, field: attrs.Attribute[Any], value: Any) -> None:
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value < 2**63:
            _refuse(field, value, f"an integer of at least {low}")

    return check


def seconds(_: Any, field: attrs.Attribute[Any], value: Any) -> None:
    """A finite number of seconds above 0."""
    fits = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not fits or value <= 0:
        _refuse(field, value, "a number of seconds above 0")


def one_of(*allowed: str) -> Check:
    """One of these texts."""

    def check(_: Any, field: attrs.Attribute[Any], value: Any) -> None:
        if value not in allowed:
            _refuse(field, value, allowed[0] if len(allowed) == 1 else f"one of {', '.join(allowed)}")

    return check


def yes_or_no(_: Any, field: attrs.Attribute[Any], value: Any) -> None:
    """True or False."""
    if not isinstance(value, bool):
        _refuse(field, value, "true or false")


def text(_: Any, field: attrs.Attribute[Any], value: Any) -> None:
    """A text that is not empty."""
    if not isinstance(value, str) or not value:
        _refuse(field, value, "a non-empty string")


def setting(default: Any, help_text: str, check: Any, converter: Any = None, flags: tuple[str, ...] = ()) -> Any:
    """One field. ``None`` as default means: derived from model and machine, so None also passes the check.

    ``flags`` are its spellings on a command line, if they are not just the field's name with dashes.
    """
    validator = attrs.validators.optional(check) if default is None else check
    return attrs.field(
        default=default, validator=validator, converter=converter, metadata={"help": help_text, "flags": flags}
    )
