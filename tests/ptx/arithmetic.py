"""Exact arithmetic, on arrays that broadcast: what a GPU's bits are, where numpy has no such function or other bits.

The NaN that an fp32 operation makes is 0x7fffffff on a GPU, whatever NaN went in; to 16 bits 0x7fff. Those of fp64 keep the CPU's bits.
"""

from __future__ import annotations

import ctypes
import ctypes.util
from collections.abc import Callable

import numpy as np

from ptx.types import Array

_NANS = {np.dtype(np.float16): np.uint16(0x7FFF).view(np.float16), np.dtype(np.float32): np.uint32(0x7FFFFFFF).view(np.float32)}

_libm = ctypes.CDLL(ctypes.util.find_library("m"))
_libm.fma.restype = ctypes.c_double
_libm.fma.argtypes = [ctypes.c_double] * 3
_fma_f64 = np.frompyfunc(_libm.fma, 3, 1)


def with_nan_of_gpu(values: Array) -> Array:
    """Changes `values`, which must be new."""
    if values.dtype in _NANS:
        nan = np.isnan(values)
        if nan.any():
            values[nan] = _NANS[values.dtype]
    return values


def fma_f32(a: Array, b: Array, c: Array) -> Array:
    """a * b + c, rounded once. In fp64 the product is exact; its sum with `c` is rounded to 53 bits, and then to 24.

    Two roundings differ from one only if the first gives a number halfway between two of fp32, and is not exact: its last 29 bits are then
    a one and zeros, or it is below fp32's normal numbers. There the sum is rounded to odd instead: if not exact, to that neighbour whose
    last bit is one, which no second rounding takes for a tie.
    """
    product = a.astype(np.float64) * b
    total = product + c
    suspect = (total.view(np.int64) & 0x1FFFFFFF) == 0x10000000
    suspect |= np.abs(total) < 2.0**-126
    result = total.astype(np.float32)
    if suspect.any():
        result[suspect] = _to_odd(*(np.broadcast_to(x, total.shape)[suspect] for x in (product, c, total))).astype(np.float32)
    return with_nan_of_gpu(result)


def _to_odd(a: Array, b: Array, total: Array) -> Array:
    back = total - a
    error = (a - (total - back)) + (b - back)  # exact: a + b == total + error
    even = (total.view(np.int64) & 1) == 0
    return np.where((error != 0) & even, np.nextafter(total, np.where(error > 0, np.inf, -np.inf)), total)


def fma_f64(a: Array, b: Array, c: Array) -> Array:
    return np.asarray(_fma_f64(a, b, c), dtype=np.float64)  # one call of the C library for each thread


def minimum(a: Array, b: Array) -> Array:
    """The number, if one is NaN; -0 is less than +0."""
    return _choose(np.fmin, np.bitwise_or, a, b)


def maximum(a: Array, b: Array) -> Array:
    return _choose(np.fmax, np.bitwise_and, a, b)


def minimum_or_nan(a: Array, b: Array) -> Array:
    return _choose(np.minimum, np.bitwise_or, a, b)


def maximum_or_nan(a: Array, b: Array) -> Array:
    return _choose(np.maximum, np.bitwise_and, a, b)


def _choose(choose: np.ufunc, sign_of_zero: np.ufunc, a: Array, b: Array) -> Array:
    bits = np.dtype(f"u{a.dtype.itemsize}")
    equal = sign_of_zero(a.view(bits), b.view(bits)).view(a.dtype)  # of equal numbers only zeros can differ
    return with_nan_of_gpu(np.where(a == b, equal, choose(a, b)))


def negative(a: Array) -> Array:
    bits, sign = _bits_and_sign(a)
    return (bits ^ sign).view(a.dtype)


def absolute(a: Array) -> Array:
    bits, sign = _bits_and_sign(a)
    return (bits & ~sign).view(a.dtype)


def _bits_and_sign(a: Array) -> tuple[Array, Array]:
    bits = a.view(np.dtype(f"u{a.dtype.itemsize}"))
    return bits, np.array([1 << (8 * a.dtype.itemsize - 1)], dtype=bits.dtype)


def bf16_of_f32(a: Array) -> Array:
    bits = a.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(a), np.uint32(0x7FFF), rounded).astype(np.uint16)


def f32_of_bf16(a: Array) -> Array:
    return (a.astype(np.uint32) << 16).view(np.float32)


def f32_of_f16(a: Array) -> Array:
    return with_nan_of_gpu(a.astype(np.float32))


def f16_of_f32(a: Array) -> Array:
    return with_nan_of_gpu(a.astype(np.float16))


def float_to_int(rounding: Callable[[Array], Array], dtype: np.dtype[np.integer]) -> Callable[[Array], Array]:
    """Clamped to what `dtype` holds; NaN gives zero, but in 64 bits, and from fp64, the sign bit."""
    bits, limits = 8 * dtype.itemsize, np.iinfo(dtype)
    least, most = (np.array([limit], dtype=dtype) for limit in (limits.min, limits.max))
    past = 2.0 ** (bits - (dtype.kind == "i"))  # the largest number is none of fp32; this one is

    def convert(a: Array) -> Array:
        rounded = rounding(a)
        nan = 1 << (bits - 1) if bits == 64 or a.dtype.itemsize == 8 else 0
        inside = (rounded >= limits.min) & (rounded < past)
        clamped = np.where(rounded < 0, least, most)
        clamped[np.isnan(a)] = np.array(nan, dtype=f"u{dtype.itemsize}").view(dtype)
        return np.where(inside, np.where(inside, rounded, 0).astype(dtype), clamped)

    return convert


def shift_left(a: Array, amount: Array) -> Array:
    """By 32 or more, if of 32 bits: zero."""
    return a << _clamp_shift(a, amount)


def shift_right(a: Array, amount: Array) -> Array:
    return a >> _clamp_shift(a, amount)


def _clamp_shift(a: Array, amount: Array) -> Array:
    return np.minimum(amount, 8 * a.dtype.itemsize).astype(a.dtype)  # numpy shifts by all bits as PTX does


def divide(a: Array, b: Array) -> Array:
    """Towards zero. By zero: all ones."""
    quotient = (a - np.fmod(a, b)) // b
    return np.where(b == 0, np.array(-1).astype(a.dtype), quotient)


def remainder(a: Array, b: Array) -> Array:
    return np.where(b == 0, a, np.fmod(a, b))


def multiply_wide(a: Array, b: Array) -> Array:
    wide = np.dtype(f"{a.dtype.kind}{2 * a.dtype.itemsize}")
    return np.multiply(a, b, dtype=wide)


def multiply_high(a: Array, b: Array) -> Array:
    bits = 8 * a.dtype.itemsize
    if bits < 64:
        return np.asarray(multiply_wide(a, b) >> bits, dtype=a.dtype)
    high: Array = _high_of_u64(a.view(np.uint64), b.view(np.uint64)).view(a.dtype)
    return np.asarray(high - np.where(a < 0, b, 0) - np.where(b < 0, a, 0)) if a.dtype.kind == "i" else high


def _high_of_u64(a: Array, b: Array) -> Array:
    a_low, a_high, b_low, b_high = a & 0xFFFFFFFF, a >> 32, b & 0xFFFFFFFF, b >> 32
    middle = a_high * b_low + (a_low * b_low >> 32)
    high: Array = a_high * b_high + (middle >> 32) + ((a_low * b_high + (middle & 0xFFFFFFFF)) >> 32)
    return high


def extract_bits(a: Array, position: Array, length: Array) -> Array:
    """bfe: `length` bits from `position`, with the last one's sign if signed."""
    above = 8 * a.dtype.itemsize - np.minimum(length & 0xFF, 8 * a.dtype.itemsize)
    return shift_right(shift_left(shift_right(a, position & 0xFF), above), above)


def insert_bits(a: Array, b: Array, position: Array, length: Array) -> Array:
    """bfi: into `b` the last `length` bits of `a`, at `position`."""
    bits = 8 * a.dtype.itemsize
    ones = shift_right(np.full(1, -1, dtype=np.int64).astype(a.dtype), bits - np.minimum(length & 0xFF, bits))
    mask = shift_left(ones, position & 0xFF)
    return (b & ~mask) | (shift_left(a, position & 0xFF) & mask)


def permute_bytes(a: Array, b: Array, selector: Array) -> Array:
    """prmt: each nibble of `selector` chooses one of eight bytes, or with its top bit the sign of that byte."""
    both = (b.astype(np.uint64) << 32) | a
    result: Array = np.zeros(1, dtype=np.uint32)
    for k in range(4):
        nibble = (selector >> (4 * k)) & 0xF
        byte = ((both >> (8 * (nibble & 7)).astype(np.uint64)) & 0xFF).astype(np.uint32)
        byte = np.where(nibble & 8, (byte >> 7) * 0xFF, byte)
        result = result | (byte << (8 * k))
    return result


def funnel_shift_left(low: Array, high: Array, amount: Array) -> Array:
    """shf.l.wrap: the upper half of both, shifted."""
    both = (high.astype(np.uint64) << 32) | low
    return ((both << (amount & 31).astype(np.uint64)) >> 32).astype(np.uint32)


def funnel_shift_right(low: Array, high: Array, amount: Array) -> Array:
    both = (high.astype(np.uint64) << 32) | low
    return (both >> (amount & 31).astype(np.uint64)).astype(np.uint32)


def logic_of_three(a: Array, b: Array, c: Array, table: Array) -> Array:
    """lop3: for each bit, that bit of the table whose number the three bits are."""
    result: Array = np.zeros(1, dtype=np.uint32)
    for k in range(8):
        in_table = -((table >> k) & 1)  # all ones or zero
        result = result | in_table & (a if k & 4 else ~a) & (b if k & 2 else ~b) & (c if k & 1 else ~c)
    return result
