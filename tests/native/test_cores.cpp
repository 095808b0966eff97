// Cores run graphs: every task once, after its predecessors, on any number of threads. What tasks hand to each other is
// plain memory, so that a thread sanitizer sees an order that is not enforced.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <new>
#include <set>
#include <thread>

#include "../../kernels/native/cores.h"
#include "support.h"

namespace chipbus::tests {
namespace {

struct Node {
    std::vector<const Node*> before;
    int64_t value = 0;
    int64_t runs = 0;
    int64_t busy_us = 0;
};

void visit(const Task& task, const Window& window, Scratch& scratch) {
    Node& node = *reinterpret_cast<Node*>(task.args[0].data);
    const auto until = std::chrono::steady_clock::now() + std::chrono::microseconds(node.busy_us);
    int64_t value = window.tokens;
    for (const Node* before : node.before) value = std::max(value, before->value + 1);
    std::memset(scratch.get(static_cast<size_t>(1 + value)), 1, static_cast<size_t>(1 + value));
    while (std::chrono::steady_clock::now() < until) {
    }
    node.value = value;
    ++node.runs;
}

void write_value(const Task& task, const Window&, Scratch&) { std::memcpy(task.args[2].data, &task.real, 4); }

void find_no_memory(const Task&, const Window& window, Scratch&) {
    if (window.stores == 0) throw std::bad_alloc();
}

const KernelSet kVisits{"visits", {find_no_memory, visit, write_value, visit, visit, visit, visit}};
const Window kWindow{7, 1, 0};

// A graph of ``count`` tasks in which each waits for up to ``most`` of the ``reach`` before it.
struct Dag {
    std::vector<Node> nodes;
    std::vector<std::vector<int32_t>> after;
    std::unique_ptr<Graph> graph;

    Dag(Random& random, int count, int most, int reach) : nodes(static_cast<size_t>(count)), after(nodes.size()) {
        std::vector<std::set<int>> before(nodes.size());
        for (int at = 0; at < count; ++at)
            for (int edge = most == 0 ? 0 : random.from(0, most); edge > 0 && at > 0; --edge) before[static_cast<size_t>(at)].insert(random.from(std::max(0, at - reach), at - 1));
        for (int at = 0; at < count; ++at)
            for (const int earlier : before[static_cast<size_t>(at)]) {
                nodes[static_cast<size_t>(at)].before.push_back(&nodes[static_cast<size_t>(earlier)]);
                after[static_cast<size_t>(earlier)].push_back(at);
            }
        std::vector<Task> tasks(nodes.size());
        std::vector<int32_t> successors;
        for (size_t at = 0; at < nodes.size(); ++at) {
            Task& task = tasks[at];
            task = Task{};
            task.kernel = kLinear;
            task.args[0].data = reinterpret_cast<char*>(&nodes[at]);
            task.next_begin = static_cast<int32_t>(successors.size());
            successors.insert(successors.end(), after[at].begin(), after[at].end());
            task.next_end = static_cast<int32_t>(successors.size());
        }
        graph = std::make_unique<Graph>(std::move(tasks), std::move(successors));
    }

    void check(int64_t runs, const Window& window) const {
        std::vector<int64_t> wanted(nodes.size());
        for (size_t at = 0; at < nodes.size(); ++at) {
            wanted[at] = window.tokens;
            for (const Node* before : nodes[at].before) wanted[at] = std::max(wanted[at], wanted[static_cast<size_t>(before - nodes.data())] + 1);
            CHECK(nodes[at].runs == runs, "task ", at, " of ", nodes.size(), " ran ", nodes[at].runs, " times in ", runs, " runs");
            CHECK(nodes[at].value == wanted[at], "task ", at, " saw ", nodes[at].value, " instead of ", wanted[at]);
        }
    }
};

TEST(every_task_runs_once_after_its_predecessors) {
    Random random(1);
    for (const int threads : {1, 2, 4}) {
        Cores cores(threads, kVisits);
        int64_t tasks = 0;
        for (int shape = 0; shape < 40; ++shape) {
            Dag dag(random, random.from(0, 120), random.from(0, 4), random.of<int>({1, 5, 120}));
            for (int run = 1; run <= 5; ++run) {
                CHECK(cores.run(*dag.graph, kWindow, false, nullptr) == -1, "no task fails");
                dag.check(run, kWindow);
                tasks += static_cast<int64_t>(dag.nodes.size());
            }
        }
        int64_t counted = 0;
        for (int core = 0; core < threads; ++core) counted += cores.counters(core).tasks;
        CHECK(counted == tasks, counted, " tasks counted, ", tasks, " run on ", threads, " threads");
    }
}

TEST(short_runs_follow_each_other_though_workers_wake_late) {
    Random random(2);
    for (const int threads : {1, 2, 4}) {
        Cores cores(threads, kVisits);
        Dag none(random, 0, 0, 1), one(random, 1, 0, 1), few(random, 9, 2, 3);
        for (int run = 1; run <= 1500; ++run) {
            Window window{run, 1, 0};
            for (Dag* dag : {&none, &one, &few}) {
                CHECK(cores.run(*dag->graph, window, false, nullptr) == -1, "no task fails");
                dag->check(run, window);
            }
        }
    }
}

TEST(cores_that_went_to_sleep_are_woken) {
    Random random(3);
    for (const int threads : {2, 4}) {
        Cores cores(threads, kVisits);
        // A chain whose tasks take longer than a core spins: whoever waits for one, or for the next run, sleeps.
        Dag chain(random, 12, 0, 1), wide(random, 40, 3, 40);
        for (size_t at = 0; at < wide.nodes.size(); ++at) wide.nodes[at].busy_us = at % 7 == 0 ? 400 : 0;
        for (Node& node : chain.nodes) node.busy_us = 300;
        for (int run = 1; run <= 10; ++run)
            for (Dag* dag : {&chain, &wide}) {
                cores.run(*dag->graph, kWindow, false, nullptr);
                dag->check(run, kWindow);
            }
    }
}

TEST(every_core_takes_part_though_it_sleeps) {
    for (const int threads : {2, 4}) {
        Cores cores(threads, kVisits);
        for (int turn = 0; turn < 5; ++turn) {
            // Longer than a core spins before it sleeps; then as many jobs as cores, none of which ends before all began.
            for (const auto until = std::chrono::steady_clock::now() + std::chrono::microseconds(600); std::chrono::steady_clock::now() < until;) {
            }
            std::atomic<int> begun{0};
            const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(10);
            cores.each(threads, [&](int64_t) {
                ++begun;
                while (begun.load() < threads && std::chrono::steady_clock::now() < deadline) std::this_thread::yield();
            });
            CHECK(std::chrono::steady_clock::now() < deadline, "a core of ", threads, " slept on");
        }
    }
}

TEST(a_single_chain_is_handed_from_core_to_core) {
    Random random(4);
    std::vector<Task> tasks(400);
    std::vector<int32_t> successors;
    std::vector<Node> nodes(tasks.size());
    for (size_t at = 0; at < tasks.size(); ++at) {
        tasks[at] = Task{};
        tasks[at].kernel = kLinear;
        tasks[at].args[0].data = reinterpret_cast<char*>(&nodes[at]);
        tasks[at].next_begin = tasks[at].next_end = static_cast<int32_t>(at);
        if (at > 0) nodes[at].before.push_back(&nodes[at - 1]);
        if (at + 1 < tasks.size()) successors.push_back(tasks[at].next_end++ + 1);
    }
    Graph graph(tasks, successors);
    for (const int threads : {2, 4}) {
        Cores cores(threads, kVisits);
        for (int run = 0; run < 20; ++run) cores.run(graph, kWindow, false, nullptr);
    }
    for (size_t at = 0; at < nodes.size(); ++at) CHECK(nodes[at].runs == 40 && nodes[at].value == kWindow.tokens + static_cast<int64_t>(at), "task ", at);
}

TEST(cores_end_with_their_object) {
    Random random(5);
    Dag dag(random, 30, 2, 8);
    int64_t runs = 0;
    for (int life = 0; life < 60; ++life) {
        Cores cores(1 + life % 4, kVisits);
        for (int run = life % 3; run > 0; --run) {
            cores.run(*dag.graph, kWindow, false, nullptr);
            dag.check(++runs, kWindow);
        }
    }
}

TEST(one_graph_runs_on_the_cores_of_several_chips) {
    Random random(6);
    Dag dag(random, 50, 3, 10);
    Cores few(1, kVisits), many(4, kVisits);
    for (int run = 1; run <= 20; ++run) {
        (run % 2 ? few : many).run(*dag.graph, kWindow, false, nullptr);
        dag.check(run, kWindow);
    }
}

TEST(a_timeline_agrees_with_the_edges) {
    Random random(7);
    for (const int threads : {1, 3}) {
        Cores cores(threads, kVisits);
        Dag dag(random, 80, 3, 20);
        std::vector<int64_t> begins(80), ends(80);
        std::vector<int32_t> where(80);
        const Timeline timeline{begins.data(), ends.data(), where.data()};
        cores.run(*dag.graph, kWindow, false, &timeline);
        dag.check(1, kWindow);
        for (size_t at = 0; at < 80; ++at) {
            CHECK(begins[at] <= ends[at] && where[at] >= 0 && where[at] < threads, "task ", at, " on core ", where[at]);
            for (const int32_t after : dag.after[at]) CHECK(ends[at] <= begins[static_cast<size_t>(after)], "task ", after, " began before task ", at, " had ended");
        }
    }
}

TEST(the_first_task_that_wrote_nan_ends_a_run) {
    for (const int threads : {1, 4}) {
        Cores cores(threads, kVisits);
        std::vector<float> out(5);
        std::vector<Task> tasks(5);
        std::vector<int32_t> successors;
        for (size_t at = 0; at < tasks.size(); ++at) {
            tasks[at] = Task{};
            tasks[at].kernel = kRmsNorm;
            tasks[at].rows = tasks[at].columns = 1;
            tasks[at].real = at == 2 ? kNan : 1;
            tasks[at].args[2] = {reinterpret_cast<char*>(&out[at]), 4};
            tasks[at].next_begin = tasks[at].next_end = static_cast<int32_t>(at);
            if (at + 1 < tasks.size()) successors.push_back(tasks[at].next_end++ + 1);
        }
        Graph graph(tasks, successors);
        CHECK(cores.run(graph, kWindow, true, nullptr) == 2, "task 2 writes a NaN");
        CHECK(out[1] == 1 && std::isnan(out[2]) && out[3] == 0 && out[4] == 0, "what follows the NaN is not run");
        CHECK(cores.run(graph, kWindow, false, nullptr) == -1, "nobody looks for a NaN");
        CHECK(out[4] == 1, "every task runs");
    }
}

TEST(a_task_without_memory_ends_its_run_and_no_other) {
    for (const int threads : {1, 2, 4}) {
        Cores cores(threads, kVisits);
        std::vector<Task> tasks(30);
        for (Task& task : tasks) task = Task{};  // kLoadRows
        Graph graph(tasks, {});
        Random random(8);
        Dag dag(random, 30, 2, 8);
        for (int run = 1; run <= 20; ++run) {
            bool has_thrown = false;
            try {
                cores.run(graph, {1, 1, 0}, false, nullptr);
            } catch (const std::bad_alloc&) {
                has_thrown = true;
            }
            CHECK(has_thrown, "no task found memory");
            CHECK(cores.run(graph, {1, 1, 1}, false, nullptr) == -1, "every task found memory");
            cores.run(*dag.graph, kWindow, false, nullptr);
            dag.check(run, kWindow);
        }
    }
}

TEST(graphs_that_would_never_end_are_refused) {
    const auto refuses = [](std::vector<int32_t> successors, int32_t begin, int32_t end, int32_t kernel) {
        std::vector<Task> tasks(3);
        for (Task& task : tasks) task = Task{};
        tasks[1].next_begin = begin;
        tasks[1].next_end = end;
        tasks[1].kernel = kernel;
        try {
            Graph graph(tasks, successors);
        } catch (const std::invalid_argument&) {
            return true;
        }
        return false;
    };
    CHECK(!refuses({2}, 0, 1, kLinear), "1 → 2 is a graph");
    CHECK(refuses({1}, 0, 1, kLinear), "1 → 1");
    CHECK(refuses({0}, 0, 1, kLinear), "1 → 0");
    CHECK(refuses({3}, 0, 1, kLinear), "1 → 3 of 3");
    CHECK(refuses({-1}, 0, 1, kLinear), "1 → −1");
    CHECK(refuses({2}, 0, 2, kLinear), "two of one successor");
    CHECK(refuses({2}, 1, 0, kLinear), "an end before the beginning");
    CHECK(refuses({2}, -1, 1, kLinear), "a beginning before the list");
    CHECK(refuses({2}, 0, 1, kNumKernels), "no such kernel");
    CHECK(refuses({2}, 0, 1, -1), "no such kernel");
}

TEST(a_job_is_done_once_for_each_index) {
    for (const int threads : {1, 2, 4}) {
        Cores cores(threads, kVisits);
        for (const int64_t count : {0, 1, 2, 1000})
            for (int run = 0; run < 20; ++run) {
                std::vector<int> done(static_cast<size_t>(count));
                cores.each(count, [&](int64_t index) { ++done[static_cast<size_t>(index)]; });
                CHECK(std::count(done.begin(), done.end(), 1) == count, count, " jobs on ", threads, " threads");
            }
    }
}

TEST(scratch_grows_and_is_aligned) {
    Scratch scratch;
    size_t largest = 0;
    for (const size_t bytes : {1, 64, 4096, 4097, 100, 1 << 20}) {
        char* memory = scratch.get(bytes);
        CHECK(reinterpret_cast<uintptr_t>(memory) % 64 == 0, bytes, " bytes");
        std::memset(memory, 1, bytes);
        largest = std::max(largest, bytes);
        CHECK(scratch.size >= largest, "never given back");
    }
}

}  // namespace
}  // namespace chipbus::tests
