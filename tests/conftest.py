"""For every test: the checkout is not importable by itself, and logging is not left configured.

``python -m pytest`` puts the working directory on the path, where transformers would take our ``kernels/`` for the
package of that name on PyPI.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != ROOT]


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """A command configures structlog for its process; the next test must not find it so."""
    yield
    structlog.reset_defaults()
