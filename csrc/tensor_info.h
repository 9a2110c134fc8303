// A strided tensor, as far as an update sees it.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "request.h"

namespace fused_opt {

// As DLPack names devices.
struct Device {
  int32_t type = 0, index = 0;

  bool is_cpu() const { return type == kCpu; }
  bool is_gpu() const { return type == kCuda || type == kRocm; }
  bool operator==(const Device& o) const { return type == o.type && (index == o.index || is_cpu()); }

  static constexpr int32_t kCpu = 1, kCuda = 2, kRocm = 10;
};

// What an update needs to know of a tensor. Pointers are borrowed from the tensor and live as long as it is neither freed nor resized.
struct TensorInfo {
  void* data = nullptr;
  const int64_t* shape = nullptr;
  const int64_t* strides = nullptr;  // in elements
  int32_t ndim = 0;
  Device device;
  char kind = '?';  // 'f' IEEE float, 'b' bfloat16, 'c' complex, 'i' signed integer, 'u' unsigned integer, 't' truth, '?' any other
  uint8_t bits = 0;
  std::vector<int64_t> owned_dims;  // backs shape and strides where torch cannot lend them (before 2.10)

  int64_t numel() const;
};

bool same_shape(const TensorInfo& a, const TensorInfo& b);
// The same element order in memory. Strides of dimensions of size one or less mean nothing and are not compared.
bool same_strides(const TensorInfo& a, const TensorInfo& b);
// No gaps and no overlaps: numel() consecutive elements, in whatever order of dimensions.
bool is_dense(const TensorInfo& t);

// Whether the format is one that rules compute with, and which; complex numbers are pairs of reals.
bool find_format(const TensorInfo& t, Format& format);
// Whether the elements are bytes.
bool is_codes(const TensorInfo& t);
bool is_complex(const TensorInfo& t);

// Shape and dtype, for errors.
std::string describe(const TensorInfo& t);

// Elements between a tensor's first and its last one in memory, both included: numel() if it is dense.
int64_t span(const TensorInfo& t);

int64_t bytes_spanned(const TensorInfo& t);

// Whether no two elements share memory: true if it certainly is so.
bool surely_disjoint(const TensorInfo& t);

// Memory at an address that need not be a multiple of the size.
template <class T>
T load(const void* data) {
  T x;
  std::memcpy(&x, data, sizeof x);
  return x;
}

}  // namespace fused_opt
