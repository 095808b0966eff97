"""Names of nodes and the socket paths of their inboxes. Pure functions, and the checks on a run directory."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from ..errors import ConfigError

__all__ = ["MAX_PATH_BYTES", "check_name", "check_run_dir", "inbox_paths"]

MAX_PATH_BYTES = 100  # the kernel's limit is 107; the rest is room for a longer name in a later version
NAME = re.compile(r"[a-z][a-z0-9_-]*(\.[a-z0-9_-]+)*")
MAX_NAME_BYTES = 64


def check_name(name: str) -> None:
    """Raise ``ConfigError`` unless ``name`` looks like "router" or "chip.0.1"."""
    if not NAME.fullmatch(name) or len(name) > MAX_NAME_BYTES:
        raise ConfigError(
            f"node name {name!r}: lower-case words and numbers joined by dots, at most {MAX_NAME_BYTES} bytes"
        )


def check_run_dir(run_dir: Path) -> None:
    """Raise ``ConfigError`` unless ``run_dir`` is a directory of ours that nobody else may enter."""
    try:
        info = run_dir.lstat()
    except OSError as error:
        raise ConfigError(f"run directory {run_dir}: {error.strerror}") from error
    if not stat.S_ISDIR(info.st_mode):
        raise ConfigError(f"run directory {run_dir} is no directory")
    if info.st_uid != os.geteuid() or info.st_mode & 0o077:
        mode = stat.S_IMODE(info.st_mode)
        raise ConfigError(
            f"run directory {run_dir} has owner {info.st_uid} and mode {mode:04o}; it must be ours, mode 0700"
        )


def inbox_paths(run_dir: Path, name: str, incarnation: int) -> tuple[Path, Path]:
    """(control, data) socket paths of one life of a node. Raises ``ConfigError`` if they are too long for a socket."""
    check_name(name)
    control, data = (run_dir / f"{name}.{incarnation}.{suffix}" for suffix in "cd")
    size = len(os.fsencode(control))
    if size > MAX_PATH_BYTES:
        raise ConfigError(
            f"socket path {control} has {size} bytes, at most {MAX_PATH_BYTES} fit; use a shorter run directory"
        )
    return control, data
