#include "parallel.h"

#ifdef _OPENMP
#include <omp.h>
#endif

#include <algorithm>

namespace fused_opt {
namespace {

// Below this many elements a thread costs more than it saves: AdamW takes 16 us for them, and waking a thread that sleeps 5 to 50 us.
constexpr int64_t kMinElementsPerThread = 32768;

// Shares end at multiples of this many elements of a tensor: a cache line of fp32, two of fp64. torch aligns new tensors to cache lines, so
// two threads do not write to the same one.
constexpr int64_t kShareUnit = 16;

Run slice(const Task& task, int64_t begin, int64_t end) {
  const auto at = [&](const void* data) {
    return data == nullptr ? nullptr : static_cast<char*>(const_cast<void*>(data)) + begin * task.item_size;
  };
  const Run& r = task.run;
  return {at(r.param), at(r.grad), {at(r.states[0]), at(r.states[1]), at(r.states[2])}, end - begin};
}

// Elements [begin, end) of all tasks laid end to end.
void run_share(const std::vector<Task>& tasks, int64_t begin, int64_t end) {
  int64_t start = 0;  // of the task, in the concatenation
  for (const Task& task : tasks) {
    const int64_t count = task.run.count;
    const auto local = [&](int64_t position) {
      const int64_t offset = std::clamp<int64_t>(position - start, 0, count);
      return offset == count ? count : offset / kShareUnit * kShareUnit;
    };
    const int64_t from = local(begin), to = local(end);
    if (from < to) task.kernel(task.scalars, slice(task, from, to));
    start += count;
    if (start >= end) return;
  }
}

}  // namespace

int run_parallel(const std::vector<Task>& tasks, int max_threads) {
  int64_t total = 0;
  for (const Task& task : tasks) total += task.run.count;
  const int threads = static_cast<int>(std::clamp<int64_t>(total / kMinElementsPerThread, 1, std::max(max_threads, 1)));
  if (threads == 1) {
    run_share(tasks, 0, total);
    return 1;
  }
#ifdef _OPENMP
  int used = 1;  // may become fewer than asked for: OMP_THREAD_LIMIT, or a parallel region around this one
#pragma omp parallel num_threads(threads)
  {
    const int team = omp_get_num_threads(), t = omp_get_thread_num();
    run_share(tasks, total * t / team, total * (t + 1) / team);
    if (t == 0) used = team;
  }
  return used;
#else
  run_share(tasks, 0, total);
  return 1;
#endif
}

}  // namespace fused_opt
