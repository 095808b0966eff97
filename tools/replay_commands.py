"""The commands of ``bus-replay``: thin, over ``replay`` (what a record is) and ``record_view`` (how it reads).

Owns: nothing.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import attrs
import click

from ..errors import ConfigError, ReplayDiverged
from ..kernels.diagnosis import DumpLevel
from .options import HELP, with_traceback
from .progress import progress_view

__all__ = ["bus_replay"]


@click.group(context_settings=HELP)
@click.version_option(package_name="chipbus")
def bus_replay() -> None:
    """Read and repeat runs recorded with --record DIR.

    Exit codes: 0 equal, 1 run failed, 2 wrong usage or a record that is refused, 11 another result, 130 interrupted.
    """


@bus_replay.command(context_settings=HELP)
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--request", metavar="ID", help="only what concerns this request: its id, req-1, or its trace id")
@click.option("--kind", metavar="KIND", help="only entries of this kind: message, batch, dispatch, register, alloc, …")
@click.option("--json", "as_json", is_flag=True, help="one JSON object per line, the summary first")
@with_traceback
def show(directory: Path, request: str | None, kind: str | None, as_json: bool) -> None:
    """Print a record's summary, then its entries by time: messages, batch decisions, dispatches."""
    from .record_view import rows, summary, summary_lines
    from .replay import open_record

    with progress_view() as view:
        record = open_record(directory, view.show)
    chosen = rows(record, request=request, kind=kind)
    if as_json:
        click.echo(json.dumps(summary(record), ensure_ascii=False))
        for row in chosen:
            click.echo(json.dumps(row.as_object(), ensure_ascii=False))
        return
    click.echo("\n".join(summary_lines(record)) + "\n")
    began_ns = None
    for row in chosen:
        began_ns = row.time_ns if began_ns is None else began_ns
        life = "" if row.incarnation == 1 else f"/{row.incarnation}"
        click.echo(f"{(row.time_ns - began_ns) / 1e9:+12.6f}  {row.actor + life:<14} {row.kind:<9} {row.text}")


@bus_replay.command(context_settings=HELP)
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--chip", metavar="NAME", help="only this chip, for example chip.0.0")
@click.option(
    "--model", metavar="DIR", type=click.Path(path_type=Path), help="where the model lies now, if not as recorded"
)
@click.option("--dump", metavar="DIR", type=click.Path(path_type=Path), help="write down arguments and results here")
@click.option(
    "--dump-level",
    type=click.Choice(["shapes", "digests", "values"]),
    default="digests",
    show_default=True,
    help="each says all that the one before it says; values: arrays as .npy files, 64 MiB per dispatch",
)
@click.option("--dump-dispatch", metavar="ID", type=click.IntRange(1), help="only the dispatch of this number")
@click.option("--json", "as_json", is_flag=True, help="print the outcome as one JSON object")
@with_traceback
def dispatch(
    directory: Path,
    chip: str | None,
    model: Path | None,
    dump: Path | None,
    dump_level: DumpLevel,
    dump_dispatch: int | None,
    as_json: bool,
) -> None:
    """Run every recorded chip command again on fresh chips and compare what was computed, bit for bit.

    Runs on cpu chips, or null chips if the record was made with those. Stops at the first difference with exit code 11.
    """
    from .replay import Dump, open_record, replay_dispatches

    if dump is not None and dump.exists():
        raise ConfigError(f"--dump {dump} exists already; name a new directory")
    wanted = None if dump is None else Dump(directory=dump, level=dump_level, dispatch_id=dump_dispatch)
    began_s = time.monotonic()
    with progress_view() as view:
        record = open_record(directory, view.show)
        outcome = replay_dispatches(record, chip=chip, model=model, dump=wanted, on_progress=view.show)
    seconds = time.monotonic() - began_s
    if as_json:
        click.echo(json.dumps({"is_equal": outcome.difference is None, **attrs.asdict(outcome), "seconds": seconds}))
    if outcome.difference is not None:
        raise ReplayDiverged(str(outcome.difference))
    if not as_json:
        for title in outcome.torn:
            click.echo(f"{title} has no end marker: it was killed or still runs; replayed as far as it goes")
        click.echo(f"{outcome.dispatches} dispatches on {outcome.chips} chips: every digest is equal, {seconds:.1f} s")
