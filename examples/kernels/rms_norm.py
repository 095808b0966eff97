"""RMSNorm in chunks of the row: a pipeline adds up squares, one task makes the factor, a second pass scales by it."""

import torch

from chipbus.kernels.golden import golden
from chipbus.kernels.tiles import IN, OUT, incore, program, tensor


@incore(x=IN, partial=OUT)
def sum_squares(x, partial):
    torch.linalg.vector_norm(x, dim=1, keepdim=True, out=partial).square_()


@incore(x=IN, partials=IN, gamma=IN, y=OUT)
def scale(x, partials, gamma, y, *, hidden, eps):
    factor = torch.rsqrt(partials.sum(1, keepdim=True) / hidden + eps)
    torch.mul(x, factor, out=y).mul_(gamma)


@program(x=tensor("float32", "T", "H"), gamma=tensor("float32", "H"), y=tensor("float32", "T", "H", direction=OUT))
def rms_norm(t, x, gamma, y, *, tile_t=16, tile_h=512, eps=1e-6):
    chunks = [slice(h, h + tile_h) for h in range(0, x.shape[1], tile_h)]
    for i in t.pipeline(0, x.shape[0], tile_t, stages=4):
        rows, scaled = x[i : i + tile_t], y[i : i + tile_t]
        partials = t.tensor("float32", rows.shape[0], len(chunks))
        for n, part in enumerate(chunks):
            t.submit(sum_squares, rows[:, part], partials[:, n : n + 1])
        for part in chunks:
            t.submit(scale, rows[:, part], partials, gamma[part], scaled[:, part], hidden=x.shape[1], eps=eps)


def plain(x, gamma):
    return x / ((x**2).mean(1, keepdims=True) + 1e-6) ** 0.5 * gamma


if __name__ == "__main__":
    print(golden(rms_norm, plain, [(16, 512), (100, 1300), (1, 1), (70, 64)], atol=1e-5))
