// Linears of every instruction set, format and epilogue against sums in double precision.
#include <algorithm>

#include "../../kernels/native/cores.h"
#include "../../kernels/native/packing.h"
#include "support.h"

namespace chipbus::tests {
namespace {

constexpr KernelSet kNoKernels{"none", {}};
const std::vector<Epilogue> kEpilogues = {kNone, kSilu, kMul, kAdd};

struct Shape {
    Dtype dtype;
    WeightFormat format;
    int rows, columns, inner, left;  // left: of the task's first column, in the matrix
    Epilogue epilogue;
    bool has_bias;
    int first = 0, padding = 0;  // rows of the window before the task's, and rows of the task that are padding
};

// A linear with everything it reads.
struct Linear {
    Linear(Random& random, const Shape& shape)
        : shape(shape), matrix(shape.dtype, shape.left + shape.columns + 5, shape.inner), x(shape.dtype, shape.rows + shape.padding, shape.inner, 7),
          bias(shape.dtype, 1, shape.columns), other(shape.dtype, shape.rows, shape.columns, 3) {
        matrix.fill(random, 0.3f);
        x.fill(random);
        bias.fill(random);
        other.fill(random);
        xs = exact(x);
        ws = exact(matrix);
        for (int64_t row = shape.rows; row < x.rows; ++row)
            for (int64_t i = 0; i < shape.inner; ++i) x.set(row, i, kNan);
        const int64_t panels = (matrix.rows + kPanel - 1) / kPanel;
        groups = (shape.inner + kGroup - 1) / kGroup;
        panel_bytes = kPanel * shape.inner * (shape.format == kWeightsFloat32 ? 4 : shape.format == kWeightsBfloat16 ? 2 : 1);
        packed = std::make_unique<char[]>(static_cast<size_t>(panels * panel_bytes));
        scales = std::make_unique<float[]>(static_cast<size_t>(panels * groups * kPanel));
        sums = std::make_unique<int32_t[]>(static_cast<size_t>(panels * groups * kPanel));
        Cores cores(1, kNoKernels);
        if (shape.format == kWeightsInt8)
            pack_int8(cores, matrix.at(0), matrix.rows, shape.inner, shape.dtype == kFloat32, packed.get(), scales.get(), sums.get());
        else
            pack_panels(cores, matrix.at(0), matrix.rows, shape.inner, static_cast<int>(matrix.item), packed.get());
    }

    // The task for ``columns`` columns from ``column`` on, of rows from ``row`` on, into y.
    Task task(const Rows& y, int row, int rows, int column, int columns) const {
        const int64_t panel = (shape.left + column) / kPanel;
        Task task{};
        task.kernel = kLinear;
        task.dtype = shape.dtype;
        task.first = shape.first + row;
        task.rows = rows;
        task.columns = columns;
        task.inner = shape.inner;
        task.settings[0] = shape.epilogue;
        task.settings[1] = shape.has_bias;
        task.settings[2] = shape.format;
        task.settings[3] = static_cast<int32_t>((shape.left + column) % kPanel);
        task.args[0] = x.arg(row);
        task.args[1] = {packed.get() + panel * panel_bytes, panel_bytes};
        if (shape.has_bias) task.args[2] = bias.arg(0, column);
        if (shape.epilogue == kMul || shape.epilogue == kAdd) task.args[3] = other.arg(row, column);
        task.args[4] = y.arg(row, column);
        task.args[5] = {reinterpret_cast<char*>(scales.get() + panel * groups * kPanel), groups * kPanel * 4};
        task.args[6] = {reinterpret_cast<char*>(sums.get() + panel * groups * kPanel), groups * kPanel * 4};
        return task;
    }

    Window window() const { return {shape.first + shape.rows, 1, 0}; }
    Rows output() const { return Rows(shape.dtype, shape.rows + shape.padding, shape.columns, 4); }

    // (value, error it may have) of an output.
    std::pair<double, double> wanted(int64_t row, int64_t column) const {
        const double *x_row = xs.data() + row * shape.inner, *w_row = ws.data() + (shape.left + column) * shape.inner;
        double value = 0, magnitude = 0;
        for (int i = 0; i < shape.inner; ++i) {
            value += x_row[i] * w_row[i];
            magnitude += std::fabs(x_row[i] * w_row[i]);
        }
        if (shape.has_bias) value += bias.get(0, column), magnitude += std::fabs(value);
        double error = (shape.inner + 8) * 6e-8 * magnitude;
        if (shape.epilogue == kSilu) value = value / (1 + std::exp(-value)), error = 1.1 * error + 1e-6 * std::fabs(value);
        if (shape.epilogue == kMul) value *= other.get(row, column), error *= std::fabs(double{other.get(row, column)});
        if (shape.epilogue == kAdd) value += other.get(row, column);
        return {value, 2 * error + rounding(shape.dtype) * std::fabs(value)};
    }

    // What the kernel multiplies, in double precision: for int8 rounded to the scale of its group.
    std::vector<double> exact(const Rows& values) const {
        std::vector<double> found;
        for (int64_t row = 0; row < values.rows; ++row)
            for (int64_t begin = 0; begin < values.columns; begin += kGroup) {
                const int64_t end = std::min(begin + kGroup, values.columns);
                float largest = kLeastOfGroup;
                for (int64_t i = begin; i < end; ++i) largest = std::max(largest, std::fabs(values.get(row, i)));
                const float factor = 127.0f / largest;
                for (int64_t i = begin; i < end; ++i)
                    found.push_back(shape.format == kWeightsInt8 ? double{std::nearbyintf(values.get(row, i) * factor)} * double{largest / 127.0f} : values.get(row, i));
            }
        return found;
    }

    Shape shape;
    Rows matrix, x, bias, other;
    std::vector<double> xs, ws;
    int64_t groups = 0, panel_bytes = 0;
    std::unique_ptr<char[]> packed;
    std::unique_ptr<float[]> scales;
    std::unique_ptr<int32_t[]> sums;
};

std::string described(const KernelSet& kernels, const Shape& shape) {
    return text(kernels.name, ", ", name_of(shape.dtype), ", format ", shape.format, ", ", shape.rows, " × ", shape.inner, " → ", shape.columns, " from ", shape.left,
                ", epilogue ", shape.epilogue, shape.has_bias ? ", bias" : "");
}

void check(const KernelSet& kernels, Random& random, const Shape& shape) {
    const Linear linear(random, shape);
    const std::string where = described(kernels, shape);
    Scratch scratch;
    const Rows y = linear.output();
    const int rows = shape.rows + shape.padding;
    kernels.run[kLinear](linear.task(y, 0, rows, 0, shape.columns), linear.window(), scratch);
    CHECK(y.touched(0, shape.rows, 0, shape.columns).empty(), where, ": wrote ", y.touched(0, shape.rows, 0, shape.columns));
    for (int64_t row = 0; row < shape.rows; ++row)
        for (int64_t column = 0; column < shape.columns; ++column) {
            const auto [value, error] = linear.wanted(row, column);
            check_near(y.get(row, column), value, error, where, ": row ", row, ", column ", column);
        }

    // A row alone, and a cut at any column: the same bits.
    const Rows alone = linear.output();
    const int cut = random.from(1, shape.columns);
    for (int row = 0; row < shape.rows; ++row) {
        kernels.run[kLinear](linear.task(alone, row, 1, 0, cut), linear.window(), scratch);
        if (cut < shape.columns) kernels.run[kLinear](linear.task(alone, row, 1, cut, shape.columns - cut), linear.window(), scratch);
        CHECK(std::memcmp(alone.at(row), y.at(row), static_cast<size_t>(shape.columns * y.item)) == 0, where, ": row ", row, " alone, cut at ", cut, ", has other bits");
    }
}

// Inputs: a multiple of 32 is a matter of tiles where there are some; more than 256 come in several chunks.
int some_inner(Random& random, Dtype dtype, WeightFormat format, int turn) {
    if (format == kWeightsInt8) return 4 * random.from(1, 80);
    if (turn == 0) return 32 * random.from(1, 5);
    if (turn == 1) return dtype == kFloat32 ? random.from(1, 100) : 2 * random.from(1, 50);
    return 2 * random.from(129, 300);
}

TEST(linears_are_what_sums_in_double_precision_say) {
    each_isa([](const KernelSet& kernels) {
        Random random(21);
        for (const Dtype dtype : {kFloat32, kBfloat16})
            for (const WeightFormat format : {dtype == kFloat32 ? kWeightsFloat32 : kWeightsBfloat16, kWeightsInt8})
                for (const int rows : {1, 2, 4, 5, 6, 7, 13, 16, 17, 33, 49, 97})
                    for (int turn = 0; turn < 3; ++turn) {
                        const int columns = rows > 40 ? random.from(1, 70) : random.of<int>({1, 15, 16, 17, 63, 64, 65, random.from(1, 150)});
                        Shape shape{dtype, format, rows, columns, some_inner(random, dtype, format, turn), 0, random.of(kEpilogues), random.chance(0.5)};
                        shape.left = random.chance(0.5) ? 0 : random.from(1, 70);
                        shape.first = random.chance(0.3) ? random.from(1, 9) : 0;
                        shape.padding = random.chance(0.3) ? random.from(1, 20) : 0;
                        check(kernels, random, shape);
                    }
    });
}

TEST(every_epilogue_of_a_linear_with_and_without_bias) {
    each_isa([](const KernelSet& kernels) {
        Random random(22);
        for (const Dtype dtype : {kFloat32, kBfloat16})
            for (const WeightFormat format : {dtype == kFloat32 ? kWeightsFloat32 : kWeightsBfloat16, kWeightsInt8})
                for (const Epilogue epilogue : kEpilogues)
                    for (const bool has_bias : {false, true}) check(kernels, random, {dtype, format, 3, 70, 64, 10, epilogue, has_bias});
    });
}

TEST(a_window_without_rows_for_a_linear_leaves_it_nothing_to_do) {
    each_isa([](const KernelSet& kernels) {
        Random random(23);
        for (const Dtype dtype : {kFloat32, kBfloat16}) {
            Shape shape{dtype, dtype == kFloat32 ? kWeightsFloat32 : kWeightsBfloat16, 4, 20, 32, 0, kNone, false};
            shape.first = 10;
            const Linear linear(random, shape);
            Scratch scratch;
            const Rows y = linear.output();
            for (const int tokens : {0, 9, 10}) kernels.run[kLinear](linear.task(y, 0, 4, 0, 20), {tokens, 1, 0}, scratch);
            CHECK(y.touched(0, 0, 0, 0).empty(), kernels.name, " wrote ", y.touched(0, 0, 0, 0));
        }
    });
}

TEST(silu_ends_well_at_both_ends) {
    each_isa([](const KernelSet& kernels) {
        Random random(24);
        const Linear linear(random, {kFloat32, kWeightsFloat32, 1, 6, 8, 0, kSilu, true});
        const float values[] = {-3e38f, -200, -88, 88, 200, 3e38f};
        for (int64_t i = 0; i < 8; ++i) linear.x.set(0, i, 0);
        for (int64_t column = 0; column < 6; ++column) linear.bias.set(0, column, values[column]);
        Scratch scratch;
        const Rows y = linear.output();
        kernels.run[kLinear](linear.task(y, 0, 1, 0, 6), linear.window(), scratch);
        for (int64_t column = 0; column < 6; ++column) {
            const double value = values[column], wanted = value < 0 ? 0 : value;
            check_near(y.get(0, column), wanted, value < 0 ? 1.5 : 1e-6 * value, kernels.name, ": silu of ", value);
        }
    });
}

TEST(what_is_not_finite_is_seen_in_its_row_and_in_no_other) {
    each_isa([](const KernelSet& kernels) {
        Random random(25);
        for (const Dtype dtype : {kFloat32, kBfloat16})
            for (const WeightFormat format : {dtype == kFloat32 ? kWeightsFloat32 : kWeightsBfloat16, kWeightsInt8})
                for (const Epilogue epilogue : kEpilogues)
                    for (const int inner : {32, 40, 300}) {
                        const Shape shape{dtype, format, 18, 40, inner, 0, epilogue, true};
                        const Linear linear(random, shape);
                        const std::string where = described(kernels, shape);
                        Scratch scratch;
                        const Rows clean = linear.output(), y = linear.output();
                        kernels.run[kLinear](linear.task(clean, 0, 18, 0, 40), linear.window(), scratch);
                        linear.x.set(5, 7, kNan);
                        linear.x.set(17, 7, kInfinity);
                        linear.x.set(17, inner - 1, -kInfinity);
                        kernels.run[kLinear](linear.task(y, 0, 18, 0, 40), linear.window(), scratch);
                        for (int64_t row = 0; row < 18; ++row) {
                            const bool is_nan = row == 5 || (row == 17 && format == kWeightsInt8);  // fp32 sums may well be infinite
                            for (int64_t column = 0; is_nan && column < 40; ++column) CHECK(std::isnan(y.get(row, column)), where, ": row ", row, ", column ", column, " lost its NaN");
                            if (row != 5 && row != 17)
                                CHECK(std::memcmp(clean.at(row), y.at(row), static_cast<size_t>(40 * y.item)) == 0, where, ": row ", row, " is changed by another");
                        }
                    }
    });
}

TEST(tiles_of_a_linear_run_side_by_side) {
    each_isa([](const KernelSet& kernels) {
        Random random(26);
        for (const Dtype dtype : {kFloat32, kBfloat16})
            for (const WeightFormat format : {dtype == kFloat32 ? kWeightsFloat32 : kWeightsBfloat16, kWeightsInt8}) {
                const Linear linear(random, {dtype, format, 21, 230, 96, 0, kAdd, true});
                const Rows whole = linear.output(), y = linear.output();
                Scratch scratch;
                kernels.run[kLinear](linear.task(whole, 0, 21, 0, 230), linear.window(), scratch);
                std::vector<Task> tasks;
                for (const auto& [row, rows] : {std::pair{0, 10}, {10, 11}})
                    for (int column = 0; column < 230; column += 37) tasks.push_back(linear.task(y, row, rows, column, std::min(37, 230 - column)));
                Graph graph(tasks, {});
                Cores cores(3, kernels);
                for (int run = 0; run < 3; ++run) CHECK(cores.run(graph, linear.window(), true, nullptr) == -1, kernels.name, " wrote a NaN");
                for (int64_t row = 0; row < 21; ++row)
                    CHECK(std::memcmp(whole.at(row), y.at(row), static_cast<size_t>(230 * y.item)) == 0, kernels.name, ", ", name_of(dtype), ", format ", format, ": row ", row);
            }
    });
}

}  // namespace
}  // namespace chipbus::tests
