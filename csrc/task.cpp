#include "task.h"

#include <algorithm>

namespace fused_opt {
namespace {

// Five operands of this size stay in a first-level cache of 32 KiB, beside what is read ahead into it.
constexpr int64_t kScratchBytes = 4096;

char* at(const Operand& operand, int64_t element) {
  return static_cast<char*>(operand.data) + element * kFormatBytes[static_cast<int>(operand.format)];
}

}  // namespace

// Operands that lie in memory as the kernel takes them are updated in place, in one call if all do. Others pass through scratch memory, a
// block at a time: decode, rule, encode, in one pass over memory.
void Task::run(int64_t begin, int64_t end) const {
  bool in_place[kMaxOperands];
  bool all_in_place = true;
  for (int k = 0; k < operand_count; ++k) {
    in_place[k] = operands[k].format == format && (!walk || walk->dense(k));
    all_in_place &= in_place[k];
  }
  alignas(64) char scratch[kMaxOperands][kScratchBytes];
  const int64_t real_bytes = kFormatBytes[static_cast<int>(format)];
  const int64_t block = all_in_place ? end - begin : kScratchBytes / real_bytes;
  for (int64_t from = begin; from < end; from += block) {
    Run run;
    run.count = std::min(block, end - from);
    // f(codec, memory, stride, scratch, count) for each row of an operand that is not in place
    const auto transfer = [&](int k, auto f) {
      if (in_place[k]) return;
      const Codec& codec = codecs->at[static_cast<int>(operands[k].format)];
      char* real = scratch[k];
      const auto row = [&](int64_t offset, int64_t stride, int64_t length) {
        f(codec, at(operands[k], offset), stride, real, length);
        real += length * real_bytes;
      };
      walk ? walk->rows(k, from, run.count, row) : row(from, 1, run.count);
    };
    for (int k = 0; k < operand_count; ++k) {
      run.operands[k] = in_place[k] ? at(operands[k], from) : scratch[k];
      transfer(k, [](const Codec& codec, void* stored, int64_t stride, void* real, int64_t count) {
        codec.decode(stored, stride, real, count);
      });
    }
    kernel(scalars, run);
    for (int k = 0; k < operand_count; ++k)
      if (k != kGrad)
        transfer(k, [](const Codec& codec, void* stored, int64_t stride, void* real, int64_t count) {
          codec.encode(real, stored, stride, count);
        });
  }
}

}  // namespace fused_opt
