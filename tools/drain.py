"""``bus-run drain``: end a replica of a running engine when its requests have ended.

Owns: nothing; it is a guest on that engine's bus.
"""

from __future__ import annotations

from pathlib import Path

import click

from ..actors.guest import Guest
from .top import choose

__all__ = ["drain"]


def drain(replica: str, run_dir: Path | None, timeout_s: float, *, stays_down: bool) -> None:
    """Wait until it is empty, or its time is over, and say what happened."""
    with Guest(choose(run_dir)) as guest:
        click.echo(f"{replica} gets no new requests; waiting up to {timeout_s:g} s for those it has", err=True)
        is_empty = guest.drain(replica, timeout_s, stays_down=stays_down)
    what = "stays down" if stays_down else "is started afresh"
    rest = "" if is_empty else f"; what had not ended within {timeout_s:g} s goes on at another replica"
    click.echo(f"{replica} {what}{rest}")
