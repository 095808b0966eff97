"""For every test: the checkout is not importable by itself, and logging is not left configured.

``python -m pytest`` puts the working directory on the path, where transformers would take our ``kernels/`` for the
package of that name on PyPI.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != ROOT]


def pytest_configure(config: pytest.Config) -> None:
    """Of several test processes at once each has a place of its own for what the leak checks look after."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        os.environ["TMPDIR"] = tempfile.tempdir = tempfile.mkdtemp(prefix="tests-")
        config.option.basetemp = Path(tempfile.tempdir) / "t"  # short, too: sockets are made below it
        os.environ.pop("XDG_RUNTIME_DIR", None)
        config.add_cleanup(lambda: shutil.rmtree(os.environ["TMPDIR"]))


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """A command configures structlog for its process; the next test must not find it so."""
    yield
    structlog.reset_defaults()
