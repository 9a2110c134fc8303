// Vectors of numbers, which the compiler makes of what the processor has: for the loops that gcc 12 would not vectorise by itself, because
// of their bytes. Elsewhere the compiler vectorises plain loops.
#pragma once

#ifdef __AVX2__
#include <immintrin.h>  // its functions are never emitted on their own, so no copy of them can be shared with other code
#endif

#include "../request.h"
#include "real.h"

namespace fused_opt::FUSED_OPT_ISA {
namespace {

#ifdef __AVX512BW__
constexpr int64_t kLanes = 16;
#else
constexpr int64_t kLanes = 8;
#endif

#ifdef __FP_FAST_FMAF
constexpr bool kFastFma = true;
#else
constexpr bool kFastFma = false;
#endif

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));
typedef uint8_t Bytes __attribute__((vector_size(kLanes)));

// What is taken from bytes and to bytes at once: the smallest block, or the length of the shortest vector of bytes that is quick.
constexpr int64_t kGroup = 32, kVectors = kGroup / kLanes;
typedef uint8_t GroupOfBytes __attribute__((vector_size(kGroup)));
static_assert(kMinBlock % kGroup == 0);

constexpr uint32_t kSign = 1u << 31;

// At any address.
template <class V>
[[gnu::always_inline]] inline V load_lanes(const void* memory) {
  V lanes;
  __builtin_memcpy(&lanes, memory, sizeof lanes);
  return lanes;
}

template <class V>
[[gnu::always_inline]] inline void store_lanes(void* memory, V lanes) {
  __builtin_memcpy(memory, &lanes, sizeof lanes);
}

// Past the caches, to a multiple of the vector's size: for results that are larger than those, which else would be read first, to be
// written. Other threads see it after a fence.
[[gnu::always_inline]] inline void stream_lanes(float* memory, Floats lanes) {
#if defined(__AVX512BW__)
  _mm512_stream_ps(memory, __m512(lanes));
#elif defined(__AVX2__)
  _mm256_stream_ps(memory, __m256(lanes));
#else
  store_lanes(memory, lanes);
#endif
}

[[gnu::always_inline]] inline Words widen(Halves x) {
#if defined(__AVX512BW__)
  return Words(_mm512_maskz_cvtepu16_epi32(0xffff, __m256i(x)));  // gcc 12 warns of the intrinsic without mask
#elif defined(__AVX2__)
  return Words(_mm256_cvtepu16_epi32(__m128i(x)));
#else
  return __builtin_convertvector(x, Words);
#endif
}

// The lower halves.
[[gnu::always_inline]] inline Halves narrow(Words x) { return __builtin_convertvector(x, Halves); }

// All bits of a number of which a comparison is true.
[[gnu::always_inline]] inline uint32_t ones_if(bool x) { return x ? ~uint32_t(0) : 0; }
[[gnu::always_inline]] inline Words ones_if(Ints x) { return Words(x); }

// first + i * step for numbers i, a vector of them at a time, modulo 2^32: a Weyl sequence.
class Weyl {
 public:
  Weyl(uint32_t first, uint32_t step) : step_(uint32_t(kLanes) * step) {
    Words lanes;
    for (int64_t i = 0; i < kLanes; ++i) lanes[i] = static_cast<uint32_t>(i);
    next_ = lanes * step + first;
  }

  [[gnu::always_inline]] Words next() {
    const Words words = next_;
    next_ += step_;
    return words;
  }

 private:
  Words next_;
  const uint32_t step_;
};

// The operations of real.h that are no operators.
[[gnu::always_inline]] inline Words bits_of(Floats x) { return Words(x); }

[[gnu::always_inline]] inline Floats spread(float x) { return x - Floats{}; }
[[gnu::always_inline]] inline Floats spread(Floats x) { return x; }

template <class A, class B>
[[gnu::always_inline]] inline Floats fma(A a, B b, Floats c) {
#if defined(__AVX512BW__)
  return Floats(_mm512_fmadd_ps(__m512(spread(a)), __m512(spread(b)), __m512(c)));
#elif defined(__FMA__)
  return Floats(_mm256_fmadd_ps(__m256(spread(a)), __m256(spread(b)), __m256(c)));
#else
  const Floats x = spread(a), y = spread(b);
#ifndef __FP_FAST_FMAF
#pragma GCC unroll 1  // calls of the C library, which would make half of the extension
#endif
  for (int64_t i = 0; i < kLanes; ++i) c[i] = fma(x[i], y[i], c[i]);
  return c;
#endif
}

[[gnu::always_inline]] inline Floats sqrt(Floats x) {
  for (int64_t i = 0; i < kLanes; ++i) x[i] = sqrt(x[i]);
  return x;
}

// Of the lowest number, too, which has no negative one.
[[gnu::always_inline]] inline Words absolute(Ints x) {
#if defined(__AVX512BW__)
  return Words(_mm512_maskz_abs_epi32(0xffff, __m512i(x)));
#elif defined(__AVX2__)
  return Words(_mm256_abs_epi32(__m256i(x)));
#else
  return x < 0 ? -Words(x) : Words(x);
#endif
}

// x or -x.
[[gnu::always_inline]] inline Floats with_sign_of(Ints sign, Floats x) {
#if defined(__AVX2__) && !defined(__AVX512BW__)
  return Floats(_mm256_blendv_ps(__m256(x), __m256(-x), __m256(sign)));
#else
  return Floats(Words(x) ^ (Words(sign) & kSign));
#endif
}

[[gnu::always_inline]] inline Words smaller(Words a, Words b) { return a < b ? a : b; }
[[gnu::always_inline]] inline Words larger(Words a, Words b) { return a > b ? a : b; }

}  // namespace
}  // namespace fused_opt::FUSED_OPT_ISA
