"""An empty record to be filled, and the surroundings of programs that are run as processes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from recordings import Recording

from support import eventually, our_processes, run_directories


@pytest.fixture
def recording(tmp_path: Path) -> Recording:
    """Of a null chip, with its manifest."""
    recording = Recording(tmp_path / "run")
    recording.write_manifest()
    return recording


@pytest.fixture
def nothing_left_behind(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A command has no settings but those of its test, and leaves no process and no run directory."""
    for variable in [name for name in os.environ if name.startswith("CHIPBUS_")]:
        monkeypatch.delenv(variable)
    before = run_directories()
    yield
    eventually(lambda: not our_processes(), "every process is gone")
    eventually(lambda: run_directories() <= before, "every run directory is gone")
