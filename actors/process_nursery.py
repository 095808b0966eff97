"""Children as real processes: forked by wardens, watched by pidfds, signalled, reaped.

Owns: wardens, the current life of each child, and the memory files in which packed weights outlive a life. Thread: the
supervisor's bus loop; nothing in here waits.

    wardens' sockets, pidfds, signals ──▶ ProcessNursery ──events──▶ SupervisorActor
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path

import attrs

from ..bus import Context
from ..bus.shortages import require_descriptors
from ..errors import StartFailed
from .boot import SUPERVISOR, ChildSpec
from .heartbeats import Heartbeats
from .journal import Journal
from .lifecycle import NEVER_STARTED
from .messages.warden import Exited, Pong, Preloaded, Spawned, SpawnRefused
from .nursery import LifeEnd, NurseryEvents
from .processes import (
    EXIT_ORPHANED,
    ExitStatus,
    Process,
    Tether,
    is_dead,
    open_pidfd,
    reap_any,
    signal_group,
    signal_process,
)
from .wardens import Warden

__all__ = ["ProcessNursery"]

SPAWN_DESCRIPTORS = 8  # tether, pidfd, weights, the two connections of its link, and a warden if there is none
_IMPORTS_S = 60.0  # torch takes a second, from a cold and slow disk some more
_RELAY_S = 0.25  # from a death to the warden's word on how, which takes 0.2 ms unless the machine is very busy
_WARDEN_LEAVE_S = 0.3  # a warden with nothing left to do ends within milliseconds
_WARDEN_REAP_S = 0.3  # and one that is killed, too


@attrs.define(eq=False)
class _Life:
    """One incarnation of one child, from the request for it until its end is known."""

    name: str
    incarnation: int
    warden: Warden
    tether: Tether
    process: Process | None = None  # None until the warden has forked it
    signum: int | None = None  # to be sent as soon as there is a process
    seen_ns: int = 0  # when its pidfd said that it has ended, on the bus clock

    @property
    def pid(self) -> int:
        return 0 if self.process is None else self.process.pid


class ProcessNursery:
    """Implements ``Nursery``, whose docstrings hold."""

    def __init__(
        self,
        run_dir: Path,
        wardens: Mapping[str, Warden],
        start_warden: Callable[[str], Warden],
        signals_fd: int,
        fate_fds: Iterable[int],
        stall_timeout_s: float,
        journal: Journal,
    ) -> None:
        """wardens: already started, by preload. start_warden: makes another one of a preload; raises ``OSError``.

        signals_fd: ``watch_signals`` of SIGCHLD and SIGTERM. fate_fds: readable once the host application is gone.
        stall_timeout_s: a warden that has finished its imports and does not answer for so long is replaced.
        """
        self.freed: list[str] = []
        self._run_dir = run_dir
        self._wardens = dict(wardens)
        self._start_warden = start_warden
        self._signals_fd = signals_fd
        self._fate_fds = tuple(fate_fds)
        self._heartbeats = Heartbeats(stall_timeout_s)
        self._imports = Heartbeats(_IMPORTS_S)
        self._journal = journal
        self._lives: dict[str, _Life] = {}
        self._weights: dict[str, int] = {}  # memory file of each child that keeps weights
        self._warden_texts: dict[str, tuple[str, str]] = {}
        self._on_left: Callable[[tuple[str, ...]], None] | None = None  # set while leaving
        self._ctx: Context
        self._events: NurseryEvents

    def open(self, ctx: Context, events: NurseryEvents) -> None:
        self._ctx = ctx
        self._events = events
        for fd in self._fate_fds:  # second line: the tether's signal comes first, unless a copy of its end leaked
            ctx.watch(fd, lambda: os._exit(EXIT_ORPHANED))
        ctx.watch(self._signals_fd, self._on_signal)
        for warden in self._wardens.values():
            self._watch_warden(warden)
        self._beat()
        ctx.after(0.0, self._sweep)  # a warden may have ended before its death could be watched

    def spawn(self, spec: ChildSpec, incarnation: int) -> None:
        name = spec.name
        try:
            require_descriptors(SPAWN_DESCRIPTORS, f"a life of {name}")
            warden = self._warden(spec.preload)
            weights = (self._weights_of(name),) if spec.keeps_weights else ()
            tether = Tether.make()
        except (OSError, StartFailed) as error:
            raise StartFailed(f"cannot start {name}: {error}") from error
        self._lives[name] = _Life(name, incarnation, warden, tether)
        warden.request(name, incarnation, tether, weights)

    def signal(self, name: str, incarnation: int, signum: int) -> None:
        life = self._life(name, incarnation)
        if life is None:
            return
        if life.process is not None:
            signal_group(life.process, signum)
        elif life.warden.withdraw(name, incarnation):
            self._ended(life, NEVER_STARTED)
        else:
            life.signum = signum
            life.tether.cut()
            if signum == signal.SIGKILL:  # it was asked for this child long ago: it is stuck
                life.warden.kill()

    def dump_stack(self, name: str, incarnation: int) -> None:
        life = self._life(name, incarnation)
        if life is not None and life.process is not None:
            signal_process(life.process, signal.SIGUSR1)

    def watch_guest(self, pid: int, on_gone: Callable[[], None]) -> None:
        try:
            pidfd = open_pidfd(pid)
        except OSError:
            self._ctx.after(0.0, on_gone)
            return

        def gone() -> None:
            self._ctx.unwatch(pidfd)
            os.close(pidfd)
            on_gone()

        self._ctx.watch(pidfd, gone)

    def pid(self, name: str) -> int:
        if name == SUPERVISOR:
            return os.getpid()
        return self._lives[name].pid if name in self._lives else 0

    def drop(self, name: str) -> None:
        file = self._weights.pop(name, None)
        if file is None:
            return
        if os.fstat(file).st_size:
            self.freed.append(f"packed weights of {name}")
        os.close(file)

    def leave(self, on_left: Callable[[tuple[str, ...]], None]) -> None:
        self._on_left = on_left
        for warden in list(self._wardens.values()):
            warden.leave()
        if not self._wardens:
            self._left()
            return
        self._ctx.after(_WARDEN_LEAVE_S, self._kill_wardens)
        self._ctx.after(_WARDEN_LEAVE_S + _WARDEN_REAP_S, self._left)

    def _kill_wardens(self) -> None:
        for warden in self._wardens.values():
            warden.kill()

    def _left(self) -> None:
        """Every warden was reaped, or no more can be done about it: whatever comes first."""
        on_left, self._on_left = self._on_left, lambda _: None
        assert on_left is not None
        on_left(tuple(f"warden {preload}" for preload in self._wardens))

    # Events from the kernel.

    def _on_signal(self) -> None:
        if signal.SIGTERM in os.read(self._signals_fd, 4096):
            self._events.on_terminated()
        self._sweep()

    def _sweep(self) -> None:
        """Reap every ended process that is a child of this one: wardens, and what a dead warden left us."""
        while (ended := reap_any()) is not None:
            pid, status = ended
            warden = next((w for w in self._wardens.values() if w.process.pid == pid and not w.has_ended), None)
            life = next((life for life in self._lives.values() if life.pid == pid), None)
            if warden is not None:
                self._warden_ended(warden, status)
            elif life is not None:
                self._ended(life, status.text)
            else:
                self._ctx.log.debug("stray.reaped", pid=pid, exit=status.text)

    def _on_pidfd(self, life: _Life) -> None:
        """It ended. How, its parent must say: the warden, or this process if the warden is gone."""
        assert life.process is not None
        if not is_dead(life.process.pidfd):  # the number was another's a moment ago, in the same turn of the loop
            return
        life.seen_ns = self._ctx.clock.now_ns()
        self._on_warden(life.warden)  # woken with us, it may have said so by now
        if self._lives.get(life.name) is not life:
            return
        self._ctx.unwatch(life.process.pidfd)  # it stays readable for ever
        self._ctx.after(_RELAY_S, lambda: self._ended(life, ExitStatus().text))
        self._sweep()

    # Wardens.

    def _beat(self) -> None:
        """Kill a warden that has stopped or is stuck; the sweep replaces it. One that imports answers nothing yet."""
        now_s = self._ctx.clock.now_ns() / 1e9
        ready = {preload: w.process.pid for preload, w in self._wardens.items() if w.is_ready}
        importing = {preload: w.process.pid for preload, w in self._wardens.items() if not w.is_ready}
        for stall in [*self._heartbeats.beat(ready, now_s), *self._imports.beat(importing, now_s)]:
            self._ctx.log.error("warden.stalled", warden=stall.name, reason=stall.reason)
            self._wardens[stall.name].kill()
        for preload in ready:
            self._wardens[preload].ping()
        self._ctx.after(self._heartbeats.interval_s, self._beat)

    def _warden(self, preload: str) -> Warden:
        warden = self._wardens.get(preload)
        if warden is None:
            warden = self._wardens[preload] = self._start_warden(preload)
            self._watch_warden(warden)
        return warden

    def _watch_warden(self, warden: Warden) -> None:
        self._journal.made(f"warden.{warden.preload}", 1, warden.process.pid)
        self._ctx.watch(warden.fd, partial(self._on_warden, warden))

    def _on_warden(self, warden: Warden) -> None:
        for message, pidfd in warden.receive():
            match message:
                case Preloaded(seconds, error, text):
                    self._ctx.log.info("warden.preloaded", warden=warden.preload, seconds=seconds, error=text)
                    if error:
                        self._warden_texts[warden.preload] = (error, text)
                case Pong():
                    self._heartbeats.answered(warden.preload, warden.process.pid)
                case Spawned(name, incarnation, pid, is_forked):
                    self._spawned(name, incarnation, Process(pid, pidfd), is_forked=is_forked)
                case SpawnRefused(name, incarnation, text):
                    life = self._life(name, incarnation)
                    if life is not None:
                        self._ended(life, NEVER_STARTED, text=text)
                case Exited(name, incarnation, code, signum, error, text):
                    life = self._life(name, incarnation)
                    if life is not None:
                        self._ended(life, ExitStatus(code, signum).text, error, text)
        if warden.is_silent:  # it is ending; its death is told by a signal
            self._ctx.unwatch(warden.fd)

    def _warden_ended(self, warden: Warden, status: ExitStatus) -> None:
        self._on_warden(warden)  # what it said before it died
        self._journal.reaped(warden.process.pid)
        was_ready = warden.is_ready or status.signum is not None  # else its imports fail, and would again
        self._ctx.unwatch(warden.fd)
        unanswered = warden.ended()
        del self._wardens[warden.preload]
        if self._on_left is None:
            self._ctx.log.warning("warden.exited", warden=warden.preload, exit=status.text)
        if was_ready and self._events.may_spawn():
            with contextlib.suppress(OSError):  # at once, so that a child that dies next need not wait for it
                self._warden(warden.preload)
        error, text = self._warden_texts.pop(
            warden.preload, ("StartFailed", f"warden {warden.preload} ended with {status.text}")
        )
        for name, incarnation in unanswered:
            life = self._life(name, incarnation)
            if life is not None:
                self._ended(life, NEVER_STARTED, error, text)
        if self._on_left is not None and not self._wardens:
            self._left()

    # The life of one child.

    def _life(self, name: str, incarnation: int) -> _Life | None:
        life = self._lives.get(name)
        return life if life is not None and life.incarnation == incarnation else None

    def _spawned(self, name: str, incarnation: int, process: Process, *, is_forked: bool) -> None:
        life = self._life(name, incarnation)
        if life is None:  # given up meanwhile; its tether is cut
            os.close(process.pidfd)
            return
        life.process = process
        self._journal.made(name, incarnation, process.pid)
        self._ctx.log.info("child.spawned", child=name, life=incarnation, pid=process.pid, is_forked=is_forked)
        self._ctx.watch(process.pidfd, lambda: self._on_pidfd(life))
        if life.signum is not None:
            signal_group(process, life.signum)
        self._events.on_spawned(name, incarnation)

    def _ended(self, life: _Life, exit_text: str, error: str = "", text: str = "") -> None:
        """The one place where a death is decided, whoever tells of it first."""
        if self._lives.get(life.name) is not life:
            return
        del self._lives[life.name]
        life.tether.drop_read_end()
        life.tether.cut()  # a child that was forked but never reported ends by this
        if life.process is not None:
            self._ctx.unwatch(life.process.pidfd)
            os.close(life.process.pidfd)
        self._events.on_ended(
            LifeEnd(
                name=life.name, incarnation=life.incarnation, pid=life.pid, exit=exit_text,
                seen_ns=life.seen_ns or self._ctx.clock.now_ns(), error=error, text=text,
            )
        )  # fmt: skip
        self._ctx.call_soon_threadsafe(lambda: self._tidy(life))  # in the next turn: others wait to hear of it

    def _tidy(self, life: _Life) -> None:
        """What an ended life has left, and nobody waits for."""
        if life.process is not None:
            self._journal.reaped(life.pid)
        self._remove_sockets(life)

    def _remove_sockets(self, life: _Life) -> None:
        """A killed node cannot remove its own; nobody connects to them any more."""
        for path in sorted(self._run_dir.glob(f"{life.name}.{life.incarnation}.?")):
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
                self.freed.append(path.name)

    def _weights_of(self, name: str) -> int:
        """The memory file that is given to every life of a child. It has no name: with the descriptors it is gone."""
        if name not in self._weights:
            self._weights[name] = os.memfd_create("chipbus-weights", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        return self._weights[name]
