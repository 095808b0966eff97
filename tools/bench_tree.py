"""A small tree of real processes under the real supervisor, and a warden alone: for benchmarks, without an engine.

Owns: what it starts, until ``close``. ``python -m chipbus.tools.bench_tree`` is the program of its supervisor and its
wardens.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import attrs

from ..actors.boot import HOST, SUPERVISOR, Boot, ChildSpec
from ..actors.messages.tree import ChildRecord, GroupLost, StartFailure, TreeChanged, TreeReady
from ..actors.messages.warden import Preloaded
from ..actors.processes import Process, Tether, open_pidfd, signal_group, spawn_supervisor, try_reap, wait_dead
from ..actors.rundir import RunDirectory
from ..actors.supervise import main as supervise
from ..actors.warden import serve
from ..actors.wardens import Warden
from ..bus import Actor, Node, NodeConfig, Progress, Ready, handles
from ..errors import StartFailed, WorkerError
from .bench_actors import ENTRIES, WARDENS, Name, Stay, WhoIsIt

__all__ = ["Crash", "SmallTree", "Spawner", "kill_process", "resident"]

_COMMAND = (sys.executable, "-P", "-m", "chipbus.tools.bench_tree")
_WAIT_S = 60.0
_END_S = 10.0


def resident(name: str, preload: str = "light", **config: Any) -> ChildSpec:
    """A child of a small tree that the host can ask."""
    return ChildSpec(name=name, kind="resident", connect=(HOST,), preload=preload, config=config)


def kill_process(pid: int) -> int:
    """SIGKILL for one of our processes, through its pidfd; the moment before, ns on the monotonic clock."""
    pidfd = open_pidfd(pid)
    try:
        killed_ns = time.monotonic_ns()
        signal_group(Process(pid, pidfd), signal.SIGKILL)
    finally:
        os.close(pidfd)
    return killed_ns


@attrs.frozen(kw_only=True)
class Crash:
    """What followed the SIGKILL of a child, in ms after it."""

    ended_ms: float  # the kernel shows its end to whoever watches it
    failed_ms: float  # the ask it had not answered
    ready_ms: float  # the tree shows its next life ready
    answered_ms: float  # the next life answered


class _Loop:
    """A node on a thread of its own. Whoever waits for it shares its condition."""

    def __init__(self, name: str, directory: RunDirectory, actor: Actor) -> None:
        self._actor = actor
        self._node = Node(NodeConfig(name=name, incarnation=1, run_dir=directory.path), actor)
        self._thread = threading.Thread(target=self._node.run, name=f"bench.{name}", daemon=True)
        self._thread.start()
        started = threading.Event()
        self.post(started.set)
        if not started.wait(_WAIT_S):
            raise WorkerError(f"the inbox of {name} was not bound in time")

    def post(self, callback: Callable[[], None]) -> None:
        self._node.call_soon_threadsafe(callback)

    def close(self) -> None:
        self.post(self._actor.ctx.stop)
        self._thread.join(_END_S)


class _Host(Actor):
    """Notes what the supervisor says, and when."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.is_ready = False
        self.failure = ""
        self.tree: tuple[ChildRecord, ...] = ()
        self.ready_ns: dict[tuple[str, int], int] = {}  # name, incarnation → first seen ready

    @handles(TreeChanged)
    def _tree_changed(self, message: TreeChanged, _: object) -> None:
        now_ns = time.monotonic_ns()
        with self.changed:
            self.tree = message.children
            for record in message.children:
                if record.state == "ready":
                    self.ready_ns.setdefault((record.name, record.incarnation), now_ns)
            self.changed.notify_all()

    @handles(TreeReady)
    def _tree_ready(self, _: TreeReady, __: object) -> None:
        with self.changed:
            self.is_ready = True
            self.changed.notify_all()

    @handles(StartFailure)
    @handles(GroupLost)
    def _broken(self, message: StartFailure | GroupLost, _: object) -> None:
        with self.changed:
            self.failure = f"{message.child}: {message.text}"
            self.changed.notify_all()

    @handles(Progress)
    def _progress(self, _: Progress, __: object) -> None:
        pass

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Until ``condition`` holds. Raises ``StartFailed`` if the tree breaks, or time is up."""
        with self.changed:
            if not self.changed.wait_for(lambda: bool(self.failure) or condition(), _WAIT_S):
                raise StartFailed("a tree for a benchmark was not as expected in time")
            if self.failure:
                raise StartFailed(self.failure)


class SmallTree:
    """Children under a supervisor whose host this process is. Ready when the constructor returns."""

    def __init__(self, *children: ChildSpec) -> None:
        self._directory = RunDirectory.create()
        boot = Boot(
            run_dir=str(self._directory.path),
            host_pid=os.getpid(),
            children=children,
            window_s=1e-3,  # no number of deaths is too many
            log_level="error",
        )
        self._host = _Host()
        self._loop = _Loop(HOST, self._directory, self._host)
        self._supervisor = spawn_supervisor(boot.write(), self._directory.lock_fd, _COMMAND)
        self._directory.give_up_lock()
        try:
            self._host.wait_for(lambda: self._host.is_ready)
        except BaseException:
            self.close()
            raise

    @property
    def run_dir(self) -> str:
        """Where its sockets are."""
        return str(self._directory.path)

    def crash(self, name: str) -> Crash:
        """Kill a child that owes an answer, and wait until its next life has answered."""
        record = next(r for r in self._host.tree if r.name == name)
        times_ns: dict[str, int] = {}

        def note(what: str) -> None:
            with self._host.changed:
                times_ns[what] = time.monotonic_ns()
                self._host.changed.notify_all()

        def ask_first() -> None:
            # It answers, so the link is up; the question behind is then on its way, or there.
            ctx.ask(name, WhoIsIt(), timeout_s=_WAIT_S, on_reply=ask_pending, on_error=lambda _: None)

        def ask_pending(_: Name) -> None:
            ctx.ask(name, Stay(), timeout_s=_WAIT_S, on_reply=lambda _: None, on_error=lambda _: failed())
            ctx.ask(name, WhoIsIt(), timeout_s=_WAIT_S, on_reply=lambda _: note("asked"), on_error=lambda _: None)

        def failed() -> None:
            note("failed")
            ctx.ask(
                name, WhoIsIt(), timeout_s=_WAIT_S, wait_for_link=True, on_reply=lambda _: note("answered"),
                on_error=lambda _: None,
            )  # fmt: skip

        def ended() -> None:
            ctx.unwatch(pidfd)
            note("ended")

        ctx = self._host.ctx
        next_life = (name, record.incarnation + 1)
        pidfd = open_pidfd(record.pid)
        self._loop.post(lambda: ctx.watch(pidfd, ended))
        self._loop.post(ask_first)
        self._host.wait_for(lambda: "asked" in times_ns)
        killed_ns = kill_process(record.pid)
        self._host.wait_for(lambda: {"ended", "answered"} <= times_ns.keys() and next_life in self._host.ready_ns)
        os.close(pidfd)
        return Crash(
            ended_ms=(times_ns["ended"] - killed_ns) / 1e6,
            failed_ms=(times_ns["failed"] - killed_ns) / 1e6,
            ready_ms=(self._host.ready_ns[next_life] - killed_ns) / 1e6,
            answered_ms=(times_ns["answered"] - killed_ns) / 1e6,
        )

    def close(self) -> None:
        """Kill the supervisor, and so everything below it; wait until that is gone."""
        self._supervisor.kill()
        self._supervisor.reap(_END_S)
        self._supervisor.close()
        self._loop.close()
        self._directory.remove(_END_S)


class _Parent(Actor):
    """In the supervisor's place: hears that a child is ready."""

    def __init__(self) -> None:
        self.ready_ns = 0
        self.is_ready = threading.Event()

    @handles(Ready)
    def _ready(self, _: Ready, __: object) -> None:
        self.ready_ns = time.monotonic_ns()
        self.is_ready.set()


class Spawner:
    """One warden, asked for one child after another by this process. Warm when the constructor returns."""

    def __init__(self, preload: str) -> None:
        self._directory = RunDirectory.create()
        boot = Boot(
            run_dir=str(self._directory.path),
            host_pid=os.getpid(),
            children=(ChildSpec(name="child", kind="resident", preload=preload),),
            log_level="error",
        )
        self._parent = _Parent()
        self._loop = _Loop(SUPERVISOR, self._directory, self._parent)
        self._warden = Warden(preload, boot.write(), self._directory.lock_fd, _COMMAND)
        self._is_warm = threading.Event()
        self._incarnation = 0
        self._error = ""
        self._loop.post(lambda: self._parent.ctx.watch(self._warden.fd, self._heard))
        if not self._is_warm.wait(_WAIT_S) or self._error:
            self.close()
            raise StartFailed(self._error or f"warden {preload} was not ready in time")

    def _heard(self) -> None:
        for message, pidfd in self._warden.receive():
            if pidfd >= 0:
                os.close(pidfd)
            if isinstance(message, Preloaded):
                self._error = message.text
                self._is_warm.set()
        if self._warden.is_silent:
            self._parent.ctx.unwatch(self._warden.fd)
            self._error = self._error or "the warden has ended"
            self._is_warm.set()

    def spawn_ms(self) -> float:
        """From the request for a child until its ``Ready`` has come over the bus. The child is then ended."""
        self._incarnation += 1
        life, tether = self._incarnation, Tether.make()
        self._parent.is_ready.clear()
        asked_ns = 0

        def ask() -> None:
            nonlocal asked_ns
            asked_ns = time.monotonic_ns()
            self._warden.request("child", life, tether)

        self._loop.post(ask)
        try:
            if not self._parent.is_ready.wait(_WAIT_S):
                raise StartFailed("a child for a benchmark was not ready in time")
        finally:
            tether.cut()
        self._loop.post(lambda: self._parent.ctx.peer_down("child", life, "it was ended"))
        return (self._parent.ready_ns - asked_ns) / 1e6

    def close(self) -> None:
        """End the warden and what is left of its children."""
        process = self._warden.process
        self._warden.kill()
        wait_dead(process.pidfd, _END_S)
        try_reap(process)
        self._loop.close()
        self._warden.ended()
        self._directory.remove(_END_S)


if __name__ == "__main__":
    if sys.argv[1] in ("serve", "child"):
        serve(ENTRIES, WARDENS)
    else:
        supervise(_COMMAND)
