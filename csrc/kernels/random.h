// Random numbers. They depend on a seed and a place only: not on threads, tiles or vectors, so a step that is repeated draws the same.
#pragma once

#include "../request.h"
#include "real.h"

namespace fused_opt::FUSED_OPT_ISA {
namespace {

// 64 random bits, number `place` of a seed. (SplitMix64, Steele, Lea and Flood 2014, https://doi.org/10.1145/2660193.2660195: `place` steps
// from state `seed`.)
inline uint64_t random_bits(uint64_t seed, int64_t place) {
  uint64_t x = seed + (static_cast<uint64_t>(place) + 1) * 0x9e3779b97f4a7c15;
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
  x = (x ^ x >> 27) * 0x94d049bb133111eb;
  return x ^ x >> 31;
}

// Of block number `block`. Nothing but seed and place decides, not the number of threads.
inline Rounding rounding_of(bool stochastic, uint64_t seed, int64_t block) {
  if (!stochastic) return {0x2000, 0};  // of 14 bits
  const uint64_t x = random_bits(seed, block);
  return {static_cast<uint16_t>(x), static_cast<uint16_t>(x >> 16 | 1)};
}

// What is added to floats before their lower half is cut off, which makes them bfloat16: the lower half of first + i * step to number i,
// and `odd` where the upper half is odd.
struct Dither {
  uint32_t first, step, odd;
};

constexpr Dither kToNearest = {0x7fff, 0, 1};  // even

// Elements of a parameter that share a draw of random numbers.
constexpr int64_t kDraw = 256;
static_assert(kDraw % kShareUnit == 0 && kShareUnit % kChunk == 0);

// How the elements of a parameter are rounded to 16 bits: `at` is for those from a position to the end of its kDraw.
struct ToNearest {
  explicit ToNearest(const double*, int64_t) {}
  [[gnu::always_inline]] static constexpr Dither at(int64_t) { return kToNearest; }
};

// To bfloat16, up with a probability that is the distance from the value below, so that the expected value is the number itself: what is
// added is uniform over all 2^16 values from one step to the next. It depends on nothing but seed, step, parameter and position.
class Stochastically {
 public:
  // `scalars`: those of stages; `number`: of the parameter in its group.
  Stochastically(const double* scalars, int64_t number)
      : seed_(random_bits(static_cast<uint64_t>(scalars[stage::kSeed]) << 24 | static_cast<uint64_t>(scalars[stage::kStep]), number)) {}

  Dither at(int64_t position) const {
    const Rounding draw = rounding_of(true, seed_, position / kDraw);
    return {draw.first + static_cast<uint32_t>(position % kDraw) * draw.step, draw.step, 0};
  }

 private:
  uint64_t seed_;
};

}  // namespace
}  // namespace fused_opt::FUSED_OPT_ISA
