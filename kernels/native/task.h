// A task as the engine runs it, and what changes between two runs of a graph. Plain data, laid out by kernels/native/graph.py.
#pragma once

#include <cstddef>
#include <cstdint>

namespace chipbus {

enum Kernel : int32_t {
    kLoadRows,
    kRotaryTable,
    kRmsNorm,
    kLinear,
    kRotateAndStore,
    kPagedAttention,
    kStoreRows,
    kNumKernels,
};

enum Dtype : int32_t { kFloat32, kBfloat16 };

enum WeightFormat : int32_t { kWeightsFloat32, kWeightsBfloat16, kWeightsInt8 };

enum Epilogue : int32_t { kNone, kSilu, kMul, kAdd };

// Weights are packed in panels of so many output columns (kernels/native/packing.h).
constexpr int kPanel = 64;
// Keys are attended in blocks of so many positions, counted from position 0, whoever asks.
constexpr int kKeyBlock = 64;
// Inputs of an int8 linear that share a scale, in weights and in activations.
constexpr int kGroup = 128;
// Keeps 127 / largest finite; a group of smaller numbers is all zeros.
constexpr float kLeastOfGroup = 1e-30f;
constexpr int kMaxHeadDim = 256;
constexpr int kMaxArgs = 9;

struct Arg {
    char* data;
    int64_t stride;  // bytes from one row, or one KV head, to the next
};

struct Task {
    int32_t kernel;
    int32_t dtype;      // of activations and caches
    int32_t first;      // token of the window its first row is
    int32_t rows;       // most it works on; the window may hold fewer
    int32_t columns;    // of the output
    int32_t inner;      // of a linear: what is summed over
    int32_t settings[6];
    float real;         // epsilon, theta, scale
    int32_t waits;      // predecessors
    int32_t next_begin; // successors, in the graph's list
    int32_t next_end;
    Arg args[kMaxArgs];
};

// What a run is told besides the memory its tasks read.
struct Window {
    int32_t tokens;  // real ones; the rest of the bucket is padding, which nobody computes
    int32_t rows;    // sequences they belong to
    int32_t stores;  // pairs of rows to store
};

// Memory of one core, grown as needed, kept between tasks.
struct Scratch {
    char* data = nullptr;
    size_t size = 0;
    char* get(size_t bytes);  // at least so many, 64-byte aligned; contents undefined
    ~Scratch();
};

using Run = void (*)(const Task&, const Window&, Scratch&);

// One instruction set's kernels.
struct KernelSet {
    const char* name;
    Run run[kNumKernels];
};

}  // namespace chipbus
