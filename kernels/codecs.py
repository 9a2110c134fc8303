"""8-bit codes, as csrc/kernels/code8.h has them, and how their fractions are rounded, as csrc/kernels/blocks.h has it.

A code represents a number relative to the largest magnitude of its block, the scale. Functions see tiles with a block in each row, and its
scale in a tile of one column.
"""

import triton
import triton.language as tl

OFFSET_BITS = tl.constexpr(19)
OFFSET_MASK = tl.constexpr((1 << 19) - 1)
NEAREST = tl.constexpr(0x2000 * 32 + 16)  # the offset that rounds to the nearest
ONE = tl.constexpr(127 << 23)  # the bits of 1.0
CODE_OF_ONE = tl.constexpr((127 << 23) >> 19)
INFINITY = tl.constexpr(0x7F800000)
NAN = tl.constexpr(0x7FC00000)


@triton.jit
def bits_of(x):
    return x.to(tl.uint32, bitcast=True)


@triton.jit
def float_of(bits):
    return bits.to(tl.uint32).to(tl.float32, bitcast=True)


@triton.jit
def if_finite(scale, bits):
    """From bits; but NaN if `scale`, which has no sign, is infinite or NaN."""
    return float_of(tl.where(bits_of(scale) < INFINITY, bits, NAN))


@triton.jit
def scale_of(values, SIGNED: tl.constexpr, mask):
    """The largest magnitude of each row; NaN where one is not finite. A negative number without sign counts as not finite."""
    magnitudes = bits_of(values)
    if SIGNED:
        magnitudes = magnitudes & 0x7FFFFFFF
    if mask is not None:
        magnitudes = tl.where(mask, magnitudes, 0)
    largest = tl.max(magnitudes, 1, keep_dims=True)
    return float_of(tl.where(largest < INFINITY, largest, NAN))


# Mu-law: 16 codes to each power of two of 1 + mu |x|, mu 247 with and 63487 without sign.


@triton.jit
def mulaw_mu(SIGNED: tl.constexpr):
    MU: tl.constexpr = 247.0 if SIGNED else 63487.0
    return MU


@triton.jit
def mulaw_unit(scale, SIGNED: tl.constexpr):
    """scale / mu, rounded such that its last bit is 0; a normal number, mu of which are finite."""
    LARGEST: tl.constexpr = 0x7B84A9F8 if SIGNED else 0x77842190
    mu = mulaw_mu(SIGNED)
    # scale / mu rounded as IEEE 754 asks, in three operations: compared with the division for all 2^31 scales and both mu.
    INVERSE: tl.constexpr = 0.004048583097755909 if SIGNED else 1.5751256796647795e-05
    nearest = scale * INVERSE
    nearest = tl.fma(tl.fma(-nearest, mu, scale), INVERSE, nearest)
    bits = bits_of(nearest)
    odd = bits & 1
    below = bits_of(tl.fma(-nearest, mu, scale)) >> 31
    bits = bits + odd - 2 * (odd & below)
    return if_finite(scale, tl.minimum(tl.maximum(bits, 1 << 23), LARGEST))


@triton.jit
def mulaw_inverse(scale, SIGNED: tl.constexpr):
    bits = bits_of(tl.div_rn(tl.full(scale.shape, mulaw_mu(SIGNED), tl.float32), scale))
    return if_finite(scale, tl.minimum(bits, 253 << 23))


@triton.jit
def mulaw_decode(codes, unit, SIGNED: tl.constexpr):
    codes = codes.to(tl.int32)
    if SIGNED:
        magnitudes = float_of((tl.abs(codes) << OFFSET_BITS) + ONE)
        unit = float_of(bits_of(unit) ^ (codes.to(tl.uint32, bitcast=True) & 0x80000000))
    else:
        magnitudes = float_of((codes << OFFSET_BITS) + ONE)
    return tl.fma(magnitudes, unit, -unit)


@triton.jit
def mulaw_encode(values, inverse, offsets, SIGNED: tl.constexpr):
    magnitudes = tl.abs(values) if SIGNED else values
    codes = ((bits_of(tl.fma(magnitudes, inverse, 1.0)) - ONE + offsets) >> OFFSET_BITS).to(tl.int32)
    if SIGNED:
        codes = tl.where(values < 0, -codes, codes)
    else:
        codes = tl.maximum(codes, tl.minimum(bits_of(values), 1).to(tl.int32))  # a second moment that was positive stays so; no -0 here
    codes = tl.where(inverse == inverse, codes, 0)  # where the scale is NaN codes mean nothing
    return codes.to(tl.int8) if SIGNED else codes.to(tl.uint8)


# Linear: code / 127.


@triton.jit
def linear_unit(scale, SIGNED: tl.constexpr):
    LEAST: tl.constexpr = 127 * 2.0**-126
    return if_finite(scale, bits_of(tl.where(scale < LEAST, LEAST, scale)))


@triton.jit
def linear_inverse(scale, SIGNED: tl.constexpr):
    return tl.div_rn(tl.full(scale.shape, 127.0, tl.float32), linear_unit(scale, SIGNED))


@triton.jit
def linear_decode(codes, unit, SIGNED: tl.constexpr):
    UNIT: tl.constexpr = 0.007874015718698502  # 1 / 127 as float
    return codes.to(tl.float32) * UNIT * unit


@triton.jit
def linear_encode(values, inverse, offsets, SIGNED: tl.constexpr):
    """Rounded to an integer, ties to even, by adding a number whose last bit weighs 1; see `Linear` in csrc/kernels/code8.h."""
    HALF: tl.constexpr = 1 << 18
    MOVE: tl.constexpr = (1 - 2.0**-10) / (1 << 19)
    moves = (offsets.to(tl.int32) - (HALF + 16)).to(tl.float32) * MOVE
    codes = (values * inverse + moves + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000
    return tl.where(inverse == inverse, codes, 0).to(tl.int8)


@triton.jit
def random_bits(seed, place):
    """64 random bits, number `place` of a seed, uint64. (SplitMix64, Steele, Lea and Flood 2014.)"""
    x = seed + (place.to(tl.uint64) + 1) * 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def stochastic_offsets(seed, block, positions):
    """What is added before the fraction of a code is cut off: a Weyl sequence (see `Offsets` in csrc/kernels/code8.h).

    Of the elements at `positions` of block number `block`; `seed`: uint64.
    """
    draw = random_bits(seed, block).to(tl.uint32)
    return (positions * (((draw >> 16) | 1) * 32) + ((draw & 0xFFFF) * 32 + 16)) & OFFSET_MASK


@triton.jit
def table_encode(values, scale, offsets, table):
    """The code of a table of 256 ascending numbers: the entry at or below the value, or the next one (csrc/quantize.cpp)."""
    x = tl.where(scale > 0, tl.div_rn(values, scale), 0.0)
    above = tl.zeros(x.shape, tl.int32)
    for k in tl.static_range(8):  # by bisection: how many entries are not above x
        above = tl.where(x < tl.load(table + above + ((128 >> k) - 1)), above, above + (128 >> k))
    above = tl.maximum(above, 1)
    low = tl.load(table + above - 1)
    high = tl.load(table + above)
    up = tl.div_rn(x - low, high - low) + offsets.to(tl.float32) * (1.0 / (1 << 19)) >= 1.0
    return tl.where(up, above, above - 1).to(tl.uint8)
