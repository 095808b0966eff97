// The tile kernels, once for every instruction set: included after a vector header, inside the namespace of the set.
//
// What each computes is defined by its namesake in kernels/torch_kernels.py. A row's result is the same bits whatever
// shares its task: sums over inputs run in the order of the inputs, one accumulator per output; keys are attended in
// blocks that begin at multiples of kKeyBlock, always whole, for one query or for many.

inline void add_lanes(float* lanes) {
    for (int width = 8; width; width /= 2)
        for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
}

inline float sum_of(F16 a) {
    float lanes[16];
    store(lanes, a);
    add_lanes(lanes);
    return lanes[0];
}

inline float max_of(F16 a) {
    float lanes[16];
    store(lanes, a);
    float most = lanes[0];
    for (int i = 1; i < 16; ++i) most = lanes[i] > most ? lanes[i] : most;
    return most;
}

// e^x within 2 units in the last place: Cephes' reduction to ±ln 2 / 2 and its polynomial. NaN stays NaN.
inline F16 exp(F16 x) {
    x = max(splat(-87.3f), min(splat(88.7f), x));
    const F16 n = round_even(x * splat(1.44269504088896341f));
    F16 r = fma(n, splat(-0.693359375f), x);
    r = fma(n, splat(2.12194440e-4f), r);
    F16 p = splat(1.9875691500e-4f);
    p = fma(p, r, splat(1.3981999507e-3f));
    p = fma(p, r, splat(8.3334519073e-3f));
    p = fma(p, r, splat(4.1665795894e-2f));
    p = fma(p, r, splat(1.6666665459e-1f));
    p = fma(p, r, splat(5.0000001201e-1f));
    p = fma(p, r * r, r) + splat(1.0f);
    // In two factors: 2^128 is no float, though e^88.7 is.
    const F16 half = round_even(n * splat(0.5f));
    return p * power_of_two(half) * power_of_two(n - half);
}

inline F16 load_values(const float* p) { return load(p); }
inline F16 load_values(const uint16_t* p) { return load_bf16(p); }
inline void store_values(float* p, F16 a) { store(p, a); }
inline void store_values(uint16_t* p, F16 a) { store_bf16(p, a); }

// Up to 16 values, zeros behind them.
template <class Value>
inline F16 load_some(const Value* p, int64_t count) {
    if (count >= 16) return load_values(p);
    Value padded[16] = {};
    for (int64_t i = 0; i < count; ++i) padded[i] = p[i];
    return load_values(padded);
}

template <class Value>
inline void store_some(Value* p, F16 a, int64_t count) {
    if (count >= 16) return store_values(p, a);
    Value padded[16];
    store_values(padded, a);
    for (int64_t i = 0; i < count; ++i) p[i] = padded[i];
}

template <class Value>
inline Value* row_of(const Arg& arg, int64_t row) {
    return reinterpret_cast<Value*>(arg.data + row * arg.stride);
}

inline int real_rows(const Task& task, int count) {
    const int left = count - task.first;
    return left < task.rows ? left : task.rows;
}

// ---- products of rows and packed panels -----------------------------------------------------------------------------

// Weights arrive from memory at the pace of the cores' arithmetic only if their lines are asked for well before and
// evenly. Rows are taken in strips, a strip's inputs in chunks; while a chunk is multiplied the next one is fetched.
constexpr int kStripRows = 48;
constexpr int64_t kPrefetch = 4096;   // bytes ahead where one block of rows is all there is
constexpr int64_t kChunkSteps = 512;  // 128 KiB of a panel: this chunk and the next one fit the second-level cache

// rows × kColumnVectors × 16 columns of a panel: out (rows, kPanel) += x · w. ``lines``: cache lines of ``ahead`` to
// fetch in each step.
template <class W, int rows, int lines>
inline void multiply_block(const typename W::Value* x, int64_t x_stride, const char* w, int64_t steps, float* out, const char* ahead) {
    F16 sums[rows][kColumnVectors];
    for (int r = 0; r < rows; ++r)
        for (int c = 0; c < kColumnVectors; ++c) sums[r][c] = load(out + r * kPanel + 16 * c);
    for (int64_t step = 0; step < steps; ++step) {
        for (int line = 0; line < lines; ++line) _mm_prefetch(ahead + 64 * line, _MM_HINT_T1);
        ahead += 64 * lines;
        typename W::Pair columns[kColumnVectors];
        for (int c = 0; c < kColumnVectors; ++c) columns[c] = W::weights(w + 64 * c);
        for (int r = 0; r < rows; ++r) {
            const typename W::Pair input = W::inputs(x + r * x_stride);
            for (int c = 0; c < kColumnVectors; ++c) sums[r][c] = W::dot(sums[r][c], input, columns[c]);
        }
        w += 4 * kPanel;
        x += W::kStep;
    }
    for (int r = 0; r < rows; ++r)
        for (int c = 0; c < kColumnVectors; ++c) store(out + r * kPanel + 16 * c, sums[r][c]);
}

template <class W, int lines>
inline void multiply_rows(int rows, const typename W::Value* x, int64_t x_stride, const char* w, int64_t steps, float* out, const char* ahead) {
    for (int c = 0; c < kPanel / 16; c += kColumnVectors) {
        const char* columns = w + 64 * c;
        float* target = out + 16 * c;
        switch (rows) {
            case 1: multiply_block<W, 1, lines>(x, x_stride, columns, steps, target, ahead); break;
            case 2: multiply_block<W, 2, lines>(x, x_stride, columns, steps, target, ahead); break;
            case 3: multiply_block<W, 3, lines>(x, x_stride, columns, steps, target, ahead); break;
            case 4: multiply_block<W, 4, lines>(x, x_stride, columns, steps, target, ahead); break;
            case 5: multiply_block<W, 5, lines>(x, x_stride, columns, steps, target, ahead); break;
#if CHIPBUS_BLOCK_ROWS > 5
            case 6: multiply_block<W, 6, lines>(x, x_stride, columns, steps, target, ahead); break;
#endif
        }
    }
}

// out (rows, kPanel) += x (rows, inner) · one panel; at most kStripRows rows.
template <class W>
inline void multiply_strip(int rows, const typename W::Value* x, int64_t x_stride, const char* w, int64_t inner, float* out) {
    const int blocks = (rows + kBlockRows - 1) / kBlockRows;
    const int64_t steps = inner / W::kStep;
    for (int64_t begin = 0; begin < steps; begin += kChunkSteps) {
        const int64_t count = steps - begin < kChunkSteps ? steps - begin : kChunkSteps;
        const char* chunk = w + begin * (4 * kPanel);
        const char* ahead = chunk + count * (4 * kPanel);  // the next chunk, perhaps of the next panel
        for (int row = 0; row < rows; row += kBlockRows) {
            const typename W::Value* from = x + row * x_stride + begin * W::kStep;
            const int here = rows - row < kBlockRows ? rows - row : kBlockRows;
            float* target = out + row * kPanel;
            if (blocks == 1)
                multiply_rows<W, 4>(here, from, x_stride, chunk, count, target, chunk + kPrefetch);
            else if (row < 2 * kBlockRows && blocks < 4)
                multiply_rows<W, 2>(here, from, x_stride, chunk, count, target, ahead + row / kBlockRows * count * 128);
            else if (row < 4 * kBlockRows && blocks >= 4)
                multiply_rows<W, 1>(here, from, x_stride, chunk, count, target, ahead + row / kBlockRows * count * 64);
            else
                multiply_rows<W, 0>(here, from, x_stride, chunk, count, target, ahead);
        }
    }
}

// One register block of an int8 panel: exact sums inside a group, scaled and added up group by group.
template <int rows>
inline void multiply_int8(const int8_t* x, int64_t x_stride, const float* x_scales, int64_t groups, const char* w, const float* scales, const int32_t* sums,
                          int64_t inner, float* out) {
    for (int r = 0; r < rows; ++r)
        for (int c = 0; c < kColumnVectors; ++c) store(out + r * kPanel + 16 * c, zero());
    for (int64_t group = 0; group < groups; ++group) {
        const int64_t left = inner - group * kGroup, steps = (left < kGroup ? left : kGroup) / 4;
        Int8::Sum exact[rows][kColumnVectors];
        for (int r = 0; r < rows; ++r)
            for (int c = 0; c < kColumnVectors; ++c) exact[r][c] = Int8::start(sums + 16 * c);
        for (int64_t step = 0; step < steps; ++step) {
            Int8::Four columns[kColumnVectors];
            for (int c = 0; c < kColumnVectors; ++c) {
                columns[c] = Int8::weights(w + 64 * c);
                _mm_prefetch(w + 64 * c + kPrefetch, _MM_HINT_T0);
            }
            for (int r = 0; r < rows; ++r) {
                const Int8::Four input = Int8::inputs(x + r * x_stride);
                for (int c = 0; c < kColumnVectors; ++c) exact[r][c] = Int8::dot(exact[r][c], input, columns[c]);
            }
            w += 4 * kPanel;
            x += 4;
        }
        for (int r = 0; r < rows; ++r)
            for (int c = 0; c < kColumnVectors; ++c) {
                float* target = out + r * kPanel + 16 * c;
                store(target, fma(Int8::floats(exact[r][c]), load(scales + 16 * c) * splat(x_scales[r * groups + group]), load(target)));
            }
        scales += kPanel;
        sums += kPanel;
    }
}

inline void multiply_int8_rows(int rows, const int8_t* x, int64_t x_stride, const float* x_scales, int64_t groups, const char* w, const float* scales, const int32_t* sums,
                               int64_t inner, float* out) {
    for (int c = 0; c < kPanel; c += 16 * kColumnVectors) {
        const char* columns = w + 4 * c;
        switch (rows) {
            case 1: multiply_int8<1>(x, x_stride, x_scales, groups, columns, scales + c, sums + c, inner, out + c); break;
            case 2: multiply_int8<2>(x, x_stride, x_scales, groups, columns, scales + c, sums + c, inner, out + c); break;
            case 3: multiply_int8<3>(x, x_stride, x_scales, groups, columns, scales + c, sums + c, inner, out + c); break;
            case 4: multiply_int8<4>(x, x_stride, x_scales, groups, columns, scales + c, sums + c, inner, out + c); break;
            case 5: multiply_int8<5>(x, x_stride, x_scales, groups, columns, scales + c, sums + c, inner, out + c); break;
#if CHIPBUS_BLOCK_ROWS > 5
            case 6: multiply_int8<6>(x, x_stride, x_scales, groups, columns, scales + c, sums + c, inner, out + c); break;
#endif
        }
    }
}

// Rows as int8 with a scale per kGroup inputs: the largest magnitude of a group becomes 127. A NaN or an infinity makes
// the first scale NaN, and with it every sum of the row.
template <class Value>
inline void quantize_row(const Value* x, int64_t inner, int8_t* out, float* scales) {
    F16 poison = zero();
    float* const first = scales;
    for (int64_t begin = 0; begin < inner; begin += kGroup) {
        const int64_t end = begin + kGroup < inner ? begin + kGroup : inner;
        F16 most = zero();
        for (int64_t i = begin; i < end; i += 16) {
            const F16 values = load_some(x + i, end - i);
            most = max(most, abs(values));
            poison = fma(values, zero(), poison);
        }
        const float found = max_of(most), largest = found > kLeastOfGroup ? found : kLeastOfGroup;
        const F16 factor = splat(127.0f / largest);
        for (int64_t i = begin; i < end; i += 16) store_int8(out + i, load_some(x + i, end - i) * factor);
        *scales++ = largest / 127.0f;
    }
    *first += sum_of(poison);
}

// ---- linear ---------------------------------------------------------------------------------------------------------

// Columns ``from`` to ``to`` of a panel's sums to a row of y: bias, then what the epilogue says. Pointers are those of
// column ``from``.
template <class Value>
inline void finish_row(const float* sums, int from, int to, int epilogue, const Value* bias, const Value* other, Value* y) {
    for (int c = from; c < to; c += 16) {
        const int64_t at = c - from, count = to - c;
        F16 v = load_some(sums + c, count);
        if (bias != nullptr) v = v + load_some(bias + at, count);
        if (epilogue == kSilu) v = v / (splat(1.0f) + exp(zero() - v));
        if (epilogue == kMul) v = v * load_some(other + at, count);
        if (epilogue == kAdd) v = v + load_some(other + at, count);
        store_some(y + at, v, count);
    }
}

// Settings: epilogue, has bias, format of the weights, first column inside the first panel.
// Args: x, w (a panel's bytes), bias, other, y, scales and sums of int8 weights (a panel's bytes).
template <class Value, class Multiply>
inline void each_panel(const Task& task, int rows, Multiply multiply) {
    const int epilogue = task.settings[0], skipped = task.settings[3];
    const bool has_bias = task.settings[1] != 0, has_other = epilogue == kMul || epilogue == kAdd;
    alignas(64) float sums[kStripRows * kPanel];
    for (int begin = -skipped, panel = 0; begin < task.columns; begin += kPanel, ++panel) {
        const int from = begin < 0 ? -begin : 0, to = task.columns - begin < kPanel ? task.columns - begin : kPanel;
        const int column = begin + from;  // of the task
        const Value* bias = has_bias ? reinterpret_cast<const Value*>(task.args[2].data) + column : nullptr;
        for (int row = 0; row < rows; row += kStripRows) {
            const int count = rows - row < kStripRows ? rows - row : kStripRows;
            multiply(panel, row, count, sums);
            for (int r = 0; r < count; ++r) {
                const Value* other = has_other ? row_of<Value>(task.args[3], row + r) + column : nullptr;
                finish_row(sums + r * kPanel, from, to, epilogue, bias, other, row_of<Value>(task.args[4], row + r) + column);
            }
        }
    }
}

template <class W>
inline void dense_linear(const Task& task, int rows) {
    using Value = typename W::Value;
    const Arg &x = task.args[0], &w = task.args[1];
    each_panel<Value>(task, rows, [&](int panel, int row, int count, float* sums) {
        __builtin_memset(sums, 0, static_cast<size_t>(count) * kPanel * 4);
        multiply_strip<W>(count, row_of<Value>(x, row), x.stride / static_cast<int64_t>(sizeof(Value)), w.data + panel * w.stride, task.inner, sums);
    });
}

template <class Value>
inline void int8_linear(const Task& task, int rows, Scratch& scratch) {
    const int64_t inner = task.inner, groups = (inner + kGroup - 1) / kGroup, stride = (inner + 63) / 64 * 64;
    char* memory = scratch.get(static_cast<size_t>(rows) * (stride + 4 * groups));
    int8_t* x = reinterpret_cast<int8_t*>(memory);
    float* x_scales = reinterpret_cast<float*>(memory + rows * stride);
    for (int row = 0; row < rows; ++row) quantize_row(row_of<Value>(task.args[0], row), inner, x + row * stride, x_scales + row * groups);
    const Arg &w = task.args[1], &scales = task.args[5], &sums = task.args[6];
    each_panel<Value>(task, rows, [&](int panel, int row, int count, float* out) {
        for (int block = 0; block < count; block += kBlockRows)
            multiply_int8_rows(count - block < kBlockRows ? count - block : kBlockRows, x + (row + block) * stride, stride, x_scales + (row + block) * groups, groups,
                               w.data + panel * w.stride, row_of<float>(scales, panel), row_of<int32_t>(sums, panel), inner, out + block * kPanel);
    });
}

// bf16 rows times bf16 panels: the AMX set has its own.
#ifndef CHIPBUS_AMX_TILES
inline void bf16_linear(const Task& task, int rows) { dense_linear<Bf16>(task, rows); }
#endif

inline void linear(const Task& task, const Window& window, Scratch& scratch) {
    const int rows = real_rows(task, window.tokens);
    if (rows <= 0) return;
    const bool is_wide = task.dtype == kFloat32;
    if (task.settings[2] == kWeightsInt8)
        is_wide ? int8_linear<float>(task, rows, scratch) : int8_linear<uint16_t>(task, rows, scratch);
    else if (is_wide)
        dense_linear<Float32>(task, rows);
    else
        bf16_linear(task, rows);
}

// ---- rows -----------------------------------------------------------------------------------------------------------

// Args: source, numbers, target. Settings: bytes of a row, bytes of a number.
inline void load_rows(const Task& task, const Window& window, Scratch&) {
    const int rows = real_rows(task, window.tokens);
    for (int row = 0; row < rows; ++row) {
        const char* at = task.args[1].data + static_cast<int64_t>(row) * task.settings[1];
        const int64_t number = task.settings[1] == 8 ? *reinterpret_cast<const int64_t*>(at) : *reinterpret_cast<const int32_t*>(at);
        __builtin_memcpy(row_of<char>(task.args[2], row), row_of<char>(task.args[0], number), static_cast<size_t>(task.settings[0]));
    }
}

template <class From, class To>
inline void convert(const From* x, To* y, int64_t count) {
    for (int64_t i = 0; i < count; i += 16) store_some(y + i, load_some(x + i, count - i), count - i);
}

// Args: source, pairs (row of the source, row of the target), target. Settings: dtype of the target.
inline void store_rows(const Task& task, const Window& window, Scratch&) {
    const int32_t* pair = reinterpret_cast<const int32_t*>(task.args[1].data);
    for (int at = 0; at < window.stores; ++at, pair += 2) {
        if (pair[0] < task.first || pair[0] >= task.first + task.rows) continue;
        const Arg &source = task.args[0], &target = task.args[2];
        const int64_t from = pair[0] - task.first;
        if (task.dtype == task.settings[0])
            __builtin_memcpy(row_of<char>(target, pair[1]), row_of<char>(source, from), static_cast<size_t>(task.columns) * (task.dtype == kFloat32 ? 4 : 2));
        else if (task.dtype == kBfloat16)
            convert(row_of<uint16_t>(source, from), row_of<float>(target, pair[1]), task.columns);
        else
            convert(row_of<float>(source, from), row_of<uint16_t>(target, pair[1]), task.columns);
    }
}

template <class Value>
inline float root_mean_square(const Value* x, int64_t width, float epsilon) {
    F16 squares[4] = {zero(), zero(), zero(), zero()};
    for (int64_t i = 0, turn = 0; i < width; i += 16, turn = (turn + 1) % 4) {
        const F16 v = load_some(x + i, width - i);
        squares[turn] = fma(v, v, squares[turn]);
    }
    const float sum = sum_of((squares[0] + squares[1]) + (squares[2] + squares[3]));
    return 1.0f / __builtin_sqrtf(sum / static_cast<float>(width) + epsilon);
}

// Args: x, gamma (fp32), y.
template <class Value>
inline void norm_rows(const Task& task, int rows) {
    const float* gamma = reinterpret_cast<const float*>(task.args[1].data);
    for (int row = 0; row < rows; ++row) {
        const Value* x = row_of<Value>(task.args[0], row);
        Value* y = row_of<Value>(task.args[2], row);
        const F16 scale = splat(root_mean_square(x, task.columns, task.real));
        for (int64_t i = 0; i < task.columns; i += 16) {
            const int64_t count = task.columns - i;
            store_some(y + i, load_some(x + i, count) * scale * load_some(gamma + i, count), count);
        }
    }
}

inline void rms_norm(const Task& task, const Window& window, Scratch&) {
    const int rows = real_rows(task, window.tokens);
    task.dtype == kFloat32 ? norm_rows<float>(task, rows) : norm_rows<uint16_t>(task, rows);
}

// Args: positions (int32), frequencies (fp32), (cos, sin) pairs. Columns: pairs.
inline void rotary_table(const Task& task, const Window& window, Scratch&) {
    const int rows = real_rows(task, window.tokens);
    const int32_t* positions = reinterpret_cast<const int32_t*>(task.args[0].data);
    const float* frequencies = reinterpret_cast<const float*>(task.args[1].data);
    for (int row = 0; row < rows; ++row) {
        float* pairs = row_of<float>(task.args[2], row);
        for (int i = 0; i < task.columns; ++i)
            __builtin_sincosf(static_cast<float>(positions[row]) * frequencies[i], &pairs[2 * i + 1], &pairs[2 * i]);
    }
}

// Args: qkv, gamma (a head's bytes), rotary, slots (int64), q, k_cache, v_cache (a KV head's bytes).
// Settings: query heads, KV heads, head dim.
template <class Value>
inline void rotate_rows(const Task& task, int rows) {
    const int heads = task.settings[0], kv_heads = task.settings[1];
    const int64_t dim = task.settings[2];
    const int64_t* slots = reinterpret_cast<const int64_t*>(task.args[3].data);
    float wide[kMaxHeadDim + 16];
    for (int row = 0; row < rows; ++row) {
        const Value* mixed = row_of<Value>(task.args[0], row);
        const float* turns = row_of<float>(task.args[2], row);
        Value* q = row_of<Value>(task.args[4], row);
        const int64_t slot = slots[row] * dim;
        for (int head = 0; head < heads + kv_heads; ++head, mixed += dim) {
            const float* gamma = row_of<float>(task.args[1], head);
            const F16 scale = splat(root_mean_square(mixed, dim, task.real));
            Value* target = head < heads ? q + head * dim : row_of<Value>(task.args[5], head - heads) + slot;
            for (int64_t i = 0; i < dim; i += 16)
                store(wide + i, rotate(load_some(mixed + i, dim - i) * scale * load_some(gamma + i, dim - i), load_some(turns + i, dim - i)));
            for (int64_t i = 0; i < dim; i += 16) store_some(target + i, load(wide + i), dim - i);
        }
        for (int head = 0; head < kv_heads; ++head, mixed += dim)
            __builtin_memcpy(row_of<Value>(task.args[6], head) + slot, mixed, static_cast<size_t>(dim) * sizeof(Value));
    }
}

inline void rotate_and_store(const Task& task, const Window& window, Scratch&) {
    const int rows = real_rows(task, window.tokens);
    task.dtype == kFloat32 ? rotate_rows<float>(task, rows) : rotate_rows<uint16_t>(task, rows);
}

// ---- attention ------------------------------------------------------------------------------------------------------

constexpr int kQueryRows = 96;  // that share one packed block of keys; a multiple of every block of rows

// Memory for one KV head and up to kQueryRows queries.
template <class W>
struct AttentionMemory {
    using Value = typename W::Value;
    Value *queries, *chances;          // (rows, dim), (rows, kKeyBlock)
    char *keys, *values;               // packed: (dim, kKeyBlock), (kKeyBlock, dim) in panels
    float *scores, *sums;              // (rows, kKeyBlock), (panels of dim, rows, kPanel)
    float *most, *total;               // (rows,)
    Value* nothing;                    // a row of zeros: the key and value of a position nobody may see
    int64_t panels;

    AttentionMemory(Scratch& scratch, int64_t dim) : panels((dim + kPanel - 1) / kPanel) {
        const int64_t wide = panels * kPanel, item = sizeof(Value);
        const int64_t sizes[] = {kQueryRows * wide * item, kQueryRows * kKeyBlock * item, wide * kKeyBlock * item, wide * kKeyBlock * item,
                                 kQueryRows * kKeyBlock * 4, kQueryRows * wide * 4, kQueryRows * 4, kQueryRows * 4, wide * item};
        int64_t total_bytes = 0;
        for (int64_t size : sizes) total_bytes += (size + 63) / 64 * 64;
        char* at = scratch.get(static_cast<size_t>(total_bytes));
        char* pieces[9];
        for (int i = 0; i < 9; ++i) {
            pieces[i] = at;
            at += (sizes[i] + 63) / 64 * 64;
        }
        queries = reinterpret_cast<Value*>(pieces[0]);
        chances = reinterpret_cast<Value*>(pieces[1]);
        keys = pieces[2];
        values = pieces[3];
        scores = reinterpret_cast<float*>(pieces[4]);
        sums = reinterpret_cast<float*>(pieces[5]);
        most = reinterpret_cast<float*>(pieces[6]);
        total = reinterpret_cast<float*>(pieces[7]);
        nothing = reinterpret_cast<Value*>(pieces[8]);
        __builtin_memset(nothing, 0, static_cast<size_t>(sizes[8]));
    }
};

// Where the keys and values of a block of positions are.
struct Block {
    const char *keys[kKeyBlock], *values[kKeyBlock];
};

// The keys and values of the next block, on their way to the cache while this one is computed. Asked for a few lines at a
// time: a core has some 20 misses under way, and whoever asks for more waits.
class Fetch {
  public:
    Fetch(const Block& block, int64_t bytes) : rows_(block.keys), bytes_(bytes) {}

    void lines(int count) {
        for (; count > 0 && row_ < 2 * kKeyBlock; --count) {
            _mm_prefetch(rows_[row_] + at_, _MM_HINT_T1);
            at_ += 64;
            if (at_ >= bytes_) {
                at_ = 0;
                ++row_;
            }
        }
    }

    void rest() { lines(2 * kKeyBlock * static_cast<int>((bytes_ + 63) / 64)); }

  private:
    const char* const* rows_;  // keys, and right behind them values
    int64_t bytes_, at_ = 0;
    int row_ = 0;
};

template <class Value>
inline void pack_keys(const Block& block, int64_t dim, char* packed, Fetch& fetch) {
    const int64_t bytes = dim * static_cast<int64_t>(sizeof(Value));
    for (int group = 0; group < kKeyBlock; group += 16) {
        const char* const* rows = block.keys + group;
        int64_t at = 0;
        for (; at + 64 <= bytes; at += 64) {
            transpose_dwords(rows, at, packed + at / 4 * (4 * kKeyBlock) + 4 * group, 4 * kKeyBlock);
            fetch.lines(8);
        }
        for (; at < bytes; at += 4)
            for (int row = 0; row < 16; ++row) __builtin_memcpy(packed + at / 4 * (4 * kKeyBlock) + 4 * (group + row), rows[row] + at, 4);
    }
}

inline void pack_values(const char* const* rows, int64_t dim, uint16_t*, char* packed, Fetch& fetch) {
    for (int position = 0; position < kKeyBlock; position += 2) {
        for (int64_t panel = 0; panel * kPanel < dim; ++panel) {
            const uint16_t* even = reinterpret_cast<const uint16_t*>(rows[position]) + panel * kPanel;
            const uint16_t* odd = reinterpret_cast<const uint16_t*>(rows[position + 1]) + panel * kPanel;
            char* out = packed + panel * (kKeyBlock * kPanel * 2) + position / 2 * (4 * kPanel);
            int64_t column = 0;
            for (; column + 32 <= kPanel && panel * kPanel + column + 32 <= dim; column += 32) interleave_pairs(even + column, odd + column, out + 4 * column);
            for (; column < kPanel; ++column) {
                const bool is_there = panel * kPanel + column < dim;
                const uint16_t pair[2] = {is_there ? even[column] : uint16_t{0}, is_there ? odd[column] : uint16_t{0}};
                __builtin_memcpy(out + 4 * column, pair, 4);
            }
        }
        fetch.lines(8);
    }
}

inline void pack_values(const char* const* rows, int64_t dim, float*, char* packed, Fetch& fetch) {
    for (int position = 0; position < kKeyBlock; ++position) {
        for (int64_t panel = 0; panel * kPanel < dim; ++panel) {
            const float* from = reinterpret_cast<const float*>(rows[position]) + panel * kPanel;
            float* out = reinterpret_cast<float*>(packed + panel * (kKeyBlock * kPanel * 4) + position * (4 * kPanel));
            for (int64_t c = 0; c < kPanel; c += 16) {
                const int64_t count = dim - panel * kPanel - c;
                store(out + c, count > 0 ? load_some(from + c, count) : zero());
            }
        }
        fetch.lines(8);
    }
}

// One row's scores of a block become chances: keys from ``visible`` on have none. Scales what the row has so far.
template <class W>
inline void soften(const AttentionMemory<W>& memory, int row, int visible, float scale) {
    const float* scores = memory.scores + row * kKeyBlock;
    const float lowest = -3.4e38f;
    F16 s[kKeyBlock / 16], most = splat(lowest);
    for (int i = 0; i < kKeyBlock / 16; ++i) {
        s[i] = first_lanes(visible - 16 * i, load(scores + 16 * i) * splat(scale), splat(lowest));
        most = max(most, s[i]);
    }
    const float before = memory.most[row], largest = max_of(most);
    const float now = largest > before ? largest : before;
    F16 added = zero();
    for (int i = 0; i < kKeyBlock / 16; ++i) {
        const F16 chance = first_lanes(visible - 16 * i, exp(s[i] - splat(now)), zero());
        added = added + chance;
        store_values(memory.chances + row * kKeyBlock + 16 * i, chance);
    }
    float lanes[16];
    store(lanes, exp(splat(before - now)));
    const float kept = lanes[0];
    memory.most[row] = now;
    memory.total[row] = memory.total[row] * kept + sum_of(added);
    for (int64_t panel = 0; panel < memory.panels; ++panel) {
        float* sums = memory.sums + (panel * kQueryRows + row) * kPanel;
        for (int c = 0; c < kPanel; c += 16) store(sums + c, load(sums + c) * splat(kept));
    }
}

// Where a sequence's keys and values are.
struct Pages {
    const char *keys, *values;  // of one KV head
    const int32_t* table;
    int64_t page_size, row_bytes;

    // The block of positions from ``base`` on; ``nothing`` from ``context`` on.
    void find(int64_t base, int64_t context, const char* nothing, Block& block) const {
        const int64_t left = context - base;
        const int known = left < 0 ? 0 : left < kKeyBlock ? static_cast<int>(left) : kKeyBlock;
        int64_t page = base / page_size, inside = base % page_size;  // a division for each position would be seen
        for (int i = 0; i < known; ++page, inside = 0) {
            int64_t offset = (table[page] * page_size + inside) * row_bytes;
            for (; i < known && inside < page_size; ++i, ++inside, offset += row_bytes) {
                block.keys[i] = keys + offset;
                block.values[i] = values + offset;
            }
        }
        for (int i = known; i < kKeyBlock; ++i) block.keys[i] = block.values[i] = nothing;
    }
};

// Consecutive queries of one sequence, ``group`` heads each, that share a KV head.
struct Queries {
    Pages pages;
    int rows, group;
    int64_t position;  // of the first

    int64_t context() const { return position + rows / group; }  // positions there are for the last one
};

// ``next``: who will be attended after these, to fetch what that takes.
template <class W>
inline void attend(const AttentionMemory<W>& memory, const Queries& queries, const Queries* next, int64_t dim, float scale) {
    using Value = typename W::Value;
    const int rows = queries.rows, group = queries.group;
    const int64_t position = queries.position, context = queries.context(), bytes = queries.pages.row_bytes;
    const char* nothing = reinterpret_cast<const char*>(memory.nothing);
    for (int row = 0; row < rows; ++row) {
        memory.most[row] = -3.4e38f;
        memory.total[row] = 0;
    }
    for (int64_t panel = 0; panel < memory.panels; ++panel) __builtin_memset(memory.sums + panel * kQueryRows * kPanel, 0, static_cast<size_t>(rows) * kPanel * 4);
    Block blocks[2];
    queries.pages.find(0, context, nothing, blocks[0]);
    for (int64_t base = 0; base < context; base += kKeyBlock) {
        const Block& here = blocks[base / kKeyBlock % 2];
        Block& ahead = blocks[base / kKeyBlock % 2 ^ 1];
        if (base + kKeyBlock < context || next == nullptr)
            queries.pages.find(base + kKeyBlock, context, nothing, ahead);
        else
            next->pages.find(0, next->context(), nothing, ahead);
        Fetch fetch(ahead, bytes);
        pack_keys<Value>(here, dim, memory.keys, fetch);
        pack_values(here.values, dim, static_cast<Value*>(nullptr), memory.values, fetch);
        const int first = base > position ? static_cast<int>(base - position) * group : 0;  // rows before see nothing here
        for (int row = first; row < rows; row += kBlockRows) {
            const int count = rows - row < kBlockRows ? rows - row : kBlockRows;
            __builtin_memset(memory.scores + row * kKeyBlock, 0, static_cast<size_t>(count) * kKeyBlock * 4);
            multiply_rows<W, 0>(count, memory.queries + row * dim, dim, memory.keys, dim / W::kStep, memory.scores + row * kKeyBlock, nullptr);
            fetch.lines(64);
            for (int r = row; r < row + count; ++r) {
                const int64_t seen = position + r / group - base + 1;
                soften(memory, r, seen < kKeyBlock ? static_cast<int>(seen) : kKeyBlock, scale);
            }
            for (int64_t panel = 0; panel < memory.panels; ++panel)
                multiply_rows<W, 0>(count, memory.chances + row * kKeyBlock, kKeyBlock,
                                    memory.values + panel * (kKeyBlock * kPanel * static_cast<int64_t>(sizeof(Value))), kKeyBlock / W::kStep,
                                    memory.sums + (panel * kQueryRows + row) * kPanel, nullptr);
        }
        fetch.rest();
    }
}

// Args: q (a token's bytes), k_cache, v_cache (a KV head's bytes), row_offsets, row_ends, block_tables, attended.
// Settings: KV heads of this task, query heads for each, head dim, page size. Real: 1 / sqrt(head dim).
template <class W>
inline void attend_tile(const Task& task, const Window& window, Scratch& scratch) {
    using Value = typename W::Value;
    const int heads = task.settings[0], group = task.settings[1];
    const int64_t dim = task.settings[2];
    const int32_t* offsets = reinterpret_cast<const int32_t*>(task.args[3].data);
    const int32_t* ends = reinterpret_cast<const int32_t*>(task.args[4].data);
    const int last = task.first + real_rows(task, window.tokens);
    if (last <= task.first) return;
    const AttentionMemory<W> memory(scratch, dim);
    const int most_tokens = kQueryRows / group > 0 ? kQueryRows / group : 1;
    for (int head = 0; head < heads; ++head) {
        int row = 0, token = task.first;
        // The next queries of this KV head, of at most ``most_tokens`` tokens of one row; false if there are none.
        const auto take = [&](Queries& queries) {
            while (row < window.rows && (token >= offsets[row + 1] || offsets[row + 1] <= offsets[row])) ++row;
            if (row >= window.rows || token >= last) return false;
            const int end = offsets[row + 1] < last ? offsets[row + 1] : last;
            const int tokens = end - token < most_tokens ? end - token : most_tokens;
            queries = {{task.args[1].data + head * task.args[1].stride, task.args[2].data + head * task.args[2].stride, row_of<int32_t>(task.args[5], row),
                        task.settings[3], dim * static_cast<int64_t>(sizeof(Value))},
                       tokens * group, group, ends[row] - (offsets[row + 1] - token)};
            token += tokens;
            return true;
        };
        Queries here{}, next{};
        int begin = task.first;
        for (bool is_there = take(here); is_there; here = next) {
            const bool goes_on = take(next);
            const int tokens = here.rows / group;
            for (int t = 0; t < tokens; ++t)
                __builtin_memcpy(memory.queries + t * group * dim, row_of<Value>(task.args[0], begin - task.first + t) + head * group * dim,
                                 static_cast<size_t>(group * dim) * sizeof(Value));
            attend<W>(memory, here, goes_on ? &next : nullptr, dim, task.real);
            for (int r = 0; r < here.rows; ++r) {
                Value* out = row_of<Value>(task.args[6], begin - task.first + r / group) + (head * group + r % group) * dim;
                const F16 share = splat(1.0f / memory.total[r]);
                for (int64_t i = 0; i < dim; i += 16)
                    store_some(out + i, load(memory.sums + (i / kPanel * kQueryRows + r) * kPanel + i % kPanel) * share, dim - i);
            }
            begin += tokens;
            is_there = goes_on;
        }
    }
}


inline void paged_attention(const Task& task, const Window& window, Scratch& scratch) {
    task.dtype == kFloat32 ? attend_tile<Float32>(task, window, scratch) : attend_tile<Bf16>(task, window, scratch);
}

#define CHIPBUS_KERNEL_SET(name) \
    {name, {load_rows, rotary_table, rms_norm, linear, rotate_and_store, paged_attention, store_rows}}
