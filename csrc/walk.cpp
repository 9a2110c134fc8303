#include "walk.h"

#include <algorithm>
#include <numeric>

namespace fused_opt {

Walk::Walk(const TensorInfo* const* tensors, int count, int leader) {
  const TensorInfo& order = *tensors[leader];
  std::vector<int32_t> dims(static_cast<size_t>(order.ndim));
  std::iota(dims.begin(), dims.end(), 0);
  dims.erase(std::remove_if(dims.begin(), dims.end(), [&](int32_t d) { return order.shape[d] == 1; }), dims.end());
  std::stable_sort(dims.begin(), dims.end(), [&](int32_t a, int32_t b) { return order.strides[a] > order.strides[b]; });

  const int64_t reals = order.kind == 'c' ? 2 : 1;  // to each element
  std::vector<std::vector<int64_t>> strides(static_cast<size_t>(count));
  const auto append = [&](int64_t size, auto stride_of) {
    bool joins = !sizes_.empty();
    for (int k = 0; k < count && joins; ++k) joins = strides[k].back() == stride_of(k) * size;
    if (joins) {
      sizes_.back() *= size;
      for (int k = 0; k < count; ++k) strides[k].back() = stride_of(k);
    } else {
      sizes_.push_back(size);
      for (int k = 0; k < count; ++k) strides[k].push_back(stride_of(k));
    }
  };
  for (const int32_t d : dims) append(order.shape[d], [&](int k) { return tensors[k]->strides[d] * reals; });
  if (reals > 1 || sizes_.empty()) append(reals, [](int) { return int64_t(1); });

  ndim_ = static_cast<int>(sizes_.size());
  for (int k = 0; k < count; ++k) {
    strides_.insert(strides_.end(), strides[k].begin(), strides[k].end());
    int64_t expected = 1;
    dense_[k] = true;
    for (int d = ndim_ - 1; d >= 0; --d) {
      dense_[k] &= strides[k][d] == expected;
      expected *= sizes_[d];
    }
  }
}

}  // namespace fused_opt
