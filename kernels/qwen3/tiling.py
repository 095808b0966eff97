"""Sizes of the tiles the Qwen3 programs are cut into: a parameter of the programs, chosen by what runs them.

Owns nothing; values only. No product is split along the axis it is summed over, so every tiling gives the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator

import attrs

from ...errors import ConfigError

__all__ = ["COARSE", "FINE", "Tiling", "spans"]


@attrs.frozen(kw_only=True)
class Tiling:
    """How much one task takes of each axis; 0 takes all of it. Checked when made: ``ConfigError``.

    An executor that dispatches from Python wants whole operations, a native one tiles of a few hundred columns.
    """

    tokens: int = 0
    """Tokens of a window per task of norms, linears and rotation."""
    columns: int = 0
    """Output columns of a layer's linear per task."""
    head_columns: int = 0
    """Vocabulary entries of the LM head per task."""
    kv_heads: int = 0
    """KV heads, each with its query heads, per task of attention."""
    query_tokens: int = 0
    """Prompt tokens per task of attention."""
    query_rows: int = 0
    """Generated tokens, each a row of its own, per task of attention."""

    def __attrs_post_init__(self) -> None:
        for field in attrs.fields(Tiling):
            value = getattr(self, field.name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ConfigError(
                    f"tiling: {field.name} is {value!r}; it must be an integer of at least 1, or 0 for all"
                )

    @property
    def static(self) -> tuple[tuple[str, int], ...]:
        """As entries of a program's configuration."""
        return tuple((f"tile_{field.name}", getattr(self, field.name)) for field in attrs.fields(Tiling))


COARSE = Tiling()
"""One task per operation and window."""

FINE = Tiling(tokens=64, columns=256, head_columns=2048, kv_heads=1, query_tokens=64, query_rows=1)
"""A thousand to four thousand tasks per step of Qwen3-0.6B."""


def spans(extent: int, tile: int) -> Iterator[tuple[int, int]]:
    """``[begin, end)`` of each tile of an axis; the last may be smaller. ``tile`` 0: one takes all."""
    step = tile or extent
    for begin in range(0, extent, step):
        yield begin, min(begin + step, extent)
