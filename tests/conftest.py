"""For every test: the checkout is not importable by itself.

``python -m pytest`` puts the working directory on the path, where transformers would take our ``kernels/`` for the
package of that name on PyPI.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != ROOT]
