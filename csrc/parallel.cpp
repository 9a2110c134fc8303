#include "parallel.h"

#ifdef _OPENMP
#include <omp.h>
#endif

#include <pthread.h>

#include <algorithm>
#include <system_error>
#include <thread>

namespace fused_opt {
namespace {

// A forked child has only the thread that forked. GNU's OpenMP does not notice that the others of its pool are gone, and would wait for
// them forever; so a child starts threads of its own for each step (some 20 us each).
bool forked = false;
[[maybe_unused]] const int watching = pthread_atfork(nullptr, nullptr, [] { forked = true; });

// Below this many elements a thread costs more than it saves: AdamW takes 16 us for them, and waking a thread that sleeps 5 to 50 us.
constexpr int64_t kMinElementsPerThread = 32768;

// Elements [begin, end) of all tasks laid end to end.
void run_share(const std::vector<Task>& tasks, int64_t begin, int64_t end) {
  int64_t start = 0;  // of the task, in the concatenation
  for (const Task& task : tasks) {
    const int64_t count = task.count, unit = std::max(kShareUnit, task.block_size);
    const auto local = [&](int64_t position) {
      const int64_t offset = std::clamp<int64_t>(position - start, 0, count);
      return offset == count ? count : offset / unit * unit;
    };
    const int64_t from = local(begin), to = local(end);
    if (from < to) task.run(from, to);
    start += count;
    if (start >= end) return;
  }
}

}  // namespace

int run_shares(int64_t total, int max_threads, const std::function<void(int64_t, int64_t)>& share) {
  const int threads = static_cast<int>(std::clamp<int64_t>(total / kMinElementsPerThread, 1, std::max(max_threads, 1)));
  if (threads == 1) {
    share(0, total);
    return 1;
  }
  const auto run_member = [&](int team, int t) { share(total * t / team, total * (t + 1) / team); };
#ifdef _OPENMP
  if (!forked) {
    int used = 1;  // may become fewer than asked for: OMP_THREAD_LIMIT, or a parallel region around this one
#pragma omp parallel num_threads(threads)
    {
      const int team = omp_get_num_threads(), t = omp_get_thread_num();
      run_member(team, t);
      if (t == 0) used = team;
    }
    return used;
  }
#endif
  std::vector<std::thread> others;
  others.reserve(static_cast<size_t>(threads));
  for (int t = 1; t < threads; ++t) try {
      others.emplace_back(run_member, threads, t);
    } catch (const std::system_error&) {  // the system starts no more threads
      run_member(threads, t);
    }
  run_member(threads, 0);
  for (std::thread& other : others) other.join();
  return static_cast<int>(others.size()) + 1;
}

int run_parallel(const std::vector<Task>& tasks, int max_threads) {
  int64_t total = 0;
  for (const Task& task : tasks) total += task.count;
  return run_shares(total, max_threads, [&](int64_t begin, int64_t end) { run_share(tasks, begin, end); });
}

}  // namespace fused_opt
