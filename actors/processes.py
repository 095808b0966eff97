"""Every process call of chipbus: start, fate tether, watch, signal, reap, and what a fresh process does to itself.

Owns: nothing but the registry of tethers a host application holds. No function here waits for a process without a
deadline. Linux only (5.3 or later): pidfds and ``F_SETSIG``.

A *tether* is a pipe whose only write end is its owner's. The holder of the read end asks the kernel for SIGKILL when
that end closes, so it dies with its owner, even while stopped or while it holds the GIL. One pipe per holder: owner
and signal belong to the open file description, so a shared pipe would protect only the last process that armed it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import attrs

from ..errors import StartFailed

__all__ = [
    "EXIT_FAILED",
    "EXIT_ORPHANED",
    "RUN_VARIABLE",
    "SUPERVISOR_COMMAND",
    "ExitStatus",
    "Process",
    "SupervisorHandle",
    "Tether",
    "arm_tether",
    "become_subreaper",
    "close_inherited_fds",
    "count_threads",
    "environment_of",
    "exit_status",
    "fork",
    "is_dead",
    "live_by_tether",
    "lower_priority",
    "open_pidfd",
    "reap_any",
    "receive_with_fds",
    "reset_signals",
    "send_with_fds",
    "set_process_name",
    "signal_group",
    "signal_process",
    "spawn",
    "spawn_supervisor",
    "start_session",
    "start_time",
    "tether_is_cut",
    "try_reap",
    "wait_dead",
    "watch_signals",
]

EXIT_FAILED = 1
"""A process of ours ended because its start, or its actor, failed; the reason was published before."""
EXIT_ORPHANED = 69
"""A process of ours found its owner already dead (sysexits: service unavailable)."""

RUN_VARIABLE = "CHIPBUS_RUN"
"""In the environment of the supervisor and of every process below it: the token of their run."""

SUPERVISOR_COMMAND: tuple[str, ...] = (sys.executable, "-P", "-m", "chipbus.actors.supervise")
"""What ``spawn_supervisor`` executes, before its arguments."""

_PIDFD_SIGNAL_PROCESS_GROUP = 1 << 2  # Linux 6.9; older kernels answer EINVAL
_PR_SET_CHILD_SUBREAPER = 36
_MAX_MESSAGE_BYTES = 64 * 1024
_MAX_FDS = 8


@attrs.frozen
class ExitStatus:
    """How a process ended: by itself with ``code``, or by signal ``signum``; both None if nobody could tell."""

    code: int | None = None
    signum: int | None = None

    @property
    def text(self) -> str:
        """``"exit code 1"``, ``"signal 9 (SIGKILL)"`` or ``"exit status unknown"``: the wording used everywhere."""
        if self.signum is not None:
            try:
                return f"signal {self.signum} ({signal.Signals(self.signum).name})"
            except ValueError:  # real-time signals have numbers but no names
                return f"signal {self.signum}"
        return "exit status unknown" if self.code is None else f"exit code {self.code}"


@attrs.frozen
class Process:
    """A process we started and have not reaped: its pid stays ours until then, its pidfd for ever."""

    pid: int
    pidfd: int


# Starting.


def spawn(argv: Sequence[str], *, pass_fds: Iterable[int], env: Mapping[str, str] | None = None) -> Process:
    """Execute ``argv`` in a session and process group of its own.

    It inherits stderr and ``pass_fds`` under their numbers, nothing else: stdin is empty, and stdout goes to stderr,
    because the standard output of a host application belongs to that application. Raises ``OSError``.
    """
    try:
        os.fstat(2)
        output: int | None = 2
    except OSError:  # a daemon may have closed it
        output = subprocess.DEVNULL
    child = subprocess.Popen(  # noqa: S603 (argv is built by us from constants and paths)
        list(argv),
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        close_fds=True,
        pass_fds=tuple(pass_fds),
        start_new_session=True,
        env=None if env is None else dict(env),
    )
    # The reap is ours: a Popen that believes its child alive would wait for it from its finaliser, at any moment.
    child.returncode = 0
    return Process(child.pid, os.pidfd_open(child.pid))


def fork(child_main: Callable[[], NoReturn]) -> Process:
    """Fork; the child runs ``child_main`` and can never come back into the caller's code.

    May be called only by a process with one thread: a lock held by another thread would stay locked in the child.
    """
    assert count_threads() == 1, "only a process with one thread may fork"
    pid = os.fork()
    if pid == 0:
        try:
            child_main()
        finally:
            os._exit(EXIT_FAILED)
    return Process(pid, os.pidfd_open(pid))


def count_threads() -> int:
    """Threads of this process, as the kernel counts them: a library's own threads too."""
    return len(list(Path("/proc/self/task").iterdir()))


def close_inherited_fds(keep: Iterable[int]) -> None:
    """Close every descriptor but stdin, stdout, stderr and ``keep``."""
    kept = {0, 1, 2, *keep}
    for fd in [int(entry.name) for entry in Path("/proc/self/fd").iterdir()]:  # a range could be a milliard
        if fd not in kept:
            with contextlib.suppress(OSError):  # the listing's own descriptor is already closed
                os.close(fd)


def reset_signals() -> None:
    """Give a forked child the signal handling of a fresh process, except that Ctrl-C is the supervisor's business."""
    signal.set_wakeup_fd(-1)
    for signum in (signal.SIGTERM, signal.SIGCHLD):
        signal.signal(signum, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def lower_priority() -> None:
    """Nice +5 for a process that computes, so that on a full machine the bus threads of the others still answer."""
    os.nice(5)


def set_process_name(name: str) -> None:
    """What ``ps`` and ``top`` show for this process; the kernel keeps 15 bytes."""
    with contextlib.suppress(OSError):  # cosmetic: /proc may be read-only
        Path("/proc/self/comm").write_bytes(name.encode()[:15])


def start_session() -> None:
    """Make the calling (forked) process leader of a session and process group of its own."""
    os.setsid()


def become_subreaper() -> None:
    """Adopt orphaned descendants of this process, so that it can reap them. Raises ``OSError``."""
    import ctypes  # only the supervisor needs it; Python has no prctl

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def watch_signals(signums: Iterable[int]) -> int:
    """Return a descriptor that yields the number of each of ``signums`` as one byte when it arrives. Main thread only.

    It is non-blocking and lives as long as the process.
    """
    read_fd, write_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.set_wakeup_fd(write_fd, warn_on_full_buffer=False)
    for signum in signums:
        signal.signal(signum, lambda *_: None)  # must be handled in Python for the wake-up to happen
        signal.siginterrupt(signum, False)
    return read_fd


# Fate.

_host_tethers: weakref.WeakSet[Tether] = weakref.WeakSet()
_fork_hook_lock = threading.Lock()
_fork_hook_installed = False


def _cut_in_forked_copy() -> None:
    """A forked copy of the host application must not keep the supervisor of the original alive."""
    for tether in list(_host_tethers):
        tether.cut()


@attrs.define(eq=False)
class Tether:
    """The owner's side of one tether: send ``read_fd`` to one process, drop it here; ``cut`` kills that process."""

    read_fd: int
    write_fd: int

    @classmethod
    def make(cls) -> Tether:
        """Open a fresh tether. One tether protects one process."""
        read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
        return cls(read_fd, write_fd)

    @classmethod
    def make_in_host(cls) -> Tether:
        """Open a tether in a process that may fork without exec: copies of the write end are closed in the fork."""
        global _fork_hook_installed
        with _fork_hook_lock:
            if not _fork_hook_installed:
                os.register_at_fork(after_in_child=_cut_in_forked_copy)
                _fork_hook_installed = True
        tether = cls.make()
        _host_tethers.add(tether)
        return tether

    def drop_read_end(self) -> None:
        """Close our copy of the read end, once the process has its own. Idempotent."""
        fd, self.read_fd = self.read_fd, -1
        if fd >= 0:
            os.close(fd)

    def cut(self) -> None:
        """Close the write end: the kernel kills whoever armed the read end. Idempotent."""
        fd, self.write_fd = self.write_fd, -1
        if fd >= 0:
            os.close(fd)


def tether_is_cut(fd: int) -> bool:
    """Whether the owner of the tether behind read end ``fd`` has ended, or cut it. Never blocks."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))


def arm_tether(fd: int, pid: int, signum: int = signal.SIGKILL) -> bool:
    """Have the kernel send ``signum`` to ``pid`` when the owner of the tether behind read end ``fd`` ends.

    Whoever starts a process may arm its tether right away: then it is bound even if it never gets to run. Whether the
    kernel accepted it.
    """
    try:
        fcntl.fcntl(fd, fcntl.F_SETOWN, pid)
        fcntl.fcntl(fd, fcntl.F_SETSIG, signum)
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_ASYNC)
        return _tether_is_armed(fd, signum)
    except OSError:
        return False


def live_by_tether(fd: int) -> None:
    """Die with the owner of the tether behind read end ``fd``; if it is already dead, end here and now.

    The kernel delivers SIGKILL. Where it does not accept that (checked by reading it back), a daemon thread waits for
    the tether instead; that needs the GIL, so a stuck process then dies late.
    """
    is_armed = arm_tether(fd, os.getpid())
    if tether_is_cut(fd):  # the owner may have died before the kernel knew whom to tell
        os._exit(EXIT_ORPHANED)
    if not is_armed:
        threading.Thread(target=_end_with_tether, args=(fd,), name="tether", daemon=True).start()


def _tether_is_armed(fd: int, signum: int) -> bool:
    has_signal = fcntl.fcntl(fd, fcntl.F_GETSIG) == signum
    return has_signal and bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ASYNC)


def _end_with_tether(fd: int) -> None:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    poll.poll()
    os._exit(EXIT_ORPHANED)


# Watching, signalling, reaping.


def open_pidfd(pid: int) -> int:
    """A descriptor that becomes readable, for good, when process ``pid`` ends. Raises ``ProcessLookupError``."""
    return os.pidfd_open(pid)


def start_time(pid: int) -> int | None:
    """When that process started, in clock ticks since boot; None if there is none, or it has ended and waits."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    state, *fields = stat[stat.rindex(")") + 2 :].split()  # from the third field on; a name may hold anything
    return None if state in "ZX" else int(fields[18])


def environment_of(pid: int) -> dict[str, str]:
    """The environment that process was executed with; empty if it is not ours to read."""
    try:
        entries = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return {}
    pairs = (os.fsdecode(entry).partition("=") for entry in entries)
    return {name: value for name, _, value in pairs}


def is_dead(pidfd: int) -> bool:
    """Whether the process behind ``pidfd`` has ended, reaped or not. Never blocks."""
    return wait_dead(pidfd, 0.0)


def wait_dead(pidfd: int, timeout_s: float) -> bool:
    """Wait until the process behind ``pidfd`` has ended, at most ``timeout_s``; whether it has."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(max(0.0, timeout_s) * 1e3))


def signal_group(process: Process, signum: int) -> None:
    """Send ``signum`` to the process and to the group it leads. Nothing happens if both are gone."""
    with contextlib.suppress(ProcessLookupError):
        try:
            signal.pidfd_send_signal(process.pidfd, signum, None, _PIDFD_SIGNAL_PROCESS_GROUP)
        except OSError as error:
            if isinstance(error, ProcessLookupError):
                pass  # it leads no group yet: forked a moment ago
            elif not is_dead(process.pidfd):  # before Linux 6.9: a living leader's pid cannot be another's group
                os.killpg(process.pid, signum)
    signal_process(process, signum)


def signal_process(process: Process, signum: int) -> None:
    """Send ``signum`` to the process alone. Nothing happens if it is gone."""
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(process.pidfd, signum)


def exit_status(process: Process) -> ExitStatus | None:
    """How our child ended, which is still to be reaped, or None while it lives. Never blocks.

    Raises ``ChildProcessError`` if it is not (or no longer, or not yet) a child of this process.
    """
    ended = os.waitid(os.P_PIDFD, process.pidfd, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    return None if ended is None else _status(ended)


def try_reap(process: Process) -> ExitStatus | None:
    """Take the status of our ended child, or None while it lives. Never blocks.

    Whatever it left behind in its process group is killed first: until the reap its pid cannot be another's group.
    Raises what ``exit_status`` raises.
    """
    status = exit_status(process)
    if status is not None:
        _kill_rest_of_group(process.pid)
        os.waitid(os.P_PIDFD, process.pidfd, os.WEXITED | os.WNOHANG)
    return status


def reap_any() -> tuple[int, ExitStatus] | None:
    """Take the status of any ended child, or None if there is none. Never blocks.

    Only for a process all of whose children are ours (the supervisor), never for a host application.
    """
    with contextlib.suppress(ChildProcessError):
        ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if ended is not None:
            _kill_rest_of_group(ended.si_pid)
            os.waitid(os.P_PID, ended.si_pid, os.WEXITED | os.WNOHANG)
            return ended.si_pid, _status(ended)
    return None


def _kill_rest_of_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _status(ended: os.waitid_result) -> ExitStatus:
    if ended.si_code == os.CLD_EXITED:
        return ExitStatus(code=ended.si_status)
    return ExitStatus(signum=ended.si_status)


# Descriptors over a socket.


def send_with_fds(link: socket.socket, message: bytes, fds: Sequence[int] = ()) -> None:
    """Send one message and copies of ``fds`` over a seqpacket socket. Raises ``OSError`` if it is full or cut."""
    assert len(message) <= _MAX_MESSAGE_BYTES
    socket.send_fds(link, [message], list(fds), socket.MSG_NOSIGNAL)


def receive_with_fds(link: socket.socket) -> tuple[bytes, list[int]]:
    """Receive one message and its descriptors, which now belong to the caller. ``b""`` means: the peer is gone.

    Without room for all descriptors there are none, and the message all the same.
    Raises ``BlockingIOError`` on a non-blocking socket with nothing to read.
    """
    try:
        message, fds, flags, _ = socket.recv_fds(link, _MAX_MESSAGE_BYTES, _MAX_FDS)
    except ConnectionError:
        return b"", []
    assert not flags & socket.MSG_TRUNC, "message longer than any we send"
    if flags & socket.MSG_CTRUNC:  # this process may open no more of them
        for fd in fds:
            os.close(fd)
        return message, []
    for fd in fds:
        os.set_inheritable(fd, False)
    return message, fds


# The host application's side.


@attrs.define(eq=False)
class SupervisorHandle:
    """The one child of a host application. Safe to use from any thread, but from one at a time."""

    process: Process
    tether: Tether
    exit: ExitStatus | None = None

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def pidfd(self) -> int:
        """Readable once the supervisor has ended; for a poll loop. Valid until ``close``."""
        return self.process.pidfd

    def try_reap(self) -> ExitStatus | None:
        """The supervisor's exit status if it has ended, else None. Never blocks."""
        if self.exit is None:
            try:
                self.exit = try_reap(self.process)
            except ChildProcessError:  # the host application waited for every child and took the status
                self.exit = ExitStatus() if is_dead(self.process.pidfd) else None
        return self.exit

    def reap(self, timeout_s: float) -> ExitStatus | None:
        """Wait at most ``timeout_s`` for the supervisor to end; its exit status, or None if it lives on."""
        if self.exit is None:
            wait_dead(self.process.pidfd, timeout_s)
        return self.try_reap()

    def kill(self) -> None:
        """End the supervisor and everything below it, now: SIGKILL, and every tether with it. Idempotent."""
        self.tether.cut()
        if self.exit is None:
            signal_group(self.process, signal.SIGKILL)

    def close(self) -> None:
        """Give the descriptors back. A supervisor that still runs ends now. Idempotent."""
        self.tether.cut()
        if self.process.pidfd >= 0:
            os.close(self.process.pidfd)
            self.process = attrs.evolve(self.process, pidfd=-1)


def spawn_supervisor(
    boot_path: Path, lock_fd: int, command: Sequence[str] = SUPERVISOR_COMMAND, *, token: str = ""
) -> SupervisorHandle:
    """Start the supervisor process described by the boot file.

    ``lock_fd`` is the run directory's lock (``RunDirectory.lock_fd``); the supervisor and all its children inherit it.
    The supervisor dies with this process, whatever kills it. Raises ``StartFailed`` if it cannot be executed.
    ``token``: of the run, for ``RUN_VARIABLE``; without one its journal names nobody who may be killed later.
    """
    if not command[0]:
        raise StartFailed("sys.executable is empty, so no process can be started; set it to a Python interpreter")
    tether = Tether.make_in_host()
    arguments = [str(boot_path), str(tether.read_fd), str(lock_fd)]
    try:
        # Not armed here: if this process is killed now, the supervisor must live long enough to have it cleaned up.
        environment = {**os.environ, RUN_VARIABLE: token}
        process = spawn([*command, *arguments], pass_fds=(tether.read_fd, lock_fd), env=environment)
    except OSError as error:
        tether.cut()
        raise StartFailed(f"cannot start the supervisor process with {command[0]}: {error}") from error
    finally:
        tether.drop_read_end()
    return SupervisorHandle(process, tether)
