"""A host application in miniature: its inbox, a real supervisor below it, and what it is told. Used by tests and by
the program that is killed in them."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import attrs

from chipbus.actors.boot import Boot, ChildSpec
from chipbus.actors.messages.tree import (
    AllReplicaStatistics,
    ChildRecord,
    CloseReport,
    GroupLost,
    ReplicaStatisticsRequest,
    Shutdown,
    StartFailure,
    TreeChanged,
    TreeReady,
)
from chipbus.actors.processes import SupervisorHandle, spawn_supervisor
from chipbus.actors.rundir import RunDirectory
from chipbus.bus import Actor, Node, NodeConfig, Progress, handles
from chipbus.errors import ChipbusError

PROGRAMS = Path(__file__).parent / "actors" / "programs"
SUPERVISOR_COMMAND = (sys.executable, "-P", str(PROGRAMS / "supervisor.py"))
WAIT_S = 20.0
M = TypeVar("M")


class Listener(Actor):
    """Keeps everything the supervisor says."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.heard: list[Any] = []
        self.trees: list[tuple[ChildRecord, ...]] = []
        self.is_up = threading.Event()

    def on_start(self) -> None:
        self.is_up.set()

    def keep(self, message: Any) -> None:
        with self.changed:
            if isinstance(message, TreeChanged):
                self.trees.append(message.children)
            else:
                self.heard.append(message)
            self.changed.notify_all()

    @handles(Progress)
    @handles(TreeReady)
    @handles(StartFailure)
    @handles(GroupLost)
    @handles(TreeChanged)
    def _keep(self, message: Any, _: object) -> None:
        self.keep(message)

    def on_peer_up(self, name: str) -> None:
        self.keep(("up", name))

    def on_peer_down(self, name: str, reason: str) -> None:
        self.keep(("down", name, reason))


class Host:
    """One tree. Leaving the block stops it, and checks that it left nothing."""

    def __init__(self, *children: ChildSpec, **settings: Any) -> None:
        self.directory = RunDirectory.create()
        settings = {"log_level": "error", "close_timeout_s": 10.0, **settings}
        self.boot = Boot(run_dir=str(self.directory.path), host_pid=os.getpid(), children=children, **settings)
        self.listener = Listener()
        self.node = Node(NodeConfig(name="host", incarnation=1, run_dir=self.directory.path), self.listener)
        self.thread = threading.Thread(target=self.node.run, daemon=True)
        self.thread.start()
        assert self.listener.is_up.wait(WAIT_S)
        self.handle: SupervisorHandle = spawn_supervisor(
            self.boot.write(), self.directory.lock_fd, SUPERVISOR_COMMAND, token=self.directory.token
        )
        self.directory.give_up_lock()
        self.report: CloseReport | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self.handle.try_reap() is None and self.report is None:
                self.shut_down(5.0)
        finally:
            exit_status = self.handle.reap(WAIT_S)
            if exit_status is None:
                self.handle.kill()
                self.handle.reap(WAIT_S)
            self.handle.close()
            self.listener.ctx.call_soon_threadsafe(self.listener.ctx.stop)
            self.thread.join(WAIT_S)
            left = self.directory.remove(WAIT_S)
        if error is None:
            assert exit_status is not None, "the supervisor did not end"
            assert left == ()

    def shut_down(self, budget_s: float) -> CloseReport:
        """Ask for the end of everything; the report."""
        self.report = self.ask(Shutdown(budget_s), CloseReport, timeout_s=budget_s + WAIT_S)
        return self.report

    def statistics(self) -> AllReplicaStatistics:
        return self.ask(ReplicaStatisticsRequest(), AllReplicaStatistics)

    def ask(self, message: Any, kind: type[M], timeout_s: float = WAIT_S) -> M:
        answered = threading.Event()
        answers: list[Any] = []

        def settle(answer: Any) -> None:
            answers.append(answer)
            answered.set()

        ctx = self.listener.ctx
        ctx.call_soon_threadsafe(
            lambda: ctx.ask("supervisor", message, timeout_s=timeout_s, on_reply=settle, on_error=settle) and None
        )
        assert answered.wait(timeout_s + 5)
        if isinstance(answers[0], ChipbusError):
            raise answers[0]
        assert isinstance(answers[0], kind)
        return answers[0]

    def hear(self, kind: type[M]) -> M:
        """The next message of ``kind`` from the supervisor."""
        return self.hear_if(lambda message: isinstance(message, kind), kind.__name__)

    def hear_if(self, is_meant: Callable[[Any], bool], what: str) -> Any:
        deadline_s = time.monotonic() + WAIT_S
        with self.listener.changed:
            while True:
                for position, message in enumerate(self.listener.heard):
                    if is_meant(message):
                        del self.listener.heard[position]
                        return message
                left_s = deadline_s - time.monotonic()
                assert self.listener.changed.wait(max(0.0, left_s)), f"no {what}, only {self.listener.heard}"

    def record(self, name: str, state: str = "ready", incarnation: int = 1) -> ChildRecord:
        """Wait until the tree shows the child like this."""

        def latest() -> ChildRecord | None:
            trees = self.listener.trees
            return next((r for r in trees[-1] if r.name == name), None) if trees else None

        def is_so() -> bool:
            found = latest()
            return found is not None and (found.state, found.incarnation) == (state, incarnation)

        with self.listener.changed:
            assert self.listener.changed.wait_for(is_so, WAIT_S), f"{name} is {latest()}"
        found = latest()
        assert found is not None
        return found

    def pids(self) -> dict[str, int]:
        return {record.name: record.pid for record in self.listener.trees[-1]}


def worker(name: str, *connect: str, **options: Any) -> ChildSpec:
    """A child that runs the test actor ``Worker``; options not of the spec are its configuration."""
    fields = {field.name for field in attrs.fields(ChildSpec)}
    spec = {key: value for key, value in options.items() if key in fields}
    config = {key: value for key, value in options.items() if key not in fields}
    return ChildSpec(**{"name": name, "kind": "worker", "connect": connect, "config": config, **spec})


def tree_of_four(**options: Any) -> tuple[ChildSpec, ...]:
    """tokenizer → router → replica with one chip, connected as the real ones are."""
    return (
        worker("tokenizer.0", "host", **options),
        worker("router", "tokenizer.0", **options),
        worker("replica.0", "router", group="replica.0", **options),
        worker("chip.0.0", "replica.0", group="replica.0", **options),
    )
