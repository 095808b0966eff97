"""A run directory of a fixed path: one runtime at a time, and nothing of anybody else's is ever removed."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chipbus.actors import rundir
from chipbus.actors.rundir import RunDirectory, remove_when_free
from chipbus.errors import ConfigError, RunDirectoryInUse, StartFailed
from support import descriptors


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """A short one: paths of sockets have at most 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="r-") as directory:
        yield Path(directory)


@pytest.fixture(autouse=True)
def every_descriptor_is_closed() -> Any:
    before = descriptors()
    yield
    assert descriptors() == before


def test_it_is_made_private_and_removed_with_its_runtime(tmp_path: Path) -> None:
    old_umask = os.umask(0)
    try:
        directory = RunDirectory.create(tmp_path / "run")
    finally:
        os.umask(old_umask)

    assert directory.path.stat().st_mode & 0o777 == 0o700
    assert directory.remove(1) == ()
    assert list(tmp_path.iterdir()) == []


def test_an_empty_private_directory_may_be_there(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir(mode=0o700)

    assert RunDirectory.create(tmp_path / "run").remove(1) == ()


@pytest.mark.guarantee("E40")
def test_a_run_directory_in_use_is_refused_with_the_pid_that_holds_it(tmp_path: Path) -> None:
    first = RunDirectory.create(tmp_path / "run")

    with pytest.raises(RunDirectoryInUse, match=rf"run is in use by the runtime of process {os.getpid()}; close that"):
        RunDirectory.create(tmp_path / "run")

    assert first.remove(1) == ()
    RunDirectory.create(tmp_path / "run").remove(1)


def crashed(path: Path) -> RunDirectory:
    """What a runtime leaves that was killed with all of its processes."""
    dead = RunDirectory.create(path)
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as left:
        left.bind(str(path / "host.1.c"))
    (path / "boot.json").write_text("{}")
    dead.give_up_lock()
    return dead


@pytest.mark.guarantee("E41")
def test_what_a_crashed_runtime_left_is_replaced_and_its_late_cleaner_removes_nothing(tmp_path: Path) -> None:
    dead = crashed(tmp_path / "run")
    grave = tmp_path / ".run.0123456789"  # of a cleaner that was killed
    crashed(grave)

    living = RunDirectory.create(tmp_path / "run")

    assert [path.name for path in living.path.iterdir()] == ["lock"]
    assert list(tmp_path.iterdir()) == [living.path]
    assert remove_when_free(dead.path, 0.0, dead.owner) is True
    assert dead.remove(0.0) == ()
    assert living.path.exists()
    assert living.remove(1) == ()


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (lambda path: path.write_text("mine"), "is no directory"),
        (lambda path: path.symlink_to(path.parent), "is no directory"),
        (lambda path: (path.mkdir(mode=0o700), (path / "thesis.tex").write_text("mine")), "has files and no lock"),
        (lambda path: (path.mkdir(), path.chmod(0o755)), r"mode 0755; it must be ours, mode 0700"),
        (lambda path: None, r"run/below/run cannot be made: No such file"),
    ],
)
def test_what_is_no_run_directory_is_refused_and_let_be(tmp_path: Path, spoil: Any, text: str) -> None:
    spoil(tmp_path / "run")
    path = tmp_path / "run" / "below" / "run" if "below" in text else tmp_path / "run"
    before = sorted(tmp_path.rglob("*"))

    with pytest.raises(ConfigError, match=text):
        RunDirectory.create(path)

    assert sorted(tmp_path.rglob("*")) == before


def test_a_path_too_long_for_sockets_is_refused_with_numbers(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"makes socket paths of \d+ bytes, at most 100 fit; name a shorter path"):
        RunDirectory.create(tmp_path / ("x" * 90))


def test_a_race_for_one_path_has_one_winner(tmp_path: Path) -> None:
    """Eight processes at once, over what a crashed one left; nobody is told anything but that it is in use."""
    crashed(tmp_path / "run")
    code = """
import sys
from pathlib import Path
from chipbus.actors.rundir import RunDirectory
from chipbus.errors import RunDirectoryInUse
print("here", flush=True)
sys.stdin.readline()
try:
    directory = RunDirectory.create(Path(sys.argv[1]))
    print("won", flush=True)
except RunDirectoryInUse:
    print("lost", flush=True)
sys.stdin.read()
"""
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    racers = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) for _ in range(8)
    ]
    for racer in racers:
        assert racer.stdout is not None
        assert racer.stdout.readline() == "here\n"
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("go\n")
    outcomes = [racer.stdout.readline() for racer in racers if racer.stdout is not None]
    for racer in racers:
        racer.communicate(timeout=20)

    assert sorted(outcomes) == ["lost\n"] * 7 + ["won\n"]
    RunDirectory.create(tmp_path / "run").remove(1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("number", "kind", "text"),
    [
        (errno.ENOSPC, ConfigError, "No space left on device: free some, or name a run directory elsewhere"),
        (errno.EDQUOT, ConfigError, "quota exceeded: free some, or name a run directory elsewhere"),
        (errno.EMFILE, StartFailed, "Too many open files: RLIMIT_NOFILE is"),
    ],
)
@pytest.mark.parametrize("call", ["open", "write"])
@pytest.mark.parametrize("is_fixed", [True, False])
def test_a_shortage_is_named_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type, text: str, call: str, is_fixed: bool
) -> None:
    """The failure of one system call is made up; a disk that is really full is in the tests of whole engines."""

    def fail(*_: object, **__: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(rundir, "_parents", lambda: [tmp_path])
    monkeypatch.setattr(rundir, "MAX_PATH_BYTES", 1000)  # the names of these tests are long
    monkeypatch.setattr(rundir.os, call, fail)
    with pytest.raises(kind, match=text):
        RunDirectory.create(tmp_path / "run" if is_fixed else None)
    monkeypatch.undo()

    assert list(tmp_path.iterdir()) == []
