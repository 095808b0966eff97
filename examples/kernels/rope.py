"""Rotary embedding: the halves of each head are turned against each other by the token's angles."""

import numpy as np
import torch

from chipbus.kernels.golden import golden
from chipbus.kernels.tiles import IN, OUT, incore, program, tensor

HEADS, ANGLES = ("T", "HEADS", "D"), ("T", "HALF")


@incore(x=IN, cos=IN, sin=IN, y=OUT)
def rotate(x, cos, sin, y):
    (low, high), (turned_low, turned_high) = x.chunk(2, -1), y.chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]  # the same angles for all heads
    torch.sub(low * cos, high * sin, out=turned_low)
    torch.add(high * cos, low * sin, out=turned_high)


@program(
    x=tensor("float32", *HEADS), cos=tensor("float32", *ANGLES), sin=tensor("float32", *ANGLES),
    y=tensor("float32", *HEADS, direction=OUT),
)  # fmt: skip
def rope(t, x, cos, sin, y, *, tile_t=64):
    for i in t.parallel(0, x.shape[0], tile_t):
        rows = slice(i, i + tile_t)
        t.submit(rotate, x[rows], cos[rows], sin[rows], y[rows])


def plain(x, cos, sin):
    low, high = np.split(x, 2, axis=-1)
    turned = (low + 1j * high) * (cos + 1j * sin)[:, None]
    return np.concatenate([turned.real, turned.imag], axis=-1)


if __name__ == "__main__":
    print(golden(rope, plain, [(64, 4, 32, 16), (130, 2, 64, 32), (1, 1, 2, 1)]))
