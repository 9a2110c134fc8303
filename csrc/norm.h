// The norm of a group's gradients.
#pragma once

#include "batch.h"
#include "isa.h"

namespace fused_opt {

// Of the gradients of a batch's parameters for the CPU's kernels, whether they have states yet or not: the sum of their squares or, with
// `largest`, the largest magnitude; NaN if there is one. Sums are made of pieces that do not depend on the number of threads, so neither do
// the bits.
double gradient_norm(const Batch& batch, const Isa& isa, bool largest, int max_threads);

}  // namespace fused_opt
