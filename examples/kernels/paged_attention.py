"""Flash attention of one query per sequence over a paged KV cache: each page's task corrects the answer so far."""

import torch

from chipbus.kernels.golden import golden
from chipbus.kernels.tiles import IN, INOUT, OUT, incore, program, tensor

Q, KV = ("float32", "B", "G", "R", "D"), tensor("float32", "G", "P", "S", "D")  # R query heads share KV head g of G


@incore(q=IN, k=IN, v=IN, table=IN, length=IN, lse=INOUT, o=INOUT)
def attend(q, k, v, table, length, lse, o, *, page):
    if page == 0:
        lse.fill_(-torch.inf)
        o.zero_()
    count = max(0, int(length) - page * k.shape[1])  # of this page's tokens, or more
    scores = q @ k[table[page], :count].T * q.shape[1] ** -0.5
    both = torch.logaddexp(lse, scores.logsumexp(1, keepdim=True))
    o.mul_(torch.exp(lse - both)).addmm_(torch.exp(scores - both), v[table[page], :count])
    lse.copy_(both)


@program(q=tensor(*Q), k=KV, v=KV, table=tensor("int32", "B", "W"), n=tensor("int32", "B"), o=tensor(*Q, direction=OUT))
def paged_attention(t, q, k, v, table, n, o):
    lse = t.tensor("float32", *q.shape[:3], 1)  # log of the sum of exponents so far
    for b in t.parallel(0, q.shape[0]):
        for g in t.parallel(0, q.shape[1]):
            for page in t.range(0, table.shape[1]):
                t.submit(attend, q[b, g], k[g], v[g], table[b], n[b : b + 1], lse[b, g], o[b, g], page=page)


def plain(q, k, v, table, n):
    q, k, v = torch.tensor(q), torch.tensor(k[:, table]), torch.tensor(v[:, table])  # each sequence's pages in order
    rows = ((one, *(cache[:, b].flatten(1, 2)[:, : n[b]] for cache in (k, v))) for b, one in enumerate(q))
    return torch.stack([torch.nn.functional.scaled_dot_product_attention(*row) for row in rows])


if __name__ == "__main__":
    shapes, ranges = [(1, 1, 1, 8, 9, 16, 1), (3, 2, 4, 16, 9, 4, 4)], {"table": (0, 9), "n": (1, 17)}
    print(golden(paged_attention, plain, shapes, inputs=ranges, atol=1e-5))
