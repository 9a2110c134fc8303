// One parameter's update as the threads see it: a kernel, and where its operands lie.
#pragma once

#include <cstdint>

#include "request.h"
#include "walk.h"

namespace fused_opt {

struct Operand {
  void* data;
  Format format;
  void* scales;  // of states in 8-bit codes, which then have no format; else null

  bool is_aligned() const {
    return reinterpret_cast<uintptr_t>(data) % static_cast<uintptr_t>(kFormatBytes[static_cast<int>(format)]) == 0;
  }
};

struct Task {
  Kernel kernel;
  Format format;  // the kernel's; its precision's own if the operands' formats differ or there is a walk
  const double* scalars;
  const CodecsByFormat* codecs;  // of the precision
  const Operand* operands;       // kAllOperands; those without data are not there
  const Walk* walk;              // null if all operands are densely packed in the same order
  int64_t count;                 // real numbers in each operand
  int64_t block_size;            // of states in 8-bit codes: then the kernel is one for them; else 0
  const StagesByPrecision* stages;
  unsigned stage_flags;  // 0: there are no stages
  const double* stage_scalars;
  int64_t number;  // of the parameter in its group

  // Updates the elements [begin, end) of the walk; `begin` is the start of a block.
  void run(int64_t begin, int64_t end) const;
};

}  // namespace fused_opt
