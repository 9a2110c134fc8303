#include "tensor_info.h"

#include <algorithm>
#include <utility>

namespace fused_opt {

int64_t TensorInfo::numel() const {
  if (std::find(shape, shape + ndim, 0) != shape + ndim) return 0;  // whose other dimensions may be beyond what 64 bits count
  int64_t n = 1;
  for (int32_t d = 0; d < ndim; ++d) n *= shape[d];
  return n;
}

bool same_shape(const TensorInfo& a, const TensorInfo& b) { return a.ndim == b.ndim && std::equal(a.shape, a.shape + a.ndim, b.shape); }

bool same_strides(const TensorInfo& a, const TensorInfo& b) {
  for (int32_t d = 0; d < a.ndim; ++d)
    if (a.shape[d] > 1 && a.strides[d] != b.strides[d]) return false;
  return true;
}

bool is_dense(const TensorInfo& t) {
  int64_t expected = 1;
  bool contiguous = true;
  for (int32_t d = t.ndim - 1; d >= 0 && contiguous; --d) {
    contiguous = t.shape[d] <= 1 || t.strides[d] == expected;
    expected *= t.shape[d];
  }
  if (contiguous || t.numel() == 0) return true;
  return span(t) == t.numel() && surely_disjoint(t);
}

bool find_format(const TensorInfo& t, Format& format) {
  const int bits = t.kind == 'c' ? t.bits / 2 : t.bits;
  if (t.kind == 'b' && bits == 16)
    format = Format::kBFloat16;
  else if (t.kind != 'f' && t.kind != 'c')
    return false;
  else if (bits == 32)
    format = Format::kFloat32;
  else if (bits == 64)
    format = Format::kFloat64;
  else if (bits == 16)
    format = Format::kFloat16;
  else
    return false;
  return true;
}

bool is_complex(const TensorInfo& t) { return t.kind == 'c'; }

std::string describe(const TensorInfo& t) {
  std::string text = "shape (";
  for (int32_t d = 0; d < t.ndim; ++d) text += (d ? ", " : "") + std::to_string(t.shape[d]);
  const char* kind = t.kind == 'f'   ? "float"
                     : t.kind == 'b' ? "bfloat"
                     : t.kind == 'c' ? "complex"
                     : t.kind == 'i' ? "int"
                     : t.kind == 'u' ? "uint"
                                     : "other";
  return text + "), dtype " + kind + std::to_string(t.bits);
}

int64_t bytes_spanned(const TensorInfo& t) { return span(t) * t.bits / 8; }

bool is_codes(const TensorInfo& t) { return (t.kind == 'i' || t.kind == 'u') && t.bits == 8; }

int64_t span(const TensorInfo& t) {
  if (t.numel() == 0) return 0;
  int64_t last = 0;
  for (int32_t d = 0; d < t.ndim; ++d) last += (t.shape[d] - 1) * t.strides[d];
  return last + 1;
}

bool surely_disjoint(const TensorInfo& t) {
  std::vector<std::pair<int64_t, int64_t>> dims;  // stride, size
  for (int32_t d = 0; d < t.ndim; ++d) {
    if (t.shape[d] == 0) return true;
    if (t.shape[d] > 1) dims.emplace_back(t.strides[d], t.shape[d]);
  }
  std::sort(dims.begin(), dims.end());
  int64_t reach = 0;  // of the smaller strides together
  for (const auto& [stride, size] : dims) {
    if (stride <= reach) return false;
    reach += stride * (size - 1);
  }
  return true;
}

}  // namespace fused_opt
