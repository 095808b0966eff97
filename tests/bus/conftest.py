"""Real nodes for tests: each in a thread or a process of its own, all ended and checked for leftovers afterwards."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
from bus_strangers import Stranger

from chipbus.bus import Actor, Node, NodeConfig
from support import descriptors, eventually

SERVE = Path(__file__).parent / "programs" / "serve.py"


@attrs.define
class Running:
    """A node in a thread."""

    node: Node
    actor: Any
    thread: threading.Thread
    errors: list[BaseException] = attrs.field(factory=list)

    def do(self, callback: Callable[[], object]) -> None:
        """Run on the node's thread and wait for it."""
        done = threading.Event()

        def run() -> None:
            try:
                callback()
            finally:
                done.set()

        self.actor.ctx.call_soon_threadsafe(run)
        assert done.wait(10)

    def stop(self) -> None:
        self.actor.ctx.call_soon_threadsafe(self.actor.ctx.stop)
        self.thread.join(10)
        assert not self.thread.is_alive()


@pytest.fixture
def run_dir() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="bus-"))
    yield path
    shutil.rmtree(path)


class Nodes:
    """Starts nodes in one run directory."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.running: list[Running] = []
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(
        self,
        name: str,
        actor: Actor,
        *connect: tuple[Any, ...],
        incarnation: int = 1,
        record: Path | None = None,
        expects: frozenset[str] | None = None,
    ) -> Running:
        """Run a node in a thread; returns at once."""
        node = Node(NodeConfig(name=name, incarnation=incarnation, run_dir=self.run_dir, record=record), actor)
        if expects is not None:
            node.expect(expects)
        for peer in connect:
            node.connect(*peer)
        running = Running(node, actor, threading.Thread(target=lambda: self._run(running)))
        running.thread.start()
        self.running.append(running)
        return running

    def _run(self, running: Running) -> None:
        try:
            running.node.run()
        except Exception as error:  # noqa: BLE001 (the test that started it looks at every error)
            running.errors.append(error)

    def serve(self, incarnation: int = 1, *, record: Path | None = None) -> subprocess.Popen[bytes]:
        """Run a server node in a process."""
        command = [sys.executable, str(SERVE), str(self.run_dir), str(incarnation), *([str(record)] if record else [])]
        process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(SERVE.parents[2])})
        self.processes.append(process)
        return process

    def end(self) -> None:
        for running in self.running:
            running.stop()
            assert running.errors == []
        for process in self.processes:
            process.kill()
            process.wait()


@pytest.fixture
def nodes(run_dir: Path) -> Iterator[Nodes]:
    before = descriptors()
    nodes = Nodes(run_dir)
    try:
        yield nodes
    finally:
        nodes.end()
    if not nodes.processes:
        assert list(run_dir.iterdir()) == []
    eventually(lambda: descriptors() <= before, "every descriptor of the nodes closed")


@pytest.fixture
def stranger(nodes: Nodes) -> Iterator[Callable[..., Stranger]]:
    made: list[Stranger] = []

    def make(node: str, **options: Any) -> Stranger:
        eventually(lambda: (nodes.run_dir / f"{node}.1.c").exists(), "the inbox is bound")
        made.append(Stranger(nodes.run_dir, node, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()
