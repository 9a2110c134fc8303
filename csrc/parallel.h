// Splits a step over threads by elements, not by tensors.
#pragma once

#include <functional>
#include <vector>

#include "task.h"

namespace fused_opt {

// Calls `share` with shares [begin, end) that together are [0, total), each on a thread of its own, at most `max_threads`. Returns how
// many.
int run_shares(int64_t total, int max_threads, const std::function<void(int64_t begin, int64_t end)>& share);

// Runs every task, on at most `max_threads` threads, and returns how many were used. The bits do not depend on it.
int run_parallel(const std::vector<Task>& tasks, int max_threads);

}  // namespace fused_opt
