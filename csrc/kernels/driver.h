// The driver: the one loop over elements. It knows neither which rule it runs nor how values are stored.
#pragma once

#include "codec.h"

namespace fused_opt::FUSED_OPT_ISA {
namespace {

// Rule, for `count` elements in place, densely packed in the rule's own precision. The compiler vectorises the loop and makes its tail from
// the same text, so an element's bits do not depend on where a vector, a tensor or a thread's share ends.
template <class Rule>
[[gnu::always_inline]] inline void update_real(const Rule& rule, void* const* operands, int64_t count) {
  using Real = typename Rule::Real;
  constexpr int kStates = Rule::kStates;
  void *const param = operands[kParam], *const grad = operands[kGrad];
  void *const s0 = operands[kFirstState], *const s1 = operands[kFirstState + 1], *const s2 = operands[kFirstState + 2];

#pragma GCC ivdep  // arrays either coincide exactly or do not overlap (Batch sees to it), so no iteration depends on another
#pragma GCC unroll 1
  for (int64_t i = 0; i < count; ++i) {
    Real p = load<Real>(param, i);
    Real state[3];
    if constexpr (kStates > 0) state[0] = load<Real>(s0, i);
    if constexpr (kStates > 1) state[1] = load<Real>(s1, i);
    if constexpr (kStates > 2) state[2] = load<Real>(s2, i);
    const Real g = rule.gradient(p, load<Real>(grad, i));
    rule.accumulate(g, state);
    rule.move(p, g, state);
    if constexpr (kStates > 0) store(s0, i, state[0]);
    if constexpr (kStates > 1) store(s1, i, state[1]);
    if constexpr (kStates > 2) store(s2, i, state[2]);
    store(param, i, p);
  }
}

// A kernel for memory in the rule's own precision.
template <class Rule>
void update(const double* scalars, const Run& run) {
  const Rule rule(scalars);
  update_real(rule, run.operands, run.count);
}

// A kernel for memory in a 16-bit format: decode, rule, encode, a chunk at a time. All operands have the format, so a chunk's elements may
// be taken in any order. The last chunk, if it is not whole, is completed with zeros elsewhere.
template <class Rule, class Value, class ParamRounding = ToNearest>
void update_coded(const double* scalars, const Run& run) {
  constexpr int kOperands = kFirstState + Rule::kStates;
  constexpr int64_t kBytes = sizeof(typename Value::Stored);
  const Rule rule(scalars);
  const ParamRounding rounding(run.stage_scalars, run.number);
  int64_t position = run.first;
  const auto update_chunk = [&](char* const* stored) __attribute__((always_inline)) {
    alignas(64) float real[kMaxOperands][kChunk];
    void* operands[kMaxOperands];
    for (int k = 0; k < kMaxOperands; ++k) operands[k] = real[k];
    for (int k = 0; k < kOperands; ++k) Chunk<Value>::decode(stored[k], real[k]);
    update_real(rule, operands, kChunk);
    for (int k = 0; k < kOperands; ++k)
      if (k != kGrad) Chunk<Value>::encode(real[k], stored[k], k == kParam ? rounding.at(position) : kToNearest);
  };

  char* stored[kMaxOperands];
  for (int k = 0; k < kOperands; ++k) stored[k] = static_cast<char*>(run.operands[k]);
  int64_t left = run.count;
  for (; left >= kChunk; left -= kChunk, position += kChunk) {
    update_chunk(stored);
    for (int k = 0; k < kOperands; ++k) stored[k] += kChunk * kBytes;
  }
  if (left > 0) {
    char whole[kMaxOperands][kChunk * kBytes] = {};
    char* elsewhere[kMaxOperands];
    for (int k = 0; k < kOperands; ++k) {
      elsewhere[k] = whole[k];
      __builtin_memcpy(whole[k], stored[k], static_cast<size_t>(left * kBytes));
    }
    update_chunk(elsewhere);
    for (int k = 0; k < kOperands; ++k)
      if (k != kGrad) __builtin_memcpy(stored[k], whole[k], static_cast<size_t>(left * kBytes));
  }
}

}  // namespace
}  // namespace fused_opt::FUSED_OPT_ISA
