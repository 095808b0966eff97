"""Into how large tiles the native engine cuts a program whose configuration leaves that open.

Owns nothing. Tile sizes change no bit (K24), so every chip may choose for itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["tiled"]


def tiled(static: Mapping[str, Any], tokens: int, threads: int) -> dict[str, Any]:
    """``static`` with every tile size of 0 replaced, for a window of ``tokens`` on so many threads."""
    chosen = {
        "tile_tokens": 128 if tokens > 128 else 0,
        "tile_columns": 256 if tokens > 64 else 128,
        "tile_head_columns": 2048,
        "tile_kv_heads": 1,
        "tile_query_tokens": 64,
        "tile_query_rows": 8,
    }
    return {**static, **{name: size for name, size in chosen.items() if not static[name]}}
