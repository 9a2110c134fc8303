"""Instructions, what to try them on, and what they mean: in Python's integers and fractions, whose arithmetic is exact."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import torch

from ptx.types import Array

Case = tuple[str, Sequence[Sequence[int]], Callable[..., int]]  # register 0 from all combinations of what is in registers 1, 2 and so on


def s(value: int, bits: int) -> int:
    return value - 2**bits if value >> (bits - 1) else value


def edges(bits: int) -> list[int]:
    half = 2 ** (bits - 1)
    return [0, 1, 2, 7, half - 1, half, half + 1, 2 * half - 2, 2 * half - 1, 0x9E3779B97F4A7C15 % half, half + 0x0123456789ABCDEF % half]


def quotient(a: int, b: int) -> int:
    return abs(a) // abs(b) * (-1 if (a < 0) != (b < 0) else 1)


def extracted(a: int, position: int, length: int, bits: int, signed: bool) -> int:
    position, length = position & 255, length & 255
    sign = signed and length > 0 and a >> min(position + length - 1, bits - 1) & 1
    return sum((a >> position + i & 1 if i < length and position + i < bits else sign) << i for i in range(bits))


def inserted(a: int, b: int, position: int, length: int) -> int:
    for i in range(min(length & 255, 32 - (position & 255))):
        b = b & ~(1 << (position & 255) + i) | (a >> i & 1) << (position & 255) + i
    return b


def permuted(a: int, b: int, selector: int) -> int:
    nibbles, both = [selector >> 4 * k & 15 for k in range(4)], (a | b << 32).to_bytes(8, "little")
    return int.from_bytes((255 * (both[n & 7] >> 7) if n & 8 else both[n & 7] for n in nibbles), "little")


AMOUNTS = [0, 1, 15, 16, 31, 32, 33, 63, 64, 65, 65536, 2**31, 2**32 - 1]
FIELDS = [0, 1, 5, 31, 32, 33, 63, 64, 200, 255, 256 + 3]
SELECTORS = [0x3210, 0x7654, 0x5410, 0xBA98, 0xFEDC, 0x8880, 0x9F3C]


def _of_width(r: str, b: int) -> list[Case]:
    """`r`: the registers of `b` bits."""
    two, any_ = f"%{r}0, %{r}1, %{r}2", edges(b)
    return [
        (f"add.s{b} {two}", [any_, any_], operator.add),
        (f"sub.u{b} {two}", [any_, any_], operator.sub),
        (f"mul.lo.s{b} {two}", [any_, any_], operator.mul),
        (f"mul.hi.u{b} {two}", [any_, any_], lambda x, y: x * y >> b),
        (f"mul.hi.s{b} {two}", [any_, any_], lambda x, y: s(x, b) * s(y, b) >> b),
        (f"mad.lo.u{b} {two}, %{r}1", [any_, any_], lambda x, y: x * y + x),
        (f"div.u{b} {two}", [any_, any_[1:]], operator.floordiv),
        (f"div.s{b} {two}", [any_, any_[1:]], lambda x, y: quotient(s(x, b), s(y, b))),
        (f"rem.u{b} {two}", [any_, any_[1:]], operator.mod),
        (f"rem.s{b} {two}", [any_, any_[1:]], lambda x, y: s(x, b) - quotient(s(x, b), s(y, b)) * s(y, b)),
        (f"min.s{b} {two}", [any_, any_], lambda x, y: min(s(x, b), s(y, b))),
        (f"max.u{b} {two}", [any_, any_], max),
        (f"and.b{b} {two}", [any_, any_], operator.and_),
        (f"or.b{b} {two}", [any_, any_], operator.or_),
        (f"xor.b{b} {two}", [any_, any_], operator.xor),
        (f"not.b{b} %{r}0, %{r}1", [any_], operator.invert),
        (f"neg.s{b} %{r}0, %{r}1", [any_], operator.neg),
        (f"abs.s{b} %{r}0, %{r}1", [any_], lambda x: abs(s(x, b))),
        (f"shl.b{b} %{r}0, %{r}1, %r2", [any_, AMOUNTS], lambda x, n: x << min(n, b)),
        (f"shr.u{b} %{r}0, %{r}1, %r2", [any_, AMOUNTS], lambda x, n: x >> min(n, b)),
        (f"shr.s{b} %{r}0, %{r}1, %r2", [any_, AMOUNTS], lambda x, n: s(x, b) >> min(n, b)),
        (f"setp.lt.s{b} %p0, %{r}1, %{r}2", [any_, any_], lambda x, y: s(x, b) < s(y, b)),
        (f"setp.hs.u{b} %p0, %{r}1, %{r}2", [any_, any_], operator.ge),
        (f"setp.ne.and.b{b} %p0, %{r}1, %{r}2, !%p3", [any_, any_, [0, 1]], lambda x, y, p: x != y and not p),
        (f"selp.b{b} %{r}0, %{r}1, -3, %p2", [any_, [0, 1]], lambda x, p: x if p else -3),
    ]


INTEGERS: list[Case] = [
    *_of_width("h", 16),
    *_of_width("r", 32),
    *_of_width("d", 64),
    ("mul.wide.s16 %r0, %h1, %h2", [edges(16)] * 2, lambda x, y: s(x, 16) * s(y, 16)),
    ("mul.wide.u32 %d0, %r1, %r2", [edges(32)] * 2, operator.mul),
    ("mad.wide.s32 %d0, %r1, %r2, %d3", [edges(32), edges(32), edges(64)], lambda x, y, z: s(x, 32) * s(y, 32) + z),
    ("bfe.u32 %r0, %r1, %r2, %r3", [edges(32), FIELDS, FIELDS], lambda x, p, n: extracted(x, p, n, 32, False)),
    ("bfe.s32 %r0, %r1, %r2, %r3", [edges(32), FIELDS, FIELDS], lambda x, p, n: extracted(x, p, n, 32, True)),
    ("bfe.s64 %d0, %d1, %r2, %r3", [edges(64), FIELDS, FIELDS], lambda x, p, n: extracted(x, p, n, 64, True)),
    ("bfi.b32 %r0, %r1, %r2, %r3, %r4", [edges(32), edges(32), FIELDS, FIELDS], inserted),
    ("prmt.b32 %r0, %r1, %r2, %r3", [edges(32), edges(32), SELECTORS], permuted),
    ("prmt.b32 %r0, %r1, %r2, 0x3340U", [edges(32)] * 2, lambda x, y: permuted(x, y, 0x3340)),
    ("lop3.b32 %r0, %r1, %r2, %r3, 0xE8", [edges(32)] * 3, lambda x, y, z: x & y | y & z | x & z),
    ("shf.l.wrap.b32 %r0, %r1, %r2, %r3", [edges(32), edges(32), AMOUNTS], lambda x, y, n: (y << 32 | x) << n % 32 >> 32),
    ("shf.r.wrap.b32 %r0, %r1, %r2, %r3", [edges(32), edges(32), AMOUNTS], lambda x, y, n: (y << 32 | x) >> n % 32),
    ("cvt.s16.s8 %h0, %h1", [edges(16)], lambda x: s(x % 256, 8)),
    ("cvt.u16.u32 %h0, %r1", [edges(32)], lambda x: x),
    ("cvt.s8.s32 %r0, %r1", [edges(32)], lambda x: s(x % 256, 8)),
    ("cvt.u8.u32 %r0, %r1", [edges(32)], lambda x: x % 256),
    ("cvt.s64.s32 %d0, %r1", [edges(32)], lambda x: s(x, 32)),
    ("cvt.sat.s8.s32 %r0, %r1", [edges(32)], lambda x: max(-128, min(127, s(x, 32)))),
    ("cvt.sat.u16.s64 %h0, %d1", [edges(64)], lambda x: max(0, min(65535, s(x, 64)))),
    ("xor.pred %p0, %p1, %p2", [[0, 1]] * 2, operator.xor),
]


# Floats: results from fractions, rounded once here.

NAN = 0x7FFFFFFF  # what a GPU's fp32 operations make of any NaN
WORDS = [
    *(0x00000000, 0x00000001, 0x00000003, 0x007FFFFF, 0x00800000, 0x00800001, 0x2F800000, 0x33800000, 0x3F7FFFFF, 0x3F800000),
    *(0x3F800001, 0x40490FDB, 0x4B000001, 0x4EFFFFFF, 0x4F000000, 0x5F7FFFFF, 0x7F000000, 0x7F7FFFFF, 0x7F800000, 0x7FC00000, 0x7F800123),
]
SINGLES = [word | sign for word in WORDS for sign in (0, 1 << 31)]
DOUBLES = [
    int(np.float64(x).view(np.uint64)) for x in (0.0, -0.0, 1e-310, 0.1, -1.5, 2.5, 2.0**31, -(2.0**63), 2.0**64, 1e300, math.inf, math.nan)
]


def f(word: int) -> float:
    return float(np.uint32(word).view(np.float32))


def d(word: int) -> float:
    return float(np.uint64(word).view(np.float64))


def word_of(x: float | Fraction, zero: float = 0.0) -> int:
    """Rounded to the nearest float, or to the even one of two. `zero` has the sign of a zero."""
    if isinstance(x, Fraction) and x:
        return round_exactly(x)
    x = zero if isinstance(x, Fraction) else x
    return NAN if math.isnan(x) else int(np.float32(x).view(np.uint32))


def round_exactly(x: Fraction) -> int:
    if abs(x) >= Fraction(2**25 - 1) * 2**103:  # halfway to 2^128
        return 0x7F800000 | (x < 0) << 31
    exponent = max(math.floor(math.log2(abs(x))) - 24, -149)  # or one less than it could be
    while abs(x) >= Fraction(2) ** (exponent + 24):
        exponent += 1
    return int(np.float32(math.ldexp(round(x / Fraction(2) ** exponent), exponent)).view(np.uint32)) | (x < 0) << 31


def exactly(compute: Callable[..., Fraction], *words: int) -> int:
    values = [f(word) for word in words]
    with np.errstate(all="ignore"):
        in_double = compute(*map(np.float64, values))  # for signs of zero, infinity and NaN
    if all(map(math.isfinite, values)) and math.isfinite(in_double):
        return word_of(compute(*map(Fraction, values)), zero=float(in_double))
    return word_of(float(in_double))


def chosen(words: tuple[int, ...], choose: Callable[..., float], or_nan: bool) -> int:
    numbers = [word for word in words if not math.isnan(f(word))]
    if not numbers or (or_nan and len(numbers) < len(words)):
        return NAN
    return int(choose(numbers, key=lambda word: (f(word), not word >> 31)))


def chosen_half(words: tuple[int, ...], choose: Callable[..., int], shift: int) -> int:
    return chosen(tuple((word >> shift) % 2**16 << 16 for word in words), choose, False) >> 16


def whole(x: float, rounding: Callable[[float], int], bits: int, signed: bool, nan: int = 0) -> int:
    least, most = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    if math.isnan(x):
        return nan
    return max(least, min(most, rounding(x))) if math.isfinite(x) else (most if x > 0 else least)


def double_of(x: Fraction | float) -> int:
    return int(np.float64(float(x)).view(np.uint64))


def half_of(word: int, dtype: torch.dtype) -> int:
    value = f(word)
    return 0x7FFF if math.isnan(value) else int(torch.tensor(value).to(dtype).view(torch.int16)) % 2**16


def both(compute: Callable[..., int], *pairs: int) -> int:
    return compute(*(pair % 2**32 for pair in pairs)) | compute(*(pair >> 32 for pair in pairs)) << 32


HALVES = [word >> 16 for word in SINGLES]
PAIRS = [a | b << 32 for a, b in zip(SINGLES, SINGLES[7:] + SINGLES[:7], strict=True)]
FINITE = [int(np.float64(x).view(np.uint64)) for x in (0.1, -1.5, 1 + 2.0**-52, 1e-310, 2.0**-1000, 2.0**31, -(2.0**63), 1e120)]


def _of_two(name: str, compute: Callable[[Any, Any], Any]) -> list[Case]:
    return [
        (f"{name}.rn.f32 %r0, %r1, %r2", [SINGLES, SINGLES], lambda x, y: exactly(compute, x, y)),
        (f"{name}.rn.f32x2 %d0, %d1, %d2", [PAIRS, PAIRS], lambda x, y: both(lambda a, b: exactly(compute, a, b), x, y)),
        (f"{name}.rn.f64 %d0, %d1, %d2", [FINITE, FINITE], lambda x, y: double_of(compute(Fraction(d(x)), Fraction(d(y))))),
    ]


def _comparison(name: str, compare: Callable[[float, float], bool]) -> Case:
    return f"setp.{name}.f32 %p0, %r1, %r2", [SINGLES, SINGLES], lambda x, y: compare(f(x), f(y))


def _or_unordered(compare: Callable[[float, float], bool]) -> Callable[[float, float], bool]:
    return lambda a, b: math.isnan(a) or math.isnan(b) or compare(a, b)


def multiply_add(a: Any, b: Any, c: Any) -> Any:
    return a * b + c


ORDERED = {"eq": operator.eq, "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge}
FLOATS: list[Case] = [
    *_of_two("add", operator.add),
    *_of_two("sub", operator.sub),
    *_of_two("mul", operator.mul),
    ("fma.rn.f32 %r0, %r1, %r2, %r3", [SINGLES[::3], SINGLES[::5], SINGLES], lambda *x: exactly(multiply_add, *x)),
    ("fma.rn.f32x2 %d0, %d1, %d2, %d3", [PAIRS[::3]] * 3, lambda *x: both(lambda *y: exactly(multiply_add, *y), *x)),
    ("fma.rn.f64 %d0, %d1, %d2, %d3", [FINITE] * 3, lambda *x: double_of(multiply_add(*(Fraction(d(y)) for y in x)))),
    ("div.rn.f32 %r0, %r1, %r2", [SINGLES, [w for w in SINGLES if w % 2**31]], lambda x, y: exactly(operator.truediv, x, y)),
    ("sqrt.rn.f32 %r0, %r1", [SINGLES], lambda x: word_of(math.sqrt(f(x)) if f(x) > 0 else f(x) if f(x) == 0 else math.nan)),
    ("neg.f32 %r0, %r1", [SINGLES], lambda x: x ^ 1 << 31),
    ("abs.f32 %r0, %r1", [SINGLES], lambda x: x & ~(1 << 31)),
    ("min.f32 %r0, %r1, %r2", [SINGLES] * 2, lambda *x: chosen(x, min, False)),
    ("max.f32 %r0, %r1, %r2", [SINGLES] * 2, lambda *x: chosen(x, max, False)),
    ("min.NaN.f32 %r0, %r1, %r2", [SINGLES] * 2, lambda *x: chosen(x, min, True)),
    ("max.f32 %r0, %r1, %r2, %r3", [SINGLES[::3], SINGLES[::5], SINGLES], lambda *x: chosen(x, max, False)),
    ("max.NaN.f32 %r0, %r1, %r2, %r3", [SINGLES[::3], SINGLES[::5], SINGLES], lambda *x: chosen(x, max, True)),
    *(_comparison(name, compare) for name, compare in ORDERED.items()),
    *(_comparison(f"{name}u", _or_unordered(compare)) for name, compare in ORDERED.items()),
    _comparison("ne", lambda a, b: a < b or a > b),
    _comparison("neu", operator.ne),
    _comparison("num", lambda a, b: not (math.isnan(a) or math.isnan(b))),
    _comparison("nan", lambda a, b: math.isnan(a) or math.isnan(b)),
    ("cvt.rn.f32.s32 %r0, %r1", [edges(32)], lambda x: word_of(Fraction(s(x, 32)))),
    ("cvt.rn.f32.u64 %r0, %d1", [[*edges(64), 2**63 + 2**39, 2**63 + 2**39 + 1]], lambda x: word_of(Fraction(x))),
    ("cvt.rn.f32.s16 %r0, %r1", [edges(32)], lambda x: word_of(Fraction(s(x % 65536, 16)))),
    ("cvt.rzi.s32.f32 %r0, %r1", [SINGLES], lambda x: whole(f(x), math.trunc, 32, True)),
    ("cvt.rni.u32.f32 %r0, %r1", [SINGLES], lambda x: whole(f(x), round, 32, False)),
    ("cvt.rmi.s16.f32 %h0, %r1", [SINGLES], lambda x: whole(f(x), math.floor, 16, True)),
    ("cvt.rpi.s64.f32 %d0, %r1", [SINGLES], lambda x: whole(f(x), math.ceil, 64, True, nan=1 << 63)),
    ("cvt.rzi.u64.f64 %d0, %d1", [DOUBLES], lambda x: whole(d(x), math.trunc, 64, False, nan=1 << 63)),
    ("cvt.rzi.s32.f64 %r0, %d1", [DOUBLES], lambda x: whole(d(x), math.trunc, 32, True, nan=1 << 31)),
    ("cvt.rn.f32.f64 %r0, %d1", [DOUBLES], lambda x: word_of(Fraction(d(x)) if math.isfinite(d(x)) else d(x), zero=d(x))),
    ("cvt.f32.bf16 %r0, %h1", [edges(16)], lambda x: x << 16),
    ("cvt.f32.f16 %r0, %h1", [range(0, 65536, 7)], lambda x: word_of(float(np.uint16(x).view(np.float16)))),
    ("add.rn.f32.bf16 %r0, %h1, %r2", [HALVES, SINGLES], lambda x, y: exactly(operator.add, x << 16, y)),
    ("sub.rn.f32.bf16 %r0, %h1, %r2", [HALVES, SINGLES], lambda x, y: exactly(operator.sub, x << 16, y)),
    (
        "sub.rn.f32.f16 %r0, %h1, %r2",
        [range(0, 31744, 99), SINGLES],
        lambda x, y: exactly(operator.sub, word_of(float(np.uint16(x).view(np.float16))), y),
    ),
    ("cvt.f64.bf16 %d0, %h1", [[half for half in HALVES if f(half << 16) == f(half << 16)]], lambda x: double_of(f(x << 16))),
    ("cvt.f64.f16 %d0, %h1", [range(0, 31744, 7)], lambda x: double_of(Fraction(float(np.uint16(x).view(np.float16))))),
    ("cvt.rn.bf16.f32 %h0, %r1", [[*SINGLES, 0x3F808000, 0x3F818000, 0x7F7F8000]], lambda x: half_of(x, torch.bfloat16)),
    ("cvt.rn.f16.f32 %h0, %r1", [[*SINGLES, 0x3F801000, 0x3F803000, 0x477FF000]], lambda x: half_of(x, torch.float16)),
    ("cvt.rn.bf16x2.f32 %r0, %r1, %r2", [SINGLES] * 2, lambda x, y: half_of(x, torch.bfloat16) << 16 | half_of(y, torch.bfloat16)),
    ("cvt.rn.f16x2.f32 %r0, %r1, %r2", [SINGLES] * 2, lambda x, y: half_of(x, torch.float16) << 16 | half_of(y, torch.float16)),
    ("abs.bf16 %h0, %h1", [HALVES], lambda x: x & 0x7FFF),
    ("neg.f16x2 %r0, %r1", [edges(32)], lambda x: x ^ 0x80008000),
    ("max.bf16x2 %r0, %r1, %r2", [SINGLES, SINGLES], lambda x, y: chosen_half((x, y), max, 0) | chosen_half((x, y), max, 16) << 16),
    ("min.NaN.bf16 %h0, %h1, %h2", [HALVES, HALVES], lambda x, y: chosen((x << 16, y << 16), min, True) >> 16),
    ("setp.neu.bf16 %p0, %h1, %h2", [HALVES, HALVES], lambda x, y: f(x << 16) != f(y << 16)),
    ("setp.lt.bf16 %p0, %h1, %h2", [HALVES, HALVES], lambda x, y: f(x << 16) < f(y << 16)),
    ("setp.geu.f16 %p0, %h1, 0x3C00", [range(0, 65536, 7)], lambda x: not float(np.uint16(x).view(np.float16)) < 1),
    ("setp.lt.bf16x2 %p0|%p1, %r1, %r2", [SINGLES, SINGLES], lambda x, y: f(x << 16 & 2**32 - 1) < f(y << 16 & 2**32 - 1)),
    ("setp.neu.bf16x2 %p1|%p0, %r1, %r2", [SINGLES, SINGLES], lambda x, y: f(x >> 16 << 16) != f(y >> 16 << 16)),
    ("mov.b64 %d0, {%r1, %r2}", [edges(32)] * 2, lambda x, y: x | y << 32),
    ("mov.b64 {_, %r0}, %d1", [edges(64)], lambda x: x >> 32),
    ("mov.b32 {%h0, _}, %r1", [edges(32)], lambda x: x),
]


def hard_to_round(count: int) -> list[tuple[Array, Array, Array]]:
    """Of a * b + c: any bits; halfway between floats but for less than fp64 holds; below normal numbers; cancelled; about 2^128."""
    random = np.random.default_rng(0)

    def exponents(low: int, high: int) -> Array:
        return np.asarray(np.ldexp(random.choice([-1.0, 1.0], count), random.integers(low, high, count)))

    def thirteen_bits() -> Array:
        return random.integers(4097, 8192, count) * 1.0

    def near_one() -> Array:
        return np.asarray(1 + np.ldexp(random.integers(-8, 8, count) * 1.0, -23))

    a, b = near_one() * exponents(-90, 90), near_one() * exponents(-30, 30)
    triples = [
        [random.integers(0, 2**32, count, dtype=np.uint32).view(np.float32) for _ in "abc"],
        [thirteen_bits(), thirteen_bits(), exponents(-149, 5)],
        [near_one() * exponents(-76, -73), near_one() * exponents(-76, -73), np.ldexp(random.integers(-99, 99, count) * 1.0, -149)],
        [a, b, -(a.astype(np.float32) * b.astype(np.float32))],
        [near_one() * exponents(63, 65), near_one() * exponents(63, 65), near_one() * exponents(60, 128)],
    ]
    return [(x.astype(np.float32), y.astype(np.float32), z.astype(np.float32)) for x, y, z in triples]
