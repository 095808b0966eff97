"""The run directory: where one runtime's sockets and boot file live, and how it never outlives that runtime.

Owns: the directory from creation to removal. Its lock file is held, through inherited descriptors, by the supervisor
and every process below it: the lock is free exactly when none of them is left, however they ended. In the file stands
who made it, the pid of the host application and a random word: a directory of a fixed path may by now be another
runtime's, and nobody removes what is not its own.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import os
import secrets
import select
import shutil
import tempfile
import time
from pathlib import Path

import attrs

from ..bus.addresses import MAX_PATH_BYTES, check_run_dir
from ..bus.shortages import cannot_write, explain
from ..errors import ConfigError, RunDirectoryInUse, StartFailed
from .janitor import end_orphans

__all__ = ["RunDirectory", "living_runtimes", "owner_of", "remove_when_free"]

_PREFIX = "chipbus-"
_LOCK = "lock"
_LONGEST_SOCKET = "chip.999.999.99999.c"
_POLL_MS = 5
_OWNER_BYTES = 200


@attrs.define(eq=False)
class RunDirectory:
    """A private directory (mode 0700) and the lock that says somebody still uses it."""

    path: Path
    lock_fd: int  # -1 once given up
    owner: str  # what its lock file says

    @classmethod
    def create(cls, path: Path | None = None) -> RunDirectory:
        """Make ``path``, or one of a random name under ``$XDG_RUNTIME_DIR`` or the temporary directory.

        What dead runtimes left is removed: there, or at ``path``. Raises ``RunDirectoryInUse`` if a runtime lives at
        ``path``, ``ConfigError`` with what was tried and why it cannot be used, ``StartFailed`` without descriptors.
        """
        if path is not None:
            return cls._create_at(path.absolute())
        refusals = []
        for parent in _parents():
            path = parent / (_PREFIX + secrets.token_hex(5))
            if too_long := _too_long(path):
                refusals.append(f"{parent} makes {too_long}")
                continue
            try:
                for prefix in (_PREFIX, f".{_PREFIX}"):
                    _remove_stale(parent, prefix)
                return cls(path, *_make_locked(path))
            except OSError as error:
                if isinstance(cannot := cannot_write(path, error.errno), StartFailed):
                    raise cannot from error
                refusals.append(f"{parent}: {explain(error.errno)}")
        raise ConfigError(f"no directory for sockets ({'; '.join(refusals)}); point TMPDIR to a short writable path")

    @classmethod
    def _create_at(cls, path: Path) -> RunDirectory:
        if too_long := _too_long(path):
            raise ConfigError(f"run directory {path} makes {too_long}; name a shorter path")
        try:
            if path.is_symlink() or path.exists():
                _take_over(path)
            return cls(path, *_make_locked(path))
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):  # somebody else was faster by a moment
                raise _in_use(path) from error
            raise cannot_write(path, error.errno) from error

    @property
    def token(self) -> str:
        """The random word of this runtime."""
        return self.owner.partition(" ")[2]

    def require_room(self, num_files: int) -> None:
        """Raise ``ConfigError`` unless that many further files, or sockets, can be made in it now."""
        made: list[Path] = []
        try:
            for number in range(num_files):
                path = self.path / f"room.{number}"
                os.mknod(path)
                made.append(path)
        except OSError as error:
            raise cannot_write(path, error.errno) from error
        finally:
            for path in made:
                path.unlink()

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
        was_free = remove_when_free(self.path, timeout_s, self.owner)
        return () if was_free and not self._is_there else (str(self.path),)

    @property
    def _is_there(self) -> bool:
        with contextlib.suppress(OSError):
            return (self.path / _LOCK).read_text() == self.owner
        return False


def owner_of(lock_fd: int) -> str:
    """Who made the run directory of this lock file, for ``remove_when_free``."""
    return os.pread(lock_fd, _OWNER_BYTES, 0).decode(errors="replace")


def living_runtimes() -> list[tuple[Path, int]]:
    """Run directories of this user where they are usually made, if somebody lives there, with each host's pid."""
    found = []
    for path in sorted({path for parent in _parents() for path in parent.glob(f"{_PREFIX}*")}):
        with contextlib.suppress(OSError, ValueError, ConfigError):  # another user's, or removed at this moment
            check_run_dir(path)
            lock_fd = os.open(path / _LOCK, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(lock_fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                found.append((path, int(owner_of(lock_fd).partition(" ")[0])))
            finally:
                os.close(lock_fd)
    return found


def remove_when_free(path: Path, timeout_s: float, owner: str) -> bool:
    """Wait at most ``timeout_s`` until nobody holds the lock of run directory ``path``, then remove it either way.

    A directory whose lock file names another ``owner`` by then is let be: ours is gone.
    """
    deadline_s = time.monotonic() + timeout_s
    was_free = _try_lock_and_remove(path, owner)
    while not was_free and time.monotonic() < deadline_s:
        select.poll().poll(_POLL_MS)  # a lock has no descriptor to wait on without blocking
        was_free = _try_lock_and_remove(path, owner)
    if not was_free:  # one of ours holds it, so nobody else can have it
        _bury(path)
    return was_free


def _parents() -> list[Path]:
    runtime_dir = os.environ.get("XDG_RUNTIME_DIR")
    candidates = [Path(runtime_dir)] if runtime_dir else []
    return [*candidates, Path(tempfile.gettempdir())]


def _too_long(path: Path) -> str:
    num_bytes = len(os.fsencode(path / _LONGEST_SOCKET))
    return f"socket paths of {num_bytes} bytes, at most {MAX_PATH_BYTES} fit" if num_bytes > MAX_PATH_BYTES else ""


def _make_locked(path: Path) -> tuple[int, str]:
    """Create ``path`` so that it never exists under its name without its lock held: the janitor may look any time.

    The lock's descriptor, and what the lock file says. An empty directory of that name is replaced.
    """
    hidden = path.with_name(f".{path.name}.{secrets.token_hex(5)}")
    owner = f"{os.getpid()} {secrets.token_hex(16)}"
    hidden.mkdir(mode=0o700)
    lock_fd = -1
    try:
        hidden.chmod(0o700)  # whatever the umask
        lock_fd = os.open(hidden / _LOCK, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.write(lock_fd, owner.encode())
        hidden.rename(path)
    except OSError:
        if lock_fd >= 0:
            os.close(lock_fd)
        with contextlib.suppress(OSError):  # rmtree would need the descriptors that may be what is missing
            (hidden / _LOCK).unlink(missing_ok=True)
            hidden.rmdir()
        raise
    return lock_fd, owner


def _take_over(path: Path) -> None:
    """Remove what a dead runtime left at ``path``, and nothing that is not a run directory. Raises ``ConfigError``."""
    check_run_dir(path)
    _remove_stale(path.parent, f".{path.name}.")
    try:
        owner = (path / _LOCK).read_text()
    except FileNotFoundError:
        if path.exists() and any(path.iterdir()):
            text = f"run directory {path} has files and no lock, so it is none; name another path"
            raise ConfigError(text) from None
        return
    if not (_try_lock_and_remove(path, owner) or (end_orphans(path) and _try_lock_and_remove(path, owner))):
        raise _in_use(path)


def _in_use(path: Path) -> RunDirectoryInUse:
    try:
        pid = (path / _LOCK).read_text().partition(" ")[0]
    except OSError:
        pid = "?"
    return RunDirectoryInUse(
        f"run directory {path} is in use by the runtime of process {pid}; close that one, or name another run_dir"
    )


def _bury(path: Path) -> None:
    """Remove a run directory, its lock last: if this is interrupted, the next janitor recognises the rest."""
    with contextlib.suppress(OSError):
        for entry in path.iterdir():
            if entry.name != _LOCK:
                entry.unlink()
    shutil.rmtree(path, ignore_errors=True)


def _remove_stale(parent: Path, prefix: str) -> None:
    for path in parent.glob(f"{glob.escape(prefix)}*"):
        with contextlib.suppress(OSError):  # another user's, or removed at this moment by its owner
            if path.stat().st_uid == os.getuid():
                owner = (path / _LOCK).read_text()
                if not _try_lock_and_remove(path, owner) and end_orphans(path):
                    _try_lock_and_remove(path, owner)


def _try_lock_and_remove(path: Path, owner: str) -> bool:
    """Remove ``path`` if nobody holds its lock. True if it is gone, or another's than ``owner``'s."""
    try:
        lock_fd = os.open(path / _LOCK, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        if owner_of(lock_fd) != owner:
            return True
        fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    else:
        # Renamed first: somebody who wants this path may take it while its old files are being removed.
        grave = path.with_name(f".{path.name}.{secrets.token_hex(5)}")
        with contextlib.suppress(FileNotFoundError):  # removed by another process of ours a moment ago
            if os.path.samestat((path / _LOCK).stat(), os.fstat(lock_fd)):
                path.rename(grave)
                _bury(grave)
        return True
    finally:
        os.close(lock_fd)
