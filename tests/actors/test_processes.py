"""Process calls, tried on real processes: fate tethers, reaping, groups, descriptors, the run directory."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from chipbus.actors import processes, rundir
from chipbus.actors.processes import ExitStatus, Process, Tether
from chipbus.actors.rundir import RunDirectory, remove_when_free
from chipbus.errors import ConfigError, StartFailed
from support import eventually

OWNER = Path(__file__).parent / "programs" / "owner.py"


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def run_python(code: str, *pass_fds: int) -> Process:
    return processes.spawn([sys.executable, "-P", "-c", code], pass_fds=pass_fds)


def reaped(process: Process) -> ExitStatus:
    """End of a process that is expected to end."""
    assert processes.wait_dead(process.pidfd, 20)
    status = processes.try_reap(process)
    os.close(process.pidfd)
    assert status is not None
    return status


def owned(*modes: str) -> Iterator[tuple[subprocess.Popen[str], list[int], list[int]]]:
    """An owner with children; yields it, the children's pids, and pids of forked copies of it."""
    with subprocess.Popen([sys.executable, "-P", str(OWNER), *modes], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        pids: list[int] = []
        try:
            lines = [owner.stdout.readline().split() for _ in modes]
            pids = [int(line[-1]) for line in lines]
            children = [int(line[0]) for line in lines if len(line) == 1]
            copies = [int(line[1]) for line in lines if len(line) == 2]
            yield owner, children, copies
        finally:
            owner.kill()
            for pid in filter(is_running, pids):
                os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize(
    ("status", "text"),
    [
        (ExitStatus(code=1), "exit code 1"),
        (ExitStatus(code=0), "exit code 0"),
        (ExitStatus(signum=9), "signal 9 (SIGKILL)"),
        (ExitStatus(signum=36), "signal 36"),
        (ExitStatus(), "exit status unknown"),
    ],
)
def test_an_exit_is_worded_the_same_everywhere(status: ExitStatus, text: str) -> None:
    assert status.text == text


@pytest.mark.guarantee("S2")
def test_every_tethered_child_dies_with_its_owner_whatever_it_is_doing() -> None:
    for owner, children, _ in owned("idle", "idle", "idle", "gil", "gil", "stopped", "stopped", "idle"):
        assert len(children) == 8
        owner.kill()
        owner.wait(10)

        eventually(lambda: not any(is_running(pid) for pid in children), "all eight tethered children are dead", 5)  # noqa: B023 (used in this turn)


def test_one_tether_shared_by_three_children_kills_only_the_last() -> None:
    """Why there is one pipe per child: owner and signal belong to the open file description."""
    for owner, children, _ in owned("shared", "shared", "shared"):
        owner.kill()
        owner.wait(10)

        eventually(lambda: not is_running(children[-1]), "the last child to arm is dead")  # noqa: B023
        assert [is_running(pid) for pid in children] == [True, True, False]


def test_a_forked_copy_of_the_owner_does_not_keep_its_children_alive() -> None:
    for owner, children, copies in owned("idle", "idle", "--fork"):
        assert is_running(copies[0])
        owner.kill()
        owner.wait(10)

        eventually(lambda: not any(is_running(pid) for pid in children), "the tethered children are dead")  # noqa: B023
        assert is_running(copies[0])


def test_a_child_whose_owner_died_before_it_could_arm_ends_by_itself() -> None:
    tether = Tether.make()
    tether.cut()
    code = f"from chipbus.actors.processes import live_by_tether; live_by_tether({tether.read_fd})"
    process = run_python(code, tether.read_fd)
    tether.drop_read_end()

    assert reaped(process).code == processes.EXIT_ORPHANED


def test_where_the_kernel_cannot_kill_a_thread_watches_the_tether() -> None:
    tether = Tether.make()
    code = (
        "import sys, signal\n"
        "from chipbus.actors import processes\n"
        "processes._tether_is_armed = lambda fd, signum: False\n"
        "processes.fcntl.F_SETSIG = processes.fcntl.F_GETFD\n"  # leaves the kernel's default, a signal we ignore
        "signal.signal(signal.SIGIO, signal.SIG_IGN)\n"
        f"processes.live_by_tether({tether.read_fd})\n"
        "while True: signal.pause()"
    )
    process = run_python(code, tether.read_fd)
    tether.drop_read_end()
    eventually(lambda: psutil.Process(process.pid).num_threads() == 2, "the second line is up")
    tether.cut()

    assert reaped(process).code == processes.EXIT_ORPHANED


def test_reaping_never_blocks_and_only_ever_takes_our_own_child() -> None:
    process = run_python("import signal; signal.pause()")
    assert processes.try_reap(process) is None
    assert not processes.is_dead(process.pidfd)

    processes.signal_group(process, signal.SIGTERM)
    assert processes.wait_dead(process.pidfd, 10)
    status = processes.try_reap(process)
    assert status is not None
    assert status.text == "signal 15 (SIGTERM)"
    with pytest.raises(ChildProcessError):
        processes.try_reap(process)
    processes.signal_group(process, signal.SIGKILL)  # to nobody, and certainly not to a recycled pid
    os.close(process.pidfd)


def test_a_group_is_signalled_whole_and_what_outlives_its_leader_is_killed_with_the_reap() -> None:
    read_fd, write_fd = os.pipe()
    code = (
        "import os, subprocess, signal, sys\n"
        "p = subprocess.Popen(['sleep', '60'])\n"
        f"os.write({write_fd}, f'{{p.pid}}\\n'.encode())\n"
        "sys.stdin.read()\n"
        "os._exit(4)"
    )
    process = run_python(code, write_fd)
    os.close(write_fd)
    with os.fdopen(read_fd) as pipe:
        grandchild = int(pipe.readline())

    assert reaped(process).code == 4
    eventually(lambda: not is_running(grandchild), "the grandchild was killed with its group")


def test_a_process_inherits_no_descriptor_it_was_not_given() -> None:
    secret_fd, given_fd = os.open("/dev/null", os.O_RDONLY), os.open("/dev/null", os.O_RDONLY)
    os.set_inheritable(secret_fd, True)
    code = (
        f"import os, sys; os.fstat({given_fd})\n"
        "if sys.stdin.read() or os.getsid(0) != os.getpid(): sys.exit(4)\n"
        f"try: os.fstat({secret_fd})\n"
        "except OSError: sys.exit(0)\n"
        "sys.exit(5)"
    )
    process = run_python(code, given_fd)
    os.close(secret_fd)
    os.close(given_fd)

    assert reaped(process).code == 0


def test_descriptors_travel_with_a_message_and_a_closed_end_reads_as_empty() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        read_fd, write_fd = os.pipe()
        processes.send_with_fds(ours, b"here", (read_fd,))
        os.close(read_fd)
        message, (received,) = processes.receive_with_fds(theirs)
        os.write(write_fd, b"x")
        assert (message, os.read(received, 1)) == (b"here", b"x")
        assert not os.get_inheritable(received)
        os.close(received)
        os.close(write_fd)
        ours.close()
        assert processes.receive_with_fds(theirs) == (b"", [])


def test_a_supervisor_that_cannot_be_executed_is_a_typed_error(tmp_path: Path) -> None:
    fds = len(list(Path("/proc/self/fd").iterdir()))
    for command in (("/no/such/python",), ("",)):
        with pytest.raises(StartFailed, match=r"cannot start the supervisor|sys\.executable is empty"):
            processes.spawn_supervisor(tmp_path / "boot.json", 2, command)
    assert len(list(Path("/proc/self/fd").iterdir())) == fds


def test_a_run_directory_is_private_short_and_locked_until_nobody_uses_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rundir, "_parents", lambda: [Path("/tmp")])
    old_umask = os.umask(0)
    try:
        directory = RunDirectory.create()
    finally:
        os.umask(old_umask)
    assert directory.path.stat().st_mode & 0o777 == 0o700
    (directory.path / "router.1.c").write_text("")
    user = run_python("import sys; sys.stdin.read(); import signal; signal.pause()", directory.lock_fd)
    directory.give_up_lock()

    another = RunDirectory.create()  # its janitor must leave the one in use alone
    assert directory.path.exists()
    assert another.remove(5) == ()
    processes.signal_group(user, signal.SIGKILL)
    reaped(user)
    assert directory.remove(5) == ()
    assert not directory.path.exists()
    assert directory.remove(5) == ()


def test_a_directory_still_in_use_at_the_deadline_is_removed_and_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rundir, "_parents", lambda: [Path("/tmp")])
    directory = RunDirectory.create()

    assert remove_when_free(directory.path, 0.05, directory.owner) is False
    assert not directory.path.exists()
    directory.give_up_lock()


def test_the_next_runtime_removes_what_a_dead_one_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rundir, "_parents", lambda: [Path("/tmp")])
    dead = RunDirectory.create()
    dead.give_up_lock()  # as if every process of it had been killed

    living = RunDirectory.create()

    assert not dead.path.exists()
    assert living.remove(1) == ()


def test_a_parent_directory_too_long_for_sockets_is_refused_with_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long, missing = tmp_path / ("x" * 90), tmp_path.parent / "none"
    monkeypatch.setattr(rundir, "_parents", lambda: [long, missing])

    with pytest.raises(ConfigError, match=r"makes socket paths of \d+ bytes, at most 100 fit; .*TMPDIR"):
        RunDirectory.create()
    monkeypatch.undo()
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/tmp")
    assert rundir._parents()[0] == Path("/tmp")
