"""Command-line options made from declared fields: the engine's settings and a request's sampling parameters.

Owns: nothing. A field added to ``EngineConfig`` or ``SamplingParams`` is a flag without a line written here.
"""

from __future__ import annotations

import ast
import inspect
import os
import textwrap
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import click

from ..actors.sampling import SamplingParams
from ..errors import RequestInvalid
from .settings import ENGINE_FIELDS, SERVER_FIELDS, Resolved, flag_names, parse_text, resolve_settings, value_type

__all__ = [
    "engine_options",
    "plain",
    "resolved_from",
    "sampling_from",
    "sampling_options",
    "sampling_rows",
    "server_options",
]

_METAVARS: dict[type, str] = {int: "INTEGER", float: "NUMBER", str: "TEXT", Path: "PATH"}
HELP: Mapping[str, Any] = {"help_option_names": ["-h", "--help"]}
"""Context settings of every command."""
GREEDY = 0.0
"""``bus-run generate`` picks the likeliest token unless asked otherwise: the same command prints the same text."""

Command = Callable[..., Any]


def engine_options(command: Command) -> Command:
    """Add MODEL, one flag per setting (of a boolean without a value), ``--config`` and ``--print-config``."""
    command = _setting_options(command, ENGINE_FIELDS)
    command = click.option("--print-config", is_flag=True, help="Print every setting with its source, and stop.")(
        command
    )
    command = click.option(
        "--config", "config_file", metavar="FILE", type=click.Path(path_type=Path), help="TOML file of settings."
    )(command)
    return click.argument("setting_model", metavar="[MODEL]", required=False)(command)


def server_options(command: Command) -> Command:
    """Add one flag per setting of the server."""
    return _setting_options(command, SERVER_FIELDS)


def _setting_options(command: Command, fields: Sequence[attrs.Attribute[Any]]) -> Command:
    for field in reversed(fields):
        if field.name != "model":
            kind = value_type(field.name)
            opposite: dict[str, Any] = {"flag_value": plain(not field.default)}
            takes = opposite if kind is bool else {"metavar": _METAVARS[kind]}
            command = click.option(*flag_names(field.name), f"setting_{field.name}", help=_engine_help(field), **takes)(
                command
            )
    return command


def with_traceback(command: Command) -> Command:
    """``--traceback`` is read by ``console.run`` from the arguments; here it is only allowed and explained."""
    return click.option(
        "--traceback", is_flag=True, expose_value=False, help="on an error, also show where it was raised"
    )(command)


def resolved_from(options: dict[str, Any]) -> Resolved:
    """Take the engine's options out of a command's keyword arguments and resolve them; raises ``ConfigError``."""
    flags = {name.removeprefix("setting_"): options.pop(name) for name in list(options) if name.startswith("setting_")}
    return resolve_settings(flags, os.environ, options.pop("config_file"))


def _engine_help(field: attrs.Attribute[Any]) -> str:
    text = str(field.metadata["help"])
    if field.default is True:
        return f"do not {text}"
    return text if field.default is None or field.default is False else f"{text}  [default: {plain(field.default)}]"


def plain(value: object) -> str:
    """A default as a person writes it: 300, not 300.0, and false."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def sampling_options(command: Command) -> Command:
    """Add one flag per sampling parameter. Flags of tuples may be repeated; flags of booleans take no value."""
    kinds = typing.get_type_hints(SamplingParams)
    documents = _field_documents(SamplingParams)
    for field in reversed(attrs.fields(SamplingParams)):
        kind, is_many = _element(kinds[field.name])
        default = GREEDY if field.name == "temperature" else field.default
        text = documents.get(field.name, "")
        if default not in (None, ()) and kind is not bool:
            text = f"{text}  [default: {plain(default)}]"
        if is_many:
            text = f"{text} May be repeated."
        extra: dict[str, Any] = {"is_flag": True} if kind is bool else {"metavar": _METAVARS[kind], "multiple": is_many}
        command = click.option(f"--{field.name.replace('_', '-')}", f"sampling_{field.name}", help=text, **extra)(
            command
        )
    return command


def sampling_from(options: dict[str, Any]) -> SamplingParams:
    """Take the sampling options out of a command's keyword arguments; raises ``RequestInvalid`` naming the field."""
    kinds = typing.get_type_hints(SamplingParams)
    fields: dict[str, Any] = {"temperature": GREEDY}
    for field in attrs.fields(SamplingParams):
        given = options.pop(f"sampling_{field.name}")
        if given is None or given == () or given is False:
            continue
        kind, is_many = _element(kinds[field.name])
        subject = f"--{field.name.replace('_', '-')}"
        if kind is bool:
            fields[field.name] = given
        elif is_many:
            fields[field.name] = tuple(_parse(subject, kind, text) for text in given)
        else:
            fields[field.name] = _parse(subject, kind, given)
    return SamplingParams(**fields)


def sampling_rows() -> list[tuple[str, str, str, str]]:
    """Flag, type, default and meaning of every sampling parameter, for the page of flags."""
    kinds = typing.get_type_hints(SamplingParams)
    documents = _field_documents(SamplingParams)
    rows = []
    for field in attrs.fields(SamplingParams):
        kind, is_many = _element(kinds[field.name])
        default = GREEDY if field.name == "temperature" else field.default
        shown = "–" if default in (None, ()) else "off" if default is False else plain(default)
        name = "flag" if kind is bool else kind.__name__
        rows.append(
            (
                f"--{field.name.replace('_', '-')}",
                f"{name}, repeatable" if is_many else name,
                shown,
                documents.get(field.name, ""),
            )
        )
    return rows


def _parse(subject: str, kind: type, text: str) -> Any:
    try:
        return parse_text(subject, kind, text)
    except ValueError as error:
        raise RequestInvalid(str(error)) from None


def _element(hint: Any) -> tuple[type, bool]:
    """The type of one value, and whether there may be several: ``tuple[int, ...]`` → (int, True)."""
    if typing.get_origin(hint) is tuple:
        return typing.get_args(hint)[0], True
    if isinstance(hint, types.UnionType):
        return next(kind for kind in typing.get_args(hint) if kind is not type(None)), False
    return hint, False


def _field_documents(cls: type) -> Mapping[str, str]:
    """The string under each field of a class, which Python itself throws away: the one place a field is explained."""
    try:
        body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    except OSError:  # no source beside the program, as in a frozen application: help without these texts
        return {}
    assert isinstance(body, ast.ClassDef)
    documents = {}
    for field, text in zip(body.body, body.body[1:], strict=False):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(text, ast.Expr)
            and isinstance(text.value, ast.Constant)
        ):
            documents[field.target.id] = " ".join(str(text.value.value).split())
    return documents
