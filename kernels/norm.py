"""Kernels for the norm of all gradients: of each chunk in a program of its own, then of all chunks together.

Sums are of float64: the squares of fp32 numbers are exact there and do not overflow. Their order is that of the chunks, whatever runs when.
"""

import triton
import triton.language as tl

from fused_opt.kernels import codecs
from fused_opt.kernels.step import ALIGNED, COLUMNS, COUNT, GRAD, address


@triton.jit
def widened(x, LARGEST: tl.constexpr):
    """What is reduced: squares in float64, or magnitudes as bits, which are in the order of the numbers, NaN above all."""
    if LARGEST:
        return codecs.bits_of(x) & 0x7FFFFFFF
    else:
        x = x.to(tl.float64)
        return x * x


@triton.jit
def combined(a, b, LARGEST: tl.constexpr):
    if LARGEST:
        return tl.maximum(a, b)
    else:
        return a + b


@triton.jit
def reduced(x, LARGEST: tl.constexpr):
    """Of all elements together, as float64."""
    if LARGEST:
        return codecs.float_of(tl.max(x, 0)).to(tl.float64)
    else:
        return tl.sum(x, 0)


@triton.jit(do_not_specialize=["partials"])  # which may begin anywhere
def measure_gradients(
    tensors, chunks, partials,
    TYPE: tl.constexpr, LARGEST: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Sum of squares, or largest magnitude, of one chunk of a gradient. `partials`: float64, a number for each chunk."""
    program = tl.program_id(0)
    row = tensors + tl.load(chunks + 2 * program).to(tl.int64) * COLUMNS
    first = tl.load(chunks + 2 * program + 1).to(tl.int64) * CHUNK
    count = tl.minimum(tl.load(row + COUNT) - first, CHUNK).to(tl.int32)
    whole = tl.where(tl.load(row + ALIGNED) != 0, count // TILE * TILE, 0)
    at = tl.arange(0, TILE)
    aligned = address(row, GRAD, TYPE, 16) + first
    found = widened(tl.zeros((TILE,), tl.float32), LARGEST)
    for i in range(0, whole, TILE):
        found = combined(found, widened(tl.load(aligned + i + at).to(tl.float32), LARGEST), LARGEST)
    grad = address(row, GRAD, TYPE, 1) + first
    for i in range(whole, count, TILE):
        found = combined(found, widened(tl.load(grad + i + at, i + at < count, 0.0).to(tl.float32), LARGEST), LARGEST)
    tl.store(partials + program, reduced(found, LARGEST))


@triton.jit(do_not_specialize=["count"])
def combine_partials(partials, total, count: tl.int64, LARGEST: tl.constexpr, TILE: tl.constexpr):
    """Of all `count` partials together, by one program."""
    at = tl.arange(0, TILE)
    if LARGEST:
        found = tl.zeros((TILE,), tl.uint32)
        for i in range(0, count, TILE):
            found = tl.maximum(found, codecs.bits_of(tl.load(partials + i + at, i + at < count, 0.0).to(tl.float32)) & 0x7FFFFFFF)
    else:
        found = tl.zeros((TILE,), tl.float64)
        for i in range(0, count, TILE):
            found += tl.load(partials + i + at, i + at < count, 0.0)
    tl.store(total, reduced(found, LARGEST))
