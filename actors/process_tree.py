"""A running process tree, seen from the host application: started, posted to, closed. Both engine and L3 worker use it.

Owns: the bus thread, the supervisor's handle, the run directory's name. Everything else belongs to the supervisor.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import attrs

from ..bus import Node, NodeConfig, Progress, get_logger
from ..bus.shortages import cannot_write, require_descriptors, require_limit
from ..errors import ChipbusError, EngineClosed, EngineDead, StartFailed
from .boot import HOST, SUPERVISOR, Boot
from .messages.tree import ChildRecord, CloseReport
from .processes import SupervisorHandle, spawn_supervisor
from .rundir import RunDirectory
from .tree_actor import TreeActor, TreeEvents

__all__ = ["ProcessTree", "TreeSettings", "close_when_forgotten"]

FAILED_START_S = 3.0  # for a supervisor to stop what it had started
LAST_WORDS_S = 0.2  # for what an ended process sent to be read
HOST_DESCRIPTORS = 16  # to start the supervisor, and for the links it and its children then make to here
SUPERVISOR_DESCRIPTORS = 48  # counted: 29 and 4 for each child, between two starts
CHILD_DESCRIPTORS = 5
KILLED_S = 1.0  # for a process to be gone after SIGKILL


@attrs.frozen(kw_only=True)
class TreeSettings:
    """How long a tree may take, what it is called in errors, and where its host records."""

    what: str  # "engine", "worker"
    start_timeout_s: float
    close_timeout_s: float
    stall_timeout_s: float
    seed: int = 0
    record: Path | None = None
    run_dir: Path | None = None  # None: one of its own making


class ProcessTree:
    """One tree of processes around one ``TreeActor``. Thread-safe; ``close`` is idempotent."""

    def __init__(
        self, actor: TreeActor, settings: TreeSettings, on_progress: Callable[[Progress], None] | None
    ) -> None:
        self._actor = actor
        self._settings = settings
        self._pid = os.getpid()
        self._close_lock = threading.Lock()
        self._bound = threading.Event()
        self._settled = threading.Event()  # ready, or dead
        self._closing = False
        self._report: CloseReport | None = None
        self._supervisor: SupervisorHandle | None = None
        self._run_dir = RunDirectory.create(settings.run_dir)
        self.death: ChipbusError | None = None
        actor.events = TreeEvents(
            on_bound=self._bound.set,
            on_ready=self._settled.set,
            on_dead=self._died,
            on_progress=on_progress or (lambda _: None),
            on_stalled=self._supervisor_stalled,
            stall_timeout_s=settings.stall_timeout_s,
        )
        config = NodeConfig(
            name="host", incarnation=1, run_dir=self._run_dir.path, seed=settings.seed, record=settings.record
        )
        try:
            self._node = Node(config, actor)
        except BaseException:
            self._run_dir.remove(0.0)
            raise
        self._thread = threading.Thread(target=self._run_bus, name="chipbus", daemon=True)

    def start(self, boot_in: Callable[[Path], Boot]) -> None:
        """Start the processes of ``boot_in(run directory)`` and wait until every one is ready.

        Raises the child's own error, or ``StartFailed``; then, as on Ctrl-C, nothing is left behind.
        """
        try:
            self._start(boot_in)
        except BaseException:
            self.close()
            raise

    def _start(self, boot_in: Callable[[Path], Boot]) -> None:
        what, timeout_s = self._settings.what, self._settings.start_timeout_s
        deadline_s = time.monotonic() + timeout_s
        boot = boot_in(self._run_dir.path)
        self._node.expect(boot.expected_by(HOST))
        self._thread.start()
        if not self._bound.wait(timeout_s):
            raise StartFailed(f"the {what}'s own inbox was not bound within {timeout_s:g} s")
        if self.death is not None:
            raise self.death
        self._check_room(boot)
        try:
            boot_path = boot.write()
        except OSError as error:
            raise cannot_write(self._run_dir.path / "boot.json", error.errno) from error
        self._supervisor = spawn_supervisor(boot_path, self._run_dir.lock_fd, token=self._run_dir.token)
        self._run_dir.give_up_lock()
        pidfd = self._supervisor.pidfd
        self.post(lambda: self._actor.ctx.watch(pidfd, self._supervisor_ended))
        if not self._settled.wait(max(0.0, deadline_s - time.monotonic()) + 1.0):  # children report before we give up
            raise StartFailed(f"the {what} was not ready within {timeout_s:g} s; see the log above")
        if self.death is not None:
            raise self.death

    def give_up_start(self) -> None:
        """Nobody wants it any more: ``start`` raises ``EngineClosed`` soon, in the thread that called it."""
        if not self._settled.is_set():
            self.death = EngineClosed(f"the {self._settings.what} was given up while it started")
            self._settled.set()
            self._bound.set()

    def _check_room(self, boot: Boot) -> None:
        """Fail now, by name, rather than in some process in the middle of its start."""
        what, num_children = f"the {self._settings.what}", len(boot.children)
        require_limit(SUPERVISOR_DESCRIPTORS + CHILD_DESCRIPTORS * num_children, f"{what}'s supervisor")
        require_descriptors(HOST_DESCRIPTORS, what)
        self._run_dir.require_room(2 + 2 * (1 + num_children))  # boot file, journal, and the sockets of each process

    def _run_bus(self) -> None:
        try:
            self._node.run()
        except ChipbusError as error:  # a typed reason is the caller's to read, not the thread's to print
            if not self._closing:
                self._died(error)
        finally:  # whatever ended it, nobody may wait for an answer any more
            if not self._closing:
                self._died(EngineDead(f"the {self._settings.what}'s bus thread ended; its error is in the log"))
            self._bound.set()

    def post(self, callback: Callable[[], None]) -> None:
        """Run ``callback`` on the bus thread."""
        self._actor.ctx.call_soon_threadsafe(callback)

    def records(self) -> tuple[ChildRecord, ...]:
        """The latest picture of the processes."""
        return self._actor.tree

    @property
    def run_dir(self) -> Path:
        """The run directory, which is removed at the end."""
        return self._run_dir.path

    @property
    def is_closing(self) -> bool:
        """A close has begun, or has ended."""
        return self._closing

    @property
    def is_over(self) -> bool:
        """It serves nothing more: closed, being closed, or dead."""
        return self._closing or self.death is not None

    def check_usable(self) -> None:
        """Raise ``EngineClosed`` or the error the tree died of."""
        what = self._settings.what
        if os.getpid() != self._pid:
            raise EngineClosed(
                f"this {what} belongs to process {self._pid}; {os.getpid()} is a forked copy and must make its own"
            )
        if self._closing:
            raise EngineClosed(f"this {what} is closed; make a new one")
        if self.death is not None:
            raise self.death

    # The end.

    def _died(self, error: ChipbusError) -> None:
        if self.death is None and not self._closing:
            self.death = error
        self._actor.fail_all(error)
        self._settled.set()

    def _supervisor_stalled(self, reason: str) -> None:
        """On the bus thread. A close that is under way has its own deadline."""
        assert self._supervisor is not None
        if not self._closing:
            self._died(EngineDead(f"the supervisor gave {reason}; it was killed, and every worker with it"))
            self._supervisor.kill()

    def _supervisor_ended(self) -> None:
        assert self._supervisor is not None
        self._actor.ctx.unwatch(self._supervisor.pidfd)
        exit_status = self._supervisor.try_reap()
        reason = exit_status.text if exit_status is not None else "exit status unknown"
        # Nobody else could tell the bus. A little later: its last words may still be on their way through ZeroMQ.
        self._actor.ctx.after(LAST_WORDS_S, lambda: self._actor.ctx.peer_down(SUPERVISOR, 1, reason))
        if not self._closing:
            self._died(EngineDead(f"the supervisor ended with {reason}, and every worker with it"))

    def close(self) -> CloseReport:
        """Stop every process under one deadline and report how each ended.

        Called again, or by several threads at once: one close, the same report. Only after one that was interrupted, or
        left something, the next call tries again.
        """
        what, timeout_s = self._settings.what, self._settings.close_timeout_s
        if os.getpid() != self._pid:
            raise EngineClosed(f"this {what} belongs to process {self._pid}; a forked copy cannot close it")
        self._closing = True
        if not self._close_lock.acquire(timeout=timeout_s + FAILED_START_S + KILLED_S):
            raise EngineClosed(f"another thread is closing this {what}, and is not done after {timeout_s:g} s")
        try:
            if self._report is None or self._report.left:
                self._report = self._close(time.monotonic() + timeout_s)
            return self._report
        except BaseException:  # a second Ctrl-C: no more politeness
            if self._supervisor is not None:
                self._supervisor.kill()
                self._supervisor.reap(KILLED_S)
            self._run_dir.remove(KILLED_S)
            raise
        finally:
            self._close_lock.release()

    def _close(self, deadline_s: float) -> CloseReport:
        def remaining_s(at_least_s: float) -> float:
            return max(at_least_s, deadline_s - time.monotonic())

        began_s = time.monotonic()
        left: list[str] = []
        report = self._ask_supervisor_to_stop(deadline_s) if self._thread.is_alive() else None
        if self._supervisor is not None:
            # A supervisor that has reported is about to exit; one that is failing its start stops its children first;
            # one that could not be asked has nothing to lose yet.
            is_failing = self.death is not None and not isinstance(self.death, EngineClosed)  # nor was it given up
            patience_s = remaining_s(0.1) if report is not None else FAILED_START_S if is_failing else 0.0
            if self._supervisor.reap(patience_s) is None:
                self._supervisor.kill()
                if self._supervisor.reap(KILLED_S) is None:
                    left.append(f"supervisor process {self._supervisor.pid}")
        if self._thread.is_alive():
            self.post(self._actor.ctx.stop)
            self._thread.join(remaining_s(0.5))
            if self._thread.is_alive():
                left.append("thread chipbus")
        if self._supervisor is not None and not left:
            self._supervisor.close()
        left_on_disk = self._run_dir.remove(remaining_s(0.5))
        report = report or self._report or CloseReport(children=(), seconds=0.0)
        report = attrs.evolve(
            report,
            seconds=time.monotonic() - began_s,
            freed=report.freed if left_on_disk else (*report.freed, str(self._run_dir.path)),
            left=(*report.left, *left, *left_on_disk) if report is not self._report else (*left, *left_on_disk),
        )
        say = get_logger().warning if report.left else get_logger().info
        say(f"{self._settings.what}.closed", seconds=report.seconds, left=report.left)
        return report

    def _ask_supervisor_to_stop(self, deadline_s: float) -> CloseReport | None:
        answer: list[CloseReport] = []
        answered = threading.Event()

        def on_report(outcome: CloseReport | ChipbusError) -> None:
            if isinstance(outcome, CloseReport):
                answer.append(outcome)
            answered.set()

        def ask() -> None:
            self._actor.fail_all(EngineClosed(f"the {self._settings.what} was closed while the request ran"))
            self._actor.shut_down(max(0.1, deadline_s - time.monotonic() - 0.5), on_report)

        self.post(ask)
        answered.wait(max(0.1, deadline_s - time.monotonic()))
        return answer[0] if answer else None


def close_when_forgotten(owner: object, tree: ProcessTree) -> weakref.finalize[[ProcessTree, int], object]:
    """Close the tree when its owner is collected or the interpreter ends, whichever comes first."""
    return weakref.finalize(owner, _close_quietly, tree, os.getpid())


def _close_quietly(tree: ProcessTree, pid: int) -> None:
    if os.getpid() == pid:
        tree.close()
