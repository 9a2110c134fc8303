// The order in which an update goes through tensors whose elements do not simply follow each other.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "request.h"
#include "tensor_info.h"

namespace fused_opt {

// A dimension that is walked has two elements at least, and no tensor has 2^63; one more for the two parts of complex numbers.
constexpr int kMaxDims = 64;

// The elements of several tensors of one shape, in the order of one's memory: dimensions from the largest of its strides to the
// smallest, those of size one dropped, neighbours joined where all tensors allow it.
class Walk {
 public:
  // `leader`: which of the tensors gives the order. Complex numbers are walked as pairs of reals.
  Walk(const TensorInfo* const* tensors, int count, int leader);

  // Whether operand `k` is densely packed in this order.
  bool dense(int k) const { return dense_[k]; }

  // Elements [begin, begin + count) of the order, for operand `k`, as rows of evenly spaced ones: f(offset in memory, stride, length).
  template <class F>
  void rows(int k, int64_t begin, int64_t count, F f) const;

 private:
  int ndim_ = 0;
  std::vector<int64_t> sizes_, strides_;  // outermost first; strides in elements, `ndim_` for each operand
  bool dense_[kAllOperands] = {};
};

template <class F>
void Walk::rows(int k, int64_t begin, int64_t count, F f) const {
  const int64_t* const strides = strides_.data() + k * ndim_;
  const int last = ndim_ - 1;
  int64_t index[kMaxDims];
  int64_t offset = 0;  // of the row's first element, without the last dimension's part
  for (int d = last; d >= 0; --d) {
    index[d] = begin % sizes_[d];
    begin /= sizes_[d];
    if (d != last) offset += index[d] * strides[d];
  }
  while (count > 0) {
    const int64_t length = std::min(count, sizes_[last] - index[last]);
    f(offset + index[last] * strides[last], strides[last], length);
    count -= length;
    index[last] = 0;
    for (int d = last - 1; d >= 0; --d) {  // as an odometer
      offset += strides[d];
      if (++index[d] < sizes_[d]) break;
      offset -= sizes_[d] * strides[d];
      index[d] = 0;
    }
  }
}

}  // namespace fused_opt
