"""A run directory that is taken, a disk that is full, no file descriptors: a sentence each time, and nothing left."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from chipbus import Engine
from chipbus.errors import ConfigError, Overloaded, RunDirectoryInUse, WorkerError
from support import eventually, our_processes

SMALL = {"chip": "null", "log_level": "error"}
OWNER = """
import signal, sys
from chipbus import Engine
if __name__ == "__main__":
    engine = Engine("demo", chip="null", run_dir=sys.argv[1])
    print("ready", flush=True)
    signal.pause()
"""
FULL_DISK = """
import json, subprocess, sys
from pathlib import Path
from chipbus import Engine
from chipbus.errors import ChipbusError
if __name__ == "__main__":
    disk, outcomes = Path(sys.argv[1]), []
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k,nr_inodes=2,mode=700", "tmpfs", disk], check=True)
    for room in range(1, 24):  # files, the disk's own root among them
        subprocess.run(["mount", "-o", f"remount,nr_inodes={room + 1}", disk], check=True)
        try:
            with Engine("demo", chip="null", run_dir=disk / "run", log_level="error") as engine:
                engine.generate("replica")
        except ChipbusError as error:
            outcomes.append([type(error).__name__, str(error)])
        else:
            outcomes.append(["served", ""])
        assert list(disk.iterdir()) == [], list(disk.iterdir())
    print(json.dumps(outcomes))
"""
FEW_DESCRIPTORS = """
import json, os, resource, threading
from chipbus import Engine
from chipbus.errors import ChipbusError
def count():
    return len(os.listdir("/proc/self/fd"))
if __name__ == "__main__":
    with Engine("demo", chip="null", log_level="error") as engine:  # everything is imported after it
        engine.generate("replica")
    before, outcomes = (count(), threading.active_count()), []
    for spare in (*range(0, 30, 2), 200):
        resource.setrlimit(resource.RLIMIT_NOFILE, (before[0] + spare, 4096))
        try:
            with Engine("demo", chip="null", log_level="error") as engine:
                engine.generate("replica")
        except ChipbusError as error:
            outcomes.append([type(error).__name__, str(error)])
        except OSError as error:
            outcomes.append([type(error).__name__, repr(error)])
        else:
            outcomes.append(["served", ""])
        resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))
        assert (count(), threading.active_count()) == before
    print(json.dumps(outcomes))
"""


def outcomes_of(code: str, *arguments: str, prefix: tuple[str, ...] = ()) -> list[list[str]]:
    done = subprocess.run(
        [*prefix, sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    found: list[list[str]] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_a_second_engine_on_a_run_directory_is_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    with Engine("demo", run_dir=tmp_path / "run", **SMALL) as engine:
        with pytest.raises(RunDirectoryInUse, match=f"in use by the runtime of process {os.getpid()}"):
            Engine("demo", run_dir=tmp_path / "run", **SMALL)

        assert engine.generate("replica")[0].outputs[0].text

    assert list(tmp_path.iterdir()) == []


def test_a_run_directory_is_taken_over_from_an_engine_that_was_killed(tmp_path: Path) -> None:
    """Its processes die a moment after it; until the last has, the directory is in use."""
    owner = subprocess.Popen([sys.executable, "-c", OWNER, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    assert owner.stdout.readline() == "ready\n"
    owner.kill()
    owner.communicate()
    engines: list[Engine] = []
    refusals: list[str] = []

    def is_taken_over() -> bool:
        try:
            engines.append(Engine("demo", run_dir=tmp_path / "run", **SMALL))
        except RunDirectoryInUse as error:
            refusals.append(str(error))
        return bool(engines)

    eventually(is_taken_over, "the directory is free")
    assert all(f"process {owner.pid}" in text for text in refusals)
    with engines[0] as engine:
        assert engine.generate("replica")[0].outputs[0].text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.guarantee("E42")
def test_an_engine_on_a_full_disk_says_so_and_leaves_nothing(tmp_path: Path) -> None:
    """A real disk, with room for 1 to 23 files, in a mount namespace of the test's own."""
    unshare = ("unshare", "--user", "--map-root-user", "--mount")
    if subprocess.run([*unshare, "mount", "-t", "tmpfs", "t", tmp_path], capture_output=True, check=False).returncode:
        pytest.skip("this machine lets nobody mount a file system of their own")

    outcomes = outcomes_of(FULL_DISK, str(tmp_path), prefix=unshare)

    kinds = [kind for kind, _ in outcomes]
    assert kinds == ["ConfigError"] * kinds.index("served") + ["served"] * (23 - kinds.index("served"))
    for _, text in outcomes[: kinds.index("served")]:
        assert text.startswith(f"{tmp_path}/run")
        assert text.endswith("cannot be made: No space left on device: free some, or name a run directory elsewhere "
                             "(run_dir)")  # fmt: skip


@pytest.mark.guarantee("E43")
def test_an_engine_without_file_descriptors_names_the_limit_and_leaves_nothing() -> None:
    """Between none and 28 free ones in the host application; the last engine, with enough, serves."""
    *failed, served = outcomes_of(FEW_DESCRIPTORS)

    assert served == ["served", ""]
    assert {kind for kind, _ in failed} == {"StartFailed"}
    assert [text for _, text in failed if "RLIMIT_NOFILE is " not in text] == []


def fails_for_want_of_descriptors(engine: Engine) -> None:
    """Requests may be lost with the process that was killed; in the end they hear why there is no other."""
    heard: list[str] = []

    def has_heard() -> bool:
        with contextlib.suppress(Overloaded):
            try:
                engine.generate("replica")
            except WorkerError as error:
                heard.append(str(error))
        return bool(heard) and "RLIMIT_NOFILE is " in heard[-1]

    eventually(has_heard, "the limit's name", within_s=30)


def test_a_restart_without_file_descriptors_is_given_up_with_the_limits_name() -> None:
    with Engine("demo", max_restarts=2, **SMALL) as engine:
        processes = {record.name: record.pid for record in engine.tree()}
        few = len(list(Path(f"/proc/{processes['supervisor']}/fd").iterdir()))
        resource.prlimit(processes["supervisor"], resource.RLIMIT_NOFILE, (few, 4096))
        os.kill(processes["chip.0.0"], signal.SIGKILL)

        fails_for_want_of_descriptors(engine)


def test_a_warden_without_file_descriptors_refuses_by_the_limits_name() -> None:
    with Engine("demo", max_restarts=2, **SMALL) as engine:
        supervisor = next(record.pid for record in engine.tree() if record.name == "supervisor")
        (warden,) = our_processes() - {record.pid for record in engine.tree()}
        few = len(list(Path(f"/proc/{warden}/fd").iterdir()))
        resource.prlimit(warden, resource.RLIMIT_NOFILE, (few + 1, 4096))
        os.kill(next(record.pid for record in engine.tree() if record.name == "router"), signal.SIGKILL)

        fails_for_want_of_descriptors(engine)
        assert supervisor in our_processes()


def test_a_run_directory_setting_is_checked_before_anything_starts(tmp_path: Path) -> None:
    before = our_processes()

    for wrong, text in (({"run_dir": tmp_path / "no" / "run"}, "cannot be made: No such file"),
                        ({"run_dir": tmp_path / ("x" * 100)}, "at most 100 fit")):  # fmt: skip
        settings: dict[str, Any] = {**SMALL, **wrong}
        with pytest.raises(ConfigError, match=text):
            Engine("demo", **settings)

    assert our_processes() == before
