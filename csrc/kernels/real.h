// Memory access, and the operations of the arithmetic contract that C++ leaves to the compiler: a fused multiply-add that rounds once, a
// correctly rounded square root and a maximum that keeps NaN. Builtins only: an inline function of the standard library compiled
// here for AVX-512 could be the copy that the linker keeps for everybody, and an older CPU would then fault on it.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace fused_opt::FUSED_OPT_ISA {
namespace {

// Elements that pass through registers together where memory holds 16-bit numbers: two vectors of float. Twice as many were a tenth slower.
#ifdef __AVX512F__
constexpr int64_t kChunk = 32;
#else
constexpr int64_t kChunk = 16;
#endif

// Element `i` of an array in memory that torch owns: at any address, which need not be a multiple of T's size (torch.frombuffer).
template <class T>
inline T load(const void* array, int64_t i) {
  T x;
  __builtin_memcpy(&x, static_cast<const char*>(array) + i * static_cast<int64_t>(sizeof x), sizeof x);
  return x;
}

template <class T>
inline void store(void* array, int64_t i, T x) {
  __builtin_memcpy(static_cast<char*>(array) + i * static_cast<int64_t>(sizeof x), &x, sizeof x);
}

inline uint32_t bits_of(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float float_of(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}

constexpr uint32_t kInfinity = 0x7f800000, kNan = 0x7fc00000;  // as bits

inline float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline double fma(double a, double b, double c) { return __builtin_fma(a, b, c); }

inline float sqrt(float x) { return __builtin_sqrtf(x); }
inline double sqrt(double x) { return __builtin_sqrt(x); }

// As torch.maximum: NaN if either is.
template <class T>
inline T max_keep_nan(T a, T b) {
  const T larger = a > b ? a : b;  // b if a is NaN
  return a != a ? a : larger;
}

}  // namespace
}  // namespace fused_opt::FUSED_OPT_ISA
