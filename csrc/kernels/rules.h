// The update rules: one element in, one element out, or a vector V of them. A rule knows no memory, loop, thread or storage format.
//
// A rule has three parts, which are called in this order: `gradient` is what it makes of the gradient, `accumulate` updates averages, and
// `move` the parameter. States in 8-bit codes can be encoded beside `move`, which waits for square roots and divisions, since only those
// that `kMoved` names change there.
//
// Every operation rounds once, `fma` is written where torch's CPU kernels have one (found by trying every contraction against torch 2.13,
// fused and for-loop, in both precisions: exactly one form of each rule gives no differing bit), and no other contraction is allowed
// (-ffp-contract=off). Scalars are computed by the caller in double and rounded once to T here.
//
// A flag is a compile-time option: it changes which states are touched, or it adds an operation that no constant can neutralise
// (L2 decay: g + 0*p is not g where p is infinite). Flag bits and scalar order are the contract with fused_opt/rules.py; a test compares
// the flags and the number of scalars, and every test of bits their order.
#pragma once

#include "../request.h"
#include "lanes.h"

namespace fused_opt::FUSED_OPT_ISA {
namespace {

// What 8-bit codes have to know of a state: whether it can be negative; and whether it is an average, whose small changes must count on
// average, or a maximum, which by random rounding would only grow.
enum StateKind { kAverage, kAverageOfSquares, kMaximumOfSquares };

// As Tensor.lerp_(end, weight), which switches formula at one half so that weight 1 gives `end` exactly.
template <class T>
struct Lerp {
  T coefficient;
  bool from_end;

  explicit Lerp(T weight) : coefficient(weight < T(0.5) ? weight : weight - T(1)), from_end(!(weight < T(0.5))) {}

  template <class V>
  V operator()(V start, V end) const {
    return fma(coefficient, end - start, from_end ? end : start);
  }
};

constexpr int kNone = -1;  // kMoved, where `move` changes no state

// What a rule makes of the gradient: turned round to maximize, and with L2 decay.
template <bool l2, class T, class V>
[[gnu::always_inline]] inline V gradient_of(V p, V g, T sign, T decay) {
  g = g * sign;
  if constexpr (l2) g = fma(p, decay, g);
  return g;
}

// Kingma & Ba 2015 (Adam), Reddi et al. 2018 (AMSGrad), Loshchilov & Hutter 2019 (AdamW: `keep` < 1 and no l2).
template <class T, unsigned kFlags>
struct Adam {
  using Real = T;
  static constexpr bool amsgrad = kFlags & adam::kAmsgrad;
  static constexpr bool l2 = kFlags & adam::kL2;
  static constexpr int kStates = amsgrad ? 3 : 2;  // exp_avg, exp_avg_sq, max_exp_avg_sq
  static constexpr StateKind kKinds[kMaxStates] = {kAverage, kAverageOfSquares, kMaximumOfSquares};
  static constexpr int kMoved = kNone;

  T sign, decay, keep, beta2, one_minus_beta2, sqrt_bias_correction2, eps, negative_step_size;
  Lerp<T> lerp;

  explicit Adam(const double* s)
      : sign(T(s[adam::kSign])),
        decay(T(s[adam::kDecay])),
        keep(T(s[adam::kKeep])),
        beta2(T(s[adam::kBeta2])),
        one_minus_beta2(T(s[adam::kOneMinusBeta2])),
        sqrt_bias_correction2(T(s[adam::kSqrtBiasCorrection2])),
        eps(T(s[adam::kEps])),
        negative_step_size(T(s[adam::kNegativeStepSize])),
        lerp(T(s[adam::kOneMinusBeta1])) {}

  template <class V>
  V gradient(V p, V g) const {
    return gradient_of<l2>(p, g, sign, decay);
  }

  template <class V>
  void accumulate(V g, V* state) const {
    V &exp_avg = state[0], &exp_avg_sq = state[1];
    exp_avg = lerp(exp_avg, g);
    exp_avg_sq = fma(one_minus_beta2 * g, g, exp_avg_sq * beta2);
    if constexpr (amsgrad) state[2] = max_keep_nan(state[2], exp_avg_sq);
  }

  template <class V>
  void move(V& p, V, V* state) const {
    const V exp_avg = state[0], second_moment = state[amsgrad ? 2 : 1];
    const V denominator = sqrt(second_moment) / sqrt_bias_correction2 + eps;
    p = p * keep + (negative_step_size * exp_avg) / denominator;
  }
};

// Hinton, lecture 6e of "Neural Networks for Machine Learning" (2012); centered: Graves 2013.
template <class T, unsigned kFlags>
struct RMSprop {
  using Real = T;
  static constexpr bool centered = kFlags & rmsprop::kCentered;
  static constexpr bool momentum = kFlags & rmsprop::kMomentum;
  static constexpr bool l2 = kFlags & rmsprop::kL2;
  static constexpr int kStates = 1 + centered + momentum;  // square_avg, [momentum_buffer], [grad_avg]
  static constexpr StateKind kKinds[kMaxStates] = {kAverageOfSquares, kAverage, kAverage};
  static constexpr int kMoved = momentum ? 1 : kNone;

  T sign, decay, alpha, one_minus_alpha, eps, mu, negative_lr;
  Lerp<T> lerp;

  explicit RMSprop(const double* s)
      : sign(T(s[rmsprop::kSign])),
        decay(T(s[rmsprop::kDecay])),
        alpha(T(s[rmsprop::kAlpha])),
        one_minus_alpha(T(s[rmsprop::kOneMinusAlpha])),
        eps(T(s[rmsprop::kEps])),
        mu(T(s[rmsprop::kMu])),
        negative_lr(T(s[rmsprop::kNegativeLr])),
        lerp(T(s[rmsprop::kOneMinusAlpha])) {}

  template <class V>
  V gradient(V p, V g) const {
    return gradient_of<l2>(p, g, sign, decay);
  }

  template <class V>
  void accumulate(V g, V* state) const {
    V& square_avg = state[0];
    square_avg = fma(one_minus_alpha * g, g, square_avg * alpha);
    if constexpr (centered) {
      V& grad_avg = state[kStates - 1];
      grad_avg = lerp(grad_avg, g);
    }
  }

  template <class V>
  void move(V& p, V g, V* state) const {
    V variance = state[0];
    if constexpr (centered) {
      const V grad_avg = state[kStates - 1];
      variance = fma(-grad_avg, grad_avg, variance);
    }
    const V denominator = sqrt(variance) + eps;
    if constexpr (momentum) {
      V& momentum_buffer = state[1];
      momentum_buffer = momentum_buffer * mu + g / denominator;
      p = fma(momentum_buffer, negative_lr, p);
    } else {
      p = p + (negative_lr * g) / denominator;
    }
  }
};

// Sutskever et al. 2013, in torch's form: lr outside the buffer, whose first value is the gradient itself, undampened.
template <class T, unsigned kFlags>
struct SGD {
  using Real = T;
  static constexpr bool momentum = kFlags & sgd::kMomentum;
  static constexpr bool nesterov = kFlags & sgd::kNesterov;
  static constexpr bool first = kFlags & sgd::kFirst;
  static constexpr bool l2 = kFlags & sgd::kL2;
  static constexpr int kStates = momentum ? 1 : 0;  // momentum_buffer
  static constexpr StateKind kKinds[kMaxStates] = {kAverage};
  static constexpr int kMoved = kNone;

  T sign, decay, mu, one_minus_dampening, negative_lr;

  explicit SGD(const double* s)
      : sign(T(s[sgd::kSign])),
        decay(T(s[sgd::kDecay])),
        mu(T(s[sgd::kMu])),
        one_minus_dampening(T(s[sgd::kOneMinusDampening])),
        negative_lr(T(s[sgd::kNegativeLr])) {}

  template <class V>
  V gradient(V p, V g) const {
    return gradient_of<l2>(p, g, sign, decay);
  }

  template <class V>
  void accumulate(V g, V* state) const {
    if constexpr (momentum) {
      V& momentum_buffer = state[0];
      momentum_buffer = first ? g : fma(one_minus_dampening, g, momentum_buffer * mu);
    }
  }

  template <class V>
  void move(V& p, V g, V* state) const {
    if constexpr (momentum) g = nesterov ? fma(state[0], mu, g) : state[0];
    p = fma(g, negative_lr, p);
  }
};

}  // namespace
}  // namespace fused_opt::FUSED_OPT_ISA
