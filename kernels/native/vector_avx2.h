// Sixteen floats in two AVX2 registers, with the meaning of vector_avx512.h. Included inside the namespace of an instruction set.

struct F16 {
    __m256 lo, hi;
};

constexpr int kColumnVectors = 1;  // 5 rows × 16 columns in 10 of 16 registers
constexpr int kBlockRows = 5;

inline F16 zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline F16 splat(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline F16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, F16 a) {
    _mm256_storeu_ps(p, a.lo);
    _mm256_storeu_ps(p + 8, a.hi);
}
inline F16 operator+(F16 a, F16 b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
inline F16 operator-(F16 a, F16 b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
inline F16 operator*(F16 a, F16 b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
inline F16 operator/(F16 a, F16 b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
inline F16 fma(F16 a, F16 b, F16 c) { return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)}; }
inline F16 max(F16 a, F16 b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
inline F16 min(F16 a, F16 b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
inline F16 abs(F16 a) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_andnot_ps(sign, a.lo), _mm256_andnot_ps(sign, a.hi)};
}
inline F16 round_even(F16 a) {
    constexpr int how = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(a.lo, how), _mm256_round_ps(a.hi, how)};
}
inline __m256 power_of_two(__m256 a) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(a), _mm256_set1_epi32(127)), 23));
}
inline F16 power_of_two(F16 a) { return {power_of_two(a.lo), power_of_two(a.hi)}; }
inline F16 first_lanes(int n, F16 a, F16 b) {
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256 lo = _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(n), lanes));
    const __m256 hi = _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(n - 8), lanes));
    return {_mm256_blendv_ps(b.lo, a.lo, lo), _mm256_blendv_ps(b.hi, a.hi, hi)};
}

inline __m256 rotate(__m256 x, __m256 turn) {
    const __m256 swapped = _mm256_permute_ps(x, 0xB1);
    return _mm256_fmaddsub_ps(x, _mm256_moveldup_ps(turn), _mm256_mul_ps(swapped, _mm256_movehdup_ps(turn)));
}
inline F16 rotate(F16 x, F16 turn) { return {rotate(x.lo, turn.lo), rotate(x.hi, turn.hi)}; }

inline __m256 widen_bf16(__m128i half) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16)); }
inline F16 load_bf16(const uint16_t* p) {
    return {widen_bf16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), widen_bf16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))};
}

inline __m256i narrow_bf16(__m256 a) {
    const __m256i bits = _mm256_castps_si256(a);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF))), 16);
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7FC0), is_nan);
}
inline void store_bf16(uint16_t* p, F16 a) {
    const __m256i halves = _mm256_packus_epi32(narrow_bf16(a.lo), narrow_bf16(a.hi));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(halves, 0xD8));
}
inline void store_int8(int8_t* p, F16 a) {
    const __m256i halves = _mm256_permute4x64_epi64(_mm256_packs_epi32(_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi)), 0xD8);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1)));
}

struct Bf16 {
    using Value = uint16_t;
    struct Pair {
        __m256i lo, hi;
    };
    static constexpr int kStep = 2;
    static Pair weights(const char* p) {
        return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32))};
    }
    static Pair inputs(const uint16_t* p) {
        int32_t pair;
        __builtin_memcpy(&pair, p, 4);
        return {_mm256_set1_epi32(pair), _mm256_set1_epi32(pair)};
    }
    static __m256 dot(__m256 sum, __m256i x, __m256i w) {
        const __m256i high = _mm256_set1_epi32(static_cast<int>(0xFFFF0000));
        sum = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_slli_epi32(x, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(w, 16)), sum);
        return _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_and_si256(x, high)), _mm256_castsi256_ps(_mm256_and_si256(w, high)), sum);
    }
    static F16 dot(F16 sum, Pair x, Pair w) { return {dot(sum.lo, x.lo, w.lo), dot(sum.hi, x.hi, w.hi)}; }
};

struct Float32 {
    using Value = float;
    using Pair = F16;
    static constexpr int kStep = 1;
    static Pair weights(const char* p) { return load(reinterpret_cast<const float*>(p)); }
    static Pair inputs(const float* p) { return splat(*p); }
    static F16 dot(F16 sum, Pair x, Pair w) { return fma(x, w, sum); }
};

struct Int8 {
    struct Sum {
        __m256i lo, hi;
    };
    using Four = Sum;
    static Sum zero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
    static Sum start(const int32_t*) { return zero(); }
    static Four weights(const char* p) {
        return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32))};
    }
    static Four inputs(const int8_t* p) {
        int32_t four;
        __builtin_memcpy(&four, p, 4);
        return {_mm256_set1_epi32(four), _mm256_set1_epi32(four)};
    }
    static __m256i dot(__m256i sum, __m256i x, __m256i w) {
        const __m256i even_x = _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8), odd_x = _mm256_srai_epi16(x, 8);
        const __m256i even_w = _mm256_srai_epi16(_mm256_slli_epi16(w, 8), 8), odd_w = _mm256_srai_epi16(w, 8);
        return _mm256_add_epi32(sum, _mm256_add_epi32(_mm256_madd_epi16(even_x, even_w), _mm256_madd_epi16(odd_x, odd_w)));
    }
    static Sum dot(Sum sum, Four x, Four w) { return {dot(sum.lo, x.lo, w.lo), dot(sum.hi, x.hi, w.hi)}; }
    static F16 floats(Sum sum) { return {_mm256_cvtepi32_ps(sum.lo), _mm256_cvtepi32_ps(sum.hi)}; }
};

inline void transpose_dwords(const char* const* rows, int64_t at, char* columns, int64_t stride) {
    for (int row = 0; row < 16; ++row)
        for (int column = 0; column < 16; ++column) __builtin_memcpy(columns + column * stride + 4 * row, rows[row] + at + 4 * column, 4);
}

inline void interleave_pairs(const uint16_t* x, const uint16_t* y, char* out) {
    for (int i = 0; i < 32; ++i) {
        __builtin_memcpy(out + 4 * i, x + i, 2);
        __builtin_memcpy(out + 4 * i + 2, y + i, 2);
    }
}
