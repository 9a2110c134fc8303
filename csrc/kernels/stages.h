// What is done to a tile of numbers before and after the rule: loops over numbers that lie in a first-level cache, each entered only where
// it was asked for. They know no rule, storage format of a state, or thread. Names and order: see fused_opt/stages.py.
#pragma once

#include "blocks.h"

namespace fused_opt::FUSED_OPT_ISA {
namespace {

// As torch.clamp: NaN stays.
template <class T>
inline T clamp(T x, T limit) {
  const T below = x > limit ? limit : x;
  return below < -limit ? -limit : below;
}

template <class T>
inline T sign_of(T x) {
  return T(x > 0) - T(x < 0);
}

inline float with_sign(float magnitude, float x) { return __builtin_copysignf(magnitude, x); }
inline double with_sign(double magnitude, double x) { return __builtin_copysign(magnitude, x); }

// The proximal operator of threshold * |x|: what is nearer to zero becomes zero, NaN stays.
template <class T>
inline T soft_threshold(T x, T threshold) {
  const T left = with_sign(x, T(1)) - threshold;
  return left <= 0 ? T(0) : with_sign(left, x);
}

// The stored value nearest to x, as a float; doubles are not rounded here.
template <class Value>
inline float nearest(float x) {
  return Value::template decode<float>(Value::template encode<float>(x));
}

// f(element) for each: `ivdep` since operands coincide exactly or do not overlap, as in the driver.
template <class F>
[[gnu::always_inline]] inline void for_each(int64_t count, F f) {
#pragma GCC ivdep
#pragma GCC unroll 1
  for (int64_t i = 0; i < count; ++i) f(i);
}

// Companions of a weight, which is one of the values that its format has. `join` makes the number that they stand for together, and `part`
// the two of it. A weight that somebody has changed since counts: a companion is added to the new one, or gives way to it.

// What the weight's rounding left out, itself rounded (Zamirai et al. 2020, https://arxiv.org/abs/2010.06192).
template <class Value>
struct Kahan {
  static float join(float weight, float companion) { return weight + companion; }
  static float part(float p, float& companion) {
    const float weight = nearest<Value>(p), rest = p - weight;
    companion = rest == rest ? rest : 0.0f;  // not between infinities
    return weight;
  }
};

// The lower half of the float, of which a bfloat16 is the upper half. It is rounded to nearest, ties away from zero, so that 16 bits with
// sign have the rest.
struct Split {
  // Below zero and above infinity are the bits of NaN: from there a lower half is that of a weight that has been changed since.
  static float join(float weight, float companion) {
    const int32_t lower = static_cast<int32_t>(companion);
    const uint32_t bits = bits_of(weight), limit = lower < 0 ? 0 : kInfinity;
    return float_of(bits + ((bits & 0x7fffffff) == limit ? 0 : static_cast<uint32_t>(lower)));
  }
  static float part(float p, float& companion) {
    const uint32_t bits = bits_of(p), upper = p == p ? (bits + 0x8000) & 0xffff0000 : 0x7fc00000;
    companion = p == p ? static_cast<float>(static_cast<int32_t>(bits - upper)) : 0.0f;
    return float_of(upper);
  }
};

// The float itself (Micikevicius et al. 2017, https://arxiv.org/abs/1710.03740).
template <class Value>
struct Master {
  static float join(float weight, float companion) { return nearest<Value>(companion) == weight ? companion : weight; }
  static float part(float p, float& companion) {
    companion = p;
    return nearest<Value>(p);
  }
};

template <class F>
[[gnu::always_inline]] inline void with_companion(unsigned flags, Format format, F f) {
  const bool is_half = format == Format::kFloat16;
  if (flags & stage::kSplit) f(Split());
  if (flags & stage::kKahan) is_half ? f(Kahan<Float16>()) : f(Kahan<BFloat16>());
  if (flags & stage::kMaster) is_half ? f(Master<Float16>()) : f(Master<BFloat16>());
}

// To bfloat16, as floats whose lower half is zero.
inline void round_stochastically(const Stochastically& rounding, const Tile& tile, float* param) {
  for (int64_t from = 0; from < tile.count;) {
    const int64_t first = tile.first + from, left = tile.count - from, of_draw = kDraw - first % kDraw;
    const int64_t length = left < of_draw ? left : of_draw;
    const Dither dither = rounding.at(first);
    float* const p = param + from;
    for_each(length, [=](int64_t i) __attribute__((always_inline)) {
      const uint32_t added = dither.first + static_cast<uint32_t>(i) * dither.step;
      store(p, i, float_of(BFloat16::round(load<float>(p, i), added, dither.odd) & 0xffff0000));
    });
    from += length;
  }
}

template <class T>
void before(unsigned flags, const double* s, const Tile& tile) {
  void *const param = tile.operands[kParam], *const grad = tile.operands[kGrad];
  const void *const mask = tile.operands[kMask], *const anchor = tile.operands[kAnchor], *const companion = tile.operands[kCompanion];
  if constexpr (sizeof(T) == sizeof(float))
    with_companion(flags, tile.format, [=, &tile](auto kind) {
      for_each(tile.count, [=](int64_t i) __attribute__((always_inline)) {
        store(param, i, decltype(kind)::join(load<float>(param, i), load<float>(companion, i)));
      });
    });
  if (flags & stage::kOfGradient) {
    const T factor = T(s[stage::kFactor]), limit = T(s[stage::kLimit]), l1 = T(s[stage::kL1]), decay = T(s[stage::kAnchorDecay]);
    for_each(tile.count, [=](int64_t i) __attribute__((always_inline)) { store(grad, i, clamp(load<T>(grad, i) * factor, limit)); });
    if (flags & stage::kSubgradient)
      for_each(tile.count,
               [=](int64_t i) __attribute__((always_inline)) { store(grad, i, load<T>(grad, i) + l1 * sign_of(load<T>(param, i))); });
    if (flags & stage::kPull)
      for_each(tile.count, [=](int64_t i) __attribute__((always_inline)) {
        store(grad, i, fma(decay, load<T>(param, i) - load<T>(anchor, i), load<T>(grad, i)));
      });
    if (flags & stage::kMasked)
      for_each(tile.count,
               [=](int64_t i) __attribute__((always_inline)) { store(grad, i, load<T>(mask, i) != 0 ? load<T>(grad, i) : T(0)); });
  }
  if (flags & stage::kShrink) {
    const T keep = T(s[stage::kKeep]);
    for_each(tile.count, [=](int64_t i) __attribute__((always_inline)) { store(param, i, load<T>(param, i) * keep); });
  }
}

template <class T>
void after(unsigned flags, const double* s, const Tile& tile) {
  void *const param = tile.operands[kParam], *const companion = tile.operands[kCompanion];
  void* const average = tile.operands[fused_opt::kAverage];  // the operand; kAverage alone is a rule's kind of state
  const void* const mask = tile.operands[kMask];
  if (flags & stage::kProximal) {
    const T threshold = T(s[stage::kThreshold]);
    for_each(tile.count, [=](int64_t i) __attribute__((always_inline)) { store(param, i, soft_threshold(load<T>(param, i), threshold)); });
  }
  if (flags & stage::kMasked)
    for_each(tile.count,
             [=](int64_t i) __attribute__((always_inline)) { store(param, i, load<T>(mask, i) != 0 ? load<T>(param, i) : T(0)); });
  if constexpr (sizeof(T) == sizeof(float)) {
    const auto round = [=, &tile](auto value) {
      for_each(tile.count,
               [=](int64_t i) __attribute__((always_inline)) { store(param, i, nearest<decltype(value)>(load<float>(param, i))); });
    };
    if (flags & stage::kStochastic)
      round_stochastically(Stochastically(s, tile.number), tile, static_cast<float*>(param));
    else if (flags & stage::kAveraged && !(flags & stage::kWithCompanion)) {  // it is one of weights as they are stored
      if (tile.format == Format::kBFloat16) round(BFloat16());
      if (tile.format == Format::kFloat16) round(Float16());
    }
  }
  if (flags & stage::kAveraged) {
    const Lerp<T> lerp{static_cast<T>(s[stage::kAverageWeight])};
    for_each(tile.count,
             [=](int64_t i) __attribute__((always_inline)) { store(average, i, lerp(load<T>(average, i), load<T>(param, i))); });
  }
  if constexpr (sizeof(T) == sizeof(float))
    with_companion(flags, tile.format, [=, &tile](auto kind) {
      for_each(tile.count, [=](int64_t i) __attribute__((always_inline)) {
        float rest;
        store(param, i, decltype(kind)::part(load<float>(param, i), rest));
        store(companion, i, rest);
      });
    });
}

// Sixteen sums in vectors of four, whatever those of the processor are, so that the bits do not depend on them. In double the squares of
// floats are exact and do not overflow. (As sixteen numbers gcc 12 kept them in memory: seven times as long.)
template <class T>
double sum_of_squares(const void* real, int64_t count) {
  typedef T Four __attribute__((vector_size(4 * sizeof(T))));
  typedef double Sums __attribute__((vector_size(4 * sizeof(double))));
  constexpr int kVectors = 4, kSums = 4 * kVectors;
  Sums sums[kVectors] = {};
  const auto add = [&sums](const void* numbers) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int k = 0; k < kVectors; ++k) {
      const Sums x = __builtin_convertvector(load<Four>(numbers, k), Sums);
      sums[k] += x * x;
    }
  };
  const T* const numbers = static_cast<const T*>(real);
  int64_t i = 0;
  for (; i + kSums <= count; i += kSums) add(numbers + i);
  if (i < count) {
    T last[kSums] = {};
    __builtin_memcpy(last, numbers + i, static_cast<size_t>(count - i) * sizeof(T));
    add(last);
  }
  const Sums sum = (sums[0] + sums[2]) + (sums[1] + sums[3]);
  return (sum[0] + sum[2]) + (sum[1] + sum[3]);
}

inline uint64_t bits_of(double x) {
  uint64_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits;
}

// Bits of magnitudes are in the order of the numbers, and those of NaN above all.
template <class T>
double largest(const void* real, int64_t count) {
  using Bits = decltype(bits_of(T()));
  Bits result = 0;
  for (int64_t i = 0; i < count; ++i) {
    const Bits magnitude = bits_of(load<T>(real, i)) & (Bits(-1) >> 1);
    result = magnitude > result ? magnitude : result;
  }
  T value;
  __builtin_memcpy(&value, &result, sizeof value);
  return static_cast<double>(value);
}

template <class T>
constexpr StagesByPrecision kStages = {before<T>, after<T>};

template <class T>
constexpr Norms kNorms = {sum_of_squares<T>, largest<T>};

}  // namespace
}  // namespace fused_opt::FUSED_OPT_ISA
