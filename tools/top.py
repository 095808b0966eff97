"""``bus-run top``: what every process of a running engine is at, now and again and again.

Owns: nothing; it is a guest on that engine's bus.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from ..actors.guest import Guest
from ..actors.rundir import living_runtimes
from ..errors import ConfigError, EngineDead

if TYPE_CHECKING:
    from rich.table import Table

    from ..actors.messages.tree import ProcessReport, TreeReport

__all__ = ["HEAD", "as_json", "cells", "choose", "top"]

_REFRESH_S = 1.0
_PIPE_COLUMNS = 200  # nobody's terminal cuts it there

HEAD = (
    "process", "owner", "kind", "state", "pid", "life", "restarts", "age", "mailbox", "asks", "waits for", "progress",
    "last exit",
)  # fmt: skip


def top(run_dir: Path | None, *, once: bool, json_once: bool) -> None:
    """Print the table of an engine's processes, again every second until interrupted; or once, as a table or JSON."""
    from rich.console import Console
    from rich.live import Live

    where = choose(run_dir)
    with Guest(where) as guest:
        report = guest.report()
        if json_once:
            print(as_json(where, report))
            return
        console = Console()
        if once:
            width = console.width if console.is_terminal else _PIPE_COLUMNS
            Console(width=width).print(_table(where, report))
            return
        timer = threading.Event()
        with Live(_table(where, report), console=console, auto_refresh=False) as live:
            while not timer.wait(_REFRESH_S):
                live.update(_table(where, guest.report()), refresh=True)


def choose(run_dir: Path | None, found: Sequence[tuple[Path, int]] | None = None) -> Path:
    """The given directory, or that of the only engine of this user. Raises ``ConfigError`` with those there are."""
    if run_dir is not None:
        return run_dir.absolute()
    engines = living_runtimes() if found is None else found
    if not engines:
        raise EngineDead("no engine of yours is running where run directories are made; name one: bus-run top RUN_DIR")
    if len(engines) > 1:
        listed = ", ".join(f"{path} (of process {pid})" for path, pid in engines)
        raise ConfigError(f"{len(engines)} engines of yours are running; name one of {listed}")
    return engines[0][0]


def cells(process: ProcessReport) -> tuple[str, ...]:
    """One line of the table, in the order of ``HEAD``. A process that should have answered and did not is silent."""
    record, node = process.record, process.node
    fixed = (
        record.name, record.parent, record.kind, record.state, str(record.pid or ""), str(record.incarnation),
        str(record.restarts),
    )  # fmt: skip
    if node is None:
        state = "silent" if record.state in ("ready", "starting") and record.pid else record.state
        return (*fixed[:3], state, *fixed[4:], "", "", "", "", "", record.last_exit)
    waits = f"{node.waits_for} of {node.waits_on} for {node.waits_s:.1f} s" if node.waits_for else ""
    progress = f"{node.progress}{' busy' if node.is_busy else ''}"
    if process.chip is not None and process.chip.busy:
        progress += f", {100 * sum(share for _, share in process.chip.busy):.0f} % of a minute"
    return (*fixed, _age(node.age_s), str(node.mailbox), str(node.open_asks), waits, progress, record.last_exit)


def as_json(run_dir: Path, report: TreeReport) -> str:
    """The whole report as one JSON object on one line."""
    processes: list[dict[str, Any]] = []
    for process in report.processes:
        fields = attrs.asdict(process.record)
        fields["phases"] = dict(process.record.phases)
        for name, said in (("node", process.node), ("chip", process.chip)):
            fields[name] = None if said is None else attrs.asdict(said)
        processes.append(fields)
    return json.dumps({"run_dir": str(run_dir), "processes": processes, "refused": report.refused})


def _age(seconds: float) -> str:
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


def _table(run_dir: Path, report: TreeReport) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, title=str(run_dir), title_justify="left", caption_justify="left")
    for name in HEAD:
        table.add_column(name, justify="right" if name in ("pid", "life", "restarts", "mailbox", "asks") else "left")
    for process in report.processes:
        table.add_row(*(Text(cell) for cell in cells(process)))
    if report.refused:
        table.caption = f"{report.refused} messages of guests were refused"
    return table
