// Codecs: how a stored value becomes the number a rule computes with, and back. A codec knows no optimizer.
//
// Encoding rounds once, to nearest even, overflows to infinity as IEEE 754 has it, and keeps NaN. All conversions are written in integer
// and float arithmetic that the compiler vectorises for any instruction set. 16-bit subnormal numbers are kept also where the processor
// flushes those of float (torch.set_flush_denormal).
#pragma once

#include "lanes.h"
#include "random.h"

namespace fused_opt::FUSED_OPT_ISA {
namespace {

// To float such that rounding once more, to a format with at least two bits less, gives what rounding once to that format would: a number
// that is no float goes to the neighbour whose last bit is 1 ("rounding to odd", Boldo & Melquiond 2008). A float goes to itself.
inline float for_rounding(float x) { return x; }
inline float for_rounding(double x) {
  const float nearest = static_cast<float>(x);
  const double back = nearest;
  uint32_t bits = bits_of(nearest);
  const uint32_t away_from_zero = (back > 0 ? back : -back) > (x > 0 ? x : -x);
  const uint32_t inexact = back != x;
  bits -= inexact & away_from_zero;
  bits |= inexact;  // NaN is not equal to itself, and stays one
  return float_of(bits);
}

// A codec has `decode` and `encode` for one value of any precision, and for a vector of float.

// fp32 and fp64.
template <class T>
struct Plain {
  using Stored = T;
  using Lanes = Floats;
  static Floats decode(Lanes x) { return x; }
  static Lanes encode(Floats x) { return x; }
  template <class Real>
  static Real decode(Stored x) {
    return static_cast<Real>(x);
  }
  template <class Real>
  static Stored encode(Real x) {
    return static_cast<Stored>(x);
  }
};

// 0 or 1, a byte.
struct Truth {
  using Stored = uint8_t;
  template <class Real>
  static Real decode(Stored x) {
    return x != 0 ? Real(1) : Real(0);
  }
  template <class Real>
  static Stored encode(Real x) {
    return x != 0;
  }
};

// A whole number. (Through 32 bits: gcc 12 does not vectorise the conversion from float to 16, and a step took ten times as long.)
struct Short {
  using Stored = int16_t;
  template <class Real>
  static Real decode(Stored x) {
    return static_cast<Real>(static_cast<int32_t>(x));
  }
  template <class Real>
  static Stored encode(Real x) {
    return static_cast<Stored>(static_cast<int32_t>(x));
  }
};

// The upper half of a float.
struct BFloat16 {
  using Stored = uint16_t;
  using Lanes = Halves;
  static Floats decode(Lanes x) { return Floats(widen(x) << 16); }
  static Lanes encode(Floats x) { return narrow(round(x) >> 16); }
  template <class Real>
  static Real decode(Stored x) {
    return float_of(uint32_t(x) << 16);
  }
  template <class Real>
  static Stored encode(Real x) {
    return static_cast<Stored>(round(for_rounding(x)) >> 16);
  }
  template <class V>
  static auto round(V x) -> decltype(bits_of(x)) {
    return round(x, kToNearest.first, kToNearest.odd);
  }
  // The result is in the upper half. See Dither.
  template <class V, class W>
  static auto round(V x, W added, uint32_t odd) -> decltype(bits_of(x)) {
    const auto bits = bits_of(x);
    return (bits + (added & 0xffff) + (bits >> 16 & odd)) | ones_if(x != x);
  }
};

// IEEE 754 binary16: 5 bits of exponent with bias 15, where float has 8 with bias 127; 10 bits of fraction, where float has 23.
struct Float16 {
  using Stored = uint16_t;
  using Lanes = Halves;
  static Floats decode(Lanes x) {
#if defined(__AVX512BW__)
    return Floats(_mm512_maskz_cvtph_ps(0xffff, __m256i(x)));
#elif defined(__F16C__)
    return Floats(_mm256_cvtph_ps(__m128i(x)));
#else
    return decode_each(x);
#endif
  }
  static Lanes encode(Floats x) {
#if defined(__AVX512BW__)
    return Lanes(_mm512_maskz_cvtps_ph(0xffff, __m512(x), 0));  // to nearest even
#elif defined(__F16C__)
    return Lanes(_mm256_cvtps_ph(__m256(x), 0));
#else
    return encode_each(x);
#endif
  }
  template <class Real>
  static Real decode(Stored x) {
    constexpr uint32_t kRebias = uint32_t(127 - 15) << 23, kMaxExponent = 31u << 23, kSmallest = kRebias + (1u << 23);
    const uint32_t sign = uint32_t(x & 0x8000) << 16, magnitude = uint32_t(x & 0x7fff) << 13;
    const uint32_t normal = magnitude + kRebias, special = normal + kRebias;                    // special: infinity or NaN
    const uint32_t subnormal = bits_of(float_of(magnitude + kSmallest) - float_of(kSmallest));  // exact
    return float_of(sign | (magnitude >= kMaxExponent ? special : magnitude < (1u << 23) ? subnormal : normal));
  }
  template <class Real>
  static Stored encode(Real x) {
    constexpr uint32_t kRebias = uint32_t(127 - 15) << 23, kSmallest = kRebias + (1u << 23), kTooLarge = uint32_t(127 + 16) << 23;
    const uint32_t bits = bits_of(for_rounding(x)), magnitude = bits & 0x7fffffff;
    const uint32_t normal = (magnitude - kRebias + 0xfff + (magnitude >> 13 & 1)) >> 13;
    // The last bit of a number from one half up to one weighs 2^-24, as that of a subnormal binary16: the addition rounds.
    const uint32_t subnormal = bits_of(float_of(magnitude < kSmallest ? magnitude : 0) + 0.5f) - bits_of(0.5f);
    const uint32_t special = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
    return static_cast<Stored>((bits >> 16 & 0x8000) | (magnitude >= kTooLarge ? special : magnitude < kSmallest ? subnormal : normal));
  }

 private:
  // Once, not in every kernel: 0.1 MB of the wheel.
  [[gnu::noinline]] static Floats decode_each(Lanes x) {
    Floats real;
#pragma GCC unroll 1
    for (int64_t i = 0; i < kLanes; ++i) real[i] = decode<float>(x[i]);
    return real;
  }
  [[gnu::noinline]] static Lanes encode_each(Floats x) {
    Lanes stored;
#pragma GCC unroll 1
    for (int64_t i = 0; i < kLanes; ++i) stored[i] = encode<float>(x[i]);
    return stored;
  }
};

// `count` values, densely packed.
template <class Value, class Real>
[[gnu::always_inline]] inline void decode_packed(const void* stored, Real* real, int64_t count) {
#pragma GCC ivdep  // `real` is scratch
#pragma GCC unroll 1
  for (int64_t i = 0; i < count; ++i) real[i] = Value::template decode<Real>(load<typename Value::Stored>(stored, i));
}

template <class Value, class Real>
[[gnu::always_inline]] inline void encode_packed(const Real* real, void* stored, int64_t count) {
#pragma GCC ivdep
#pragma GCC unroll 1
  for (int64_t i = 0; i < count; ++i) store(stored, i, Value::template encode<Real>(real[i]));
}

#ifdef __F16C__
// binary16 to float and back is one instruction for a vector of numbers, where the arithmetic above takes some ninety for eight. Three
// quarters of a 16-bit AdamW step's time were spent in that.

// f(position, length) for each vector, the last one shorter.
template <class F>
[[gnu::always_inline]] inline void by_lanes(int64_t count, F f) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) f(i, kLanes);
  if (i < count) f(i, count - i);
}

template <>
[[gnu::always_inline]] inline void decode_packed<Float16, float>(const void* stored, float* real, int64_t count) {
  by_lanes(count, [=](int64_t i, int64_t length) __attribute__((always_inline)) {
    Halves halves = {};
    __builtin_memcpy(&halves, static_cast<const char*>(stored) + 2 * i, static_cast<size_t>(2 * length));
    const Floats floats = Float16::decode(halves);
    __builtin_memcpy(real + i, &floats, static_cast<size_t>(4 * length));
  });
}

template <>
[[gnu::always_inline]] inline void encode_packed<Float16, float>(const float* real, void* stored, int64_t count) {
  by_lanes(count, [=](int64_t i, int64_t length) __attribute__((always_inline)) {
    Floats floats = {};
    __builtin_memcpy(&floats, real + i, static_cast<size_t>(4 * length));
    const Halves halves = Float16::encode(floats);
    __builtin_memcpy(static_cast<char*>(stored) + 2 * i, &halves, static_cast<size_t>(2 * length));
  });
}
#endif

// kChunk values between memory and registers, in whatever order is quick, the same for every operand: see `update_coded`.
template <class Value>
struct Chunk {
  [[gnu::always_inline]] static void decode(const void* stored, float* real) { decode_packed<Value>(stored, real, kChunk); }
  [[gnu::always_inline]] static void encode(const float* real, void* stored, Dither) { encode_packed<Value>(real, stored, kChunk); }
};

#ifndef __F16C__
// As in Float16::decode_each.
template <>
struct Chunk<Float16> {
  [[gnu::noinline]] static void decode(const void* stored, float* real) { decode_packed<Float16>(stored, real, kChunk); }
  [[gnu::noinline]] static void encode(const float* real, void* stored, Dither) { encode_packed<Float16>(real, stored, kChunk); }
};
#endif

// Even elements first, then odd ones: so a 32-bit word makes two floats, and two floats a word, without moving anything between the lanes
// of a vector register (a fifth of the step's time).
template <>
struct Chunk<BFloat16> {
  [[gnu::always_inline]] static void decode(const void* stored, float* real) {
#pragma GCC ivdep
#pragma GCC unroll 1
    for (int64_t i = 0; i < kChunk / 2; ++i) {
      const uint32_t word = load<uint32_t>(stored, i);
      real[i] = float_of(word << 16);
      real[i + kChunk / 2] = float_of(word & 0xffff0000);
    }
  }
  [[gnu::always_inline]] static void encode(const float* real, void* stored, Dither dither) {
#pragma GCC ivdep
#pragma GCC unroll 1
    for (int64_t i = 0; i < kChunk / 2; ++i) {
      const uint32_t added = dither.first + 2 * static_cast<uint32_t>(i) * dither.step;
      const uint32_t low = BFloat16::round(real[i], added, dither.odd);
      const uint32_t high = BFloat16::round(real[i + kChunk / 2], added + dither.step, dither.odd);
      store<uint32_t>(stored, i, low >> 16 | (high & 0xffff0000));
    }
  }
};

// A vector of values, at any address.
template <class Value>
[[gnu::always_inline]] inline Floats decode_lanes(const void* stored) {
  return Value::decode(load_lanes<typename Value::Lanes>(stored));
}

// Codecs as the portable code calls them.
template <class Real, class Value>
void decode(const void* stored, int64_t stride, void* real, int64_t count) {
  if (stride == 1) return decode_packed<Value>(stored, static_cast<Real*>(real), count);
  for (int64_t i = 0; i < count; ++i) store(real, i, Value::template decode<Real>(load<typename Value::Stored>(stored, i * stride)));
}

template <class Real, class Value>
void encode(const void* real, void* stored, int64_t stride, int64_t count) {
  if (stride == 1) return encode_packed<Value>(static_cast<const Real*>(real), stored, count);
  for (int64_t i = 0; i < count; ++i) store(stored, i * stride, Value::template encode<Real>(load<Real>(real, i)));
}

template <class Real, class Value>
constexpr Codec kCodec = {decode<Real, Value>, encode<Real, Value>};

}  // namespace
}  // namespace fused_opt::FUSED_OPT_ISA
