// Loops over the 8-bit codes of blocks, each with its scale. They know codes and rules by name only.
//
// A block that has a NaN or an infinity gets NaN for its scale and decodes to NaN everywhere: such a value never looks like an ordinary
// one.
#pragma once

#include <type_traits>
#include <utility>  // types only, no code

#include "code8.h"
#include "driver.h"
#include "rules.h"

namespace fused_opt::FUSED_OPT_ISA {
namespace {

constexpr uint32_t kInfinity = 0x7f800000;

// Magnitudes below or above these are encoded after a multiplication with 2^+-100: else the inverse of the scale would overflow, or lose
// bits as a subnormal number. Which magnitude counts as zero is for the processor to say (torch.set_flush_denormal).
constexpr uint32_t kSmall = (127 - 90) << 23, kLarge = (127 + 90) << 23;
constexpr float kBoost = 0x1p100f;

// The largest magnitude, as bits: those of numbers without sign are in the order of the numbers, above them infinity, above that NaN.
inline uint32_t largest_magnitude(const float* values, int64_t count) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t magnitude = bits_of(load<float>(values, i)) & 0x7fffffff;
    largest = magnitude > largest ? magnitude : largest;
  }
  return largest;
}

inline float scale_of(uint32_t largest) { return float_of(largest < kInfinity ? largest : 0x7fc00000); }

// Mixes all bits into all (Ettinger's "lowbias32", https://nullprogram.com/blog/2018/07/31/).
inline uint32_t mix(uint32_t x) {
  x = (x ^ x >> 16) * 0x7feb352d;
  x = (x ^ x >> 15) * 0x846ca68b;
  return x ^ x >> 16;
}

// Of block number `block`. Nothing but seed, place and values decides, not the number of threads. In an optimizer the seed is the sum of
// the bits of the block's parameters: not the step, which it would have to save, and not nothing, since with the same draw in every step a
// small momentum could be rounded to itself for ever, and go on moving a weight that has no gradient any more.
inline Rounding rounding_of(bool stochastic, uint64_t seed, int64_t block, uint32_t largest) {
  if (!stochastic) return {0x2000, 0};  // of 14 bits
  const uint32_t key = mix(mix(static_cast<uint32_t>(seed)) ^ static_cast<uint32_t>(seed >> 32));
  const uint32_t drawn = mix((mix(key + static_cast<uint32_t>(block)) + static_cast<uint32_t>(block >> 32)) ^ largest);
  return {static_cast<uint16_t>(drawn), static_cast<uint16_t>(drawn >> 16 | 1)};
}

template <class Code>
[[gnu::noinline]] void decode_block(const uint8_t* codes, float scale, float* values, int64_t count) {
  int64_t i = 0;
  for (; i + kGroup <= count; i += kGroup) decode_group<Code>(codes + i, scale, values + i);
  if (i < count) {
    uint8_t last_codes[kGroup] = {};
    float last[kGroup];
    __builtin_memcpy(last_codes, codes + i, static_cast<size_t>(count - i));
    decode_group<Code>(last_codes, scale, last);
    __builtin_memcpy(values + i, last, static_cast<size_t>(count - i) * sizeof(float));
  }
}

template <class Code>
[[gnu::always_inline]] inline void encode_all(const float* values, int64_t count, float inverse, Rounding rounding, uint8_t* codes) {
  Offsets offsets(rounding);
  int64_t i = 0;
  for (; i + kGroup <= count; i += kGroup) encode_group<Code>(values + i, inverse, offsets, codes + i);
  if (i < count) {
    float last[kGroup] = {};
    uint8_t last_codes[kGroup];
    __builtin_memcpy(last, values + i, static_cast<size_t>(count - i) * sizeof(float));
    encode_group<Code>(last, inverse, offsets, last_codes);
    __builtin_memcpy(codes + i, last_codes, static_cast<size_t>(count - i));
  }
}

// Without sign there is no rounding to zero: a second moment that was positive stays so. Seldom needed, so looked for afterwards, 32 codes
// at a time.
inline void keep_positive(const float* values, int64_t count, uint8_t* codes) {
  uint8_t smallest = 255;
  for (int64_t i = 0; i < count; ++i) smallest = codes[i] < smallest ? codes[i] : smallest;
  if (smallest > 0) return;
  for (int64_t i = 0; i < count; ++i) codes[i] = static_cast<uint8_t>(codes[i] | (codes[i] == 0 && load<float>(values, i) != 0));
}

// `count` values of which `largest` is the largest magnitude; kMaxBlock at the most.
template <class Code>
[[gnu::noinline]] void encode_block(const float* values, int64_t count, uint32_t largest, Rounding rounding, uint8_t* codes) {
  const float scale = scale_of(largest);
  if (!(scale > 0)) {
    for (int64_t i = 0; i < count; ++i) codes[i] = 0;
  } else if (largest >= kSmall && largest < kLarge) {
    encode_all<Code>(values, count, Code::inverse(scale), rounding, codes);
  } else {
    float boosted[kMaxBlock];
    const float boost = largest < kSmall ? kBoost : 1 / kBoost;
    for (int64_t i = 0; i < count; ++i) boosted[i] = load<float>(values, i) * boost;
    encode_all<Code>(boosted, count, Code::inverse(scale * boost), rounding, codes);
  }
  if (!Code::kSigned) keep_positive(values, count, codes);
}

template <class Code>
constexpr BlockCodec kBlockCodec = {decode_block<Code>, encode_block<Code>};

template <class Rule, int kState>
using CodeOfState = MuLaw<Rule::kKinds[kState] == kAverage>;

// A kernel for fp32 parameters and gradients, and states in 8-bit codes: decode, rule, encode, a block at a time. The three are separate
// loops because the rule waits for square roots and divisions, and the more instructions stand beside them the fewer of those are under way
// at a time (AdamW, ns an element: 1.0 so, 1.1 to 1.3 with decoding or encoding in the rule's loop). Prefetching the next block gained
// nothing.
template <class Rule, int... kState>
[[gnu::always_inline]] inline void update_blocks_of(const double* scalars, const Run& run, std::integer_sequence<int, kState...>) {
  const Rule rule(scalars);
  alignas(64) float states[Rule::kStates][kMaxBlock + 16];  // not 4096 bytes apart, which processors take for the same address at first
  int64_t block = run.first / run.block_size;
  for (int64_t first = 0; first < run.count; first += run.block_size, ++block) {
    const int64_t left = run.count - first, count = left < run.block_size ? left : run.block_size;
    void* operands[kMaxOperands] = {static_cast<float*>(run.operands[kParam]) + first, static_cast<float*>(run.operands[kGrad]) + first};
    uint8_t* codes[Rule::kStates];
    for (int k = 0; k < Rule::kStates; ++k) {
      operands[kFirstState + k] = states[k];
      codes[k] = static_cast<uint8_t*>(run.operands[kFirstState + k]) + first;
    }
    (decode_block<CodeOfState<Rule, kState>>(codes[kState], load<float>(run.scales[kState], block), states[kState], count), ...);
    Measured measured;
    update_real<Rule, true>(rule, operands, count, &measured);
    (encode_block<CodeOfState<Rule, kState>>(
         states[kState], count, measured.largest[kState],
         rounding_of(Rule::kKinds[kState] != kMaximumOfSquares, measured.param_sum, block, measured.largest[kState]), codes[kState]),
     ...);
    for (int k = 0; k < Rule::kStates; ++k) store(run.scales[k], block, scale_of(measured.largest[k]));
  }
}

template <class Rule>
void update_blocks(const double* scalars, const Run& run) {
  update_blocks_of<Rule>(scalars, run, std::make_integer_sequence<int, Rule::kStates>());
}

}  // namespace
}  // namespace fused_opt::FUSED_OPT_ISA
