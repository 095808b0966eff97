// The kernels that take rows one by one, on every instruction set, against loops in double precision; and what finds NaN.
#include <algorithm>

#include "../../kernels/native/cores.h"
#include "support.h"

namespace chipbus::tests {
namespace {

bool is_same(const Rows& a, const Rows& b, int64_t row) { return std::memcmp(a.at(row), b.at(row), static_cast<size_t>(a.columns * a.item)) == 0; }

TEST(rows_are_loaded_by_number) {
    each_isa([](const KernelSet& kernels) {
        Random random(31);
        for (const Dtype dtype : {kFloat32, kBfloat16})
            for (const int number_bytes : {4, 8}) {
                const int rows = random.from(1, 9), padding = 2, first = random.from(0, 3);
                const Rows source(dtype, 12, random.from(1, 50), 5), target(dtype, rows + padding, source.columns, 2);
                source.fill(random);
                std::vector<int64_t> numbers(static_cast<size_t>(rows));
                const auto memory = std::make_unique<char[]>(static_cast<size_t>(rows * number_bytes));  // none for padding
                for (int row = 0; row < rows; ++row) {
                    const int64_t number = numbers[static_cast<size_t>(row)] = random.below(12);
                    std::memcpy(memory.get() + row * number_bytes, &number, static_cast<size_t>(number_bytes));
                }
                Task task{};
                task.kernel = kLoadRows;
                task.dtype = dtype;
                task.first = first;
                task.rows = rows + padding;
                task.columns = static_cast<int32_t>(source.columns);
                task.settings[0] = static_cast<int32_t>(source.columns * source.item);
                task.settings[1] = number_bytes;
                task.args[0] = source.arg();
                task.args[1].data = memory.get();
                task.args[2] = target.arg();
                Scratch scratch;
                kernels.run[kLoadRows](task, {first + rows, 1, 0}, scratch);
                CHECK(target.touched(0, rows, 0, target.columns).empty(), kernels.name, " wrote ", target.touched(0, rows, 0, target.columns));
                for (int row = 0; row < rows; ++row)
                    CHECK(std::memcmp(target.at(row), source.at(numbers[static_cast<size_t>(row)]), static_cast<size_t>(target.columns * target.item)) == 0, kernels.name, ": row ", row);
            }
    });
}

TEST(rows_are_stored_in_pairs_and_converted) {
    each_isa([](const KernelSet& kernels) {
        Random random(32);
        for (const Dtype from : {kFloat32, kBfloat16})
            for (const Dtype to : {kFloat32, kBfloat16})
                for (const int64_t columns : {1, 15, 16, 50}) {
                    const Rows source(from, 6, columns, 3), target(to, 9, columns, 1);
                    source.fill(random);
                    if (columns > 3) source.set(2, 0, kNan), source.set(2, 1, kInfinity), source.set(2, 2, -0.0f), source.set(2, 3, 3.4e38f);
                    // The task has tokens 4 to 9 of the window; other tasks store the other pairs.
                    const std::vector<std::vector<int32_t>> pairs = {{5, 7}, {3, 1}, {9, 0}, {10, 2}, {4, 3}, {6, 8}, {4, 4}};
                    const auto memory = std::make_unique<int32_t[]>(2 * pairs.size());
                    for (size_t at = 0; at < pairs.size(); ++at) std::copy(pairs[at].begin(), pairs[at].end(), memory.get() + 2 * at);
                    Task task{};
                    task.kernel = kStoreRows;
                    task.dtype = from;
                    task.first = 4;
                    task.rows = 6;
                    task.columns = static_cast<int32_t>(columns);
                    task.settings[0] = to;
                    task.args[0] = source.arg();
                    task.args[1].data = reinterpret_cast<char*>(memory.get());
                    task.args[2] = target.arg();
                    Scratch scratch;
                    kernels.run[kStoreRows](task, {10, 7, static_cast<int32_t>(pairs.size())}, scratch);
                    for (const int64_t row : {1, 2, 5, 6})
                        for (int64_t column = 0; column < columns; ++column) CHECK(target.is_untouched(row, column), kernels.name, " wrote row ", row);
                    for (const auto& pair : pairs) {
                        if (pair[0] < 4 || pair[0] >= 10) continue;
                        for (int64_t column = 0; column < columns; ++column) {
                            const float value = source.get(pair[0] - 4, column), wanted = from == kFloat32 && to == kBfloat16 ? widen(narrow(value)) : value;
                            const float seen = target.get(pair[1], column);
                            CHECK(bits_of(seen) == bits_of(wanted) || (std::isnan(seen) && std::isnan(wanted)), kernels.name, ": row ", pair[1], ", column ", column, ": ", seen, " instead of ", wanted);
                        }
                    }
                }
    });
}

double root_mean_square(const Rows& x, int64_t row, int64_t from, int64_t width, double epsilon) {
    double sum = 0;
    for (int64_t i = 0; i < width; ++i) sum += double{x.get(row, from + i)} * double{x.get(row, from + i)};
    return 1 / std::sqrt(sum / static_cast<double>(width) + epsilon);
}

TEST(rows_are_divided_by_their_root_mean_square) {
    each_isa([](const KernelSet& kernels) {
        Random random(33);
        for (const Dtype dtype : {kFloat32, kBfloat16})
            for (const int64_t columns : {1, 7, 16, 24, 65, 200}) {
                const int rows = random.from(1, 5), padding = 3, first = 2;
                const Rows x(dtype, rows, columns, 6), gamma(kFloat32, 1, columns), y(dtype, rows + padding, columns, 1), alone(dtype, rows, columns);
                x.fill(random, 3);
                gamma.fill(random);
                const auto task = [&](const Rows& to, int row, int most) {
                    Task task{};
                    task.kernel = kRmsNorm;
                    task.dtype = dtype;
                    task.first = first + row;
                    task.rows = most;
                    task.columns = static_cast<int32_t>(columns);
                    task.real = 1e-6f;
                    task.args[0] = x.arg(row);
                    task.args[1] = gamma.arg();
                    task.args[2] = to.arg(row);
                    return task;
                };
                Scratch scratch;
                const Window window{first + rows, 1, 0};
                kernels.run[kRmsNorm](task(y, 0, rows + padding), window, scratch);
                CHECK(y.touched(0, rows, 0, columns).empty(), kernels.name, " wrote ", y.touched(0, rows, 0, columns));
                for (int row = 0; row < rows; ++row) {
                    const double scale = root_mean_square(x, row, 0, columns, 1e-6);
                    for (int64_t column = 0; column < columns; ++column) {
                        const double wanted = x.get(row, column) * scale * gamma.get(0, column);
                        check_near(y.get(row, column), wanted, (rounding(dtype) + 1e-5) * std::fabs(wanted), kernels.name, ", ", columns, " columns: row ", row);
                    }
                    kernels.run[kRmsNorm](task(alone, row, 1), window, scratch);
                    CHECK(is_same(alone, y, row), kernels.name, ": row ", row, " alone has other bits");
                }
            }
    });
}

TEST(rotary_tables_are_cosines_and_sines) {
    each_isa([](const KernelSet& kernels) {
        Random random(34);
        const int rows = 5, pairs = 12;
        const Rows frequencies(kFloat32, 1, pairs), table(kFloat32, rows + 2, 2 * pairs, 3);
        const auto positions = std::make_unique<int32_t[]>(rows);
        for (int row = 0; row < rows; ++row) positions[static_cast<size_t>(row)] = row == 0 ? 0 : random.from(1, 40'000);
        for (int i = 0; i < pairs; ++i) frequencies.set(0, i, std::pow(1e6f, -static_cast<float>(i) / pairs));
        Task task{};
        task.kernel = kRotaryTable;
        task.rows = rows + 2;
        task.columns = pairs;
        task.args[0].data = reinterpret_cast<char*>(positions.get());
        task.args[1] = frequencies.arg();
        task.args[2] = table.arg();
        Scratch scratch;
        kernels.run[kRotaryTable](task, {rows, 1, 0}, scratch);
        CHECK(table.touched(0, rows, 0, 2 * pairs).empty(), kernels.name, " wrote ", table.touched(0, rows, 0, 2 * pairs));
        for (int row = 0; row < rows; ++row)
            for (int i = 0; i < pairs; ++i) {
                const double angle = static_cast<float>(positions[static_cast<size_t>(row)]) * frequencies.get(0, i);
                check_near(table.get(row, 2 * i), std::cos(angle), 2e-7, kernels.name, ": cosine of ", angle);
                check_near(table.get(row, 2 * i + 1), std::sin(angle), 2e-7, kernels.name, ": sine of ", angle);
            }
    });
}

TEST(heads_are_normed_turned_and_stored_in_their_slots) {
    each_isa([](const KernelSet& kernels) {
        Random random(35);
        for (const Dtype dtype : {kFloat32, kBfloat16})
            for (const int dim : {2, 10, 16, 24, 64, 128, kMaxHeadDim}) {
                const int heads = random.from(1, 4), kv_heads = random.from(1, 2), rows = random.from(1, 5), padding = 2, first = 3, num_slots = 12, turned = heads + kv_heads;
                const Rows qkv(dtype, rows, (turned + kv_heads) * dim, 2), gamma(kFloat32, turned, dim), turns(kFloat32, rows, dim);
                qkv.fill(random, 2);
                gamma.fill(random);
                for (int row = 0; row < rows; ++row)
                    for (int i = 0; i < dim / 2; ++i) {
                        const double angle = 3 * random.normal();
                        turns.set(row, 2 * i, static_cast<float>(std::cos(angle)));
                        turns.set(row, 2 * i + 1, static_cast<float>(std::sin(angle)));
                    }
                std::vector<int64_t> order = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11};
                for (size_t at = order.size() - 1; at > 0; --at) std::swap(order[at], order[static_cast<size_t>(random.below(static_cast<int64_t>(at) + 1))]);
                const auto slots = std::make_unique<int64_t[]>(static_cast<size_t>(rows));
                std::copy_n(order.begin(), rows, slots.get());
                const auto run = [&](const Rows& q, const Rows& keys, const Rows& values, int row, int most) {
                    Task task{};
                    task.kernel = kRotateAndStore;
                    task.dtype = dtype;
                    task.first = first + row;
                    task.rows = most;
                    task.columns = heads * dim;
                    task.settings[0] = heads;
                    task.settings[1] = kv_heads;
                    task.settings[2] = dim;
                    task.real = 1e-6f;
                    task.args[0] = qkv.arg(row);
                    task.args[1] = gamma.arg();
                    task.args[2] = turns.arg(row);
                    task.args[3].data = reinterpret_cast<char*>(slots.get() + row);
                    task.args[4] = q.arg(row);
                    task.args[5] = {keys.at(0), num_slots * dim * keys.item};
                    task.args[6] = {values.at(0), num_slots * dim * values.item};
                    Scratch scratch;
                    kernels.run[kRotateAndStore](task, {first + rows, 1, 0}, scratch);
                };
                const Rows q(dtype, rows + padding, heads * dim), keys(dtype, kv_heads * num_slots, dim), values(dtype, kv_heads * num_slots, dim);
                run(q, keys, values, 0, rows + padding);
                CHECK(q.touched(0, rows, 0, heads * dim).empty(), kernels.name, " wrote ", q.touched(0, rows, 0, heads * dim));
                for (int row = 0; row < rows; ++row)
                    for (int head = 0; head < turned + kv_heads; ++head) {
                        const double scale = root_mean_square(qkv, row, head * dim, dim, 1e-6);
                        const int64_t slot = slots[static_cast<size_t>(row)], kv_head = head < turned ? head - heads : head - turned;
                        for (int i = 0; i < dim; ++i) {
                            if (head >= turned) {
                                const float kept = values.get(kv_head * num_slots + slot, i), given = qkv.get(row, head * dim + i);
                                CHECK(kept == given, kernels.name, ", dim ", dim, ": row ", row, ", head ", head, ": ", kept, " instead of ", given);
                                continue;
                            }
                            const auto normed = [&](int at) { return qkv.get(row, head * dim + at) * scale * gamma.get(head, at); };
                            const double a = normed(i & ~1), b = normed(i | 1), cosine = turns.get(row, i & ~1), sine = turns.get(row, i | 1);
                            const double wanted = i % 2 == 0 ? a * cosine - b * sine : b * cosine + a * sine;
                            const double seen = head < heads ? q.get(row, head * dim + i) : keys.get(kv_head * num_slots + slot, i);
                            check_near(seen, wanted, 2e-5 * (std::fabs(a) + std::fabs(b)) + rounding(dtype) * std::fabs(wanted), kernels.name, ", ", name_of(dtype), ", dim ", dim, ": row ", row, ", head ", head);
                        }
                    }
                for (int head = 0; head < kv_heads; ++head)
                    for (int at = rows; at < num_slots; ++at)
                        for (int i = 0; i < dim; ++i)
                            CHECK(keys.is_untouched(head * num_slots + order[static_cast<size_t>(at)], i) && values.is_untouched(head * num_slots + order[static_cast<size_t>(at)], i), kernels.name,
                                  " wrote slot ", order[static_cast<size_t>(at)]);

                const Rows q_alone(dtype, rows, heads * dim), keys_alone(dtype, kv_heads * num_slots, dim), values_alone(dtype, kv_heads * num_slots, dim);
                for (int row = 0; row < rows; ++row) run(q_alone, keys_alone, values_alone, row, 1);
                for (int row = 0; row < rows; ++row) CHECK(is_same(q_alone, q, row), kernels.name, ": row ", row, " alone has other bits");
                for (int64_t row = 0; row < keys.rows; ++row) CHECK(is_same(keys_alone, keys, row) && is_same(values_alone, values, row), kernels.name, ": row ", row, " of the cache has other bits");
            }
    });
}

TEST(nan_is_found_in_real_rows_of_an_output) {
    for (const Dtype dtype : {kFloat32, kBfloat16})
        for (const auto& [kernel, output] : {std::pair{kLoadRows, 2}, {kRotaryTable, 2}, {kRmsNorm, 2}, {kLinear, 4}, {kRotateAndStore, 4}, {kPagedAttention, 6}}) {
            const Dtype stored = kernel == kRotaryTable ? kFloat32 : dtype;
            const int columns = 9, wide = kernel == kRotaryTable ? 2 * columns : columns;
            const Rows y(stored, 4, wide, 3);
            for (int64_t row = 0; row < 4; ++row)
                for (int64_t column = 0; column < wide; ++column) y.set(row, column, column % 2 ? kInfinity : -kInfinity);
            for (int64_t column = 0; column < wide; ++column) y.set(3, column, kNan);
            Task task{};
            task.kernel = kernel;
            task.dtype = dtype;
            task.first = 5;
            task.rows = 4;
            task.columns = columns;
            task.args[output] = y.arg();
            CHECK(!holds_nan(task, {8, 1, 0}), "kernel ", kernel, ": the NaN is in padding");
            CHECK(holds_nan(task, {9, 1, 0}), "kernel ", kernel, ": row 3 is NaN");
            for (const int64_t column : {0, wide - 1}) {
                y.set(1, column, kNan);
                CHECK(holds_nan(task, {8, 1, 0}), "kernel ", kernel, ", column ", column);
                y.set(1, column, -kNan);
                CHECK(holds_nan(task, {8, 1, 0}), "kernel ", kernel, ", column ", column, ", negative");
                y.set(1, column, 1);
            }
            CHECK(!holds_nan(task, {5, 1, 0}) && !holds_nan(task, {2, 1, 0}), "kernel ", kernel, ": no row is real");
        }
    Task task{};
    task.kernel = kStoreRows;
    CHECK(!holds_nan(task, {9, 1, 3}), "stores are not looked at");
}

}  // namespace
}  // namespace chipbus::tests
