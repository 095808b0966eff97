#include "packing.h"

#include <cmath>
#include <cstring>

namespace chipbus {

namespace {

float value_at(const char* matrix, int64_t index, bool is_wide) {
    uint32_t bits = 0;
    if (is_wide)
        std::memcpy(&bits, matrix + 4 * index, 4);
    else
        std::memcpy(reinterpret_cast<char*>(&bits) + 2, matrix + 2 * index, 2);
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

}  // namespace

void pack_panels(Cores& cores, const char* matrix, int64_t columns, int64_t inner, int item, char* packed) {
    const int64_t row_bytes = inner * item, dwords = row_bytes / 4;  // one fp32 or two bf16 inputs each
    constexpr int64_t kBlock = 16;                                   // columns and dwords: whole cache lines on both sides
    cores.each((columns + kPanel - 1) / kPanel, [&](int64_t panel) {
        char* out = packed + panel * kPanel * row_bytes;
        uint32_t block[kBlock][kBlock];
        for (int64_t begin = 0; begin < dwords; begin += kBlock) {
            const int64_t wide = dwords - begin < kBlock ? dwords - begin : kBlock;
            for (int64_t left = 0; left < kPanel; left += kBlock) {
                std::memset(block, 0, sizeof block);
                for (int64_t column = 0; column < kBlock; ++column) {
                    const int64_t row = panel * kPanel + left + column;
                    if (row < columns) std::memcpy(block[column], matrix + row * row_bytes + begin * 4, static_cast<size_t>(wide) * 4);
                }
                for (int64_t at = 0; at < wide; ++at) {
                    uint32_t line[kBlock];
                    for (int64_t column = 0; column < kBlock; ++column) line[column] = block[column][at];
                    std::memcpy(out + ((begin + at) * kPanel + left) * 4, line, sizeof line);
                }
            }
        }
    });
}

void pack_int8(Cores& cores, const char* matrix, int64_t columns, int64_t inner, bool is_wide, char* packed, float* scales, int32_t* sums) {
    const int64_t groups = (inner + kGroup - 1) / kGroup;
    cores.each((columns + kPanel - 1) / kPanel, [&](int64_t panel) {
        for (int64_t column = 0; column < kPanel; ++column) {
            const int64_t row = panel * kPanel + column;
            for (int64_t group = 0; group < groups; ++group) {
                const int64_t begin = group * kGroup, end = begin + kGroup < inner ? begin + kGroup : inner;
                float largest = kLeastOfGroup, poison = 0;  // NaN from the first NaN or infinity on
                for (int64_t i = begin; i < end && row < columns; ++i) {
                    const float value = value_at(matrix, row * inner + i, is_wide);
                    largest = std::fmax(largest, std::fabs(value));
                    poison += value * 0.0f;
                }
                const float factor = 127.0f / largest;
                const bool is_real = row < columns && poison == 0;
                int32_t sum = 0;
                for (int64_t i = begin; i < end; ++i) {
                    const float value = is_real ? value_at(matrix, row * inner + i, is_wide) : 0.0f;
                    const auto rounded = static_cast<int8_t>(std::nearbyintf(value * factor));
                    sum += rounded;
                    packed[panel * kPanel * inner + (i / 4 * kPanel + column) * 4 + i % 4] = static_cast<char>(rounded);
                }
                const int64_t place = (panel * groups + group) * kPanel + column;
                scales[place] = largest / 127.0f + poison;
                sums[place] = sum;
            }
        }
    });
}

}  // namespace chipbus
