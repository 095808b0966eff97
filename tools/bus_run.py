"""``bus-run``: start an engine from a command line. The commands are in ``run_commands``.

Owns: nothing.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from .console import run_process

if TYPE_CHECKING:
    import click

__all__ = ["main"]


def _load() -> click.Command:
    from .run_commands import bus_run

    return bus_run


def main() -> int:
    """Run ``bus-run`` with the process's arguments; returns the exit code."""
    return run_process("bus-run", _load)


if __name__ == "__main__":
    sys.exit(main())
