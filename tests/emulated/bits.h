// What the programs that compare bits between ISAs share: the data, which depends on an element's index alone, and how bits are compared,
// counted and printed. Any two NaNs count as equal.
#pragma once

#include <stdio.h>
#include <string.h>

#include <vector>

#include "request.h"

namespace bits {

using namespace fused_opt;

constexpr int64_t kLengths[] = {0, 1, 3, 15, 16, 17, 31, 33, 63, 64, 65, 127, 1000, 4099};
constexpr int64_t kMaxLength = 4099;
constexpr int64_t kGuard = 32;  // elements after the last that must stay as they are

struct Isa {
  const char* name;
  const KernelTable* table;
};

// The scalars differ from step to step: both signs, both branches of Lerp (split at weight one half), decay and none.
inline double sign(int step) { return step == 2 ? -1 : 1; }
inline double decay(int step) { return step == 3 ? 0 : 0.013; }
inline double weight(int step) { return step == 1 ? 0.75 : 0.1; }

inline void adam_scalars(int step, double* s) {
  s[adam::kSign] = sign(step);
  s[adam::kDecay] = decay(step);
  s[adam::kKeep] = 1 - 1e-3 * decay(step);
  s[adam::kOneMinusBeta1] = weight(step);
  s[adam::kBeta2] = 0.999;
  s[adam::kOneMinusBeta2] = 1 - 0.999;
  s[adam::kSqrtBiasCorrection2] = 0.03 * (step + 1);
  s[adam::kEps] = 1e-8;
  s[adam::kNegativeStepSize] = -1e-2 / (step + 1);
}

inline void rmsprop_scalars(int step, double* s) {
  s[rmsprop::kSign] = sign(step);
  s[rmsprop::kDecay] = decay(step);
  s[rmsprop::kAlpha] = 1 - weight(step);
  s[rmsprop::kOneMinusAlpha] = weight(step);
  s[rmsprop::kEps] = 1e-8;
  s[rmsprop::kMu] = 0.9;
  s[rmsprop::kNegativeLr] = -1e-2;
}

inline void sgd_scalars(int step, double* s) {
  s[sgd::kSign] = sign(step);
  s[sgd::kDecay] = decay(step);
  s[sgd::kMu] = 0.9;
  s[sgd::kOneMinusDampening] = 1 - weight(step);
  s[sgd::kNegativeLr] = -1e-2;
}

struct Rule {
  const char* name;
  const KernelsByFormat* KernelTable::* kernels;
  unsigned flag_combinations;
  void (*scalars)(int step, double* s);
} constexpr kRules[] = {
    {"adam", &KernelTable::adam, adam::kFlagCombinations, adam_scalars},
    {"rmsprop", &KernelTable::rmsprop, rmsprop::kFlagCombinations, rmsprop_scalars},
    {"sgd", &KernelTable::sgd, sgd::kFlagCombinations, sgd_scalars},
};

inline uint64_t mix(uint64_t x) {  // splitmix64
  x += 0x9e3779b97f4a7c15;
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
  x = (x ^ x >> 27) * 0x94d049bb133111eb;
  return x ^ x >> 31;
}

// Sign, exponent and fraction of a Format, and numbers of it as bits.
struct Layout {
  int bytes, fraction_bits, exponent_bits;

  uint64_t max_exponent() const { return (uint64_t(1) << exponent_bits) - 1; }
  bool is_nan(uint64_t x) const { return (x & ~sign()) > max_exponent() << fraction_bits; }
  uint64_t sign() const { return uint64_t(1) << (8 * bytes - 1); }

  uint64_t read(const char* array, int64_t i) const {  // the same for every NaN
    uint64_t x = 0;
    memcpy(&x, array + i * bytes, bytes);  // little-endian
    return is_nan(x) ? ~uint64_t(0) : x;
  }
  void write(char* array, int64_t i, uint64_t x) const { memcpy(array + i * bytes, &x, bytes); }

  // Of 64 values 56 of ordinary size, 4 of any magnitude, and a subnormal, a zero, an infinity and a NaN.
  uint64_t value(uint64_t seed, bool seldom_negative) const {
    const uint64_t random = mix(seed), kind = random >> 58;
    const bool negative = (random >> 55 & (seldom_negative ? 7 : 1)) == 0;
    uint64_t exponent = kind < 56 ? max_exponent() / 2 - 9 + random % 13 : 1 + random % (max_exponent() - 1);
    if (kind >= 60) exponent = kind < 62 ? 0 : max_exponent();
    const uint64_t fraction = kind == 61 || kind == 62 ? 0 : mix(random) >> (64 - fraction_bits) | 1;
    return (negative ? sign() : 0) | exponent << fraction_bits | fraction;
  }
} constexpr kLayouts[kFormats] = {{4, 23, 8}, {8, 52, 11}, {2, 7, 8}, {2, 10, 5}};  // in the order of Format

struct Count {
  long long compared = 0, differing = 0;

  void compare(uint64_t actual, uint64_t expected) {
    ++compared;
    differing += actual != expected;
  }
  Count operator-(const Count& o) const { return {compared - o.compared, differing - o.differing}; }
};

inline void print_line(const char* what, const char* format, const Count& count, uint64_t hash) {
  printf("%-24s %-13s  %lld of %lld differ  hash %016llx\n", what, format, count.differing, count.compared, (unsigned long long)hash);
}

// Defined in stage_bits.cpp: what stages do, norms, and the kernels that round parameters stochastically.
void check_stages(const std::vector<Isa>& isas, Count& count);

}  // namespace bits
