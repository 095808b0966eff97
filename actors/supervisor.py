"""The supervisor: owns every process of the runtime, restarts what dies, tells the others, and never waits.

Owns: wardens, the current life of each child, the memory files in which packed weights outlive a life, and the tree's
state (``lifecycle.Tree``). Thread: its bus loop.

    wardens' sockets, pidfds, signals, messages ──events──▶ lifecycle.step ──actions──▶ wardens, signals, messages

It is also the directory of the bus: a child that says hello is announced to those that connect to it, and a child that
ends is announced to everyone it was linked with, before its next life can be.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path

import attrs

from ..bus import Actor, Call, PeerDown, PeerUp, Progress, Ready, Stop, Timer, handles
from ..errors import ChipbusError, MailboxFull, PeerGone
from .boot import HOST, SUPERVISOR, Boot
from .lifecycle import (
    NEVER_STARTED,
    Action,
    AnnounceFailure,
    AnnounceLost,
    AnnounceReady,
    AnnounceStopped,
    AskStop,
    Begin,
    ChildCondemned,
    ChildDied,
    ChildFailed,
    ChildLinked,
    ChildReady,
    Event,
    Kill,
    Phase,
    Spawn,
    Status,
    StopAll,
    Terminate,
    Tick,
    ends,
    left_alive,
    next_wake_s,
    plant,
    records,
    step,
)
from .messages.tree import (
    AllReplicaStatistics,
    ChildRecord,
    CloseReport,
    Condemn,
    GroupLost,
    ReplicaStatistics,
    ReplicaStatisticsRequest,
    Shutdown,
    StartError,
    StartFailure,
    TreeChanged,
    TreeReady,
)
from .messages.warden import Exited, Preloaded, Spawned, SpawnRefused
from .processes import EXIT_ORPHANED, ExitStatus, Process, Tether, is_dead, reap_any, signal_group
from .wardens import Warden

__all__ = ["SupervisorActor"]

ROUTER = "router"
STATISTICS_TIMEOUT_S = 2.0
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

    @property
    def pid(self) -> int:
        return 0 if self.process is None else self.process.pid


class SupervisorActor(Actor):
    """Runs one tree of children, from ``Begin`` until everything is stopped and reported."""

    def __init__(
        self,
        boot: Boot,
        wardens: Mapping[str, Warden],
        start_warden: Callable[[str], Warden],
        signals_fd: int,
        fate_fds: Iterable[int],
    ) -> None:
        """wardens: already started, by preload. start_warden: makes another one of a preload; raises ``OSError``.

        signals_fd: ``watch_signals`` of SIGCHLD and SIGTERM. fate_fds: readable once the host application is gone.
        """
        self._boot = boot
        self._tree = plant(boot)
        self._wardens = dict(wardens)
        self._start_warden = start_warden
        self._signals_fd = signals_fd
        self._fate_fds = tuple(fate_fds)
        self._lives: dict[str, _Life] = {}
        self._weights: dict[str, int] = {}  # memory file of each child that keeps weights
        self._events: deque[Event] = deque()
        self._is_stepping = False
        self._timer: Timer | None = None
        self._shutdowns: list[Call] = []
        self._is_to_end = False  # when everything is stopped
        self._is_leaving = False
        self._has_reported = False
        self._lost: list[GroupLost] = []
        self._warden_texts: dict[str, tuple[str, str]] = {}
        self._freed: list[str] = []
        self._told: tuple[ChildRecord, ...] = ()

    # Hooks.

    def on_start(self) -> None:
        """Start every child."""
        self.ctx.connect(HOST, 1)
        for fd in self._fate_fds:  # second line: the tether's signal comes first, unless a copy of its end leaked
            self.ctx.watch(fd, lambda: os._exit(EXIT_ORPHANED))
        self.ctx.watch(self._signals_fd, self._on_signal)
        for warden in self._wardens.values():
            self.ctx.watch(warden.fd, partial(self._on_warden, warden))
        self._feed(Begin())
        self._sweep()  # a warden may have ended before its death could be watched

    def on_stop(self) -> None:
        """The host asked the node itself to stop: the same as ``Shutdown``, without a report."""
        self.ctx.hold_stop()
        self._is_to_end = True
        self._feed(StopAll(self._boot.close_timeout_s))

    def on_peer_up(self, name: str) -> None:
        """A child is on the bus: introduce it."""
        life = self._lives.get(name)
        if life is None or self.ctx.peers().get(name) != life.incarnation:
            return
        self._feed(ChildLinked(name, life.incarnation))
        if self._tree.children[name].status is Status.STOPPING:
            return
        for other in self._boot.children:
            if name in other.connect and self._is_linked(other.name):
                self._tell(other.name, PeerUp(name, life.incarnation))
        spec = self._tree.children[name].spec
        for peer in spec.connect:
            if peer == HOST:
                self._tell(name, PeerUp(HOST, 1))
            elif self._is_linked(peer):
                self._tell(name, PeerUp(peer, self._lives[peer].incarnation))
        if name == ROUTER:  # it may be new: it has not heard
            for lost in self._lost:
                self._tell(ROUTER, lost)

    def _is_linked(self, name: str) -> bool:
        child = self._tree.children[name]
        return child.is_linked and child.status in (Status.STARTING, Status.READY)

    # Messages from children.

    @handles(Ready)
    def _ready(self, message: Ready, _: Call | None) -> None:
        life = self._lives.get(self.ctx.sender)
        if life is not None:
            self.ctx.log.info(
                "child.ready", child=life.name, pid=life.pid, actor_s=message.seconds, detail=message.detail
            )
            self._feed(ChildReady(life.name, life.incarnation))

    @handles(StartError)
    def _start_error(self, message: StartError, _: Call | None) -> None:
        life = self._lives.get(self.ctx.sender)
        if life is not None:
            self._feed(ChildFailed(life.name, life.incarnation, message.error, message.text))

    @handles(Condemn)
    def _condemn(self, message: Condemn, _: Call | None) -> None:
        spec = self._boot.spec(message.child)
        if spec is None or self.ctx.sender not in spec.connect:  # only whom it serves may say so
            self.ctx.log.warning("condemn.refused", child=message.child, sender=self.ctx.sender)
            return
        self.ctx.log.error("child.condemned", child=message.child, reason=message.reason)
        self._feed(ChildCondemned(message.child, message.incarnation, message.reason))

    @handles(Progress)
    def _progress(self, message: Progress, _: Call | None) -> None:
        self._tell(HOST, attrs.evolve(message, phase=f"{self.ctx.sender} {message.phase}"))

    # Messages from the host.

    @handles(Shutdown)
    def _shutdown(self, message: Shutdown, call: Call | None) -> None:
        if call is not None:
            self._shutdowns.append(call)
        self._is_to_end = True
        self._feed(StopAll(message.budget_s))
        if self._tree.phase is Phase.STOPPED:
            self._leave()

    @handles(ReplicaStatisticsRequest)
    def _statistics(self, message: ReplicaStatisticsRequest, call: Call | None) -> None:
        if call is None:
            return
        names = [name for name, child in self._tree.children.items() if child.spec.kind == "replica"]
        waiting = {name for name in names if self._is_linked(name)}
        answers: dict[str, ReplicaStatistics] = {}

        def fail(name: str, _: ChipbusError) -> None:
            settle(name, None)

        def settle(name: str, answer: ReplicaStatistics | None) -> None:
            waiting.discard(name)
            if answer is not None:
                answers[name] = answer
            if not waiting:
                call.reply(AllReplicaStatistics(tuple(answers[n] for n in names if n in answers)))

        if not waiting:
            call.reply(AllReplicaStatistics(()))
        for name in sorted(waiting):
            self.ctx.ask(
                name,
                message,
                timeout_s=STATISTICS_TIMEOUT_S,
                on_reply=partial(settle, name),
                on_error=partial(fail, name),
            )

    # Events from the kernel.

    def _on_signal(self) -> None:
        signums = os.read(self._signals_fd, 4096)
        if signal.SIGTERM in signums:
            self.ctx.log.warning("supervisor.terminated")
            self._is_to_end = True
            self._feed(StopAll(self._boot.close_timeout_s))
            if self._tree.phase is Phase.STOPPED:
                self._leave()
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
                self._life_ended(life, status.text)
            else:
                self.ctx.log.debug("stray.reaped", pid=pid, exit=status.text)

    def _on_warden(self, warden: Warden) -> None:
        for message, pidfd in warden.receive():
            match message:
                case Preloaded(seconds, error, text):
                    self.ctx.log.info("warden.preloaded", warden=warden.preload, seconds=seconds, error=text)
                    if error:
                        self._warden_texts[warden.preload] = (error, text)
                case Spawned(name, incarnation, pid, is_forked):
                    self._spawned(name, incarnation, Process(pid, pidfd), is_forked=is_forked)
                case SpawnRefused(name, incarnation, text):
                    life = self._life(name, incarnation)
                    if life is not None:
                        self._life_ended(life, NEVER_STARTED, text=text)
                case Exited(name, incarnation, code, signum, error, text):
                    life = self._life(name, incarnation)
                    if life is not None:
                        self._life_ended(life, ExitStatus(code, signum).text, error, text)
        if warden.is_silent:  # it is ending; its death is told by a signal
            self.ctx.unwatch(warden.fd)

    def _warden_ended(self, warden: Warden, status: ExitStatus) -> None:
        self._on_warden(warden)  # what it said before it died
        was_ready = warden.is_ready
        self.ctx.unwatch(warden.fd)
        unanswered = warden.ended()
        del self._wardens[warden.preload]
        if not self._is_leaving:
            self.ctx.log.warning("warden.exited", warden=warden.preload, exit=status.text)
        if was_ready and self._tree.phase < Phase.STOPPING:
            with contextlib.suppress(OSError):  # at once, so that a child that dies next need not wait for it
                self._warden(warden.preload)
        error, text = self._warden_texts.pop(
            warden.preload, ("StartFailed", f"warden {warden.preload} ended with {status.text}")
        )
        for name, incarnation in unanswered:
            life = self._life(name, incarnation)
            if life is not None:
                self._life_ended(life, NEVER_STARTED, error, text)
        if self._is_leaving and not self._wardens:
            self._report()

    def _spawned(self, name: str, incarnation: int, process: Process, *, is_forked: bool) -> None:
        life = self._life(name, incarnation)
        if life is None:  # given up meanwhile; its tether is cut
            os.close(process.pidfd)
            return
        life.process = process
        self.ctx.log.info("child.spawned", child=name, life=incarnation, pid=process.pid, is_forked=is_forked)
        self.ctx.watch(process.pidfd, lambda: self._on_pidfd(life))
        if life.signum is not None:
            signal_group(process, life.signum)
        self._tell_tree()

    def _on_pidfd(self, life: _Life) -> None:
        """It ended. How, its parent must say: the warden, or this process if the warden is gone."""
        assert life.process is not None
        if not is_dead(life.process.pidfd):  # the number was another's a moment ago, in the same turn of the loop
            return
        self.ctx.unwatch(life.process.pidfd)  # it stays readable for ever
        self.ctx.after(_RELAY_S, lambda: self._life_ended(life, ExitStatus().text))
        self._sweep()

    # The life of one child.

    def _life(self, name: str, incarnation: int) -> _Life | None:
        life = self._lives.get(name)
        return life if life is not None and life.incarnation == incarnation else None

    def _life_ended(self, life: _Life, exit_text: str, error: str = "", text: str = "") -> None:
        """The one place where a death is decided, whoever tells of it first."""
        if self._lives.get(life.name) is not life:
            return
        del self._lives[life.name]
        life.tether.drop_read_end()
        life.tether.cut()  # a child that was forked but never reported ends by this
        if life.process is not None:
            self.ctx.unwatch(life.process.pidfd)
            os.close(life.process.pidfd)
        is_stopping = self._tree.children[life.name].status is Status.STOPPING
        log = self.ctx.log.info if is_stopping else self.ctx.log.warning
        log("child.exited", child=life.name, life=life.incarnation, pid=life.pid, exit=exit_text, reason=text)
        self._remove_sockets(life)
        if self._tree.children[life.name].is_linked:
            self._tell_down(life, exit_text)
        self._feed(ChildDied(life.name, life.incarnation, exit_text, error, text))

    def _tell_down(self, life: _Life, reason: str) -> None:
        self.ctx.peer_down(life.name, life.incarnation, reason)
        spec = self._tree.children[life.name].spec
        neighbours = {*spec.connect, *(other.name for other in self._boot.children if life.name in other.connect)}
        for name in sorted(neighbours):
            if name == HOST or self._tree.children[name].is_linked:
                self._tell(name, PeerDown(life.name, life.incarnation, reason))

    def _remove_sockets(self, life: _Life) -> None:
        """A killed node cannot remove its own; nobody connects to them any more."""
        for path in sorted(Path(self._boot.run_dir).glob(f"{life.name}.{life.incarnation}.?")):
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
                self._freed.append(path.name)

    # State machine.

    def _feed(self, event: Event) -> None:
        """Take one step, and those that its actions cause; then arm the timer and show the tree."""
        self._events.append(event)
        if self._is_stepping:
            return
        self._is_stepping = True
        try:
            while self._events:
                self._tree, actions = step(self._tree, self._events.popleft(), self._now_s())
                for action in actions:
                    self._do(action)
        finally:
            self._is_stepping = False
        self._drop_weights()
        self._arm_timer()
        self._tell_tree()

    def _do(self, action: Action) -> None:
        match action:
            case Spawn(name, incarnation):
                self._spawn(name, incarnation)
            case AskStop(name, _, deadline_s):
                self._tell(name, Stop(int(deadline_s * 1e9)))
            case Terminate(name, incarnation):
                self._signal(name, incarnation, signal.SIGTERM)
            case Kill(name, incarnation):
                self._signal(name, incarnation, signal.SIGKILL)
            case AnnounceReady(seconds):
                self.ctx.log.info("tree.ready", seconds=seconds)
                self._tell(HOST, TreeReady(seconds))
            case AnnounceFailure(name, error, text):
                self.ctx.log.error("tree.start_failed", child=name, reason=text)
                self._tell(HOST, StartFailure(name, error, text))
                self.ctx.after(2 * self._boot.close_timeout_s, self._end_unasked)
            case AnnounceLost(name, text):
                self.ctx.log.error("group.lost", child=name, reason=text)
                self._lost.append(GroupLost(name, text))
                self._tell(HOST, self._lost[-1])
                if ROUTER in self._tree.children and self._is_linked(ROUTER):
                    self._tell(ROUTER, self._lost[-1])
            case AnnounceStopped():
                if self._is_to_end:
                    self._leave()

    def _spawn(self, name: str, incarnation: int) -> None:
        spec = self._tree.children[name].spec
        try:
            warden = self._warden(spec.preload)
            weights = (self._weights_of(name),) if spec.keeps_weights else ()
            tether = Tether.make()
        except OSError as error:
            self._events.append(
                ChildDied(name, incarnation, NEVER_STARTED, "StartFailed", f"cannot start {name}: {error}")
            )
            return
        self._lives[name] = _Life(name, incarnation, warden, tether)
        warden.request(name, incarnation, tether, weights)

    def _weights_of(self, name: str) -> int:
        """The memory file that is given to every life of a child. It has no name: with the descriptors it is gone."""
        if name not in self._weights:
            self._weights[name] = os.memfd_create("chipbus-weights", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        return self._weights[name]

    def _drop_weights(self) -> None:
        """Close the memory files of children that have no further life."""
        for name in [name for name in self._weights if self._tree.children[name].status is Status.GONE]:
            file = self._weights.pop(name)
            if os.fstat(file).st_size:
                self._freed.append(f"packed weights of {name}")
            os.close(file)

    def _warden(self, preload: str) -> Warden:
        warden = self._wardens.get(preload)
        if warden is None:
            warden = self._wardens[preload] = self._start_warden(preload)
            self.ctx.watch(warden.fd, partial(self._on_warden, warden))
        return warden

    def _signal(self, name: str, incarnation: int, signum: int) -> None:
        life = self._life(name, incarnation)
        if life is None:
            return
        if life.process is not None:
            signal_group(life.process, signum)
        elif life.warden.withdraw(name, incarnation):
            self._life_ended(life, NEVER_STARTED)
        else:
            life.signum = signum
            life.tether.cut()
            if signum == signal.SIGKILL:  # it was asked for this child long ago: it is stuck
                life.warden.kill()

    def _arm_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        wake_s = next_wake_s(self._tree)
        if wake_s is not None:
            self._timer = self.ctx.after(max(0.0, wake_s - self._now_s()), self._tick)

    def _tick(self) -> None:
        self._timer = None
        self._feed(Tick())

    def _now_s(self) -> float:
        return self.ctx.clock.now_ns() / 1e9

    # The end.

    def _end_unasked(self) -> None:
        """A failed start is answered by the host's ``Shutdown``. If that never comes, end all the same."""
        self._is_to_end = True
        if self._tree.phase is Phase.STOPPED:
            self._leave()

    def _leave(self) -> None:
        """All children are gone: let the wardens go, then report."""
        if self._is_leaving:
            return
        self._is_leaving = True
        for warden in list(self._wardens.values()):
            warden.leave()
        if not self._wardens:
            self._report()
            return
        self.ctx.after(_WARDEN_LEAVE_S, self._kill_wardens)
        self.ctx.after(_WARDEN_LEAVE_S + _WARDEN_REAP_S, self._report)

    def _kill_wardens(self) -> None:
        for warden in self._wardens.values():
            warden.kill()

    def _report(self) -> None:
        if self._has_reported:
            return
        self._has_reported = True
        stop = self._tree.stop
        report = CloseReport(
            children=ends(self._tree),
            seconds=0.0 if stop is None else self._now_s() - stop.began_s,
            freed=tuple(self._freed),
            left=(*left_alive(self._tree), *(f"warden {preload}" for preload in self._wardens)),
        )
        for call in self._shutdowns:
            call.reply(report)
        self._shutdowns.clear()
        self.ctx.stop()

    # Telling.

    def _tell(self, name: str, message: object) -> None:
        """Tell a peer that may be gone, or may not be reading. What it misses it learns from the next tree or death."""
        try:
            self.ctx.tell(name, message)
        except (PeerGone, MailboxFull) as error:
            self.ctx.log.debug("tell.failed", to=name, message=type(message).__name__, reason=str(error))

    def _tell_tree(self) -> None:
        """Show the host the tree, if it looks different from what it was shown last."""
        state = {Phase.RUNNING: "ready", Phase.STOPPING: "stopping", Phase.STOPPED: "stopping"}
        own = ChildRecord(
            name=SUPERVISOR, kind=SUPERVISOR, pid=os.getpid(), parent="", state=state.get(self._tree.phase, "starting"),
            incarnation=1, restarts=0,
        )  # fmt: skip
        tree = (own, *records(self._tree, {name: life.pid for name, life in self._lives.items()}))
        if tree != self._told:
            self._told = tree
            self._tell(HOST, TreeChanged(tree))
