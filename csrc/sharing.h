// Finds tensors of one step that share memory.
#pragma once

#include <cstdint>
#include <vector>

namespace fused_opt {

// Addresses that a step touches.
struct Range {
  uintptr_t begin, end;
  bool write;
  bool operator==(const Range& o) const { return begin == o.begin && end == o.end && write == o.write; }
};

class Batch;

// Remembers its answer: sorting 5000 ranges costs as much as a step on small tensors, and pointers rarely change from one step to the next.
class Sharing {
 public:
  // True if memory that the step writes is also another tensor's, in whatever batch: then order matters, and parameters must run one at a
  // time. Tensors that interleave without sharing an element count as sharing.
  bool found(const std::vector<Batch*>& batches);

 private:
  std::vector<Range> ranges_, known_;
  bool known_found_ = false;
};

}  // namespace fused_opt
