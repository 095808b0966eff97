"""Figures of one benchmark run: what was measured, set against others in the same rounds, and against its aim.

Owns: nothing.
"""

from __future__ import annotations

import datetime as dt
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import attrs
import msgspec

from .check import table

__all__ = ["OURS", "Aim", "Row", "as_json", "as_table", "at_least", "at_most", "command_line", "compared", "today"]

OURS = "chipbus"
_HEAD = ("figure", "system", "median", "range", "unit", f"{OURS} ÷ it", "range", "aim", "met")


@attrs.frozen
class Aim:
    """What a median is meant to stay below, or above."""

    bound: float
    is_most: bool

    def is_met(self, median: float) -> bool:
        return median <= self.bound if self.is_most else median >= self.bound

    def text(self, unit: str) -> str:
        return f"{'≤' if self.is_most else '≥'} {self.bound:,}{unit}"


def at_most(bound: float) -> Aim:
    """An aim that is met at or below ``bound``."""
    return Aim(bound, is_most=True)


def at_least(bound: float) -> Aim:
    """An aim that is met at or above ``bound``."""
    return Aim(bound, is_most=False)


@attrs.frozen(kw_only=True)
class Row:
    """One figure of one system. ``values`` has one entry per round; without any, ``why_not`` says why.

    ``ratios``: ours of the same rounds, divided by these. The aim is for them, or for the values if there are none.
    """

    figure: str
    system: str
    unit: str
    values: tuple[float, ...] = ()
    ratios: tuple[float, ...] = ()
    aim: Aim | None = None
    why_not: str = ""

    @property
    def is_met(self) -> bool | None:
        """Whether the median meets the aim; None without an aim or a measurement."""
        measured = self.ratios or self.values
        return self.aim.is_met(statistics.median(measured)) if self.aim is not None and measured else None

    @property
    def aim_text(self) -> str:
        """The aim with its unit."""
        if self.aim is None:
            return ""
        return self.aim.text("×" if self.ratios or not self.values or self.unit == "×" else f" {self.unit}")


def compared(
    figure: str,
    unit: str,
    ours: Sequence[float],
    others: Mapping[str, Sequence[float] | str],
    *,
    aim: Aim | None = None,
    aims: Mapping[str, Aim] | None = None,
) -> list[Row]:
    """Our row, then one per other system: its values, or in words why there are none. ``aims``: for our ratio to it."""
    rows = [Row(figure=figure, system=OURS, unit=unit, values=tuple(ours), aim=aim)]
    for system, theirs in others.items():
        their_aim = (aims or {}).get(system)
        if isinstance(theirs, str):
            rows.append(Row(figure=figure, system=system, unit=unit, aim=their_aim, why_not=theirs))
            continue
        ratios = tuple(a / b for a, b in zip(ours, theirs, strict=True))
        rows.append(
            Row(figure=figure, system=system, unit=unit, values=tuple(theirs), ratios=ratios, aim=their_aim)
        )  # fmt: skip
    return rows


def as_table(rows: Sequence[Row]) -> str:
    """A line per row; medians and ranges over the rounds."""
    cells, before = [], ""
    for row in rows:
        met = {True: "yes", False: "NO", None: ""}[row.is_met]
        spans = [*_span(row.values), row.unit if row.values else "", *_span(row.ratios)]
        spans[0] = spans[0] or row.why_not
        cells.append(("" if row.figure == before else row.figure, row.system, *spans, row.aim_text, met))
        before = row.figure
    return table(_HEAD, cells, numbers_from=2)


def _span(values: Sequence[float]) -> tuple[str, str]:
    if not values:
        return "", ""
    return _number(statistics.median(values)), f"{_number(min(values))} .. {_number(max(values))}"


def _number(value: float) -> str:
    """Three digits that mean something."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 0.1 else f"{value:.4f}"


def command_line() -> str:
    """How this program was called."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def today() -> str:
    """The date, ISO 8601."""
    return dt.datetime.now(dt.UTC).date().isoformat()


def as_json(machine: str, rounds: int, rows: Sequence[Row]) -> bytes:
    """All of it, every round's value included."""
    told = [
        {
            "figure": row.figure,
            "system": row.system,
            "unit": row.unit,
            "median": statistics.median(row.values) if row.values else None,
            "values": row.values,
            "ratio": statistics.median(row.ratios) if row.ratios else None,
            "ratios": row.ratios,
            "aim": row.aim_text,
            "is_met": row.is_met,
            "why_not": row.why_not,
        }
        for row in rows
    ]
    whole = {"machine": machine, "date": today(), "command": command_line(), "rounds": rounds, "rows": told}
    return msgspec.json.format(msgspec.json.encode(whole)) + b"\n"
