"""How far it is: a live display on a terminal, plain lines elsewhere. Always on stderr; stdout is for results.

Owns: the phases seen so far. Thread: whichever reports; one reports at a time per phase.
"""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

from ..bus import Progress

if TYPE_CHECKING:
    from rich.progress import TaskID  # rich takes 100 ms to load, for terminals only

__all__ = ["LineProgress", "LiveProgress", "ProgressView", "amount", "progress_view"]

_QUIET_S = 1.0  # a phase that moves on says so at most this often in plain lines


class ProgressView(Protocol):
    """Shows ``Progress`` messages; a context manager, so that the terminal is given back whatever happens."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def show(self, progress: Progress) -> None:
        """A phase has come this far. May be called from any thread."""

    def say(self, line: str) -> None:
        """One line that stays."""

    def result(self, text: str, end: str = "\n") -> None:
        """Part of what was asked for, on stdout."""


def progress_view() -> ProgressView:
    """The view for this process's stderr."""
    return LiveProgress() if sys.stderr.isatty() else LineProgress()


class LineProgress:
    """Plain lines: the first and last of each phase, and one a second between them."""

    def __init__(self) -> None:
        self._last_s: dict[str, float] = {}
        self._ended: set[str] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing is held."""

    def show(self, progress: Progress) -> None:
        """Print the phase if it is new, has ended, or was silent for a second."""
        now_s = time.monotonic()
        has_ended = _has_ended(progress)
        is_due = now_s - self._last_s.get(progress.phase, -_QUIET_S) >= _QUIET_S
        if progress.phase in self._ended or not (has_ended or is_due):
            return
        self._last_s[progress.phase] = now_s
        if has_ended:
            self._ended.add(progress.phase)
        self.say(f"{progress.phase}: {amount(progress)}")

    def say(self, line: str) -> None:
        """Print it."""
        print(line, file=sys.stderr, flush=True)

    def result(self, text: str, end: str = "\n") -> None:
        """Print it to stdout."""
        print(text, end=end, flush=True)


class LiveProgress:
    """One bar per phase, redrawn in place by rich."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bars

        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[amount]}"),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            transient=True,
            redirect_stdout=False,  # rich would send results to stderr with the bars
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take the bars away; what was said stays."""
        self._bars.stop()

    def show(self, progress: Progress) -> None:
        """Move the phase's bar, and take it away at its end."""
        self._bars.start()
        facts: dict[str, Any] = {
            "completed": progress.done,
            "total": progress.total or None,
            "amount": amount(progress),
        }
        task = self._tasks.get(progress.phase)
        if _has_ended(progress):
            if task is not None:
                self._bars.update(task, visible=False)
        elif task is None:
            self._tasks[progress.phase] = self._bars.add_task(progress.phase, **facts)
        else:
            self._bars.update(task, **facts)

    def say(self, line: str) -> None:
        """Print it above the bars, as it is."""
        self._bars.console.print(line, markup=False, highlight=False)

    def result(self, text: str, end: str = "\n") -> None:
        """Print it to stdout. Where that is the bars' own terminal they make room until the next ``show``."""
        if sys.stdout.isatty():
            self._bars.stop()
        print(text, end=end, flush=True)


def amount(progress: Progress) -> str:
    """``done of total``, with many bytes as MB."""
    is_large = progress.unit == "bytes" and max(progress.done, progress.total) >= 1e6
    scale, unit = (1e6, "MB") if is_large else (1.0, progress.unit)
    done = f"{progress.done / scale:,.0f}"
    return f"{done} of {progress.total / scale:,.0f} {unit}" if progress.total else f"{done} {unit}"


def _has_ended(progress: Progress) -> bool:
    return 0 < progress.total <= progress.done
