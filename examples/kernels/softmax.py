"""Softmax of rows of any length: one pass keeps maximum and sum, corrected as it goes; a second one divides."""

import torch

from chipbus.kernels.golden import golden
from chipbus.kernels.tiles import IN, INOUT, OUT, incore, program, tensor


@incore(x=IN, top=INOUT, total=INOUT)
def reduce(x, top, total, *, first):
    highest = x.amax(1, keepdim=True) if first else torch.maximum(top, x.amax(1, keepdim=True))
    part = torch.exp(x - highest).sum(1, keepdim=True)
    total.copy_(part if first else part + total * torch.exp(top - highest))
    top.copy_(highest)


@incore(x=IN, top=IN, total=IN, y=OUT)
def divide(x, top, total, y):
    torch.sub(x, top, out=y).exp_().div_(total)


@program(x=tensor("float32", "M", "N"), y=tensor("float32", "M", "N", direction=OUT))
def softmax(t, x, y, *, tile_m=16, tile_n=512):
    for m in t.parallel(0, x.shape[0], tile_m):
        rows, answers = x[m : m + tile_m], y[m : m + tile_m]
        with t.scope():
            top, total = (t.tensor("float32", rows.shape[0], 1) for _ in range(2))
            for n in t.range(0, x.shape[1], tile_n):
                t.submit(reduce, rows[:, n : n + tile_n], top, total, first=n == 0)
            for n in t.parallel(0, x.shape[1], tile_n):
                t.submit(divide, rows[:, n : n + tile_n], top, total, answers[:, n : n + tile_n])


def plain(x):
    return torch.nn.functional.softmax(torch.from_numpy(x), 1).numpy()


if __name__ == "__main__":
    print(golden(softmax, plain, [(16, 512), (50, 1300), (1, 1), (17, 513)]))
