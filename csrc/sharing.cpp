#include "sharing.h"

#include <algorithm>

#include "batch.h"

namespace fused_opt {

bool Sharing::found(const std::vector<Batch*>& batches) {
  ranges_.clear();
  for (const Batch* batch : batches) batch->append_ranges(ranges_);
  if (ranges_ == known_) return known_found_;
  known_ = ranges_;
  std::sort(ranges_.begin(), ranges_.end(), [](const Range& a, const Range& b) { return a.begin < b.begin; });
  uintptr_t end = 0, written_end = 0;
  known_found_ = false;
  for (const Range& r : ranges_) {
    known_found_ |= r.begin < (r.write ? end : written_end);
    end = std::max(end, r.end);
    if (r.write) written_end = std::max(written_end, r.end);
  }
  return known_found_;
}

}  // namespace fused_opt
