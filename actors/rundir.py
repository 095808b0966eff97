"""The run directory: where one runtime's sockets and boot file live, and how it never outlives that runtime.

Owns: the directory from creation to removal. Its lock file is held, through inherited descriptors, by the supervisor
and every process below it: the lock is free exactly when none of them is left, however they ended.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import select
import shutil
import tempfile
import time
from pathlib import Path

import attrs

from ..bus.addresses import MAX_PATH_BYTES
from ..errors import ConfigError

__all__ = ["RunDirectory", "remove_when_free"]

_PREFIX = "chipbus-"
_LOCK = "lock"
_LONGEST_SOCKET = "chip.999.999.99999.c"
_POLL_MS = 5


@attrs.define(eq=False)
class RunDirectory:
    """A fresh private directory (mode 0700, random name) and the lock that says somebody still uses it."""

    path: Path
    lock_fd: int  # -1 once given up

    @classmethod
    def create(cls) -> RunDirectory:
        """Make one under ``$XDG_RUNTIME_DIR`` or the temporary directory, and remove those of dead runtimes there.

        Raises ``ConfigError`` with every parent tried and why it cannot be used.
        """
        refusals = []
        for parent in _parents():
            path = parent / (_PREFIX + secrets.token_hex(5))
            num_bytes = len(os.fsencode(path / _LONGEST_SOCKET))
            if num_bytes > MAX_PATH_BYTES:
                refusals.append(f"{parent} makes socket paths of {num_bytes} bytes, at most {MAX_PATH_BYTES} fit")
                continue
            try:
                _remove_stale(parent)
                return cls(path, _make_locked(path))
            except OSError as error:
                refusals.append(f"{parent}: {error.strerror}")
        raise ConfigError(f"no directory for sockets ({'; '.join(refusals)}); point TMPDIR to a short writable path")

    def give_up_lock(self) -> None:
        """Close our copy of the lock, once the supervisor has its own. Idempotent."""
        fd, self.lock_fd = self.lock_fd, -1
        if fd >= 0:
            os.close(fd)

    def remove(self, timeout_s: float) -> tuple[str, ...]:
        """Remove the directory as soon as no process of the runtime is left, at the latest after ``timeout_s``.

        What is left: its path if a process still lived then, or the directory cannot be removed. Idempotent.
        """
        self.give_up_lock()
        was_free = remove_when_free(self.path, timeout_s)
        return () if was_free and not self.path.exists() else (str(self.path),)


def remove_when_free(path: Path, timeout_s: float) -> bool:
    """Wait at most ``timeout_s`` until nobody holds the lock of run directory ``path``, then remove it either way."""
    deadline_s = time.monotonic() + timeout_s
    was_free = _try_lock_and_remove(path)
    while not was_free and time.monotonic() < deadline_s:
        select.poll().poll(_POLL_MS)  # a lock has no descriptor to wait on without blocking
        was_free = _try_lock_and_remove(path)
    if not was_free:
        shutil.rmtree(path, ignore_errors=True)
    return was_free


def _parents() -> list[Path]:
    runtime_dir = os.environ.get("XDG_RUNTIME_DIR")
    candidates = [Path(runtime_dir)] if runtime_dir else []
    return [*candidates, Path(tempfile.gettempdir())]


def _make_locked(path: Path) -> int:
    """Create ``path`` so that it never exists under its name without its lock held: the janitor may look any time."""
    hidden = path.with_name(f".{path.name}")
    hidden.mkdir(mode=0o700)
    try:
        lock_fd = os.open(hidden / _LOCK, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        hidden.rename(path)
    except OSError:
        shutil.rmtree(hidden, ignore_errors=True)
        raise
    return lock_fd


def _remove_stale(parent: Path) -> None:
    for path in parent.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):  # another user's, or removed at this moment by its owner
            if path.stat().st_uid == os.getuid():
                _try_lock_and_remove(path)


def _try_lock_and_remove(path: Path) -> bool:
    """Remove ``path`` if nobody holds its lock. True if it is gone."""
    try:
        lock_fd = os.open(path / _LOCK, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return not path.exists()
    try:
        fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    else:
        shutil.rmtree(path, ignore_errors=True)
        return True
    finally:
        os.close(lock_fd)
