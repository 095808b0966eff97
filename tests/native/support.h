// What the tests of the native engine share: registration, checks that say what they saw, memory with nothing around it.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "../../kernels/native/isa.h"

namespace chipbus::tests {

struct Test {
    const char* name;
    void (*run)();
};

std::vector<Test>& all_tests();

struct Registered {
    Registered(const char* name, void (*run)()) { all_tests().push_back({name, run}); }
};

#define TEST(name)                                  \
    static void name();                             \
    static const Registered name##_test{#name, name}; \
    static void name()

template <class... Parts>
std::string text(const Parts&... parts) {
    std::ostringstream out;
    (out << ... << parts);
    return out.str();
}

#define CHECK(condition, ...)                                                                                            \
    do {                                                                                                                 \
        if (!(condition)) throw std::runtime_error(text(__FILE__, ":", __LINE__, ": not " #condition ": ", __VA_ARGS__)); \
    } while (false)

// The same numbers in every run of a test.
class Random {
  public:
    explicit Random(uint64_t seed) : bits_(seed) {}
    int64_t below(int64_t end) { return static_cast<int64_t>(bits_() % static_cast<uint64_t>(end)); }
    int from(int first, int last) { return first + static_cast<int>(below(last - first + 1)); }
    bool chance(double p) { return static_cast<double>(bits_() % 1'000'000) < p * 1e6; }
    float normal() { return std::normal_distribution<float>()(bits_); }
    template <class T>
    const T& of(const std::vector<T>& choices) {
        return choices[static_cast<size_t>(below(static_cast<int64_t>(choices.size())))];
    }

  private:
    std::mt19937_64 bits_;
};

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

inline uint32_t bits_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

// fp32 to bf16, to the nearest, ties to even.
inline uint16_t narrow(float value) {
    if (std::isnan(value)) return 0x7FC0;
    const uint32_t bits = bits_of(value);
    return static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

inline float widen(uint16_t half) {
    const uint32_t bits = static_cast<uint32_t>(half) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

constexpr unsigned char kUntouched = 0xA5;

// Rows of fp32 or bf16 values (or of bytes) in memory of their own of exactly that size: an address sanitizer sees one
// byte too many. Bytes nobody wrote are kUntouched.
class Rows {
  public:
    Rows(Dtype dtype, int64_t rows, int64_t columns, int64_t padding = 0)
        : dtype(dtype), rows(rows), columns(columns), item(dtype == kFloat32 ? 4 : 2), stride((columns + padding) * item),
          bytes(rows == 0 ? 0 : (rows - 1) * stride + columns * item), memory_(std::make_unique<char[]>(static_cast<size_t>(bytes))) {
        std::memset(memory_.get(), kUntouched, static_cast<size_t>(bytes));
    }

    char* at(int64_t row, int64_t column = 0) const { return memory_.get() + row * stride + column * item; }
    Arg arg(int64_t row = 0, int64_t column = 0) const { return {at(row, column), stride}; }

    float get(int64_t row, int64_t column) const {
        if (dtype == kFloat32) {
            float value;
            std::memcpy(&value, at(row, column), 4);
            return value;
        }
        uint16_t half;
        std::memcpy(&half, at(row, column), 2);
        return widen(half);
    }

    void set(int64_t row, int64_t column, float value) const {
        const uint16_t half = narrow(value);
        std::memcpy(at(row, column), dtype == kFloat32 ? static_cast<const void*>(&value) : &half, static_cast<size_t>(item));
    }

    void fill(Random& random, float scale = 1) const {
        for (int64_t row = 0; row < rows; ++row)
            for (int64_t column = 0; column < columns; ++column) set(row, column, scale * random.normal());
    }

    bool is_untouched(int64_t row, int64_t column) const {
        for (int64_t byte = 0; byte < item; ++byte)
            if (static_cast<unsigned char>(at(row, column)[byte]) != kUntouched) return false;
        return true;
    }

    // Values of other rows, or outside [from, to), that were written; "" if none.
    std::string touched(int64_t first, int64_t last, int64_t from, int64_t to) const {
        for (int64_t row = 0; row < rows; ++row)
            for (int64_t column = 0; column < columns; ++column)
                if ((row < first || row >= last || column < from || column >= to) && !is_untouched(row, column)) return text("row ", row, ", column ", column);
        return "";
    }

    const Dtype dtype;
    const int64_t rows, columns, item, stride, bytes;

  private:
    std::unique_ptr<char[]> memory_;
};

template <class... Where>
void check_near(double seen, double wanted, double error, const Where&... where) {
    CHECK(std::fabs(seen - wanted) <= error, text(where...), ": ", seen, " instead of ", wanted, ", which may differ by ", error);
}

inline double rounding(Dtype dtype) { return dtype == kFloat32 ? 6e-8 : 1.0 / 256; }

// The kernels of every instruction set this machine has.
inline void each_isa(const std::function<void(const KernelSet&)>& test) {
    for (const char* name : {"avx2", "avx512", "avx512bf16", "amx", "amx-emulated"}) {
        const char* why = "";
        if (const KernelSet* kernels = find_kernels(name, &why)) test(*kernels);
    }
}

inline const char* name_of(Dtype dtype) { return dtype == kFloat32 ? "float32" : "bfloat16"; }

}  // namespace chipbus::tests
