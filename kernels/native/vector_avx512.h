// Sixteen floats in one AVX-512 register. Included once, inside the namespace of an instruction set.

struct F16 {
    __m512 v;
};

constexpr int kColumnVectors = 4;  // of 16 columns a register block holds: 6 rows × 4 in 24 registers
constexpr int kBlockRows = 6;

inline F16 zero() { return {_mm512_setzero_ps()}; }
inline F16 splat(float x) { return {_mm512_set1_ps(x)}; }
inline F16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, F16 a) { _mm512_storeu_ps(p, a.v); }
inline F16 operator+(F16 a, F16 b) { return {_mm512_add_ps(a.v, b.v)}; }
inline F16 operator-(F16 a, F16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline F16 operator*(F16 a, F16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F16 operator/(F16 a, F16 b) { return {_mm512_div_ps(a.v, b.v)}; }
inline F16 fma(F16 a, F16 b, F16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline F16 max(F16 a, F16 b) { return {_mm512_max_ps(a.v, b.v)}; }
inline F16 min(F16 a, F16 b) { return {_mm512_min_ps(a.v, b.v)}; }
inline F16 abs(F16 a) { return {_mm512_abs_ps(a.v)}; }
inline F16 round_even(F16 a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
// 2^a for whole a
inline F16 power_of_two(F16 a) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(a.v), _mm512_set1_epi32(127)), 23))}; }
// The first n lanes of a, the others of b; n may be below 0 and above 16.
inline F16 first_lanes(int n, F16 a, F16 b) {
    const unsigned lanes = n <= 0 ? 0 : n >= 16 ? 0xFFFF : (1u << n) - 1;
    return {_mm512_mask_blend_ps(static_cast<__mmask16>(lanes), b.v, a.v)};
}
// Pairs (a, b) of x turned by pairs (cos, sin): (a cos − b sin, b cos + a sin).
inline F16 rotate(F16 x, F16 turn) {
    const __m512 swapped = _mm512_permute_ps(x.v, 0xB1);
    return {_mm512_fmaddsub_ps(x.v, _mm512_moveldup_ps(turn.v), _mm512_mul_ps(swapped, _mm512_movehdup_ps(turn.v)))};
}

inline F16 load_bf16(const uint16_t* p) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16))};
}

inline void store_int8(int8_t* p, F16 a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(a.v)));
}

inline void store_bf16(uint16_t* p, F16 a) {
#ifdef CHIPBUS_BF16_INSTRUCTIONS
    const __m256i half = (__m256i)_mm512_cvtneps_pbh(a.v);
#else
    const __m512i bits = _mm512_castps_si512(a.v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF))), 16);
    rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7FC0));
    const __m256i half = _mm512_cvtepi32_epi16(rounded);
#endif
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), half);
}

// Products of bf16 pairs: the same pair of one row times 16 columns' pairs.
struct Bf16 {
    using Value = uint16_t;
    using Pair = __m512i;
    static constexpr int kStep = 2;  // inputs one step takes
    static Pair weights(const char* p) { return _mm512_loadu_si512(p); }
    static Pair inputs(const uint16_t* p) {
        int32_t pair;
        __builtin_memcpy(&pair, p, 4);
        return _mm512_set1_epi32(pair);
    }
    static F16 dot(F16 sum, Pair x, Pair w) {
#ifdef CHIPBUS_BF16_INSTRUCTIONS
        return {_mm512_dpbf16_ps(sum.v, (__m512bh)x, (__m512bh)w)};
#else
        const __m512i high = _mm512_set1_epi32(static_cast<int>(0xFFFF0000));
        sum.v = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(x, 16)), _mm512_castsi512_ps(_mm512_slli_epi32(w, 16)), sum.v);
        sum.v = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(x, high)), _mm512_castsi512_ps(_mm512_and_si512(w, high)), sum.v);
        return sum;
#endif
    }
};

struct Float32 {
    using Value = float;
    using Pair = __m512;
    static constexpr int kStep = 1;
    static Pair weights(const char* p) { return _mm512_loadu_ps(p); }
    static Pair inputs(const float* p) { return _mm512_set1_ps(*p); }
    static F16 dot(F16 sum, Pair x, Pair w) { return {_mm512_fmadd_ps(x, w, sum.v)}; }
};

// Exact sums of four int8 products in each of 16 columns.
struct Int8 {
    using Sum = __m512i;
    using Four = __m512i;
    static Four weights(const char* p) { return _mm512_loadu_si512(p); }
    static Four inputs(const int8_t* p) {
        int32_t four;
        __builtin_memcpy(&four, p, 4);
        return _mm512_set1_epi32(four);
    }
#ifdef CHIPBUS_BF16_INSTRUCTIONS
    // The instruction takes unsigned times signed: inputs are 128 too large, and ``start`` makes up for that.
    static Sum start(const int32_t* sums) { return _mm512_slli_epi32(_mm512_sub_epi32(_mm512_setzero_si512(), _mm512_loadu_si512(sums)), 7); }
    static Sum dot(Sum sum, Four x, Four w) { return _mm512_dpbusd_epi32(sum, _mm512_xor_si512(x, _mm512_set1_epi32(static_cast<int>(0x80808080))), w); }
#else
    static Sum start(const int32_t*) { return _mm512_setzero_si512(); }
    static Sum dot(Sum sum, Four x, Four w) {
        const __m512i even_x = _mm512_srai_epi16(_mm512_slli_epi16(x, 8), 8), odd_x = _mm512_srai_epi16(x, 8);
        const __m512i even_w = _mm512_srai_epi16(_mm512_slli_epi16(w, 8), 8), odd_w = _mm512_srai_epi16(w, 8);
        return _mm512_add_epi32(sum, _mm512_add_epi32(_mm512_madd_epi16(even_x, even_w), _mm512_madd_epi16(odd_x, odd_w)));
    }
#endif
    static F16 floats(Sum sum) { return {_mm512_cvtepi32_ps(sum)}; }
};

// 16 rows of 16 dwords, transposed: what is at rows[r][c] goes to columns + c × stride + 4 r bytes.
inline void transpose_dwords(const char* const* rows, int64_t at, char* columns, int64_t stride) {
    __m512i a[16], b[16];
    for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(rows[i] + at);
    for (int i = 0; i < 8; ++i) {
        b[2 * i] = _mm512_unpacklo_epi32(a[2 * i], a[2 * i + 1]);
        b[2 * i + 1] = _mm512_unpackhi_epi32(a[2 * i], a[2 * i + 1]);
    }
    for (int i = 0; i < 4; ++i) {
        a[4 * i] = _mm512_unpacklo_epi64(b[4 * i], b[4 * i + 2]);
        a[4 * i + 1] = _mm512_unpackhi_epi64(b[4 * i], b[4 * i + 2]);
        a[4 * i + 2] = _mm512_unpacklo_epi64(b[4 * i + 1], b[4 * i + 3]);
        a[4 * i + 3] = _mm512_unpackhi_epi64(b[4 * i + 1], b[4 * i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
        b[i] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88);
        b[i + 4] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xDD);
        b[i + 8] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88);
        b[i + 12] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xDD);
    }
    for (int i = 0; i < 4; ++i) {
        a[i] = _mm512_shuffle_i32x4(b[i], b[i + 8], 0x88);
        a[i + 8] = _mm512_shuffle_i32x4(b[i], b[i + 8], 0xDD);
        a[i + 4] = _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0x88);
        a[i + 12] = _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0xDD);
    }
    for (int i = 0; i < 16; ++i) _mm512_storeu_si512(columns + i * stride, a[i]);
}

// Which of 64 halves, 32 of x and 32 of y, make pairs: x0 y0 x1 y1 …
alignas(64) constexpr uint16_t kFirstPairs[32] = {0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39, 8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};

// Two rows of 32 bf16 as 32 pairs: x0 y0 x1 y1 …
inline void interleave_pairs(const uint16_t* x, const uint16_t* y, char* out) {
    const __m512i first = _mm512_load_si512(kFirstPairs), second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
    const __m512i from_x = _mm512_loadu_si512(x), from_y = _mm512_loadu_si512(y);
    _mm512_storeu_si512(out, _mm512_permutex2var_epi16(from_x, first, from_y));
    _mm512_storeu_si512(out + 64, _mm512_permutex2var_epi16(from_x, second, from_y));
}
