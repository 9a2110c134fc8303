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

// The largest magnitude, as bits: those of numbers without sign are in the order of the numbers, above them infinity, above that NaN.
inline uint32_t largest_magnitude(const float* values, int64_t count) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t magnitude = bits_of(load<float>(values, i)) & 0x7fffffff;
    largest = magnitude > largest ? magnitude : largest;
  }
  return largest;
}

inline float scale_of(uint32_t largest) { return float_of(largest < kInfinity ? largest : kNan); }

template <class Code>
[[gnu::noinline]] void decode_block(const uint8_t* codes, float scale, float* values, int64_t count, bool stream) {
  const float unit = Code::unit(scale);
  int64_t i = 0;
  if (stream && reinterpret_cast<uintptr_t>(values) % sizeof(Floats) == 0)
    for (; i + kGroup <= count; i += kGroup) decode_group<Code, true>(codes + i, unit, values + i);
  for (; i + kGroup <= count; i += kGroup) decode_group<Code>(codes + i, unit, values + i);
  if (i < count) {
    uint8_t last_codes[kGroup] = {};
    float last[kGroup];
    __builtin_memcpy(last_codes, codes + i, static_cast<size_t>(count - i));
    decode_group<Code>(last_codes, unit, last);
    __builtin_memcpy(values + i, last, static_cast<size_t>(count - i) * sizeof(float));
  }
}

// Where the scale is NaN codes mean nothing.
[[gnu::noinline]] void clear(uint8_t* codes, int64_t count) {
  for (int64_t i = 0; i < count; ++i) codes[i] = 0;
}

// Without sign nothing is rounded to zero: a second moment that was positive stays so.
[[gnu::noinline]] void keep_positive(const float* values, int64_t count, uint8_t* codes) {
  for (int64_t i = 0; i < count; ++i) codes[i] = static_cast<uint8_t>(codes[i] | (codes[i] == 0 && load<float>(values, i) != 0));
}

// Encodes the groups of a block, which has one scale, one after the other.
class GroupEncoder {
 public:
  explicit GroupEncoder(float inverse) : inverse_(inverse), smallest_(GroupOfBytes{} - 1) {}

  template <class Code>
  [[gnu::always_inline]] void encode(const float* values, const Words* offsets, uint8_t* codes) {
    const GroupOfBytes group = encode_group<Code>(values, inverse_, offsets);
    if (!Code::kSigned) smallest_ = group < smallest_ ? group : smallest_;
    store_lanes(codes, group);
  }

  // Of all groups together.
  template <class Code>
  [[gnu::always_inline]] void finish(const float* values, int64_t count, uint8_t* codes) const {
    uint8_t smallest = 255;
    for (int64_t i = 0; i < kGroup; ++i) smallest = smallest_[i] < smallest ? smallest_[i] : smallest;
    if (inverse_ != inverse_)
      clear(codes, count);
    else if (!Code::kSigned && smallest == 0)
      keep_positive(values, count, codes);
  }

 private:
  const float inverse_;
  GroupOfBytes smallest_;
};

// `count` values; kMaxBlock at the most.
template <class Code>
[[gnu::noinline]] void encode_block(const float* values, int64_t count, float scale, Rounding rounding, uint8_t* codes) {
  GroupEncoder encoder(Code::inverse(scale));
  Offsets offsets(rounding);
  Words of_group[kVectors];
  int64_t i = 0;
  for (; i + kGroup <= count; i += kGroup) {
    offsets.next(of_group);
    encoder.encode<Code>(values + i, of_group, codes + i);
  }
  if (i < count) {
    float last[kGroup] = {};
    uint8_t last_codes[kGroup];
    __builtin_memcpy(last, values + i, static_cast<size_t>(count - i) * sizeof(float));
    offsets.next(of_group);
    encoder.encode<Code>(last, of_group, last_codes);
    __builtin_memcpy(codes + i, last_codes, static_cast<size_t>(count - i));
  }
  encoder.finish<Code>(values, count, codes);
}

template <class Code>
constexpr BlockCodec kBlockCodec = {decode_block<Code>, encode_block<Code>};

// Those of squares are never negative: had a rule made one so, its sign would be taken for a magnitude beyond infinity.
template <StateKind kKind>
[[gnu::always_inline]] inline Words magnitudes(Floats x) {
  return kKind == kAverage ? Words(x) & ~kSign : Words(x);
}

inline uint32_t largest_lane(Words x) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < kLanes; ++i) largest = x[i] > largest ? x[i] : largest;
  return largest;
}

inline uint32_t sum_of_lanes(Words x) {
  uint32_t sum = 0;
  for (int64_t i = 0; i < kLanes; ++i) sum += x[i];
  return sum;
}

template <class Rule, int kState>
using CodeOfState = MuLaw<Rule::kKinds[kState] == kAverage>;

constexpr int64_t kCacheLine = 64;

// Elements that are read ahead, from large tensors: AdamW took 1.2 times as long without, 1.05 times with twice or half as many.
constexpr int64_t kReadAhead = 512;

// A block of an update, at any address. Its memory goes on to the end of its last group.
template <class Rule>
struct Block {
  char* param;
  const char* grad;
  uint8_t* codes[Rule::kStates];
  void* scales[Rule::kStates];  // of all blocks
  int64_t count, number;
  int64_t position;  // of the first element in the tensors
};

// In two loops: the first decodes and accumulates, which gives the new scales; the second encodes beside the rule's move, whose square
// roots and divisions would otherwise only be waited for. (Decoding, rule and encoding one after the other took AdamW 1.3 times as long,
// and more where decoding stood beside the divisions, since so fewer of them are under way at a time. The first loop of the next block
// before the second of this one, so as not to wait for the scales, gained nothing.)
//
// The seed of the rounding is made of the parameters before the step and of the new scales: not of the step's number, which would have to
// be saved, and not of nothing, since with the same draw in every step a small momentum could be rounded to itself for ever, and go on
// moving a weight that has no gradient any more. All averages are rounded by the same offsets.
template <class Rule, class Value, class ParamRounding, int... kState>
[[gnu::always_inline]] inline void update_block(const Rule& given_rule, const Block<Rule>& given_block, const ParamRounding& rounding,
                                                std::integer_sequence<int, kState...>) {
  const Rule rule = given_rule;  // so that the compiler knows that no store changes them
  const Block<Rule> block = given_block;
  constexpr int64_t kBytes = sizeof(typename Value::Stored);
  const int64_t end = (block.count + kGroup - 1) / kGroup * kGroup;
  alignas(64) float states[Rule::kStates][kMaxBlock + 16];  // not 4096 bytes apart, which processors take for the same address at first

  const float units[] = {CodeOfState<Rule, kState>::unit(load<float>(block.scales[kState], block.number))...};
  Words largest[Rule::kStates] = {}, param_sum = {};
#pragma GCC unroll 2
  for (int64_t i = 0; i < end; i += kLanes) {
    const Floats p = decode_lanes<Value>(block.param + i * kBytes);
    param_sum += smaller(Words(p) & ~kSign, Words{} + kInfinity);  // the bits of a NaN differ between processors
    Floats state[] = {CodeOfState<Rule, kState>::decode(widen(block.codes[kState] + i), units[kState])...};
    rule.accumulate(rule.gradient(p, decode_lanes<Value>(block.grad + i * kBytes)), state);
    ((largest[kState] = larger(largest[kState], magnitudes<Rule::kKinds[kState]>(state[kState]))), ...);
    (store_lanes(&states[kState][i], state[kState]), ...);
  }
  const float scales[] = {scale_of(largest_lane(largest[kState]))...};

  const uint32_t scale_sum = ((kState == Rule::kMoved ? 0 : bits_of(scales[kState])) + ...);
  const uint64_t seed = uint64_t(scale_sum) << 32 | sum_of_lanes(param_sum);
  Offsets random(rounding_of(true, seed, block.number)), nearest(rounding_of(false, seed, block.number));
  GroupEncoder encoders[] = {GroupEncoder(CodeOfState<Rule, kState>::inverse(scales[kState]))...};
#pragma GCC unroll 1
  for (int64_t i = 0; i < end; i += kGroup) {
    const Dither dither = rounding.at(block.position + i);
    Weyl added(dither.first, dither.step);
#pragma GCC unroll 4
    for (int64_t j = i; j < i + kGroup; j += kLanes) {
      Floats p = decode_lanes<Value>(block.param + j * kBytes);
      Floats state[] = {load_lanes<Floats>(&states[kState][j])...};
      rule.move(p, rule.gradient(p, decode_lanes<Value>(block.grad + j * kBytes)), state);
      if constexpr (std::is_same_v<ParamRounding, Stochastically>)
        store_lanes(block.param + j * kBytes, narrow(BFloat16::round(p, added.next(), dither.odd) >> 16));
      else
        store_lanes(block.param + j * kBytes, Value::encode(p));
      if constexpr (Rule::kMoved != kNone) store_lanes(&states[Rule::kMoved][j], state[Rule::kMoved]);
    }
    constexpr int64_t kLine = kCacheLine / kBytes < kGroup ? kCacheLine / kBytes : kGroup;
#pragma GCC unroll 2
    for (int64_t j = i + kReadAhead; j < i + kReadAhead + kGroup; j += kLine) {
      __builtin_prefetch(block.param + j * kBytes, 1);
      __builtin_prefetch(block.grad + j * kBytes, 0);
    }
    Words random_offsets[kVectors], nearest_offsets[kVectors];
    random.next(random_offsets);
    nearest.next(nearest_offsets);
    const auto encode = [&](auto k) __attribute__((always_inline)) {
      constexpr int kIndex = decltype(k)::value;
      if constexpr (kIndex != Rule::kMoved)
        encoders[kIndex].template encode<CodeOfState<Rule, kIndex>>(
            &states[kIndex][i], Rule::kKinds[kIndex] == kMaximumOfSquares ? nearest_offsets : random_offsets, block.codes[kIndex] + i);
    };
    (encode(std::integral_constant<int, kState>()), ...);
  }
  const auto finish = [&](auto k) __attribute__((always_inline)) {
    constexpr int kIndex = decltype(k)::value;
    using Code = CodeOfState<Rule, kIndex>;
    if constexpr (kIndex == Rule::kMoved) {
      const float scale = scale_of(largest_magnitude(states[kIndex], block.count));
      encode_block<Code>(states[kIndex], block.count, scale, rounding_of(true, seed, block.number), block.codes[kIndex]);
      store(block.scales[kIndex], block.number, scale);
    } else {
      store(block.scales[kIndex], block.number, scales[kIndex]);
      encoders[kIndex].template finish<Code>(states[kIndex], block.count, block.codes[kIndex]);
    }
  };
  (finish(std::integral_constant<int, kState>()), ...);
}

// Elsewhere and followed by zeros: the last block of a tensor, if it is no whole number of groups.
template <class Rule, class Value>
class PaddedCopy {
 public:
  [[gnu::noinline]] Block<Rule> of(const Block<Rule>& block) {
    Block<Rule> padded = block;
    padded.param = copy(param_, block.param, block.count, kBytes);
    padded.grad = copy(grad_, block.grad, block.count, kBytes);
    for (int k = 0; k < Rule::kStates; ++k) padded.codes[k] = copy(codes_[k], block.codes[k], block.count, 1);
    return padded;
  }

  [[gnu::noinline]] void write_back(const Block<Rule>& block) const {
    __builtin_memcpy(block.param, param_, static_cast<size_t>(block.count * kBytes));
    for (int k = 0; k < Rule::kStates; ++k) __builtin_memcpy(block.codes[k], codes_[k], static_cast<size_t>(block.count));
  }

 private:
  static constexpr int64_t kBytes = sizeof(typename Value::Stored);

  template <class T>
  static T* copy(T* to, const T* from, int64_t count, int64_t bytes) {
    __builtin_memcpy(to, from, static_cast<size_t>(count * bytes));
    __builtin_memset(to + count * bytes, 0, static_cast<size_t>((kGroup - count % kGroup) * bytes));
    return to;
  }

  char param_[kMaxBlock * kBytes], grad_[kMaxBlock * kBytes];
  uint8_t codes_[Rule::kStates][kMaxBlock];
};

// A kernel for states in 8-bit codes, and parameters and gradients in another format.
template <class Rule, class Value, class ParamRounding = ToNearest>
void update_blocks(const double* scalars, const Run& run) {
  constexpr int64_t kBytes = sizeof(typename Value::Stored);
  constexpr auto kStates = std::make_integer_sequence<int, Rule::kStates>();
  const Rule rule(scalars);
  const ParamRounding rounding(run.stage_scalars, run.number);
  PaddedCopy<Rule, Value> copy;
  int64_t number = run.first / run.block_size;
  for (int64_t first = 0; first < run.count; first += run.block_size, ++number) {
    const int64_t left = run.count - first;
    Block<Rule> block;
    block.param = static_cast<char*>(run.operands[kParam]) + first * kBytes;
    block.grad = static_cast<const char*>(run.operands[kGrad]) + first * kBytes;
    for (int k = 0; k < Rule::kStates; ++k) {
      block.codes[k] = static_cast<uint8_t*>(run.operands[kFirstState + k]) + first;
      block.scales[k] = run.scales[k];
    }
    block.count = left < run.block_size ? left : run.block_size;
    block.number = number;
    block.position = run.first + first;
    const bool whole = block.count % kGroup == 0;
    update_block<Rule, Value>(rule, whole ? block : copy.of(block), rounding, kStates);
    if (!whole) copy.write_back(block);
  }
}

}  // namespace
}  // namespace fused_opt::FUSED_OPT_ISA
