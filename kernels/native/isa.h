// Which kernels this processor can run. Chosen at run time: one binary serves every x86-64 machine.
#pragma once

#include "task.h"

namespace chipbus {

extern const KernelSet kAvx2Kernels;
extern const KernelSet kAvx512Kernels;
extern const KernelSet kAvx512Bf16Kernels;
extern const KernelSet kAmxKernels;
extern const KernelSet kEmulatedAmxKernels;  // the AMX kernels with their tile instructions in C++: for tests

// The kernels of an instruction set by name, or nullptr with ``why`` if this machine lacks it. Asks the kernel for the
// use of AMX tiles, once per process.
const KernelSet* find_kernels(const char* name, const char** why);

// The best name this processor supports, "" if none.
const char* best_isa();

}  // namespace chipbus
