"""Helpers for tests of whole processes: what is alive, and waiting for a condition with a deadline."""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest


def run_directories() -> set[str]:
    """Engines' run directories on this machine, wherever they are made."""
    homes = {tempfile.gettempdir(), os.environ.get("XDG_RUNTIME_DIR", tempfile.gettempdir())}
    return {str(path) for home in homes for path in Path(home).glob("chipbus-*")}


def our_processes() -> set[int]:
    """Living processes of any engine started below this test process."""
    return {child.pid for child in psutil.Process().children(recursive=True)}


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def weight_files(pid: int) -> list[int]:
    """Inode numbers of the memory files for packed weights that a process has open."""
    found = []
    with contextlib.suppress(FileNotFoundError, PermissionError):  # it has ended, or is not ours
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                if str(entry.readlink()).startswith("/memfd:chipbus-weights"):
                    found.append(entry.stat().st_ino)
    return found


def holders(file: int) -> list[int]:
    """Every process of this machine that has the memory file of that inode number open."""
    return [pid for pid in psutil.pids() if file in weight_files(pid)]


def comes_true(condition: Callable[[], bool], within_s: float) -> bool:
    """Poll ``condition``; whether it came to hold within ``within_s``."""
    deadline_s = time.monotonic() + within_s
    waiter = threading.Event()
    while not condition():
        if time.monotonic() > deadline_s:
            return False
        waiter.wait(0.01)
    return True


def eventually(condition: Callable[[], bool], what: str, within_s: float = 10.0) -> None:
    """Poll ``condition`` until it holds; fail naming ``what`` after ``within_s``."""
    if not comes_true(condition, within_s):
        pytest.fail(f"not within {within_s:g} s: {what}")
