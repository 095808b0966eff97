"""What a recorded run leaves for those who look at it afterwards: its latest report, and its events, line by line.

    DIR/report.json     an ``EngineReport``, replaced whole, so that a reader never sees half of one
    DIR/events.jsonl    an ``Event`` per line, appended as they happen; a killed engine's last line may be torn

Owns: both files, on the writing side. Nothing a request says gets in, as nothing of it is in reports and events.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import attrs
import msgspec

from ..bus import get_logger
from ..errors import ConfigError, LedgerCorrupt
from .report import MOST_EVENTS, REPORT_SCHEMA, EngineReport, Event

__all__ = ["RunFiles", "read_recorded"]

_REPORT, _EVENTS = "report.json", "events.jsonl"
_encode = msgspec.json.Encoder().encode


class RunFiles:
    """Writes both files. Where the disk refuses one, that is logged once and no more is written: serving goes on."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._has_failed = False

    def event(self, event: Event) -> None:
        """Append one."""
        self._attempt(_EVENTS, lambda path: _write(path, os.O_APPEND, _encode(event) + b"\n"))

    def report(self, report: EngineReport) -> None:
        """Replace the report."""

        def replace(path: Path) -> None:
            fresh = path.with_name(f".{path.name}")
            _write(fresh, os.O_TRUNC, _encode(report))
            fresh.replace(path)

        self._attempt(_REPORT, replace)

    def _attempt(self, name: str, write: Callable[[Path], None]) -> None:
        path = self._directory / name
        if self._has_failed:
            return
        try:
            write(path)
        except OSError as error:
            self._has_failed = True
            get_logger().error("run_files.failed", path=str(path), error=str(error))


def _write(path: Path, how: int, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | how, 0o600)
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(fd, rest) :]
    finally:
        os.close(fd)


def read_recorded(directory: Path | str) -> EngineReport:
    """The latest report of a record, with the events that came after it, of an engine that lives or is gone.

    Raises ``ConfigError`` if there is none, or one of another schema, ``LedgerCorrupt`` with file and place if a file
    is damaged. A last line of events without its end is not read.
    """
    path = Path(directory) / _REPORT
    try:
        data = path.read_bytes()
        lines = (Path(directory) / _EVENTS).read_bytes().split(b"\n")
    except OSError as error:
        raise ConfigError(f"there is no report of a run at {error.filename}: {error.strerror}") from error
    try:
        schema = msgspec.json.decode(data, type=_Schema).schema
        if schema != REPORT_SCHEMA:
            raise ConfigError(f"{path} has schema {schema}; this version reads {REPORT_SCHEMA}")
        report = msgspec.json.decode(data, type=EngineReport)
    except msgspec.MsgspecError as error:
        raise LedgerCorrupt(f"{path} is no report: {error}") from error
    events: list[Event] = []
    for number, line in enumerate(lines[:-1], 1):
        try:
            events.append(msgspec.json.decode(line, type=Event))
        except msgspec.MsgspecError as error:
            raise LedgerCorrupt(f"{Path(directory) / _EVENTS}, line {number} is no event: {error}") from error
    return attrs.evolve(report, events=tuple(events[-MOST_EVENTS:]))


class _Schema(msgspec.Struct):
    schema: int
