"""Real wardens, asked by hand: what they fork, how they tell of deaths, what they leave when their owner is gone."""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest

from chipbus.actors import processes
from chipbus.actors.boot import Boot, ChildSpec
from chipbus.actors.messages.warden import Exited, Preloaded, Spawned, SpawnRefused
from chipbus.actors.processes import Process, Tether
from chipbus.actors.rundir import RunDirectory
from chipbus.actors.wardens import Warden
from support import eventually

COMMAND = (sys.executable, "-P", str(Path(__file__).parent / "programs" / "warden.py"))
M = TypeVar("M")
StartWarden = Callable[..., "Talk"]


class Talk:
    """A warden, its run directory, and everything it has said."""

    def __init__(self, directory: RunDirectory, preload: str, children: tuple[ChildSpec, ...]) -> None:
        self.directory = directory
        boot = Boot(run_dir=str(directory.path), host_pid=os.getpid(), children=children, log_level="error")
        self.warden = Warden(preload, boot.write(), directory.lock_fd, COMMAND)
        self.heard: list[Any] = []
        self.pidfds: list[int] = []
        self.tethers: dict[str, Tether] = {}
        self.has_ended = False

    def hear(self, kind: type[M]) -> M:
        """The next message of ``kind``; earlier ones of other kinds stay in ``heard``."""
        deadline_s = time.monotonic() + 20
        while True:
            for position, message in enumerate(self.heard):
                if isinstance(message, kind):
                    del self.heard[position]
                    return message
            assert time.monotonic() < deadline_s, f"no {kind.__name__}, only {self.heard}"
            self.listen()

    def listen(self) -> None:
        """Wait for it to say something, and note that in ``heard``, in its order."""
        assert select.select([self.warden.fd], [], [], 20)[0]
        for message, pidfd in self.warden.receive():
            self.heard.append(message)
            if pidfd >= 0:
                self.pidfds.append(pidfd)

    def spawn(self, name: str, incarnation: int = 1) -> Process:
        self.tethers[name] = Tether.make()
        self.warden.request(name, incarnation, self.tethers[name])
        spawned = self.hear(Spawned)
        assert (spawned.name, spawned.incarnation) == (name, incarnation)
        return Process(spawned.pid, self.pidfds[-1])

    def reaped(self) -> processes.ExitStatus:
        assert processes.wait_dead(self.warden.process.pidfd, 20)
        status = processes.try_reap(self.warden.process)
        assert status is not None
        self.warden.ended()
        self.has_ended = True
        return status

    def close(self) -> None:
        if not self.has_ended:
            self.warden.kill()
            self.reaped()
        for tether in self.tethers.values():
            tether.drop_read_end()
            tether.cut()
        for pidfd in self.pidfds:
            os.close(pidfd)


@pytest.fixture
def start_warden() -> Iterator[StartWarden]:
    fds = len(list(Path("/proc/self/fd").iterdir()))
    directory = RunDirectory.create()
    talks: list[Talk] = []

    def start(preload: str, *children: ChildSpec) -> Talk:
        talks.append(Talk(directory, preload, children))
        return talks[-1]

    yield start
    for talk in talks:
        talk.close()
    assert directory.remove(10) == ()
    assert len(list(Path("/proc/self/fd").iterdir())) == fds
    assert psutil.Process().children() == []


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def silent(directory: Path | None = None, **config: Any) -> ChildSpec:
    return ChildSpec(name="router", kind="silent", config=config)


def test_a_child_is_forked_with_hygiene(start_warden: StartWarden, tmp_path: Path) -> None:
    answer = tmp_path / "answer"
    talk = start_warden("light", ChildSpec(name="router", kind="listing", config={"ready_file": str(answer)}))
    assert talk.hear(Preloaded).error == ""
    talk.spawn("router")

    assert talk.hear(Exited).code == 0
    fds, is_leader, threads = answer.read_text().split("|")
    # stdio, tether, lock and last words, and the descriptor of the listing itself
    assert len(fds.split(",")) == 7
    assert (is_leader, threads) == ("True", "1")


def test_a_child_bears_its_name_and_computes_at_a_lower_priority(start_warden: StartWarden, tmp_path: Path) -> None:
    answer = tmp_path / "answer"
    spec = ChildSpec(name="chip.0.0", kind="silent", preload="nice", config={"ready_file": str(answer)})
    talk = start_warden("nice", spec)
    child = talk.spawn("chip.0.0")
    eventually(lambda: answer.exists() and answer.read_text() != "", "the child runs")

    pid, nice, comm = answer.read_text().split()
    assert (int(pid), comm) == (child.pid, "chip.0.0")
    assert int(nice) == os.nice(0) + 5


@pytest.mark.guarantee("S3")
def test_a_child_that_dies_at_once_gives_its_status_and_exactly_one_death(start_warden: StartWarden) -> None:
    talk = start_warden("light", ChildSpec(name="router", kind="brief", config={"code": 7}))
    for incarnation in range(1, 21):
        talk.spawn("router", incarnation)
        exited = talk.hear(Exited)
        assert (exited.name, exited.incarnation, exited.code, exited.signum) == ("router", incarnation, 7, None)
        talk.tethers["router"].cut()
    talk.warden.leave()

    assert talk.reaped().text == "exit code 0"
    assert [m for m in talk.heard if isinstance(m, Exited)] == []


def test_a_killed_child_is_reaped_with_its_signal_and_its_grandchildren(
    start_warden: StartWarden, tmp_path: Path
) -> None:
    answer = tmp_path / "answer"
    talk = start_warden("light", silent(ready_file=str(answer), leaves_a_grandchild=True))
    child = talk.spawn("router")
    eventually(lambda: answer.exists() and answer.read_text().isdecimal(), "the grandchild runs")
    os.kill(child.pid, signal.SIGKILL)

    exited = talk.hear(Exited)
    assert (exited.code, exited.signum) == (None, signal.SIGKILL)
    eventually(lambda: not is_running(int(answer.read_text())), "the grandchild is gone")


@pytest.mark.guarantee("S80")
def test_a_warden_deals_with_a_death_before_it_starts_the_next_life(start_warden: StartWarden, tmp_path: Path) -> None:
    answer = tmp_path / "answer"
    talk = start_warden("light", silent(ready_file=str(answer), leaves_a_grandchild=True))
    talk.hear(Preloaded)
    child = talk.spawn("router")
    eventually(lambda: answer.exists() and answer.read_text().isdecimal(), "the grandchild runs")
    grandchild = int(answer.read_text())
    warden = psutil.Process(talk.warden.process.pid)
    warden.suspend()
    eventually(lambda: warden.status() == psutil.STATUS_STOPPED, "the warden hears of nothing")
    os.kill(child.pid, signal.SIGKILL)
    assert processes.wait_dead(child.pidfd, 20)
    talk.tethers["router"].cut()
    talk.tethers["router"] = Tether.make()
    talk.warden.request("router", 2, talk.tethers["router"])
    warden.resume()  # now it hears of both at once

    while len(talk.heard) < 2:
        talk.listen()
    assert [(type(message), message.incarnation) for message in talk.heard] == [(Exited, 1), (Spawned, 2)]
    eventually(lambda: not is_running(grandchild), "what the first life left in its group is gone")


def test_the_last_words_of_a_child_come_with_its_status(start_warden: StartWarden) -> None:
    talk = start_warden(
        "light",
        ChildSpec(name="router", kind="refusing"),
        ChildSpec(name="chip.0.0", kind="refusing", config={"untyped": True}),
        ChildSpec(name="chip.0.1", kind="nonsense"),
    )
    talk.spawn("router")
    typed = talk.hear(Exited)
    talk.spawn("chip.0.0")
    untyped = talk.hear(Exited)
    talk.spawn("chip.0.1")
    unknown = talk.hear(Exited)

    assert (typed.code, typed.error, typed.text) == (1, "CheckpointError", "no config.json in /models/none")
    assert (untyped.code, untyped.error) == (1, "StartFailed")
    assert untyped.text.startswith("ZeroDivisionError: xxx")
    assert (unknown.error, unknown.text[:41]) == ("ConfigError", "there is no kind of child 'nonsense'; kno")


def test_only_children_of_the_boot_file_can_be_made(start_warden: StartWarden) -> None:
    talk = start_warden("light", silent())
    tether = talk.tethers["stranger"] = Tether.make()
    talk.warden.request("stranger", 1, tether)

    assert "names no child 'stranger'" in talk.hear(SpawnRefused).text
    assert not talk.warden.owes("stranger", 1)


def test_a_request_made_during_the_imports_waits_and_can_be_withdrawn(start_warden: StartWarden) -> None:
    talk = start_warden("light", silent(), ChildSpec(name="chip.0.0", kind="silent"))
    for name in ("router", "chip.0.0"):
        talk.tethers[name] = Tether.make()
        talk.warden.request(name, 1, talk.tethers[name])

    assert talk.warden.withdraw("router", 1)
    assert talk.hear(Spawned).name == "chip.0.0"
    assert not talk.warden.withdraw("chip.0.0", 1)


@pytest.mark.guarantee("S4")
def test_a_preload_that_starts_a_thread_makes_children_be_executed_instead_of_forked(start_warden: StartWarden) -> None:
    talk = start_warden("threaded", ChildSpec(name="router", kind="refusing", preload="threaded"))
    talk.tethers["router"] = Tether.make()
    talk.warden.request("router", 1, talk.tethers["router"])

    assert talk.hear(Spawned).is_forked is False
    exited = talk.hear(Exited)
    assert (exited.code, exited.text) == (1, "no config.json in /models/none")


def test_a_preload_that_cannot_be_imported_is_named(start_warden: StartWarden) -> None:
    talk = start_warden("broken", silent())

    preloaded = talk.hear(Preloaded)
    assert preloaded.text == "warden broken cannot import is_broken: RuntimeError: no such accelerator"
    assert talk.reaped().text == "exit code 1"


def test_a_cut_tether_kills_the_child_even_while_it_is_stopped(start_warden: StartWarden) -> None:
    talk = start_warden("light", silent())
    child = talk.spawn("router")
    os.kill(child.pid, signal.SIGSTOP)
    talk.tethers["router"].cut()

    assert talk.hear(Exited).signum == signal.SIGKILL


def test_the_light_warden_outlives_its_supervisor_kills_its_children_and_cleans_up(start_warden: StartWarden) -> None:
    talk = start_warden("light", silent(), ChildSpec(name="chip.0.0", kind="silent"))
    children = [talk.spawn("router"), talk.spawn("chip.0.0")]
    (talk.directory.path / "router.1.c").write_text("")
    talk.directory.give_up_lock()
    os.kill(talk.warden.process.pid, signal.SIGSTOP)
    talk.warden._link.close()  # this and the next line are what the death of a supervisor does
    talk.warden._tether.cut()

    assert processes.wait_dead(talk.warden.process.pidfd, 10)
    assert all(processes.is_dead(child.pidfd) for child in children)
    assert not talk.directory.path.exists()


def test_any_other_warden_dies_with_its_supervisor(start_warden: StartWarden) -> None:
    talk = start_warden("nice", silent())
    talk.hear(Preloaded)
    talk.warden._tether.cut()

    assert talk.reaped().text == "signal 9 (SIGKILL)"
    assert talk.directory.path.exists()


@pytest.mark.slow
def test_children_forked_after_importing_torch_can_compute_with_two_threads(start_warden: StartWarden) -> None:
    names = [f"chip.0.{index}" for index in range(3)]
    talk = start_warden("torch", *(ChildSpec(name=name, kind="multiplying", preload="torch") for name in names))
    for name in names:
        talk.spawn(name)

    assert [talk.hear(Exited).code for _ in names] == [0, 0, 0]
