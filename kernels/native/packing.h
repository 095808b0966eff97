// Weights as the kernels read them: panels of kPanel output columns, inputs in order.
//
//     float32    panel, input, column                              4 bytes each
//     bfloat16   panel, pair of inputs, column, input of the pair  2 bytes each
//     int8       panel, four inputs, column, input of the four     1 byte each; a scale per column and kGroup inputs
//
// Columns behind the last are zeros.
#pragma once

#include "cores.h"

namespace chipbus {

// matrix: (columns, inner) row-major, ``item`` bytes each, 4 or 2. packed: as ``packed_bytes`` says.
void pack_panels(Cores& cores, const char* matrix, int64_t columns, int64_t inner, int item, char* packed);

// matrix as above in fp32 (``is_wide``) or bf16. scales, sums: (panels, groups, kPanel), scale and sum of a column's group.
void pack_int8(Cores& cores, const char* matrix, int64_t columns, int64_t inner, bool is_wide, char* packed, float* scales, int32_t* sums);

}  // namespace chipbus
