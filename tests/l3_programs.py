"""Tile programs for tests of an L3 worker with real chip processes."""

from __future__ import annotations

from typing import Any

from chipbus.kernels.tiles import IN, INOUT, OUT, Tile, Trace, incore, program, tensor


@incore(x=INOUT)
def add_one(x: Any) -> None:
    x += 1


@incore(a=IN, b=IN, out=OUT)
def add_tiles(a: Any, b: Any, out: Any) -> None:
    out.copy_(a + b)


@incore(x=INOUT)
def raise_error(x: Any) -> None:
    raise ZeroDivisionError("tile divided by zero")


@program(x=tensor("float32", "N", direction=INOUT))
def bump(t: Trace, x: Tile) -> None:
    """x += 1."""
    t.submit(add_one, x)


@program(a=tensor("float32", "N"), b=tensor("float32", "N"), out=tensor("float32", "N", direction=OUT))
def add(t: Trace, a: Tile, b: Tile, out: Tile, *, tile: int = 4) -> None:
    """out = a + b, in tiles."""
    for n in t.parallel(0, a.shape[0], tile):
        t.submit(add_tiles, a[n : n + tile], b[n : n + tile], out[n : n + tile])


@program(x=tensor("float32", "N", direction=INOUT))
def boom(t: Trace, x: Tile) -> None:
    """Raises on the chip."""
    t.submit(raise_error, x)
