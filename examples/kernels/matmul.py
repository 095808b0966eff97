"""Matrix product: each tile of c is summed over tiles of the inner dimension in memory of its own scope."""

from chipbus.kernels.golden import golden
from chipbus.kernels.tiles import IN, INOUT, OUT, incore, program, tensor


@incore(acc=OUT)
def clear(acc):
    acc.zero_()


@incore(a=IN, b=IN, acc=INOUT)
def multiply_add(a, b, acc):
    acc.addmm_(a, b)


@incore(acc=IN, c=OUT)
def store(acc, c):
    c.copy_(acc)


@program(a=tensor("float32", "M", "K"), b=tensor("float32", "K", "N"), c=tensor("float32", "M", "N", direction=OUT))
def matmul(t, a, b, c, *, tile_m=64, tile_n=64, tile_k=128):
    for m in t.parallel(0, c.shape[0], tile_m):
        for n in t.parallel(0, c.shape[1], tile_n):
            with t.scope():
                part = c[m : m + tile_m, n : n + tile_n]
                acc = t.tensor("float32", *part.shape)
                t.submit(clear, acc)
                for k in t.range(0, a.shape[1], tile_k):
                    t.submit(multiply_add, a[m : m + tile_m, k : k + tile_k], b[k : k + tile_k, n : n + tile_n], acc)
                t.submit(store, acc, part)


if __name__ == "__main__":
    print(golden(matmul, lambda a, b: a @ b, [(64, 128, 64), (200, 300, 70), (1, 129, 65), (3, 0, 2)], atol=1e-4))
