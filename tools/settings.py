"""Where each setting comes from: flag, ``CHIPBUS_*`` variable, TOML file or default, in that order.

Owns: nothing. ``EngineConfig`` and ``ServerConfig`` are the only lists of settings; names, types and rules are read
from their fields. Variables and files may hold both, also for a command that starts no server: one file serves all.
"""

from __future__ import annotations

import difflib
import tomllib
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from ..actors.config import EngineConfig
from ..actors.processes import RUN_VARIABLE
from ..errors import ConfigError
from .serve.config import ServerConfig

__all__ = [
    "ENGINE_FIELDS",
    "PREFIX",
    "RESERVED_PREFIX",
    "SERVER_FIELDS",
    "Resolved",
    "Setting",
    "flag_names",
    "parse_text",
    "resolve_settings",
    "value_type",
]

PREFIX = "CHIPBUS_"
"""One variable per setting: ``CHIPBUS_`` and the field's name in capitals."""
RESERVED_PREFIX = "CHIPBUS_RING_"
"""Ring sizes, resolved per dispatch by the kernels and not here."""

ENGINE_FIELDS: tuple[attrs.Attribute[Any], ...] = attrs.fields(EngineConfig)
SERVER_FIELDS: tuple[attrs.Attribute[Any], ...] = attrs.fields(ServerConfig)
_FIELDS = {field.name: field for field in (*ENGINE_FIELDS, *SERVER_FIELDS)}
_TYPES = {**typing.get_type_hints(EngineConfig), **typing.get_type_hints(ServerConfig)}
assert len(_FIELDS) == len(ENGINE_FIELDS) + len(SERVER_FIELDS)
_RULES: dict[type, str] = {
    bool: "true or false", int: "an integer", float: "a number", str: "text", Path: "a path",
}  # fmt: skip
_NUMBERS = (int, float)
_TRUTHS = {"true": True, "1": True, "false": False, "0": False}


@attrs.frozen
class Setting:
    """One resolved setting.

    ``source`` is "default", "flag --dtype", "flag MODEL", "variable CHIPBUS_DTYPE" or "file chipbus.toml".
    """

    name: str
    value: str | bool | int | float | Path | None
    source: str

    def as_toml(self) -> str:
        """``name = value``; None becomes a comment, for TOML has no null, and so does a secret."""
        if self.value is None:
            return f"# {self.name} is not set"
        if _FIELDS[self.name].metadata.get("secret"):
            return f"# {self.name} is set, and not shown"
        if isinstance(self.value, bool):
            return f"{self.name} = {str(self.value).lower()}"
        if isinstance(self.value, _NUMBERS):
            return f"{self.name} = {self.value!r}"
        return f"{self.name} = {_toml_string(str(self.value))}"


@attrs.frozen
class Resolved:
    """A checked configuration, and where each of its values comes from, in the order of the fields."""

    config: EngineConfig
    settings: tuple[Setting, ...]
    server: ServerConfig
    server_settings: tuple[Setting, ...]

    def as_toml(self, *, with_server: bool = False) -> str:
        """Every value with its source as a comment; itself a valid ``--config`` file."""
        settings = (*self.settings, *self.server_settings) if with_server else self.settings
        lines = [setting.as_toml() for setting in settings]
        width = max(map(len, lines))
        return "\n".join(f"{line:<{width}}  # {s.source}" for line, s in zip(lines, settings, strict=True))


def resolve_settings(flags: Mapping[str, str | None], environ: Mapping[str, str], file: Path | None) -> Resolved:
    """Bring the four sources together; raises ``ConfigError`` naming the source, the value and the rule.

    flags:   by field name, the text after the flag; None where it was not given
    environ: the environment; only ``CHIPBUS_*`` is read, and a name that is no setting is refused
    file:    a TOML file of flat ``name = value`` lines, or None
    """
    found: dict[str, tuple[Any, str]] = {}
    if file is not None:
        for name, value in _read_file(file).items():
            source = f"file {file}"
            found[name] = (_check_typed(f"{name} in {file}", name, value), source)
    for variable, text in environ.items():
        is_ours = variable.startswith(PREFIX) and not variable.startswith(RESERVED_PREFIX)
        if is_ours and variable != RUN_VARIABLE:  # which says where this process is, not what is wanted
            name = _known_variable(variable)
            found[name] = (parse_text(variable, value_type(name), text), f"variable {variable}")
    for name, flag_text in flags.items():
        if flag_text is not None:
            flag = flag_names(name)[0]
            found[name] = (parse_text(flag, value_type(name), flag_text), f"flag {flag}")
    for name, (value, source) in found.items():
        _check_range(name, value, source)

    def settings(config: EngineConfig | ServerConfig, fields: tuple[attrs.Attribute[Any], ...]) -> tuple[Setting, ...]:
        sources = {name: source for name, (_, source) in found.items()}
        return tuple(Setting(f.name, getattr(config, f.name), sources.get(f.name, "default")) for f in fields)

    def given(fields: tuple[attrs.Attribute[Any], ...]) -> dict[str, Any]:
        return {field.name: found[field.name][0] for field in fields if field.name in found}

    config, server = EngineConfig(**given(ENGINE_FIELDS)), ServerConfig(**given(SERVER_FIELDS))
    return Resolved(config, settings(config, ENGINE_FIELDS), server, settings(server, SERVER_FIELDS))


def flag_names(name: str) -> tuple[str, ...]:
    """Every spelling of one setting's flag, the usual one first. ``model`` is the positional MODEL.

    The flag of a boolean says the opposite of its default: what is on unless asked otherwise has a ``--no-…``.
    """
    if name == "model":
        return ("MODEL",)
    field = _FIELDS[name]
    return tuple(field.metadata["flags"]) or (f"--{'no-' * (field.default is True)}{name.replace('_', '-')}",)


def value_type(name: str) -> type:
    """``bool``, ``int``, ``float``, ``str`` or ``Path``: the type of a setting's value, besides None."""
    return _without_none(_TYPES[name])


def parse_text(subject: str, kind: type, text: str) -> Any:
    """Text from a flag or variable as ``kind``, strictly; raises ``ConfigError`` naming ``subject``, text and rule."""
    try:
        if kind in _NUMBERS and (text != text.strip() or "_" in text):
            raise ValueError(text)  # int() and float() would take " 1_0 "
        return _TRUTHS[text] if kind is bool else kind(text)
    except (ValueError, KeyError):
        raise ConfigError(f"{subject} is {text!r}; it must be {_RULES[kind]}") from None


def _without_none(hint: Any) -> type:
    kinds = [kind for kind in typing.get_args(hint) or (hint,) if kind is not type(None)]
    assert len(kinds) == 1, f"a setting has one type besides None, not {hint}"
    assert kinds[0] in _RULES, f"a setting's type is one of {', '.join(k.__name__ for k in _RULES)}, not {hint}"
    return typing.cast(type, kinds[0])


def _read_file(file: Path) -> dict[str, Any]:
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"configuration file {file} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"configuration file {file} is not TOML: {error}") from error
    for name in table:
        if name not in _TYPES:
            raise ConfigError(f"configuration file {file} has an unknown key {name!r}; {_nearest(name, list(_TYPES))}")
    return table


def _check_typed(subject: str, name: str, value: Any) -> Any:
    """A TOML value has a type of its own: it must be the setting's, though an integer will do for a number."""
    kind = value_type(name)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is Path and isinstance(value, str):
        return Path(value)
    if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
        raise ConfigError(f"{subject} is {value!r}; it must be {_RULES[kind]}")
    return value


def _known_variable(variable: str) -> str:
    name = variable.removeprefix(PREFIX).lower()
    if name not in _TYPES or variable != variable.upper():
        known = [PREFIX + field.upper() for field in _TYPES]
        raise ConfigError(f"there is no setting for the variable {variable}; {_nearest(variable.upper(), known)}")
    return name


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"


def _check_range(name: str, value: Any, source: str) -> None:
    """The field's own rule, here so that the sentence can name the source; the constructor would check it anyway."""
    field = _FIELDS[name]
    assert field.validator is not None, f"setting {name} has no rule"
    try:
        field.validator(None, field, value)
    except ConfigError as error:
        raise ConfigError(f"{error} (from {source})") from None


def _toml_string(text: str) -> str:
    """A TOML basic string. JSON's escapes are a subset of TOML's once non-ASCII text is left as it is."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(f"\\u{ord(c):04X}" if ord(c) < 0x20 or ord(c) == 0x7F else c for c in escaped) + '"'
