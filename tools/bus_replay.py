"""``bus-replay``: read and repeat recorded runs. The commands are in ``replay_commands``.

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
    from .replay_commands import bus_replay

    return bus_replay


def main() -> int:
    """Run ``bus-replay`` with the process's arguments; returns the exit code."""
    return run_process("bus-replay", _load)


if __name__ == "__main__":
    sys.exit(main())
