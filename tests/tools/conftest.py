"""An empty record to be filled."""

from __future__ import annotations

from pathlib import Path

import pytest
from recordings import Recording


@pytest.fixture
def recording(tmp_path: Path) -> Recording:
    """Of a null chip, with its manifest."""
    recording = Recording(tmp_path / "run")
    recording.write_manifest()
    return recording
