"""The warden: a process that has imported what children need, forks them on request, and reaps them.

Owns: the children it forked, until it has reaped them and told the supervisor how they ended. One thread, no bus of its
own, no computation: that is what makes forking from it safe.

    supervisor ──SpawnChild + tether──▶ warden ──fork──▶ child: own session, tether armed, runs its node
               ◀─Spawned + pidfd──────         ◀─pidfd──
               ◀─Exited, last words───

The light warden is the last one out: when the supervisor is gone without a word, it kills what is left of its children
and removes the run directory. The other wardens die with the supervisor at once.
"""

from __future__ import annotations

import errno
import faulthandler
import gc
import importlib
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

import attrs
import msgspec
import structlog

from ..bus import Node, NodeConfig
from ..bus.lifecycle import failure_of
from ..bus.registry import schema_hash
from ..bus.shortages import explain, require_descriptors
from ..errors import ChipbusError, StartFailed
from .boot import SUPERVISOR, Boot, ChildSpec
from .kinds import ENTRIES, PRELOADS, load_actor
from .logs import configure_logging
from .messages.warden import (
    Exited,
    FromWarden,
    Leave,
    Ping,
    Pong,
    Preloaded,
    SpawnChild,
    Spawned,
    SpawnRefused,
    ToWarden,
)
from .processes import (
    EXIT_FAILED,
    Process,
    arm_tether,
    close_inherited_fds,
    count_threads,
    exit_status,
    fork,
    live_by_tether,
    lower_priority,
    receive_with_fds,
    reset_signals,
    send_with_fds,
    set_process_name,
    signal_group,
    spawn,
    start_session,
    try_reap,
    wait_dead,
)
from .rundir import owner_of, remove_when_free
from .wardens import LIGHT

__all__ = ["serve"]

_LAST_WORDS_BYTES = 4000  # below PIPE_BUF: written whole, without blocking, or not at all
_LAST_OUT_S = 5.0
SPAWN_DESCRIPTORS = 8  # last words, pidfd, and what fork and exec take in between

log = structlog.get_logger()


@attrs.frozen
class _Child:
    name: str
    incarnation: int
    process: Process
    words_fd: int  # read end of the pipe its last words come through


class _LastWords(msgspec.Struct, array_like=True):
    error: str
    text: str


class _Warden:
    def __init__(
        self, preload: str, boot_path: Path, link: socket.socket, lock_fd: int, entries: Mapping[str, str]
    ) -> None:
        self._preload = preload
        self._boot_path = boot_path
        self._boot = Boot.read(boot_path)
        configure_logging(self._boot.log_level, f"warden.{preload}")
        self._link = link
        self._lock_fd = lock_fd
        self._entries = entries
        self._children: dict[int, _Child] = {}  # by pidfd
        self._poll = select.poll()
        self._poll.register(link.fileno(), select.POLLIN)

    def preload(self, modules: tuple[str, ...]) -> None:
        """Import ``modules``; look between them whether the supervisor is still there."""
        began_s = time.monotonic()
        for module in modules:
            try:
                importlib.import_module(module)
            except Exception as error:  # noqa: BLE001 (an import may raise anything; the user must read it)
                text = f"warden {self._preload} cannot import {module}: {type(error).__name__}: {error}"
                self._tell(Preloaded(time.monotonic() - began_s, "StartFailed", text))
                os._exit(EXIT_FAILED)
            if any(events & select.POLLHUP for _, events in self._poll.poll(0)):
                self._end_orphaned()
        schema_hash()  # 6 ms of digests and decoders, once for all children instead of in each
        gc.collect()
        gc.freeze()  # what was imported is never garbage, and collecting it would copy its pages in every child
        set_process_name(f"warden.{self._preload}")
        self._tell(Preloaded(time.monotonic() - began_s))

    def run(self) -> NoReturn:
        """Serve until the supervisor says so, or is gone."""
        while True:
            ready = [fd for fd, _ in self._poll.poll()]
            for fd in ready:
                if fd != self._link.fileno():  # first: what a life left in its group ends before the next life begins
                    self._reap(fd)
            if self._link.fileno() in ready:
                self._receive()

    def _receive(self) -> None:
        data, fds = receive_with_fds(self._link)
        if not data:
            self._end_orphaned()
        match msgspec.msgpack.decode(data, type=ToWarden):
            case SpawnChild(name, incarnation):
                self._spawn(name, incarnation, fds)
            case Ping():
                self._tell(Pong())
            case Leave():
                os._exit(0)

    def _spawn(self, name: str, incarnation: int, fds: list[int]) -> None:
        """fds: read end of the tether and, for a child that keeps weights, their memory file."""
        spec = self._boot.spec(name)
        try:
            if not fds:
                raise OSError(errno.EMFILE, "no room for its tether")
            require_descriptors(SPAWN_DESCRIPTORS, f"a life of {name}")
            words_fd, childs_words_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        except (OSError, StartFailed) as error:
            for fd in fds:
                os.close(fd)
            text = explain(error.errno) if isinstance(error, OSError) else str(error)
            self._tell(SpawnRefused(name, incarnation, f"warden {self._preload} cannot start {name}: {text}"))
            return
        tether_fd, *weights_fds = fds
        given = (tether_fd, childs_words_fd, *weights_fds)
        try:
            if spec is None:
                raise ProcessLookupError(f"the boot file names no child {name!r}")
            is_forked = count_threads() == 1
            if is_forked:
                process = fork(lambda: self._child_main(spec, incarnation, given))
            else:
                log.warning("warden.not_forking", child=name, threads=count_threads())
                process = self._execute(name, incarnation, given)
            arm_tether(tether_fd, process.pid)
        except OSError as error:
            os.close(words_fd)
            self._tell(SpawnRefused(name, incarnation, f"warden {self._preload} cannot start {name}: {error}"))
            return
        finally:
            for fd in given:
                os.close(fd)
        self._children[process.pidfd] = _Child(name, incarnation, process, words_fd)
        self._poll.register(process.pidfd, select.POLLIN)
        self._tell(Spawned(name, incarnation, process.pid, is_forked), (process.pidfd,))

    def _child_main(self, spec: ChildSpec, incarnation: int, given: tuple[int, ...]) -> NoReturn:
        close_inherited_fds((*given, self._lock_fd))
        reset_signals()
        start_session()
        _run_child(self._boot, spec, incarnation, self._entries, *given)

    def _execute(self, name: str, incarnation: int, given: tuple[int, ...]) -> Process:
        """The slow way, taken when an import started a thread: a fresh process that imports everything itself."""
        own_command = sys.orig_argv[: len(sys.orig_argv) - len(sys.argv) + 1]
        arguments = ["child", str(self._boot_path), name, str(incarnation), *map(str, given)]
        return spawn([*own_command, *arguments], pass_fds=(*given, self._lock_fd))

    def _reap(self, pidfd: int) -> None:
        child = self._children[pidfd]
        status = exit_status(child.process)
        if status is None:
            return
        words = _read_last_words(child.words_fd)
        # Told first: others wait to hear of it, nobody for the rest.
        self._tell(Exited(child.name, child.incarnation, status.code, status.signum, words.error, words.text))
        try_reap(child.process)
        self._poll.unregister(pidfd)  # it stays readable for ever
        del self._children[pidfd]
        os.close(child.words_fd)
        os.close(pidfd)

    def _tell(self, message: FromWarden, fds: tuple[int, ...] = ()) -> None:
        try:
            send_with_fds(self._link, msgspec.msgpack.encode(message), fds)
        except ConnectionError:
            self._end_orphaned()

    def _end_orphaned(self) -> NoReturn:
        if self._preload == LIGHT:
            for child in self._children.values():
                signal_group(child.process, signal.SIGKILL)
            deadline_s = time.monotonic() + _LAST_OUT_S
            for child in self._children.values():
                wait_dead(child.process.pidfd, deadline_s - time.monotonic())
                try_reap(child.process)
            owner = owner_of(self._lock_fd)
            os.close(self._lock_fd)
            remove_when_free(Path(self._boot.run_dir), max(0.1, deadline_s - time.monotonic()), owner)
        os._exit(0)


def _run_child(
    boot: Boot,
    spec: ChildSpec,
    incarnation: int,
    entries: Mapping[str, str],
    tether_fd: int,
    words_fd: int,
    weights_fd: int | None = None,
) -> NoReturn:
    """Be the child: arm the tether, build the actor, run its node to the end. Never returns, never raises."""
    live_by_tether(tether_fd)
    set_process_name(spec.name)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)  # all threads, to stderr: what the supervisor asks of one that is stuck
    configure_logging(boot.log_level, spec.name)
    if spec.preload != LIGHT:
        lower_priority()
    code = 0
    try:
        config = NodeConfig(
            name=spec.name,
            incarnation=incarnation,
            run_dir=Path(boot.run_dir),
            seed=boot.seed,
            record=None if boot.record is None else Path(boot.record),
        )
        given = {} if weights_fd is None else {"weights_fd": weights_fd}
        node = Node(config, load_actor(spec.kind, {**spec.config, **given}, entries))
        node.expect(boot.expected_by(spec.name))
        node.connect(SUPERVISOR, 1)
        node.run()
    except ChipbusError as error:
        failure = failure_of(error)
        _say_last_words(words_fd, failure.error, failure.text)
        code = EXIT_FAILED
    except Exception as error:  # whatever an actor raises must reach the user, and ends this process
        log.exception("actor.failed")
        _say_last_words(words_fd, "StartFailed", f"{type(error).__name__}: {error}")
        code = EXIT_FAILED
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _say_last_words(words_fd: int, error: str, text: str) -> None:
    words = msgspec.json.encode(_LastWords(error, text))
    if len(words) > _LAST_WORDS_BYTES:
        words = msgspec.json.encode(_LastWords(error, text[: _LAST_WORDS_BYTES // 8] + " …"))
    os.write(words_fd, words)


def _read_last_words(words_fd: int) -> _LastWords:
    try:
        return msgspec.json.decode(os.read(words_fd, 2 * _LAST_WORDS_BYTES), type=_LastWords)
    except (BlockingIOError, msgspec.DecodeError):  # it said nothing: the pipe is empty, or held open by a stray
        return _LastWords("", "")


def serve(entries: Mapping[str, str] = ENTRIES, preloads: Mapping[str, tuple[str, ...]] = PRELOADS) -> NoReturn:
    """Be a warden (``serve PRELOAD BOOT LINK TETHER LOCK``) or an executed child (``child BOOT NAME …``).

    ``sys.argv`` is what the supervisor's side (``wardens.Warden``) or ``_execute`` made it; numbers are descriptors.
    """
    reset_signals()
    if sys.argv[1] == "child":
        _, _, boot_path, name, incarnation, *given = sys.argv
        boot = Boot.read(Path(boot_path))
        spec = boot.spec(name)
        assert spec is not None, "the warden has looked it up"
        _run_child(boot, spec, int(incarnation), entries, *map(int, given))
    _, _, preload, boot_path, link_fd, tether_fd, lock_fd = sys.argv
    if preload != LIGHT:
        live_by_tether(int(tether_fd))
    set_process_name(f"importing.{preload}")
    warden = _Warden(preload, Path(boot_path), socket.socket(fileno=int(link_fd)), int(lock_fd), entries)
    warden.preload(preloads[preload])
    warden.run()


if __name__ == "__main__":
    serve()
