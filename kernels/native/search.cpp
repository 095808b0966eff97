#include "search.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>

namespace chipbus {

namespace {

constexpr int64_t kPiece = 16384;  // values one core looks at
constexpr int64_t kReadBytes = 1 << 20;

struct Found {
    float value;
    int64_t index;
};

bool beats(const Found& a, const Found& b) {
    if (std::isnan(a.value) != std::isnan(b.value)) return std::isnan(a.value);
    if (a.value > b.value) return true;
    return (a.value == b.value || std::isnan(a.value)) && a.index < b.index;
}

Found best_of(const float* values, int64_t begin, int64_t end) {
    // The largest first, in lanes a compiler can keep in registers; then where it is.
    constexpr int kLanes = 16;
    float most[kLanes];
    std::fill_n(most, kLanes, -std::numeric_limits<float>::infinity());
    bool has_nan = false;
    int64_t at = begin;
    for (; at + kLanes <= end; at += kLanes)
        for (int lane = 0; lane < kLanes; ++lane) {
            const float value = values[at + lane];
            most[lane] = value > most[lane] ? value : most[lane];
            has_nan |= value != value;
        }
    float largest = *std::max_element(most, most + kLanes);
    for (; at < end; ++at) {
        largest = values[at] > largest ? values[at] : largest;
        has_nan |= values[at] != values[at];
    }
    for (at = begin; at < end; ++at)
        if (has_nan ? values[at] != values[at] : values[at] == largest) break;
    return {values[at < end ? at : begin], at < end ? at : begin};
}

}  // namespace

std::vector<int64_t> largest(Cores& cores, const char* matrix, int64_t row_bytes, const std::vector<int64_t>& rows, int64_t columns) {
    const int64_t pieces = (columns + kPiece - 1) / kPiece;
    std::vector<Found> found(rows.size() * static_cast<size_t>(pieces));
    const auto look = [&](int64_t job) {
        const auto* values = reinterpret_cast<const float*>(matrix + rows[static_cast<size_t>(job / pieces)] * row_bytes);
        const int64_t begin = job % pieces * kPiece;
        found[static_cast<size_t>(job)] = best_of(values, begin, std::min(begin + kPiece, columns));
    };
    const auto jobs = static_cast<int64_t>(found.size());
    if (jobs <= 2)  // less work than waking anyone
        for (int64_t job = 0; job < jobs; ++job) look(job);
    else
        cores.each(jobs, look);
    std::vector<int64_t> best;
    for (size_t row = 0; row < rows.size(); ++row) {
        Found one = found[row * static_cast<size_t>(pieces)];
        for (int64_t piece = 1; piece < pieces; ++piece) {
            const Found& other = found[row * static_cast<size_t>(pieces) + static_cast<size_t>(piece)];
            if (beats(other, one)) one = other;
        }
        best.push_back(one.index);
    }
    return best;
}

std::vector<int64_t> top(const float* values, int64_t size, int64_t count) {
    std::vector<int64_t> order(static_cast<size_t>(size));
    std::iota(order.begin(), order.end(), int64_t{0});
    const auto before = [values](int64_t a, int64_t b) {
        const float x = values[a], y = values[b];
        if (std::isnan(x) != std::isnan(y)) return std::isnan(y);
        return x > y || ((x == y || std::isnan(x)) && a < b);
    };
    const auto end = order.begin() + std::clamp<int64_t>(count, 0, size);
    std::partial_sort(order.begin(), end, order.end(), before);
    return {order.begin(), end};
}

double read_all(Cores& cores, const char* memory, int64_t bytes) {
    const auto began = std::chrono::steady_clock::now();
    cores.each((bytes + kReadBytes - 1) / kReadBytes, [&](int64_t piece) {
        const char* begin = memory + piece * kReadBytes;
        const int64_t size = std::min(kReadBytes, bytes - piece * kReadBytes);
        uint64_t sums[8] = {};
        for (int64_t at = 0; at + 64 <= size; at += 64)
            for (int lane = 0; lane < 8; ++lane) {
                uint64_t word;
                std::memcpy(&word, begin + at + 8 * lane, 8);
                sums[lane] ^= word;
            }
        volatile uint64_t kept = sums[0] ^ sums[1] ^ sums[2] ^ sums[3] ^ sums[4] ^ sums[5] ^ sums[6] ^ sums[7];
        (void)kept;
    });
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
}

}  // namespace chipbus
