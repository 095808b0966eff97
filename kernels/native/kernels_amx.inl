// bf16 linears on AMX tiles, included into a set whose other kernels are those of AVX-512 BF16.
//
// A tile product takes 16 rows, 32 inputs and 16 columns. A panel as packed for everyone is four tiles of columns side by
// side, 16 pairs of inputs high. One accumulator for each output, inputs in order: the same sums for 1 row and for 512.

struct TileProduct {
    // out (rows, kPanel) = x (rows, inner) · one panel, inner a multiple of 32; tiles are configured for ``rows``.
    static void multiply(const uint16_t* x, int64_t x_stride, const char* w, int64_t inner, float* out) {
        tile_zero(0);
        tile_zero(1);
        tile_zero(2);
        tile_zero(3);
        for (int64_t at = 0; at < inner; at += 32, w += 16 * 4 * kPanel) {
            for (int line = 0; line < 64; ++line) _mm_prefetch(w + kPrefetch + 64 * line, _MM_HINT_T0);
            tile_load(4, x + at, 2 * x_stride);
            tile_load(5, w, 4 * kPanel);
            tile_load(6, w + 64, 4 * kPanel);
            tile_dot(0, 4, 5);
            tile_load(7, w + 128, 4 * kPanel);
            tile_dot(1, 4, 6);
            tile_load(5, w + 192, 4 * kPanel);
            tile_dot(2, 4, 7);
            tile_dot(3, 4, 5);
        }
        tile_store(0, out, 4 * kPanel);
        tile_store(1, out + 16, 4 * kPanel);
        tile_store(2, out + 32, 4 * kPanel);
        tile_store(3, out + 48, 4 * kPanel);
    }
};

inline void bf16_linear(const Task& task, int rows) {
    if (task.inner % 32 != 0) return dense_linear<Bf16>(task, rows);  // every row, in every batch: no mixture of the two
    const Arg &x = task.args[0], &w = task.args[1];
    int configured = 0;
    each_panel<uint16_t>(task, rows, [&](int panel, int row, int count, float* sums) {
        for (int block = 0; block < count; block += 16) {
            const int here = count - block < 16 ? count - block : 16;
            if (here != configured) tile_configure(configured = here);
            TileProduct::multiply(row_of<uint16_t>(x, row + block), x.stride / 2, w.data + panel * w.stride, task.inner, sums + block * kPanel);
        }
    });
    tile_release();
}
