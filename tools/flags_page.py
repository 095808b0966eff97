"""``docs/flags.md``, made from the declared fields: ``python -m chipbus.tools.flags_page > docs/flags.md``.

Owns: nothing. A test compares the page with what this prints.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import attrs
import click

from .options import plain, sampling_rows
from .settings import ENGINE_FIELDS, PREFIX, SERVER_FIELDS, flag_names, value_type

__all__ = ["page"]

_PAGE = """\
# Flags

Printed by `python -m chipbus.tools.flags_page` from `actors/config.py`, `tools/serve/config.py` and
`actors/sampling.py`: edit those.

## Settings of an engine

A flag wins over the variable, the variable over `--config FILE` (TOML, flat `key = value` lines), the file over the
default. `--print-config` shows each value with its source, and what it prints is itself a `--config` file.
`Engine(...)` takes the keys as keyword arguments and reads neither variables nor files. An unknown key, and an unknown
variable that begins with `CHIPBUS_`, is refused with the nearest match; `CHIPBUS_RING_*` is left to ring sizes.

{settings}

## Settings of the server, `bus-run serve`

Beside those of its engine. A variable or a file may hold them also where no server is started: one file serves all
commands. The key is never printed.

{server}

## Sampling, `bus-run generate` and `bus-run chat`

Names, ranges and meanings are those of `SamplingParams`. One default differs: on the command line `--temperature` is 0,
greedy, so that the same command prints the same text. `--seed` is the request's own; `--engine-seed` draws seeds for
requests that bring none.

{sampling}

## Exit codes

| code | meaning |
| --- | --- |
| 0 | fine |
| 1 | the run failed; the last lines on stderr say how |
| 2 | wrong usage, configuration, model, request or record; nothing is left behind |
| 11 | `bus-replay dispatch`: a result differs from the recorded one |
| 130 | interrupted by Ctrl-C or SIGTERM; everything started was stopped |"""


def page() -> str:
    """The whole page, Markdown."""
    sampling = [(f"`{flag}`", kind, default, text) for flag, kind, default, text in sampling_rows()]
    head = ("flag", "variable", "key", "type", "default", "meaning")
    return _PAGE.format(
        settings=_table(head, map(_row, ENGINE_FIELDS)),
        server=_table(head, map(_row, SERVER_FIELDS)),
        sampling=_table(("flag", "type", "default", "meaning"), sampling),
    )


def _row(field: attrs.Attribute[Any]) -> tuple[str, ...]:
    return (
        ", ".join(f"`{name}`" for name in flag_names(field.name)),
        f"`{PREFIX}{field.name.upper()}`",
        f"`{field.name}`",
        value_type(field.name).__name__,
        "–" if field.default is None else f"`{plain(field.default)}`",
        str(field.metadata["help"]),
    )


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ("---",) * len(head), *rows])


if __name__ == "__main__":
    click.echo(page())
