#include "task.h"

#include <algorithm>

namespace fused_opt {
namespace {

// Of an operand in a tile: five of this size stay in a first-level cache of 32 KiB, beside what is read ahead into it.
constexpr int64_t kTileBytes = 4096;

// Where operands are decoded from memory in which they are densely packed: so short that the processor decodes the next tile beside this
// one's divisions. (AdamW with split bfloat16 weights took 1.5 times as long with 4096 bytes, 1.2 times with 2048 or 512. But a walk is
// slow to start: strided gradients took 1.4 times as long with 1024.)
constexpr int64_t kDecodedTileBytes = 1024;

// With states in 8-bit codes whole blocks are updated.
constexpr int64_t kBlockScratchBytes = kMaxBlock * sizeof(float);
// Between the operands, which 4096 bytes apart some processors take for the same address at first.
constexpr int64_t kGapBytes = 192;
constexpr int64_t kAllScratchBytes = kAllOperands * (kBlockScratchBytes + kGapBytes);

char* at(const Operand& operand, int64_t element) {
  const int64_t bytes = operand.scales ? 1 : kFormatBytes[static_cast<int>(operand.format)];
  return static_cast<char*>(operand.data) + element * bytes;
}

}  // namespace

// Operands that lie in memory as the kernel takes them are updated in place, in one call if all do and there are no stages. Others pass
// through scratch memory, a tile at a time: decode, stages, rule, stages, encode, in one pass over memory.
void Task::run(int64_t begin, int64_t end) const {
  bool is_there[kAllOperands], in_place[kAllOperands];
  bool all_in_place = stage_flags == 0;
  for (int k = 0; k < kAllOperands; ++k) {
    is_there[k] = operands[k].data && (k < kMask || stage_flags & stage::kUses[k - kMask]);
    in_place[k] = !is_there[k] || operands[k].scales || (operands[k].format == format && (!walk || walk->dense(k)));
    if (k == kGrad && (stage_flags & stage::kOfGradient)) in_place[k] = false;  // it is only read
    all_in_place &= in_place[k];
  }
  alignas(64) char scratch[kAllScratchBytes];
  const int64_t real_bytes = kFormatBytes[static_cast<int>(format)];
  const int64_t wanted_bytes = walk || operands[kParam].format == format ? kTileBytes : kDecodedTileBytes;
  const int64_t scratch_bytes = std::max(wanted_bytes, block_size * real_bytes);
  const int64_t size = all_in_place ? end - begin : scratch_bytes / real_bytes;
  for (int64_t from = begin; from < end; from += size) {
    Tile tile = {{}, std::min(size, end - from), from, number, operands[kParam].format};
    // f(codec, memory, stride, scratch, count) for each row of an operand that is not in place
    const auto transfer = [&](int k, auto f) {
      if (in_place[k]) return;
      const Codec& codec = codecs->at[static_cast<int>(operands[k].format)];
      char* real = scratch + k * (scratch_bytes + kGapBytes);
      const auto row = [&](int64_t offset, int64_t stride, int64_t length) {
        f(codec, at(operands[k], offset), stride, real, length);
        real += length * real_bytes;
      };
      walk ? walk->rows(k, from, tile.count, row) : row(from, 1, tile.count);
    };
    Run run = {};
    run.count = tile.count;
    run.first = from;
    run.stage_scalars = stage_scalars;
    run.number = number;
    run.block_size = block_size;
    for (int k = 0; k < kAllOperands; ++k) {
      if (!is_there[k]) continue;
      tile.operands[k] = in_place[k] ? at(operands[k], from) : scratch + k * (scratch_bytes + kGapBytes);
      if (k < kMaxOperands) run.operands[k] = tile.operands[k];
      if (operands[k].scales) run.scales[k - kFirstState] = operands[k].scales;
      transfer(k, [](const Codec& codec, void* stored, int64_t stride, void* real, int64_t count) {
        codec.decode(stored, stride, real, count);
      });
    }
    if (stage_flags) stages->before(stage_flags, stage_scalars, tile);
    kernel(scalars, run);
    if (stage_flags) stages->after(stage_flags, stage_scalars, tile);
    for (int k = 0; k < kAllOperands; ++k)
      if (k != kGrad && k != kMask && k != kAnchor)
        transfer(k, [](const Codec& codec, void* stored, int64_t stride, void* real, int64_t count) {
          codec.encode(real, stored, stride, count);
        });
  }
}

}  // namespace fused_opt
