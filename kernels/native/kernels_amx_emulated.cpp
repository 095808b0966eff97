// The AMX kernels with tile instructions in C++, as Intel's manual (SDM volume 2, LDTILECFG, TDPBF16PS) describes them:
// what is written for AMX is tested on machines that lack it. Slow, and chosen by tests alone.
#include <cmath>
#include <cstring>

#include "isa.h"

#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vnni")
#include <immintrin.h>

#define CHIPBUS_BLOCK_ROWS 6
#define CHIPBUS_BF16_INSTRUCTIONS
#define CHIPBUS_AMX_TILES

namespace chipbus {
namespace {

struct Tiles {
    int rows[8] = {};
    char data[8][16][64] = {};
};

thread_local Tiles tiles;

inline void tile_configure(int rows) {
    tiles = Tiles();
    for (int tile = 0; tile < 8; ++tile) tiles.rows[tile] = tile < 5 ? rows : 16;
}

inline void tile_release() { tiles = Tiles(); }

inline void tile_zero(int tile) { std::memset(tiles.data[tile], 0, sizeof tiles.data[tile]); }

inline void tile_load(int tile, const void* from, int64_t stride) {
    tile_zero(tile);
    for (int row = 0; row < tiles.rows[tile]; ++row) std::memcpy(tiles.data[tile][row], static_cast<const char*>(from) + row * stride, 64);
}

inline void tile_store(int tile, void* to, int64_t stride) {
    for (int row = 0; row < tiles.rows[tile]; ++row) std::memcpy(static_cast<char*>(to) + row * stride, tiles.data[tile][row], 64);
}

// A bf16 value; the instruction takes denormals for zeros.
inline float tile_value(const char* at) {
    uint16_t half;
    std::memcpy(&half, at, 2);
    if ((half & 0x7F80) == 0) half &= 0x8000;
    const uint32_t bits = static_cast<uint32_t>(half) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline void tile_dot(int sums, int rows, int columns) {
    for (int row = 0; row < tiles.rows[rows]; ++row)
        for (int column = 0; column < 16; ++column) {
            float even = 0, odd = 0;
            for (int pair = 0; pair < 16; ++pair) {
                const char *x = tiles.data[rows][row] + 4 * pair, *w = tiles.data[columns][pair] + 4 * column;
                even = std::fma(tile_value(x), tile_value(w), even);
                odd = std::fma(tile_value(x + 2), tile_value(w + 2), odd);
            }
            float sum;
            std::memcpy(&sum, tiles.data[sums][row] + 4 * column, 4);
            sum += even + odd;
            std::memcpy(tiles.data[sums][row] + 4 * column, &sum, 4);
        }
}

inline void bf16_linear(const Task& task, int rows);

#include "vector_avx512.h"
#include "kernels.inl"
#include "kernels_amx.inl"

}  // namespace

extern const KernelSet kEmulatedAmxKernels = CHIPBUS_KERNEL_SET("amx-emulated");

}  // namespace chipbus
