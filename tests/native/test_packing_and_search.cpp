// Weights in panels, and what is done with logits, against plain loops.
#include <algorithm>

#include "../../kernels/native/packing.h"
#include "../../kernels/native/search.h"
#include "support.h"

namespace chipbus::tests {
namespace {

constexpr KernelSet kNoKernels{"none", {}};

int64_t panels_of(int64_t columns) { return (columns + kPanel - 1) / kPanel; }

TEST(panels_hold_every_weight_once_and_zeros_behind) {
    Random random(11);
    Cores cores(2, kNoKernels);
    for (const Dtype dtype : {kFloat32, kBfloat16})
        for (int shape = 0; shape < 12; ++shape) {
            const int64_t columns = random.from(1, 200), inner = dtype == kFloat32 ? random.from(1, 80) : 2 * random.from(1, 40);
            const Rows matrix(dtype, columns, inner), packed(dtype, panels_of(columns) * inner, kPanel);
            matrix.fill(random);
            pack_panels(cores, matrix.at(0), columns, inner, static_cast<int>(matrix.item), packed.at(0));
            const int64_t step = dtype == kFloat32 ? 1 : 2;
            for (int64_t column = 0; column < panels_of(columns) * kPanel; ++column)
                for (int64_t i = 0; i < inner; ++i) {
                    const int64_t flat = column / kPanel * kPanel * inner + (i / step * kPanel + column % kPanel) * step + i % step;
                    const float wanted = column < columns ? matrix.get(column, i) : 0, seen = packed.get(flat / kPanel, flat % kPanel);
                    CHECK(bits_of(seen) == bits_of(wanted), name_of(dtype), " ", columns, " × ", inner, ": column ", column, ", input ", i);
                }
        }
}

TEST(int8_panels_are_the_nearest_multiples_of_a_groups_scale) {
    Random random(12);
    Cores cores(2, kNoKernels);
    for (const Dtype dtype : {kFloat32, kBfloat16})
        for (int shape = 0; shape < 8; ++shape) {
            const int64_t columns = random.from(1, 150), inner = 4 * random.from(1, 80), groups = (inner + kGroup - 1) / kGroup;
            const Rows matrix(dtype, columns, inner);
            matrix.fill(random, 0.05f);
            for (int64_t i = 0; i < std::min<int64_t>(inner, kGroup); ++i) matrix.set(0, i, 0);  // a group of zeros
            const Rows scales(kFloat32, panels_of(columns) * groups, kPanel);
            const auto size = static_cast<size_t>(panels_of(columns) * kPanel * inner);
            const auto packed = std::make_unique<char[]>(size);
            const auto sums = std::make_unique<int32_t[]>(static_cast<size_t>(panels_of(columns) * groups * kPanel));
            pack_int8(cores, matrix.at(0), columns, inner, dtype == kFloat32, packed.get(), reinterpret_cast<float*>(scales.at(0)), sums.get());
            for (int64_t column = 0; column < panels_of(columns) * kPanel; ++column)
                for (int64_t group = 0; group < groups; ++group) {
                    const int64_t end = std::min(group * kGroup + kGroup, inner), panel = column / kPanel;
                    float largest = kLeastOfGroup;
                    for (int64_t i = group * kGroup; i < end && column < columns; ++i) largest = std::max(largest, std::fabs(matrix.get(column, i)));
                    const float scale = scales.get(panel * groups + group, column % kPanel);
                    CHECK(scale == largest / 127.0f, "column ", column, ", group ", group, ": ", scale);
                    int32_t sum = 0;
                    for (int64_t i = group * kGroup; i < end; ++i) {
                        const auto value = static_cast<int8_t>(packed[static_cast<size_t>(panel * kPanel * inner + (i / 4 * kPanel + column % kPanel) * 4 + i % 4)]);
                        const double wanted = column < columns ? matrix.get(column, i) : 0;
                        check_near(value * double{scale}, wanted, 0.501 * scale, "column ", column, ", input ", i);
                        sum += value;
                    }
                    const int32_t kept = sums[static_cast<size_t>((panel * groups + group) * kPanel + column % kPanel)];
                    CHECK(kept == sum, "column ", column, ", group ", group, ": ", kept, " instead of ", sum);
                }
        }
}

TEST(a_nan_or_an_infinity_in_an_int8_group_makes_its_scale_nan) {
    Random random(15);
    Cores cores(2, kNoKernels);
    for (const Dtype dtype : {kFloat32, kBfloat16})
        for (const float value : {kNan, kInfinity, -kInfinity}) {
            const Rows matrix(dtype, 3, 2 * kGroup), scales(kFloat32, 2, kPanel);
            matrix.fill(random);
            matrix.set(1, kGroup + 5, value);
            const auto packed = std::make_unique<char[]>(kPanel * 2 * kGroup);
            const auto sums = std::make_unique<int32_t[]>(2 * kPanel);
            pack_int8(cores, matrix.at(0), 3, 2 * kGroup, dtype == kFloat32, packed.get(), reinterpret_cast<float*>(scales.at(0)), sums.get());
            for (int64_t group = 0; group < 2; ++group)
                for (int64_t column = 0; column < kPanel; ++column) {
                    const bool is_nan = std::isnan(scales.get(group, column)), wanted = group == 1 && column == 1;
                    CHECK(is_nan == wanted, value, ": scale of column ", column, ", group ", group, " is ", scales.get(group, column));
                }
        }
}

TEST(the_largest_is_the_first_among_equals_and_nan_is_larger_than_all) {
    Random random(13);
    Cores cores(2, kNoKernels);
    for (const int64_t columns : {1, 7, 16, 33, 16384, 16385, 40000}) {
        const int64_t rows = columns > 1000 ? 3 : 9;
        const Rows logits(kFloat32, rows, columns, 3);
        for (int64_t row = 0; row < rows; ++row)
            for (int64_t column = 0; column < columns; ++column) logits.set(row, column, static_cast<float>(random.from(-3, columns > 1000 ? 30 : 3)));  // many equals
        for (int64_t column = 0; column < columns; ++column) logits.set(0, column, -kInfinity);
        logits.set(1, random.below(columns), kNan);
        logits.set(1, random.below(columns), kNan);
        logits.set(2, random.below(columns), kInfinity);
        const std::vector<int64_t> asked = columns > 1000 ? std::vector<int64_t>{2, 0, 1} : std::vector<int64_t>{8, 0, 1, 1, 2, 5};
        const std::vector<int64_t> seen = largest(cores, logits.at(0), logits.stride, asked, columns);
        CHECK(seen.size() == asked.size(), seen.size(), " answers");
        for (size_t at = 0; at < asked.size(); ++at) {
            int64_t wanted = 0;
            for (int64_t column = 1; column < columns; ++column) {
                const float value = logits.get(asked[at], column), best = logits.get(asked[at], wanted);
                if (!std::isnan(best) && (std::isnan(value) || value > best)) wanted = column;
            }
            CHECK(seen[at] == wanted, "row ", asked[at], " of ", columns, ": ", seen[at], " instead of ", wanted);
        }
    }
    CHECK(largest(cores, nullptr, 0, {}, 10).empty(), "nothing asked");
}

TEST(the_top_come_in_order_with_nan_last) {
    Random random(14);
    for (const int64_t size : {1, 5, 300}) {
        std::vector<float> values(static_cast<size_t>(size));
        for (float& value : values) value = random.chance(0.1) ? kNan : static_cast<float>(random.from(-4, 4));
        std::vector<int64_t> wanted(values.size());
        for (size_t at = 0; at < wanted.size(); ++at) wanted[at] = static_cast<int64_t>(at);
        std::stable_sort(wanted.begin(), wanted.end(), [&](int64_t a, int64_t b) {
            const float x = values[static_cast<size_t>(a)], y = values[static_cast<size_t>(b)];
            return std::isnan(y) ? !std::isnan(x) : x > y;
        });
        for (const int64_t count : {int64_t{0}, int64_t{1}, size / 2, size, size + 3}) {
            const std::vector<int64_t> seen = top(values.data(), size, count);
            const auto most = static_cast<size_t>(std::min(count, size));
            CHECK(seen == std::vector<int64_t>(wanted.begin(), wanted.begin() + static_cast<int64_t>(most)), count, " of ", size);
        }
    }
}

TEST(memory_is_read_to_its_last_byte_and_no_further) {
    Cores cores(2, kNoKernels);
    for (const int64_t bytes : {0, 1, 63, 64, 1000, (1 << 20) + 65}) {
        const auto memory = std::make_unique<char[]>(static_cast<size_t>(bytes));
        CHECK(read_all(cores, memory.get(), bytes) >= 0, bytes, " bytes");
    }
}

}  // namespace
}  // namespace chipbus::tests
