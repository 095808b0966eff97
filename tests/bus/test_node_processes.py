"""Nodes in processes of their own: kills, freezes, second lives, records of the killed."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from bus_actors import Asker, Count, Hold, Number

from chipbus.bus import Stop, read_ledger
from chipbus.errors import DeadlineExceeded, MailboxFull, PeerGone
from support import eventually


def asking_node(nodes: Any) -> tuple[Any, Asker]:
    asker = Asker()
    asking = nodes.start("asker", asker, ("server", 1))
    eventually(lambda: asker.events == ["up server"], "the link to the process")
    return asking, asker


@pytest.mark.slow
def test_asks_tells_and_streams_cross_processes(nodes: Any) -> None:
    process = nodes.serve()
    asking, asker = asking_node(nodes)

    asking.do(lambda: [asker.ask("server", Number(n)) for n in range(100)])
    asking.do(lambda: asker.ask("server", Count(50)))
    eventually(lambda: len(asker.heard) == 151, "all answers")
    asking.do(lambda: asker.ctx.tell("server", Stop(0)))

    assert asker.heard == [*range(1, 101), *range(50), -1]
    assert process.wait(10) == 0
    assert [path.name for path in nodes.run_dir.iterdir() if path.name.startswith("server")] == []


@pytest.mark.slow
@pytest.mark.guarantee("B38")
def test_a_killed_process_is_replaced_by_a_second_life_that_hears_nothing_old(nodes: Any) -> None:
    process = nodes.serve()
    asking, asker = asking_node(nodes)
    for life in range(2, 8):  # the connections of every life must come up, whatever became of those before
        asking.do(lambda: asker.ask("server", Hold()))
        process.kill()
        process.wait()
        asking.do(lambda: [asker.ctx.tell("server", Number(n)) for n in range(5)])

        asking.do(lambda n=life: asker.ctx.peer_down("server", n - 1, "signal 9 (SIGKILL)"))
        assert asker.errors[-1] is PeerGone
        process = nodes.serve(incarnation=life)
        asking.do(lambda n=life: asker.ctx.connect("server", n))
        eventually(lambda: asker.events[-1] == "up server", f"life {life}: {asker.events}, {asker.ctx.counters()}")
        heard = len(asker.heard)
        asking.do(lambda: asker.ask("server", Number(6)))
        asking.do(lambda: asker.ask("server", Number(7)))

        eventually(lambda n=heard: len(asker.heard) == n + 2, "answers")
        assert asker.heard[-2:] == [7, 8]
        assert dict(asker.ctx.peers()) == {"server": life}


@pytest.mark.slow
@pytest.mark.guarantee("B39")
def test_a_frozen_peer_fills_a_bounded_queue_and_holds_up_no_stop(nodes: Any) -> None:
    process = nodes.serve()
    asking, asker = asking_node(nodes)
    os.kill(process.pid, signal.SIGSTOP)
    accepted = [0]

    def flood() -> None:
        """One loop turn's worth: ends when the out-queue is full."""
        with contextlib.suppress(MailboxFull):
            while True:
                asker.ctx.tell("server", Number(0, bytes(4000)))
                accepted[0] += 1

    before = -1
    while accepted[0] != before:  # until the sockets take no more either
        before = accepted[0]
        asking.do(flood)
        asking.do(lambda: None)
    asking.do(lambda: asker.ask("server", Number(1), timeout_s=0.1))
    eventually(lambda: asker.errors == [DeadlineExceeded], "the ask waited, and ended")
    assert "never sent: server did not take what it was sent before" in str(asker.heard[0])
    asking.do(lambda: asker.ask("server", Number(1)))
    began_s = time.monotonic()
    asking.stop()

    assert time.monotonic() - began_s < 3
    os.kill(process.pid, signal.SIGCONT)


@pytest.mark.slow
@pytest.mark.guarantee("L6")
def test_the_ledger_of_a_killed_process_is_torn_and_readable(nodes: Any, tmp_path: Path) -> None:
    process = nodes.serve(record=tmp_path)
    asking, asker = asking_node(nodes)
    asking.do(lambda: [asker.ask("server", Number(n)) for n in range(20)])
    eventually(lambda: len(asker.heard) == 20, "answers")

    process.kill()
    process.wait()

    ledger = read_ledger(tmp_path / "server.1.ledger")
    asked = [entry for entry in ledger if entry.fields["kind"] == "ASK"]
    assert ledger.torn
    assert ledger.meta["name"] == "server"
    assert len(asked) == 20


FATAL = """
import sys, tempfile
from pathlib import Path
from chipbus.bus import Actor, Node, NodeConfig

class Fatal(Actor):
    def on_start(self):
        self.ctx.after(0.01, self.end)

    def end(self):
        raise {error}

Node(NodeConfig(name="fatal", incarnation=1, run_dir=Path(sys.argv[1])), Fatal()).run()
"""


@pytest.mark.slow
@pytest.mark.guarantee("B32")
@pytest.mark.parametrize("error", ["SystemExit(0)", "MemoryError()"])
def test_a_fatal_exception_in_a_callback_ends_the_process_with_code_70(run_dir: Path, error: str) -> None:
    command = [sys.executable, "-c", FATAL.format(error=error), str(run_dir)]

    assert subprocess.run(command, timeout=30, check=False, capture_output=True).returncode == 70


@pytest.mark.slow
@pytest.mark.guarantee("B44")
def test_an_interrupt_in_a_callback_ends_the_node_and_leaves_nothing(run_dir: Path) -> None:
    command = [sys.executable, "-c", FATAL.format(error="KeyboardInterrupt()"), str(run_dir)]

    ended = subprocess.run(command, timeout=30, check=False, capture_output=True)

    assert b"KeyboardInterrupt" in ended.stderr
    assert list(run_dir.iterdir()) == []
