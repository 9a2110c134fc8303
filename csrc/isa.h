// Which compiled copies of the kernels this binary holds, and which of them this CPU can run.
#pragma once

#include "request.h"

namespace fused_opt {

struct Isa {
  const char* name;
  const KernelTable* kernels;
  bool (*supported)();
};

// From the plainest to the widest; the first runs everywhere.
extern const Isa isas[];
extern const int isa_count;

}  // namespace fused_opt
