// Kernels for processors with AMX bf16 tiles.
#include "isa.h"

#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vnni,amx-tile,amx-bf16")
#include <immintrin.h>

#define CHIPBUS_BLOCK_ROWS 6
#define CHIPBUS_BF16_INSTRUCTIONS
#define CHIPBUS_AMX_TILES

namespace chipbus {
namespace {

struct TileConfig {  // Intel SDM, LDTILECFG
    uint8_t palette = 1;
    uint8_t start_row = 0;
    uint8_t reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};

// Tiles 0 to 3: sums of ``rows`` rows and 16 columns. 4: rows, 32 inputs. 5 to 7: 16 pairs of inputs, 16 columns. Per
// thread; other libraries change it, so every linear sets its own.
inline void tile_configure(int rows) {
    TileConfig config;
    for (int tile = 0; tile < 8; ++tile) {
        config.row_bytes[tile] = 64;
        config.rows[tile] = static_cast<uint8_t>(tile < 5 ? rows : 16);
    }
    // GCC 12 takes the stores above for dead and drops them; gone when it models the instruction's memory operand.
    asm volatile("" : : "r"(&config) : "memory");
    _tile_loadconfig(&config);
}

// The intrinsics take tile numbers as literals.
#define tile_zero(tile) _tile_zero(tile)
#define tile_load(tile, from, stride) _tile_loadd(tile, from, stride)
#define tile_store(tile, to, stride) _tile_stored(tile, to, stride)
#define tile_dot(sums, rows, columns) _tile_dpbf16ps(sums, rows, columns)
#define tile_release() _tile_release()

inline void bf16_linear(const Task& task, int rows);

#include "vector_avx512.h"
#include "kernels.inl"
#include "kernels_amx.inl"

}  // namespace

extern const KernelSet kAmxKernels = CHIPBUS_KERNEL_SET("amx");

}  // namespace chipbus
