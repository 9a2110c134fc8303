"""The update rules, part by part as csrc/kernels/rules.h has them: every operation rounds once, `fma` where it stands, division and square
root as IEEE 754 asks.

A rule sees tiles of fp32 numbers and knows no memory, dtype or loop. `s` are the step's scalars in the order of `Rule.scalars` in
fused_opt/rules.py, of which the first is a factor of the gradient and the second the weight decay.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fused_opt import rules as specs


class Kind(NamedTuple):
    """What 8-bit codes have to know of a state.

    Attributes:
        signed: whether it can be negative.
        average: whether small changes must count on average; a maximum, by random rounding, would only grow.
        moved: whether `move` changes it, and not `accumulate`.
    """

    signed: bool
    average: bool = True
    moved: bool = False


class Rule(NamedTuple):
    """A rule's parts, which are called in the order `gradient`, `accumulate`, `move`.

    Attributes:
        l2: the flag by which weight decay is added to the gradient.
        scalars: their number.
        states: in torch's order, each with its kind and the flag without which the rule does not have it, or 0.
    """

    accumulate: Any
    move: Any
    l2: int
    scalars: int
    states: tuple[tuple[str, Kind, int], ...]

    def kinds(self, flags: int) -> dict[str, Kind]:
        """Of the states that there are with these flags."""
        return {name: kind for name, kind, flag in self.states if not flag or flags & flag}


@triton.jit
def gradient(p, g, s, L2: tl.constexpr):
    """What a rule makes of the gradient: turned round to maximize, and with L2 decay."""
    g = g * s[0]
    if L2:
        g = tl.fma(p, s[1], g)
    return g


@triton.jit
def lerp(start, end, weight):
    """As Tensor.lerp_(end, weight), which switches formula at one half so that weight 1 gives `end` exactly."""
    from_end = weight >= 0.5
    coefficient = tl.where(from_end, weight - 1.0, weight)
    return tl.fma(coefficient, end - start, tl.where(from_end, end, start))


# Kingma & Ba 2015 (Adam), Reddi et al. 2018 (AMSGrad), Loshchilov & Hutter 2019 (AdamW: keep < 1 and no L2).
# Scalars: sign, decay, keep, 1 - beta1, beta2, 1 - beta2, sqrt(bias correction 2), eps, -step size.


@triton.jit
def adam_accumulate(g, states, s, FLAGS: tl.constexpr):
    exp_avg = lerp(states[0], g, s[3])
    exp_avg_sq = tl.fma(s[5] * g, g, states[1] * s[4])
    if FLAGS & 1:  # amsgrad
        return exp_avg, exp_avg_sq, tl.maximum(states[2], exp_avg_sq, propagate_nan=tl.PropagateNan.ALL)
    else:
        return exp_avg, exp_avg_sq


@triton.jit
def adam_move(p, g, states, s, FLAGS: tl.constexpr):
    AMSGRAD: tl.constexpr = FLAGS & 1
    denominator = tl.div_rn(tl.sqrt_rn(states[1 + AMSGRAD]), s[6]) + s[7]
    return p * s[2] + tl.div_rn(s[8] * states[0], denominator), states


# Hinton, lecture 6e of "Neural Networks for Machine Learning" (2012); centered: Graves 2013.
# Scalars: sign, decay, alpha, 1 - alpha, eps, momentum, -lr. States: square_avg, [momentum_buffer], [grad_avg].


@triton.jit
def rmsprop_accumulate(g, states, s, FLAGS: tl.constexpr):
    square_avg = tl.fma(s[3] * g, g, states[0] * s[2])
    averages = (square_avg,)
    if FLAGS & 2:  # momentum
        averages = averages + (states[1],)
    if FLAGS & 1:  # centered
        averages = averages + (lerp(states[len(states) - 1], g, s[3]),)
    return averages


@triton.jit
def rmsprop_move(p, g, states, s, FLAGS: tl.constexpr):
    variance = states[0]
    if FLAGS & 1:
        grad_avg = states[len(states) - 1]
        variance = tl.fma(-grad_avg, grad_avg, variance)
    denominator = tl.sqrt_rn(variance) + s[4]
    if FLAGS & 2:
        momentum_buffer = states[1] * s[5] + tl.div_rn(g, denominator)
        p = tl.fma(momentum_buffer, s[6], p)
        moved = (states[0], momentum_buffer)
        if FLAGS & 1:
            moved = moved + (states[2],)
        return p, moved
    else:
        return p + tl.div_rn(s[6] * g, denominator), states


# Sutskever et al. 2013, in torch's form: lr outside the buffer, whose first value is the gradient itself, undampened.
# Scalars: sign, decay, momentum, 1 - dampening, -lr.


@triton.jit
def sgd_accumulate(g, states, s, FLAGS: tl.constexpr):
    if FLAGS & 1:  # momentum
        if FLAGS & 4:  # first
            return (g,)
        else:
            return (tl.fma(s[3], g, states[0] * s[2]),)
    else:
        return states


@triton.jit
def sgd_move(p, g, states, s, FLAGS: tl.constexpr):
    if FLAGS & 1:
        if FLAGS & 2:  # nesterov
            g = tl.fma(states[0], s[2], g)
        else:
            g = states[0]
    return tl.fma(g, s[4], p), states


AVERAGE, SQUARES, MAXIMUM, MOVED = Kind(True), Kind(False), Kind(False, average=False), Kind(True, moved=True)

RULES = {
    "adam": Rule(
        adam_accumulate,
        adam_move,
        specs.ADAM_L2,
        9,
        (("exp_avg", AVERAGE, 0), ("exp_avg_sq", SQUARES, 0), ("max_exp_avg_sq", MAXIMUM, specs.AMSGRAD)),
    ),
    "rmsprop": Rule(
        rmsprop_accumulate,
        rmsprop_move,
        specs.RMSPROP_L2,
        7,
        (("square_avg", SQUARES, 0), ("momentum_buffer", MOVED, specs.RMSPROP_MOMENTUM), ("grad_avg", AVERAGE, specs.CENTERED)),
    ),
    "sgd": Rule(sgd_accumulate, sgd_move, specs.SGD_L2, 5, (("momentum_buffer", AVERAGE, specs.SGD_MOMENTUM),)),
}
