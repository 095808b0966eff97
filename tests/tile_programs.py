"""Small tile programs for tests of the language and of the chips that run it."""

from __future__ import annotations

import torch

from chipbus.kernels.graph import Tag
from chipbus.kernels.tiles import IN, INOUT, OUT, Tile, Trace, incore, program, tensor

__all__ = ["add_up", "boom", "layered", "normed_product", "prefix_sum", "staged", "traced", "whole"]

traced: list[tuple[int, ...]] = []
"""One entry for each time ``staged`` was traced."""

X, Y = tensor("float32", "M", "N"), tensor("float32", "M", "N", direction=OUT)


@incore(x=IN, y=OUT)
def scale(x: torch.Tensor, y: torch.Tensor, *, by: float = 2.0) -> None:
    """y = by · x."""
    torch.mul(x, by, out=y)


@incore(x=IN, total=INOUT)
def accumulate(x: torch.Tensor, total: torch.Tensor) -> None:
    """total += x."""
    total.add_(x)


@incore(x=IN)
def explode(x: torch.Tensor) -> None:
    """Never returns."""
    raise RuntimeError(f"no core for {tuple(x.shape)}")


@program(x=X, y=Y)
def whole(t: Trace, x: Tile, y: Tile, *, by: float = 3.0) -> None:
    """y = by · x in one task."""
    t.submit(scale, x, y, by=by)


@program(x=X, y=Y)
def staged(t: Trace, x: Tile, y: Tile, *, tile: int = 3, stages: int = 2) -> None:
    """y = 6 · x through memory of pipeline stages."""
    traced.append(x.shape)
    for m in t.pipeline(0, x.shape[0], tile, stages=stages):
        rows = x[m : m + tile]
        doubled = t.tensor("float32", *rows.shape)
        t.submit(scale, rows, doubled)
        t.submit(scale, doubled, y[m : m + tile], by=3.0)


@program(x=X, y=Y)
def layered(t: Trace, x: Tile, y: Tile, *, tile_m: int = 2, tile_n: int = 3) -> None:
    """y = 6 · x + x, tile by tile, through memory of nested scopes."""
    for m in t.parallel(0, x.shape[0], tile_m):
        with t.scope():
            for n in t.range(0, x.shape[1], tile_n):
                part, out = x[m : m + tile_m, n : n + tile_n], y[m : m + tile_m, n : n + tile_n]
                doubled = t.tensor("float32", *part.shape)
                t.submit(scale, part, doubled)
                with t.scope():
                    tripled = t.tensor("float32", *part.shape)
                    t.submit(scale, doubled, tripled, by=3.0)
                    t.submit(scale, tripled, out, by=1.0)
                t.submit(accumulate, part, out)


@program(x=tensor("float32", "N"), total=tensor("float32", 1, direction=INOUT), y=tensor("float32", "N", direction=OUT))
def prefix_sum(t: Trace, x: Tile, total: Tile, y: Tile) -> None:
    """y[n] = total + x[0] + … + x[n]; total ends as the last of them."""
    for n in t.range(0, x.shape[0]):
        t.submit(accumulate, x[n : n + 1], total)
        t.submit(scale, total, y[n : n + 1], by=1.0)


@program(x=X, total=tensor("float32", "M", "N", direction=INOUT))
def add_up(t: Trace, x: Tile, total: Tile, *, rows: int = 1) -> None:
    """total += x in its first ``rows`` rows; the others are not touched."""
    t.submit(accumulate, x[:rows], total[:rows])


@incore(x=IN, gamma=IN, h=OUT)
def normalize(x: torch.Tensor, gamma: torch.Tensor, h: torch.Tensor) -> None:
    h.copy_(x * (x.square().mean(1, keepdim=True) + 1e-6).rsqrt() * gamma)


@program(
    x=tensor("float32", "M", "K"), gamma=tensor("float32", "K"), w=tensor("float32", "N", "K"),
    y=tensor("float32", "M", "N", direction=OUT),
)  # fmt: skip
def normed_product(t: Trace, x: Tile, gamma: Tile, w: Tile, y: Tile) -> None:
    """rms_norm(x) · wᵀ, the product by a built-in kernel, then scaled by 2."""
    h, product = t.tensor("float32", *x.shape), t.tensor("float32", *y.shape)
    t.submit(normalize, x, gamma, h)
    t.submit("linear", (Tag.INPUT, h), (Tag.INPUT, w), (Tag.OUTPUT, product), epilogue="none", bias=0)
    t.submit(scale, product, y)


@program(x=X, y=Y)
def boom(t: Trace, x: Tile, y: Tile) -> None:
    """A task that works, one that raises, one that never runs."""
    t.submit(scale, x, y, by=5.0)
    t.submit(explode, x)
    t.submit(scale, x, y, by=7.0)
