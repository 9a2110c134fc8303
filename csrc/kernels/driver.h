// The driver: the one loop over elements. It knows neither which rule it runs nor how values are stored.
#pragma once

#include "../request.h"

namespace fused_opt::FUSED_OPT_ISA {
namespace {

// Decode, rule, encode, for `run.count` elements in place. The compiler vectorises the loop and makes its tail from the same text, so an
// element's bits do not depend on where a vector, a tensor or a thread's share ends.
template <class Rule, class Codec>
void update(const double* scalars, const Run& run) {
  using Real = typename Rule::Real;
  using Stored = typename Codec::Stored;
  constexpr int kStates = Rule::kStates;

  const Rule rule(scalars);
  Stored* const param = static_cast<Stored*>(run.param);
  const Stored* const grad = static_cast<const Stored*>(run.grad);
  Stored* const s0 = static_cast<Stored*>(run.states[0]);
  Stored* const s1 = static_cast<Stored*>(run.states[1]);
  Stored* const s2 = static_cast<Stored*>(run.states[2]);

#pragma GCC ivdep  // arrays either coincide exactly or do not overlap (Batch sees to it), so no iteration depends on another
  for (int64_t i = 0; i < run.count; ++i) {
    Real p = Codec::decode(param[i]);
    Real state[3];
    if constexpr (kStates > 0) state[0] = Codec::decode(s0[i]);
    if constexpr (kStates > 1) state[1] = Codec::decode(s1[i]);
    if constexpr (kStates > 2) state[2] = Codec::decode(s2[i]);
    rule(p, Codec::decode(grad[i]), state);
    if constexpr (kStates > 0) s0[i] = Codec::encode(state[0]);
    if constexpr (kStates > 1) s1[i] = Codec::encode(state[1]);
    if constexpr (kStates > 2) s2[i] = Codec::encode(state[2]);
    param[i] = Codec::encode(p);
  }
}

}  // namespace
}  // namespace fused_opt::FUSED_OPT_ISA
