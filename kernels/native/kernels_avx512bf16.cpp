// Kernels for processors with AVX-512 BF16 and VNNI: dot products of bf16 pairs and of int8 quadruples.
#include "isa.h"

#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vnni")
#include <immintrin.h>

#define CHIPBUS_BLOCK_ROWS 6
#define CHIPBUS_BF16_INSTRUCTIONS

namespace chipbus {
namespace {

#include "vector_avx512.h"
#include "kernels.inl"

}  // namespace

extern const KernelSet kAvx512Bf16Kernels = CHIPBUS_KERNEL_SET("avx512bf16");

}  // namespace chipbus
