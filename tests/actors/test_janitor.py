"""What a dead run left running is ended by its journal, and only what is certain to be of that run."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from supervised import Host, tree_of_four

from chipbus.actors.journal import Journal, Life, read_journal
from chipbus.actors.messages.tree import TreeReady
from chipbus.actors.processes import RUN_VARIABLE, environment_of, start_time
from chipbus.actors.rundir import RunDirectory

TOKEN = "f00d"
Sleeper = subprocess.Popen[bytes]


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where run directories are made, short enough for sockets."""
    with tempfile.TemporaryDirectory(dir="/tmp") as path:
        monkeypatch.setenv("XDG_RUNTIME_DIR", path)
        yield Path(path)


@pytest.fixture
def sleep() -> Iterator[Callable[[str, int], Sleeper]]:
    """Starts processes that sleep, with a run's token and its lock."""
    sleepers: list[Sleeper] = []

    def start(token: str, lock_fd: int) -> Sleeper:
        environment = {**os.environ, RUN_VARIABLE: token}
        sleepers.append(subprocess.Popen(["sleep", "60"], env=environment, pass_fds=(lock_fd,)))
        return sleepers[-1]

    yield start
    for sleeper in sleepers:
        sleeper.kill()
        sleeper.wait()


def start_of(process: Sleeper) -> int:
    start = start_time(process.pid)
    assert start is not None
    return start


def gone() -> Life:
    """A process that was, and is no more."""
    with subprocess.Popen(["true"]) as process:
        process.wait()
    return Life("supervisor", 1, process.pid, 1)


def leave_run(home: Path, owners: tuple[Life, ...], lines: list[dict[str, object]]) -> tuple[Path, int]:
    """A run directory with a journal, and its lock's descriptor."""
    path = home / "chipbus-0123456789"
    path.mkdir(mode=0o700)
    lock_fd = os.open(path / "lock", os.O_CREAT | os.O_RDWR)
    fcntl.flock(lock_fd, fcntl.LOCK_EX)
    os.write(lock_fd, b"1 0123")
    begun = {"type": "begun", "token": TOKEN, "owners": owners}
    (path / "journal").write_bytes(b"".join(msgspec.json.encode(line) + b"\n" for line in [begun, *lines]))
    return path, lock_fd


def made(process: Sleeper, start: int) -> dict[str, object]:
    return {"type": "made", "name": "chip.0.0", "incarnation": 1, "pid": process.pid, "start": start}


def next_run() -> None:
    """What an engine does first, and last."""
    assert RunDirectory.create().remove(5.0) == ()


@pytest.mark.guarantee("S34")
def test_the_next_start_ends_what_a_dead_run_left_running_and_nothing_it_only_resembles(
    home: Path, sleep: Callable[[str, int], Sleeper]
) -> None:
    path, lock_fd = leave_run(home, (gone(), gone()), [])
    null_fd = os.open("/dev/null", os.O_RDONLY)
    orphan = sleep(TOKEN, lock_fd)
    younger, tokenless, other, reaped, unnamed = (sleep(token, null_fd) for token in (TOKEN, "", "beef", TOKEN, TOKEN))
    lines = [
        made(orphan, start_of(orphan)),
        made(younger, start_of(younger) - 1),
        made(tokenless, start_of(tokenless)),
        made(other, start_of(other)),
        made(reaped, start_of(reaped)),
        {"type": "reaped", "pid": reaped.pid, "start": start_of(reaped)},
    ]
    with (path / "journal").open("ab") as journal:
        journal.write(b"".join(msgspec.json.encode(line) + b"\n" for line in lines) + b'{"type": "ma')
    os.close(lock_fd)
    os.close(null_fd)

    next_run()

    assert orphan.wait(10) == -signal.SIGKILL
    assert [process.poll() for process in (younger, tokenless, other, reaped, unnamed)] == [None] * 5
    assert not path.exists()


@pytest.mark.parametrize("owner", ["host", "supervisor"])
def test_a_run_whose_host_or_supervisor_lives_is_let_be(
    home: Path, sleep: Callable[[str, int], Sleeper], owner: str
) -> None:
    living = Life(owner, 1, os.getpid(), start_time(os.getpid()) or 0)
    path, lock_fd = leave_run(home, (gone(), living), [])
    child = sleep(TOKEN, lock_fd)
    with (path / "journal").open("ab") as journal:
        journal.write(msgspec.json.encode(made(child, start_of(child))) + b"\n")
    os.close(lock_fd)

    next_run()

    assert child.poll() is None
    assert path.exists()


@pytest.mark.parametrize("content", [None, b"", b"nonsense\n", b'{"type": "begun", "token": "", "owners": []}\n'])
def test_without_a_journal_that_can_be_read_nothing_is_touched(
    home: Path, sleep: Callable[[str, int], Sleeper], content: bytes | None
) -> None:
    path, lock_fd = leave_run(home, (), [])
    (path / "journal").unlink()
    if content is not None:
        (path / "journal").write_bytes(content)
    child = sleep("", lock_fd)
    os.close(lock_fd)

    next_run()

    assert child.poll() is None
    assert path.exists()


def test_the_supervisor_keeps_the_journal_of_its_processes(home: Path) -> None:
    with Host(*tree_of_four()) as host:
        host.hear(TreeReady)
        os.kill(host.record("router").pid, signal.SIGKILL)
        host.record("router", incarnation=2)

        run = read_journal(host.directory.path)
        assert run is not None
        assert run.token == host.directory.token != ""
        assert [(owner.name, owner.pid) for owner in run.owners] == [
            ("host", os.getpid()),
            ("supervisor", host.handle.pid),
        ]
        assert {(life.name, life.incarnation) for life in run.living} == {
            ("warden.light", 1), ("tokenizer.0", 1), ("router", 2), ("replica.0", 1), ("chip.0.0", 1),
        }  # fmt: skip
        for life in (*run.living, run.owners[1]):
            assert start_time(life.pid) == life.start
            assert environment_of(life.pid)[RUN_VARIABLE] == run.token


def test_a_journal_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "none", TOKEN, os.getpid())
    journal.made("router", 1, os.getpid())
    journal.reaped(os.getpid())

    assert read_journal(tmp_path / "none") is None
