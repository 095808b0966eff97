// Kernels for processors with AVX2 and FMA. Nothing else is included after the target is set: a function of the standard
// library compiled for it could be the one that other files end up calling.
#include "isa.h"

#pragma GCC target("avx2,fma")
#include <immintrin.h>

#define CHIPBUS_BLOCK_ROWS 5

namespace chipbus {
namespace {

#include "vector_avx2.h"
#include "kernels.inl"

}  // namespace

extern const KernelSet kAvx2Kernels = CHIPBUS_KERNEL_SET("avx2");

}  // namespace chipbus
