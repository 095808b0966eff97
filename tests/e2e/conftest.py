"""Whole engines. After each test nothing of an engine is left: no process, descriptor, thread or run directory."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator

import pytest

from support import descriptors, eventually, our_processes, run_directories


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    gc.collect()
    before = (our_processes(), run_directories(), descriptors(), threading.active_count())
    yield
    gc.collect()
    eventually(lambda: our_processes() <= before[0], "every process of the engine is gone")
    eventually(lambda: run_directories() <= before[1], "every run directory is gone")
    eventually(lambda: threading.active_count() <= before[3], "every thread of the engine is gone")
    eventually(lambda: descriptors() <= before[2], "every descriptor is closed")
