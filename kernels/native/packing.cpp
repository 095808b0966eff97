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
    cores.each((columns + kPanel - 1) / kPanel, [&](int64_t panel) {
        char* out = packed + panel * kPanel * row_bytes;
        for (int64_t column = 0; column < kPanel; ++column) {
            const int64_t row = panel * kPanel + column;
            for (int64_t at = 0; at < dwords; ++at) {
                if (row < columns)
                    std::memcpy(out + (at * kPanel + column) * 4, matrix + row * row_bytes + at * 4, 4);
                else
                    std::memset(out + (at * kPanel + column) * 4, 0, 4);
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
                float largest = 0;
                for (int64_t i = begin; i < end && row < columns; ++i) largest = std::fmax(largest, std::fabs(value_at(matrix, row * inner + i, is_wide)));
                const float factor = largest > 0 ? 127.0f / largest : 0.0f;
                int32_t sum = 0;
                for (int64_t i = begin; i < end; ++i) {
                    const float value = row < columns ? value_at(matrix, row * inner + i, is_wide) : 0.0f;
                    const auto rounded = static_cast<int8_t>(std::nearbyintf(value * factor));
                    sum += rounded;
                    packed[panel * kPanel * inner + (i / 4 * kPanel + column) * 4 + i % 4] = static_cast<char>(rounded);
                }
                const int64_t place = (panel * groups + group) * kPanel + column;
                scales[place] = largest / 127.0f;
                sums[place] = sum;
            }
        }
    });
}

}  // namespace chipbus
