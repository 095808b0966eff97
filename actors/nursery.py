"""What a supervisor needs of the place where its children live, and what that place reports back.

Owns: nothing. ``ProcessNursery`` makes real processes, ``LocalNursery`` actors of the one-process system. The
supervisor decides, its nursery carries out; both run on the supervisor's loop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import attrs

from ..bus import Context
from .boot import ChildSpec

__all__ = ["LifeEnd", "Nursery", "NurseryEvents"]


@attrs.frozen(kw_only=True)
class LifeEnd:
    """The end of one incarnation of one child. ``exit``: an ``ExitStatus.text``, or ``NEVER_STARTED``.

    ``seen_ns``: when, on the bus clock, the nursery first saw that it was over; how may be known only later.

    ``error`` (a class name in chipbus.errors) and ``text`` are its last words, if it had any.
    """

    name: str
    incarnation: int
    pid: int  # 0 if it never had a process
    exit: str
    seen_ns: int
    error: str = ""
    text: str = ""


@attrs.frozen(kw_only=True)
class NurseryEvents:
    """Whom a nursery tells what. Callbacks run on the supervisor's loop, ``on_ended`` also from inside ``signal``."""

    on_spawned: Callable[[str, int], None]
    """The child of that name and incarnation has its process."""
    on_ended: Callable[[LifeEnd], None]
    """A life is over, once for each that was asked for: nothing of it runs, ``pid`` and ``signal`` know it no more."""
    on_terminated: Callable[[], None]
    """Everything is asked to stop, by SIGTERM."""
    may_spawn: Callable[[], bool]
    """Whether another life may still be asked for."""


class Nursery(Protocol):
    """Where children live. At most one life of each name at a time is asked for."""

    @property
    def freed(self) -> Sequence[str]:
        """Names of what was removed on behalf of children."""
        ...

    def open(self, ctx: Context, events: NurseryEvents) -> None:
        """Begin to watch; ``ctx`` is the supervisor's. Called once, before all else."""
        ...

    def spawn(self, spec: ChildSpec, incarnation: int) -> None:
        """Ask for a child's next life. Raises ``StartFailed`` if not even that is possible."""
        ...

    def signal(self, name: str, incarnation: int, signum: int) -> None:
        """Send SIGTERM or SIGKILL to a life, now or as soon as it has a process. One that is over is left alone."""
        ...

    def dump_stack(self, name: str, incarnation: int) -> None:
        """Have a life write to the log what each of its threads is doing. One that cannot, or is over, does nothing."""
        ...

    def watch_guest(self, pid: int, on_gone: Callable[[], None]) -> None:
        """Call ``on_gone`` once that process, which is none of ours, has ended."""
        ...

    def pid(self, name: str) -> int:
        """Of a child's process, or of the supervisor; 0 while there is none."""
        ...

    def drop(self, name: str) -> None:
        """The child has no further life: give back what outlives lives. Idempotent."""
        ...

    def leave(self, on_left: Callable[[tuple[str, ...]], None]) -> None:
        """Every child is gone: end what served them, then call ``on_left`` once, with the names of what remains."""
        ...
