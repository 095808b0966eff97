// Kernels for processors with AVX-512 but no bf16 instructions: pairs are widened and multiplied in fp32.
#include "isa.h"

#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq")
#include <immintrin.h>

#define CHIPBUS_BLOCK_ROWS 6

namespace chipbus {
namespace {

#include "vector_avx512.h"
#include "kernels.inl"

}  // namespace

extern const KernelSet kAvx512Kernels = CHIPBUS_KERNEL_SET("avx512");

}  // namespace chipbus
