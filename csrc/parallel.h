// Splits a step over threads by elements, not by tensors.
#pragma once

#include <vector>

#include "task.h"

namespace fused_opt {

// Runs every task, on at most `max_threads` threads, and returns how many were used. The bits do not depend on it.
int run_parallel(const std::vector<Task>& tasks, int max_threads);

}  // namespace fused_opt
