// Paged attention of every instruction set: decode and prefill over scattered pages whose other slots are NaN.
#include <algorithm>

#include "../../kernels/native/cores.h"
#include "support.h"

namespace chipbus::tests {
namespace {

struct Shape {
    Dtype dtype;
    int kv_heads, group, dim, page_size;
    std::vector<std::pair<int, int>> sequences;  // (positions before the window, tokens of the window)
};

// A cache that holds NaN wherever no sequence has a position, and a window of queries.
struct Attention {
    Attention(Random& random, const Shape& shape)
        : shape(shape), pages_each(most_pages()), pages(static_cast<int>(shape.sequences.size()) * pages_each + 2), slots(pages * shape.page_size),
          keys(shape.dtype, int64_t{shape.kv_heads} * slots, shape.dim), values(shape.dtype, int64_t{shape.kv_heads} * slots, shape.dim), tokens(all_tokens()),
          q(shape.dtype, tokens, shape.kv_heads * shape.group * shape.dim, 3), tables(std::make_unique<int32_t[]>(shape.sequences.size() * static_cast<size_t>(pages_each + 1))),
          offsets(std::make_unique<int32_t[]>(shape.sequences.size() + 1)), ends(std::make_unique<int32_t[]>(shape.sequences.size())) {
        q.fill(random);
        for (const Rows* cache : {&keys, &values})
            for (int64_t row = 0; row < cache->rows; ++row)
                for (int64_t i = 0; i < shape.dim; ++i) cache->set(row, i, kNan);
        std::vector<int> free(static_cast<size_t>(pages));
        for (int page = 0; page < pages; ++page) free[static_cast<size_t>(page)] = page;
        for (size_t row = 0; row < shape.sequences.size(); ++row) {
            const auto& [before, count] = shape.sequences[row];
            offsets[row + 1] = offsets[row] + count;
            ends[row] = before + count;
            for (int page = 0; page <= pages_each; ++page) table(row)[page] = 1'000'000'000;  // nobody may look there
            for (int position = 0; position < before + count; ++position) {
                if (position % shape.page_size == 0) {
                    const auto taken = free.begin() + random.below(static_cast<int64_t>(free.size()));
                    table(row)[position / shape.page_size] = *taken;
                    free.erase(taken);
                }
                for (int head = 0; head < shape.kv_heads; ++head)
                    for (int i = 0; i < shape.dim; ++i) {
                        keys.set(slot(row, position, head), i, random.normal());
                        values.set(slot(row, position, head), i, random.normal());
                    }
            }
        }
    }

    int most_pages() const {
        int most = 0;
        for (const auto& [before, count] : shape.sequences) most = std::max(most, (before + count + shape.page_size - 1) / shape.page_size);
        return most;
    }
    int all_tokens() const {
        int count = 0;
        for (const auto& sequence : shape.sequences) count += sequence.second;
        return count;
    }
    int32_t* table(size_t row) const { return tables.get() + row * static_cast<size_t>(pages_each + 1); }
    int64_t slot(size_t row, int position, int head) const {
        return int64_t{head} * slots + int64_t{table(row)[position / shape.page_size]} * shape.page_size + position % shape.page_size;
    }

    // Tokens from ``first`` on, KV heads from ``head`` on, into ``out``.
    Task task(const Rows& out, int first, int rows, int head, int heads) const {
        Task task{};
        task.kernel = kPagedAttention;
        task.dtype = shape.dtype;
        task.first = first;
        task.rows = rows;
        task.columns = heads * shape.group * shape.dim;
        task.settings[0] = heads;
        task.settings[1] = shape.group;
        task.settings[2] = shape.dim;
        task.settings[3] = shape.page_size;
        task.real = 1 / std::sqrt(static_cast<float>(shape.dim));
        task.args[0] = q.arg(first, int64_t{head} * shape.group * shape.dim);
        task.args[1] = {keys.at(int64_t{head} * slots), int64_t{slots} * shape.dim * keys.item};
        task.args[2] = {values.at(int64_t{head} * slots), int64_t{slots} * shape.dim * values.item};
        task.args[3].data = reinterpret_cast<char*>(offsets.get());
        task.args[4].data = reinterpret_cast<char*>(ends.get());
        task.args[5] = {reinterpret_cast<char*>(tables.get()), (pages_each + 1) * 4};
        task.args[6] = out.arg(first, int64_t{head} * shape.group * shape.dim);
        return task;
    }

    Window window() const { return {tokens, static_cast<int32_t>(shape.sequences.size()), 0}; }
    Rows output(int padding = 0) const { return Rows(shape.dtype, tokens + padding, q.columns, 1); }

    void check(const Rows& out, const std::string& where) const {
        for (size_t row = 0; row < shape.sequences.size(); ++row)
            for (int head = 0; head < shape.kv_heads * shape.group; ++head) {
                const auto& [before, count] = shape.sequences[row];
                const std::vector<double> k = of_sequence(keys, row, head / shape.group), v = of_sequence(values, row, head / shape.group);
                for (int token = 0; token < count; ++token) check_token(out, where, row, head, token, before + token + 1, k, v);
            }
    }

    // One head's keys or values of a sequence, position by position.
    std::vector<double> of_sequence(const Rows& cache, size_t row, int kv_head) const {
        std::vector<double> found;
        for (int position = 0; position < ends[row]; ++position)
            for (int i = 0; i < shape.dim; ++i) found.push_back(cache.get(slot(row, position, kv_head), i));
        return found;
    }

    void check_token(const Rows& out, const std::string& where, size_t row, int head, int token, int seen, const std::vector<double>& k, const std::vector<double>& v) const {
        const int at = offsets[row] + token, dim = shape.dim;
        std::vector<double> query(static_cast<size_t>(dim)), chances(static_cast<size_t>(seen)), wanted(query), magnitude(query);
        for (int i = 0; i < dim; ++i) query[static_cast<size_t>(i)] = q.get(at, int64_t{head} * dim + i);
        double most = -1e300, total = 0;
        const double* key = k.data();
        for (double& score : chances) {
            for (const double value : query) score += value * *key++;
            score /= std::sqrt(static_cast<double>(dim));
            most = std::max(most, score);
        }
        for (double& chance : chances) total += chance = std::exp(chance - most);
        const double* value = v.data();
        for (const double chance : chances)
            for (size_t i = 0; i < query.size(); ++i) {
                const double part = chance / total * *value++;
                wanted[i] += part;
                magnitude[i] += std::fabs(part);
            }
        const double error = shape.dtype == kFloat32 ? 3e-5 : 1.5 / 256;
        for (size_t i = 0; i < query.size(); ++i)
            check_near(out.get(at, int64_t{head} * dim + static_cast<int64_t>(i)), wanted[i], error * (magnitude[i] + std::fabs(wanted[i])), where, ": sequence ", row, ", token ", token, ", head ", head);
    }

    Shape shape;
    int pages_each, pages, slots;
    Rows keys, values;
    int tokens;
    Rows q;
    std::unique_ptr<int32_t[]> tables, offsets, ends;
};

std::string described(const KernelSet& kernels, const Shape& shape) {
    return text(kernels.name, ", ", name_of(shape.dtype), ", ", shape.kv_heads, " × ", shape.group, " heads of ", shape.dim, ", pages of ", shape.page_size);
}

void check(const KernelSet& kernels, Random& random, const Shape& shape) {
    const Attention attention(random, shape);
    const std::string where = described(kernels, shape);
    Scratch scratch;
    const Rows out = attention.output(3);
    kernels.run[kPagedAttention](attention.task(out, 0, attention.tokens + 3, 0, shape.kv_heads), attention.window(), scratch);
    CHECK(out.touched(0, attention.tokens, 0, out.columns).empty(), where, ": wrote ", out.touched(0, attention.tokens, 0, out.columns));
    attention.check(out, where);

    // In tiles of any number of tokens and one KV head each: the same bits.
    const Rows cut = attention.output();
    for (int first = 0, rows = 0; first < attention.tokens; first += rows) {
        rows = random.from(1, 6);
        for (int head = 0; head < shape.kv_heads; ++head) kernels.run[kPagedAttention](attention.task(cut, first, rows, head, 1), attention.window(), scratch);
    }
    for (int64_t row = 0; row < attention.tokens; ++row)
        CHECK(std::memcmp(cut.at(row), out.at(row), static_cast<size_t>(out.columns * out.item)) == 0, where, ": token ", row, " has other bits in another tile");
}

const std::vector<std::pair<int, int>> kMixed = {{0, 1}, {5, 1}, {63, 1}, {64, 1}, {130, 1}, {0, 9}, {60, 10}, {1, 3}};

TEST(attention_is_a_softmax_over_the_pages_of_a_sequence) {
    each_isa([](const KernelSet& kernels) {
        Random random(41);
        for (const Dtype dtype : {kFloat32, kBfloat16})
            for (const int dim : {2, 24, 64, 80, kMaxHeadDim}) {
                const int group = random.of<int>({1, 2, 3, 4, 8}), page_size = random.of<int>({1, 4, 16, 50});
                check(kernels, random, {dtype, random.from(1, 2), group, dim, page_size, kMixed});
            }
    });
}

TEST(attention_of_a_prompt_longer_than_a_tile_of_queries) {
    each_isa([](const KernelSet& kernels) {
        Random random(42);
        for (const Dtype dtype : {kFloat32, kBfloat16}) {
            check(kernels, random, {dtype, 1, 2, 16, 16, {{0, 120}, {3, 70}}});
            check(kernels, random, {dtype, 1, 5, 16, 8, {{30, 45}}});
        }
    });
}

TEST(attention_of_as_many_heads_as_may_share_a_kv_head) {
    each_isa([](const KernelSet& kernels) {
        Random random(43);
        for (const Dtype dtype : {kFloat32, kBfloat16})
            for (const int group : {48, 95, 96}) check(kernels, random, {dtype, 1, group, 8, 16, {{0, 2}, {70, 1}}});
    });
}

TEST(sequences_do_not_see_each_other) {
    each_isa([](const KernelSet& kernels) {
        Random random(44);
        for (const Dtype dtype : {kFloat32, kBfloat16}) {
            const Attention attention(random, {dtype, 2, 2, 16, 4, {{10, 1}, {3, 4}, {70, 2}}});
            Scratch scratch;
            const Rows clean = attention.output(), out = attention.output();
            kernels.run[kPagedAttention](attention.task(clean, 0, attention.tokens, 0, 2), attention.window(), scratch);
            for (int head = 0; head < 2; ++head) attention.values.set(attention.slot(1, 2, head), 5, kNan), attention.keys.set(attention.slot(1, 2, head), 5, kNan);
            kernels.run[kPagedAttention](attention.task(out, 0, attention.tokens, 0, 2), attention.window(), scratch);
            for (int64_t token = 0; token < attention.tokens; ++token)
                for (int64_t i = 0; i < out.columns; ++i) {
                    if (token >= 1 && token < 5)
                        CHECK(std::isnan(out.get(token, i)), kernels.name, ": token ", token, " sees a NaN and hides it");
                    else
                        CHECK(bits_of(out.get(token, i)) == bits_of(clean.get(token, i)), kernels.name, ": token ", token, " sees another sequence");
                }
        }
    });
}

TEST(tiles_of_attention_run_side_by_side) {
    each_isa([](const KernelSet& kernels) {
        Random random(45);
        for (const Dtype dtype : {kFloat32, kBfloat16}) {
            const Attention attention(random, {dtype, 2, 2, 24, 16, kMixed});
            Scratch scratch;
            const Rows whole = attention.output(), out = attention.output();
            kernels.run[kPagedAttention](attention.task(whole, 0, attention.tokens, 0, 2), attention.window(), scratch);
            std::vector<Task> tasks;
            for (int first = 0; first < attention.tokens; first += 5)
                for (int head = 0; head < 2; ++head) tasks.push_back(attention.task(out, first, 5, head, 1));
            Graph graph(tasks, {});
            Cores cores(3, kernels);
            for (int run = 0; run < 3; ++run) CHECK(cores.run(graph, attention.window(), true, nullptr) == -1, kernels.name, " wrote a NaN");
            for (int64_t row = 0; row < attention.tokens; ++row)
                CHECK(std::memcmp(whole.at(row), out.at(row), static_cast<size_t>(out.columns * out.item)) == 0, kernels.name, ", ", name_of(dtype), ": token ", row);
        }
    });
}

}  // namespace
}  // namespace chipbus::tests
