// What is done with rows of logits, and with memory as a whole.
#pragma once

#include <vector>

#include "cores.h"

namespace chipbus {

// For each of ``rows`` of an fp32 matrix, the index of its largest value: NaN counts as larger than all, as in numpy; the
// lowest index among equals.
std::vector<int64_t> largest(Cores& cores, const char* matrix, int64_t row_bytes, const std::vector<int64_t>& rows, int64_t columns);

// Indices of the ``count`` largest values, largest first, the lower index first among equals; NaN last.
std::vector<int64_t> top(const float* values, int64_t size, int64_t count);

// Seconds that reading ``bytes`` takes on all cores, each taking the next megabyte.
double read_all(Cores& cores, const char* memory, int64_t bytes);

}  // namespace chipbus
