"""What a full disk or a full table of file descriptors is called, for whoever has to do something about it."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
from pathlib import Path

from ..errors import ConfigError, StartFailed

__all__ = ["cannot_write", "explain", "require_descriptors", "require_limit"]

NO_DESCRIPTORS = (errno.EMFILE, errno.ENFILE)
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


def explain(number: int | None) -> str:
    """An error number as a sentence of the system's; one that means a shortage also with its limit and what to do."""
    text = os.strerror(number or 0)
    if number in NO_DESCRIPTORS:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        return f"{text}: RLIMIT_NOFILE is {soft} (at most {hard} here); raise it, for example with ulimit -n"
    if number in NO_SPACE:
        return f"{text}: free some, or name a run directory elsewhere (run_dir)"
    return text


def cannot_write(path: Path, number: int | None) -> ConfigError | StartFailed:
    """The error to raise when something of the run directory could not be made."""
    kind = StartFailed if number in NO_DESCRIPTORS else ConfigError
    return kind(f"{path} cannot be made: {explain(number)}")


def require_limit(count: int, what: str) -> None:
    """Raise ``StartFailed`` unless a fresh process of ours may open ``count`` file descriptors."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < count:
        raise StartFailed(f"{what} needs {count} file descriptors. {explain(errno.EMFILE)}")


def require_descriptors(count: int, what: str) -> None:
    """Raise ``StartFailed`` unless ``count`` file descriptors can be opened now.

    libzmq aborts its process when it runs out of them in the wrong place, so this is asked before it is.
    """
    with contextlib.ExitStack() as held:
        try:
            for _ in range(count):
                held.callback(os.close, os.eventfd(0, os.EFD_CLOEXEC))
        except OSError as error:
            raise StartFailed(f"{what} needs {count} more file descriptors. {explain(error.errno)}") from error
