#include "cores.h"

#include <pthread.h>

#include <cstdlib>
#include <cstring>
#include <ctime>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>

#if defined(__x86_64__)
#define CHIPBUS_PAUSE() __builtin_ia32_pause()
#else
#define CHIPBUS_PAUSE() ((void)0)
#endif

namespace chipbus {

namespace {

// A core that finds nothing to do looks again for this long before it sleeps: handing over between spinning cores
// takes 0.1 µs, waking one up 50. Longer, and idle cores steal from other processes.
constexpr int64_t kSpinNs = 200'000;
constexpr int kLooksPerClock = 256;

int64_t now_ns() {
    timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * int64_t{1'000'000'000} + time.tv_nsec;
}

// Return when ``value`` no longer is ``old``.
template <class T>
T await_change(const std::atomic<T>& value, T old) {
    int64_t until = 0;
    for (;;) {
        for (int look = 0; look < kLooksPerClock; ++look) {
            const T seen = value.load(std::memory_order_acquire);
            if (seen != old) return seen;
            CHIPBUS_PAUSE();
        }
        const int64_t now = now_ns();
        if (until == 0) until = now + kSpinNs;
        if (now >= until) value.wait(old, std::memory_order_acquire);
    }
}

}  // namespace

char* Scratch::get(size_t bytes) {
    if (bytes > size) {
        std::free(data);
        size = (bytes + 4095) / 4096 * 4096;
        data = static_cast<char*>(std::aligned_alloc(64, size));
        if (data == nullptr) {
            size = 0;
            throw std::bad_alloc();
        }
    }
    return data;
}

Scratch::~Scratch() { std::free(data); }

Graph::Graph(std::vector<Task> tasks, std::vector<int32_t> successors) : tasks_(std::move(tasks)), successors_(std::move(successors)) {
    const auto count = static_cast<int32_t>(tasks_.size());
    std::vector<int32_t> waits(tasks_.size(), 0);
    for (int32_t at = 0; at < count; ++at) {
        const Task& task = tasks_[static_cast<size_t>(at)];
        if (task.kernel < 0 || task.kernel >= kNumKernels) throw std::invalid_argument("task " + std::to_string(at) + " names kernel " + std::to_string(task.kernel));
        if (task.next_begin < 0 || task.next_end < task.next_begin || task.next_end > static_cast<int32_t>(successors_.size()))
            throw std::invalid_argument("task " + std::to_string(at) + " has successors outside the list");
        for (int32_t next = task.next_begin; next < task.next_end; ++next) {
            const int32_t after = successors_[static_cast<size_t>(next)];
            // Submission order is an order of execution, so edges that lead on cannot close a circle.
            if (after <= at || after >= count) throw std::invalid_argument("task " + std::to_string(at) + " is followed by task " + std::to_string(after));
            ++waits[static_cast<size_t>(after)];
        }
    }
    for (int32_t at = 0; at < count; ++at) {
        Task& task = tasks_[static_cast<size_t>(at)];
        task.waits = waits[static_cast<size_t>(at)];
        if (task.waits == 0) sources_.push_back(at);
    }
    waits_ = std::make_unique<std::atomic<int32_t>[]>(tasks_.size());
    ready_ = std::make_unique<std::atomic<int32_t>[]>(tasks_.size());
}

Cores::Cores(int threads, const KernelSet& kernels) : kernels_(kernels) {
    for (int core = 0; core < threads; ++core) cores_.push_back(std::make_unique<Core>());
    try {
        for (int32_t core = 1; core < threads; ++core) {
            threads_.emplace_back([this, core] { live(core); });
            pthread_setname_np(threads_.back().native_handle(), ("chip core " + std::to_string(core)).substr(0, 15).c_str());
        }
    } catch (...) {  // no more threads to be had
        end_threads();
        throw;
    }
}

Cores::~Cores() { end_threads(); }

void Cores::end_threads() {
    is_over_.store(true);
    turn_.fetch_add(1);
    turn_.notify_all();
    for (std::thread& thread : threads_) thread.join();
}

void Cores::live(int32_t core) {
    uint32_t turn = 0;
    for (;;) {
        turn = await_change(turn_, turn);
        if (is_over_.load()) return;
        inside_.fetch_add(1);
        if (is_open_.load()) (*job_)(*cores_[static_cast<size_t>(core)], core);
        inside_.fetch_sub(1);
    }
}

void Cores::together(const std::function<void(Core&, int32_t)>& job) {
    job_ = &job;
    is_open_.store(true);
    turn_.fetch_add(1);
    turn_.notify_all();
    job(*cores_[0], 0);
    is_open_.store(false);
    while (inside_.load() != 0) CHIPBUS_PAUSE();
}

void Cores::each(int64_t count, const std::function<void(int64_t)>& job) {
    std::atomic<int64_t> next{0};
    together([&](Core& core, int32_t) {
        for (int64_t index = next.fetch_add(1); index < count; index = next.fetch_add(1)) {
            job(index);
            core.count();
        }
    });
}

int64_t Cores::ended() const {
    int64_t sum = 0;
    for (const auto& core : cores_) sum += core->ended.load(std::memory_order_relaxed);
    return sum;
}

int32_t Cores::run(Graph& graph, const Window& window, bool check, const Timeline* timeline) {
    const size_t count = graph.tasks_.size();
    for (size_t at = 0; at < count; ++at) {
        graph.waits_[at].store(graph.tasks_[at].waits, std::memory_order_relaxed);
        graph.ready_[at].store(-1, std::memory_order_relaxed);
    }
    int32_t given = 0;
    for (const int32_t source : graph.sources_) graph.ready_[static_cast<size_t>(given++)].store(source, std::memory_order_relaxed);
    taken_.store(0);
    given_.store(given);
    failed_.store(-1);
    together([&](Core& core, int32_t number) { run_tasks(core, number, graph, window, check, timeline); });
    if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
    return failed_.load();
}

void Cores::run_tasks(Core& core, int32_t number, Graph& graph, const Window& window, bool check, const Timeline* timeline) {
    const auto count = static_cast<int32_t>(graph.tasks_.size());
    const int64_t began = now_ns();
    int64_t waited = 0;
    for (;;) {
        const int32_t ticket = taken_.fetch_add(1, std::memory_order_relaxed);
        if (ticket >= count) break;
        std::atomic<int32_t>& place = graph.ready_[static_cast<size_t>(ticket)];
        int32_t at = place.load(std::memory_order_acquire);
        if (at < 0) {
            const int64_t since = now_ns();
            at = await_change(place, int32_t{-1});
            waited += now_ns() - since;
        }
        const Task& task = graph.tasks_[static_cast<size_t>(at)];
        const int64_t begin = timeline != nullptr ? now_ns() : 0;
        if (failed_.load(std::memory_order_relaxed) < 0) {
            int32_t none = -1;
            try {
                kernels_.run[task.kernel](task, window, core.scratch);
                if (check && holds_nan(task, window)) failed_.compare_exchange_strong(none, at);
            } catch (...) {  // no memory; the other cores still wait for the tasks after this one
                if (failed_.compare_exchange_strong(none, at)) error_ = std::current_exception();
            }
        }
        if (timeline != nullptr) {
            timeline->begins[at] = begin;
            timeline->ends[at] = now_ns();
            timeline->cores[at] = number;
        }
        ++core.counters.tasks;
        core.count();
        for (int32_t next = task.next_begin; next < task.next_end; ++next) {
            const int32_t after = graph.successors_[static_cast<size_t>(next)];
            if (graph.waits_[static_cast<size_t>(after)].fetch_sub(1, std::memory_order_acq_rel) != 1) continue;
            std::atomic<int32_t>& free = graph.ready_[static_cast<size_t>(given_.fetch_add(1, std::memory_order_relaxed))];
            // Not only released: libstdc++'s notify_one reads whether anyone waits, and on x86 that read may overtake a
            // plain store. The waiter would see neither the value nor the call, and sleep for ever.
            free.store(after, std::memory_order_seq_cst);
            free.notify_one();
        }
    }
    core.counters.busy_ns += now_ns() - began - waited;
}

bool holds_nan(const Task& task, const Window& window) {
    // Where each kernel's output is among its arguments, and whether that is fp32 whatever the task's dtype.
    static constexpr int kOutput[kNumKernels] = {2, 2, 2, 4, 4, 6, -1};
    const int output = kOutput[task.kernel];
    if (output < 0) return false;
    const int rows = window.tokens - task.first < task.rows ? window.tokens - task.first : task.rows;
    const bool is_wide = task.dtype == kFloat32 || task.kernel == kRotaryTable;
    const int64_t columns = task.kernel == kRotaryTable ? 2 * int64_t{task.columns} : task.columns;
    for (int row = 0; row < rows; ++row) {
        const char* data = task.args[output].data + row * task.args[output].stride;
        for (int64_t column = 0; column < columns; ++column) {
            uint32_t bits = 0;
            if (is_wide)
                std::memcpy(&bits, data + 4 * column, 4);
            else
                std::memcpy(reinterpret_cast<char*>(&bits) + 2, data + 2 * column, 2);
            if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return true;
        }
    }
    return false;
}

}  // namespace chipbus
