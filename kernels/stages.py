"""What is done to a tile of numbers before and after the rule, as csrc/kernels/stages.h has it: every operation rounds once.

Stages see tiles of fp32 numbers and know no memory or loop. `t` are their scalars, `STAGES` says which there are, `operands` are the tiles
of what they use, in the order of OPERANDS: see fused_opt/stages.py.
"""

import triton
import triton.language as tl

from fused_opt import stages as specs
from fused_opt.kernels import codecs
from fused_opt.kernels.rules import lerp

# The flags by which operands are there: mask, anchor, average and companion.
OPERANDS = (specs.MASK, specs.ANCHOR, specs.AVERAGE, specs.KAHAN | specs.SPLIT | specs.MASTER)
ANCHOR_AT = tl.constexpr(1)
AVERAGE_AT = tl.constexpr(2)
COMPANION_AT = tl.constexpr(3)

CLAMP = tl.constexpr(specs.CLAMP)
SUBGRADIENT = tl.constexpr(specs.SUBGRADIENT)
ANCHOR = tl.constexpr(specs.ANCHOR)
MASK = tl.constexpr(specs.MASK)
SHRINK = tl.constexpr(specs.SHRINK)
PROXIMAL = tl.constexpr(specs.PROXIMAL)
AVERAGE = tl.constexpr(specs.AVERAGE)
STOCHASTIC = tl.constexpr(specs.STOCHASTIC)
KAHAN = tl.constexpr(specs.KAHAN)
SPLIT = tl.constexpr(specs.SPLIT)
WITH_COMPANION = tl.constexpr(OPERANDS[3])
OF_GRADIENT = tl.constexpr(specs.OF_GRADIENT)

FACTOR = tl.constexpr(specs.FACTOR)
LIMIT = tl.constexpr(specs.LIMIT)
L1 = tl.constexpr(specs.L1)
ANCHOR_DECAY = tl.constexpr(specs.ANCHOR_DECAY)
KEEP = tl.constexpr(specs.KEEP)
THRESHOLD = tl.constexpr(specs.THRESHOLD)
AVERAGE_WEIGHT = tl.constexpr(specs.AVERAGE_WEIGHT)
SEED = tl.constexpr(specs.SEED)
STEP = tl.constexpr(specs.STEP)

DRAW = tl.constexpr(256)  # elements that share a draw of random numbers
UPPER = tl.constexpr(0xFFFF0000)


@triton.jit
def clamp(x, limit):
    below = tl.where(x > limit, limit, x)
    return tl.where(below < -limit, -limit, below)


@triton.jit
def soft_threshold(x, threshold):
    left = tl.abs(x) - threshold
    signed = codecs.float_of((codecs.bits_of(left) & 0x7FFFFFFF) | (codecs.bits_of(x) & 0x80000000))
    return tl.where(left <= 0.0, 0.0, signed)


@triton.jit
def nearest(x, TYPE: tl.constexpr):
    """The number of that type nearest to x."""
    return x.to(TYPE).to(tl.float32)


@triton.jit
def join(weight, companion, STAGES: tl.constexpr, TYPE: tl.constexpr):
    if KAHAN & STAGES:
        return weight + companion.to(tl.float32)
    elif SPLIT & STAGES:
        # Below zero and above infinity are the bits of NaN: from there a lower half is that of a weight that has been changed since.
        bits = codecs.bits_of(weight)
        low = companion.to(tl.int32)
        fits = (bits & 0x7FFFFFFF) != tl.where(low < 0, 0, codecs.INFINITY)
        return codecs.float_of(tl.where(fits, bits + low.to(tl.uint32, bitcast=True), bits))
    else:
        master = companion.to(tl.float32)
        return tl.where(nearest(master, TYPE) == weight, master, weight)


@triton.jit
def part(p, STAGES: tl.constexpr, TYPE: tl.constexpr):
    """Weight and companion."""
    if SPLIT & STAGES:
        bits = codecs.bits_of(p)
        upper = tl.where(p == p, (bits + 0x8000) & UPPER, codecs.NAN).to(tl.uint32)
        return codecs.float_of(upper), tl.where(p == p, (bits - upper).to(tl.int32, bitcast=True), 0)
    else:
        weight = nearest(p, TYPE)
        if KAHAN & STAGES:
            rest = p - weight
            return weight, tl.where(rest == rest, rest, 0.0)  # not between infinities
        else:
            return weight, p


@triton.jit
def seed_of(t, number):
    """Of parameter `number` of its group, in this step."""
    key = (t[SEED].to(tl.int32).to(tl.uint64) << 24) | t[STEP].to(tl.int32).to(tl.uint64)
    return codecs.random_bits(key, number)


@triton.jit
def round_stochastically(p, seed, first, ROWS: tl.constexpr, SIZE: tl.constexpr):
    """To bfloat16. `first`: position of the tile's first element, a multiple of DRAW."""
    DRAWS: tl.constexpr = ROWS * SIZE // DRAW
    draw = codecs.random_bits(seed, first // DRAW + tl.arange(0, DRAWS)[:, None]).to(tl.uint32)
    random = ((draw & 0xFFFF) + tl.arange(0, DRAW)[None, :].to(tl.uint32) * ((draw >> 16) | 1)) & 0xFFFF
    if SIZE != DRAW:
        random = tl.reshape(random, (ROWS, SIZE))
    return codecs.float_of(tl.where(p == p, (codecs.bits_of(p) + random) & UPPER, codecs.NAN))


@triton.jit
def before(p, g, operands, t, STAGES: tl.constexpr, TYPE: tl.constexpr):
    """The parameter, stored as TYPE, and the gradient that the rule gets."""
    if WITH_COMPANION & STAGES:
        p = join(p, operands[COMPANION_AT], STAGES, TYPE)
    if OF_GRADIENT & STAGES:
        g = g * t[FACTOR]
    if CLAMP & STAGES:
        g = clamp(g, t[LIMIT])
    if SUBGRADIENT & STAGES:
        g = g + t[L1] * ((p > 0.0).to(tl.float32) - (p < 0.0).to(tl.float32))
    if ANCHOR & STAGES:
        g = tl.fma(t[ANCHOR_DECAY], p - operands[ANCHOR_AT].to(tl.float32), g)
    if MASK & STAGES:
        g = tl.where(operands[0] != 0, g, 0.0)
    if SHRINK & STAGES:
        p = p * t[KEEP]
    return p, g


@triton.jit
def after(
    p, operands, t, seed, first,
    STAGES: tl.constexpr, TYPE: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """The parameter, its average and its companion, to be stored; of the latter two only those that there are."""
    average = p
    companion = p
    if PROXIMAL & STAGES:
        p = soft_threshold(p, t[THRESHOLD])
    if MASK & STAGES:
        p = tl.where(operands[0] != 0, p, 0.0)
    if STOCHASTIC & STAGES:
        p = round_stochastically(p, seed, first, ROWS, SIZE)
    if AVERAGE & STAGES:
        if not (STOCHASTIC | WITH_COMPANION) & STAGES:  # of weights as they are stored
            p = nearest(p, TYPE)
        average = lerp(operands[AVERAGE_AT].to(tl.float32), p, t[AVERAGE_WEIGHT])
    if WITH_COMPANION & STAGES:
        p, companion = part(p, STAGES, TYPE)
    return p, average, companion
