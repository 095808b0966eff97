"""Children as actors of the one-process system: the tree's supervisor, on a virtual clock, in every order of events.

Owns: the current life of each child in one ``LocalSystem(directory=False)``. What a child's process costs and loses is
not modelled, only when it begins and ends: signals end it at once, as they end a process that does not handle them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from signal import SIGKILL

import attrs

from ..bus import Actor, Context, LocalSystem, Timer
from ..bus.lifecycle import failure_of
from ..errors import ChipbusError
from .boot import SUPERVISOR, ChildSpec
from .lifecycle import NEVER_STARTED
from .nursery import LifeEnd, NurseryEvents
from .processes import EXIT_FAILED, ExitStatus

__all__ = ["LocalNursery"]

_LONGEST_SPAWN_S = 0.01  # virtual; long enough that children begin in any order


@attrs.define(eq=False)
class _Life:
    """One incarnation of one child, from the request for it until its end is known."""

    spec: ChildSpec
    incarnation: int
    birth: Timer | None = None  # pending until the actor is made
    pid: int = 0


class LocalNursery:
    """Implements ``Nursery``, whose docstrings hold. pids are numbers that are never used again."""

    def __init__(self, system: LocalSystem, make: Callable[[ChildSpec, int], Actor]) -> None:
        """make: the actor of a child's life, by its incarnation. What it raises ends that life, with its words."""
        self.freed: Sequence[str] = ()
        self._system = system
        self._make = make
        self._lives: dict[str, _Life] = {}
        self._last_pid = 1  # the supervisor's
        self._ctx: Context
        self._events: NurseryEvents

    def kill(self, name: str, signum: int = SIGKILL) -> None:
        """End a living child from outside, as somebody with a shell would. The nursery notices a little later."""
        self._system.kill(name, ExitStatus(signum=signum).text)

    def terminate(self) -> None:
        """Ask for the end of everything, as SIGTERM to the supervisor does."""
        self._ctx.call_soon_threadsafe(self._events.on_terminated)

    def open(self, ctx: Context, events: NurseryEvents) -> None:
        self._ctx = ctx
        self._events = events

    def spawn(self, spec: ChildSpec, incarnation: int) -> None:
        life = self._lives[spec.name] = _Life(spec, incarnation)
        life.birth = self._ctx.after(self._ctx.random.uniform(0.0, _LONGEST_SPAWN_S), lambda: self._begin(life))

    def signal(self, name: str, incarnation: int, signum: int) -> None:
        life = self._lives.get(name)
        if life is None or life.incarnation != incarnation:
            return
        if life.birth is not None and life.birth.is_pending:
            life.birth.cancel()
            self._ended(life, NEVER_STARTED)
        elif self._system.incarnation(name) == incarnation:  # else its end is on its way
            self.kill(name, signum)

    def dump_stack(self, name: str, incarnation: int) -> None:
        pass

    def watch_guest(self, pid: int, on_gone: Callable[[], None]) -> None:
        pass

    def pid(self, name: str) -> int:
        if name == SUPERVISOR:
            return 1
        return self._lives[name].pid if name in self._lives else 0

    def drop(self, name: str) -> None:
        pass

    def leave(self, on_left: Callable[[tuple[str, ...]], None]) -> None:
        on_left(())

    def _begin(self, life: _Life) -> None:
        spec, incarnation = life.spec, life.incarnation
        self._last_pid += 1
        life.pid = self._last_pid
        self._events.on_spawned(spec.name, incarnation)
        try:
            self._system.spawn(
                spec.name,
                self._make(spec, incarnation),
                connect=(SUPERVISOR,),
                incarnation=incarnation,
                on_end=lambda reason: self._ctx.call_soon_threadsafe(lambda: self._ended(life, reason)),
            )
        except ChipbusError as error:
            failure = failure_of(error)
            self._ended(life, ExitStatus(EXIT_FAILED).text, failure.error, failure.text)
        except Exception as error:  # as a child process does: whatever an actor raises must reach the user
            self._ctx.log.exception("actor.failed")
            self._ended(life, ExitStatus(EXIT_FAILED).text, "StartFailed", f"{type(error).__name__}: {error}")

    def _ended(self, life: _Life, reason: str, error: str = "", text: str = "") -> None:
        name = life.spec.name
        if self._lives.get(name) is not life:  # one that failed to start is told of twice
            return
        del self._lives[name]
        exit_text = ExitStatus(0).text if reason == LocalSystem.STOPPED else reason
        self._events.on_ended(
            LifeEnd(
                name=name, incarnation=life.incarnation, pid=life.pid, exit=exit_text,
                seen_ns=self._ctx.clock.now_ns(), error=error, text=text,
            )
        )  # fmt: skip
