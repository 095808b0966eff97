// The cores of one chip: threads that run task graphs without anything between the first and the last task but atomics.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#include "task.h"

namespace chipbus {

// A captured graph: tasks in submission order with their successors, and the counters of one run.
class Graph {
  public:
    // successors: of all tasks, one list; Task::next_begin and next_end point into it. Throws std::invalid_argument if
    // an index is out of range or a task waits for itself through others: a run of such a graph would never end.
    Graph(std::vector<Task> tasks, std::vector<int32_t> successors);

    const std::vector<Task>& tasks() const { return tasks_; }

  private:
    friend class Cores;
    std::vector<Task> tasks_;
    std::vector<int32_t> successors_;
    std::vector<int32_t> sources_;  // tasks that wait for nothing
    std::unique_ptr<std::atomic<int32_t>[]> waits_;
    std::unique_ptr<std::atomic<int32_t>[]> ready_;  // tasks in the order they became ready; -1: not yet
};

// When and where each task of a run was: ns of CLOCK_MONOTONIC, and the core.
struct Timeline {
    int64_t* begins;
    int64_t* ends;
    int32_t* cores;
};

struct CoreCounters {
    int64_t tasks = 0;
    int64_t busy_ns = 0;  // in runs of graphs, waiting for a ready task not counted
};

class Cores {
  public:
    // The caller of ``run`` is core 0; ``threads`` - 1 more are started now, named "chip core N" to who looks at the
    // process, and joined by the destructor. Throws std::system_error if there are no more threads to be had.
    Cores(int threads, const KernelSet& kernels);
    ~Cores();
    Cores(const Cores&) = delete;
    Cores& operator=(const Cores&) = delete;

    // Every task once, each after its predecessors. With ``check``, a task whose output holds a NaN ends the run: its
    // index is returned, and tasks not yet begun are skipped. Else -1. One caller at a time. Throws std::bad_alloc if a
    // task found no memory.
    int32_t run(Graph& graph, const Window& window, bool check, const Timeline* timeline);

    // ``job(index)`` for each index below ``count``, on all cores.
    void each(int64_t count, const std::function<void(int64_t)>& job);

    int threads() const { return static_cast<int>(cores_.size()); }
    const char* isa() const { return kernels_.name; }
    CoreCounters counters(int core) const { return cores_[static_cast<size_t>(core)]->counters; }
    // Tasks of graphs and jobs of ``each`` that have ended so far. Any thread, at any time: whether work goes on.
    int64_t ended() const;

  private:
    struct alignas(128) Core {
        Scratch scratch;
        CoreCounters counters;
        std::atomic<int64_t> ended{0};  // written by this core alone

        void count() { ended.store(ended.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed); }
    };

    void together(const std::function<void(Core&, int32_t)>& job);
    void live(int32_t core);
    void end_threads();
    void run_tasks(Core& core, int32_t number, Graph& graph, const Window& window, bool check, const Timeline* timeline);

    const KernelSet& kernels_;
    std::vector<std::unique_ptr<Core>> cores_;
    std::vector<std::thread> threads_;

    // One job at a time. A worker that wakes up late finds it closed and does not delay its end.
    const std::function<void(Core&, int32_t)>* job_ = nullptr;
    std::atomic<uint32_t> turn_{0};
    std::atomic<bool> is_open_{false};
    std::atomic<int32_t> inside_{0};
    std::atomic<bool> is_over_{false};

    // Of the graph that is running.
    alignas(128) std::atomic<int32_t> taken_{0};
    alignas(128) std::atomic<int32_t> given_{0};
    alignas(128) std::atomic<int32_t> failed_{-1};
    std::exception_ptr error_;  // what task ``failed_`` threw, written by the core that made it so
};

// Whether any value a task has written in real rows of its output is NaN. Caches are not looked at: their rows are
// those of q, which is.
bool holds_nan(const Task& task, const Window& window);

}  // namespace chipbus
