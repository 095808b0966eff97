"""``bus-run bench kernels``: how fast a model's programs are on one chip in this process, and what holds them back.

Owns: the chip, while it measures.
"""

from __future__ import annotations

import contextlib
import os
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import attrs
import click

from ..actors.plan import model_directory
from ..kernels.diagnosis import to_trace_events
from .benchmarks import machine
from .check import table

if TYPE_CHECKING:
    from ..kernels.bench import KernelBench, Roofline, Timing, Work

__all__ = ["Settings", "kernel_lines", "kernels"]

_WORK = ("decode 1", "decode 4", "decode 16", "decode 1 4096", "prefill 128", "prefill 512", "prefill 2048")
_TRACED = ("decode 1", "prefill 128")
_HEAD = (
    "", "tok/s", "range", "ms per step", "in kernels", "% of roofline", "% of pure read", "tasks", "tasks/s", "MB read",
    "GB/s", "% busy per core",
)  # fmt: skip


@attrs.frozen(kw_only=True)
class Settings:
    """On what to measure."""

    model: str
    """A directory, or "demo"."""
    threads: int | None = None
    """None: all cores."""
    weights: str = ""
    """What matrices are kept in: "int8", or "" for bfloat16."""
    isa: str = ""
    """Instruction set of the native engine, "" for the best there is; "none" for torch."""

    @contextlib.contextmanager
    def open(self) -> Iterator[KernelBench]:
        """The model's programs on a chip, until the block ends."""
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as chip workers have it, and why: actors/wardens.py
        from ..kernels.bench import KernelBench  # imports torch

        threads = self.threads or len(os.sched_getaffinity(0))
        with contextlib.closing(
            KernelBench(model_directory(self.model), threads, weights=self.weights, isa=self.isa)
        ) as running:
            yield running


@attrs.frozen
class _Round:
    """One kind of work in one round, and what was measured beside it."""

    timing: Timing
    roofline: Roofline
    read_s: float | None  # of the packed weights, right before and after

    @property
    def seconds(self) -> float:
        return self.timing.seconds


def kernels(settings: Settings, *, rounds: int, trace: Path | None) -> None:
    """Print a line per kind of work: medians over the rounds. ``trace``: also write a decode step and a prefill there.

    The roofline and, beside batch 1, a pure read of the packed weights are measured in the same rounds.
    """
    with settings.open() as running:
        from ..kernels.bench import Work

        works = [work for work in map(Work.parse, _WORK) if not running.refused(work)]
        measured: dict[Work, list[_Round]] = {work: [] for work in works}
        for number in range(rounds + 1):  # the first warms up
            roofline = running.roofline()
            for work in works:
                one = _measured(running, work, roofline)
                if number:
                    measured[work].append(one)
        click.echo(f"{machine()}; {settings.model}, {running.threads} threads, {rounds} rounds")
        click.echo(f"engine {running.engine}; activations bfloat16, weights {settings.weights or 'bfloat16'}")
        click.echo(f"last round: {roofline.read_bytes_per_s / 1e9:.1f} GB/s, {roofline.flop_per_s / 1e12:.2f} TFLOP/s")
        click.echo(table(_HEAD, [_row(work, found) for work, found in measured.items()], numbers_from=1))
        click.echo("in kernels: ms inside the engine; tasks, MB per step; tasks/s, GB/s, % busy of the time in kernels")
        if trace is not None:
            runs = [running.timeline(work) for work in map(Work.parse, _TRACED) if not running.refused(work)]
            trace.write_bytes(to_trace_events(*runs))


def kernel_lines(settings: Settings) -> None:
    """Serve the two-line protocol by which engines are compared in fine alternation."""
    with settings.open() as running:
        from ..kernels.bench import line_server

        line_server(running)


def _measured(running: KernelBench, work: Work, roofline: Roofline) -> _Round:
    is_paired = work.name == "decode" and work.size == 1
    before = running.read_weights() if is_paired else None
    timing = running.measure(work)
    after = running.read_weights() if is_paired else None
    return _Round(timing, roofline, None if before is None or after is None else (before + after) / 2)


def _row(work: Work, rounds: Sequence[_Round]) -> tuple[str, ...]:
    usages = [usage for one in rounds for usage in one.timing.usages]
    kernels_s = statistics.median(one.timing.kernel_seconds for one in rounds)
    tasks, read = usages[0].tasks, statistics.median(usage.bytes_read for usage in usages)
    busy = [statistics.median(shares) for shares in zip(*(usage.busy_shares for usage in usages), strict=True)]
    rates = [work.size / one.seconds for one in rounds]
    of_read = [100 * one.read_s / one.seconds for one in rounds if one.read_s is not None]
    return (
        str(work),
        f"{statistics.median(rates):,.1f}",
        f"{min(rates):,.1f} .. {max(rates):,.1f}",
        f"{1e3 * statistics.median(one.seconds for one in rounds):,.3f}",
        f"{1e3 * kernels_s:,.3f}",
        f"{statistics.median(100 * one.roofline.fraction(work, one.seconds) for one in rounds):.0f}",
        f"{statistics.median(of_read):.0f}" if of_read else "",
        f"{tasks:,}",
        f"{tasks / kernels_s:,.0f}",
        f"{read / 1e6:,.1f}",
        f"{read / 1e9 / kernels_s:.1f}",
        " ".join(f"{100 * share:.0f}" for share in busy),
    )
