"""The table of instructions that compute a value from values: opcode with its modifiers, types, function.

An opcode stands here with exactly those modifiers that it may have. Left out on purpose: approximations (.approx, .full) and .ftz, whose
bits nobody promises; fp32 add, sub and mul without .rn, which ptxas may contract to a fused multiply-add; arithmetic in 16-bit floats
that rounds, since the kernels compute in fp32 and round once.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import numpy as np

from ptx import arithmetic
from ptx.types import TYPES, Array, Type

Function = Callable[..., Array]


@dataclass(frozen=True)
class Operation:
    result: Type
    operands: tuple[Type, ...]
    compute: Function


OPERATIONS: dict[str, Operation] = {}

_SIGNED, _UNSIGNED = ("s16", "s32", "s64"), ("u16", "u32", "u64")
_INTEGERS = _SIGNED + _UNSIGNED
_BITS = ("b16", "b32", "b64")
_FLOATS = ("f32", "f64")
_HALVES = ("f16", "bf16", "f16x2", "bf16x2")

_CHOICES: dict[str, Function] = {
    "min": arithmetic.minimum,
    "max": arithmetic.maximum,
    "min.NaN": arithmetic.minimum_or_nan,
    "max.NaN": arithmetic.maximum_or_nan,
}
_WIDEN: dict[str, Function] = {"f16": arithmetic.f32_of_f16, "bf16": arithmetic.f32_of_bf16}
_NARROW: dict[str, Function] = {"f16": arithmetic.f16_of_f32, "bf16": arithmetic.bf16_of_f32}


def _add(opcode: str, compute: Function, result: str, *operands: str) -> None:
    assert opcode not in OPERATIONS, opcode
    OPERATIONS[opcode] = Operation(TYPES[result], tuple(TYPES[name] for name in operands), compute)


def _twice_as_wide(name: str) -> str:
    return f"{name[0]}{2 * int(name[1:])}"


def _gpu_nan(compute: Function) -> Function:
    return lambda *operands: arithmetic.with_nan_of_gpu(compute(*operands))


def _select(a: Array, b: Array, chosen: Array) -> Array:
    return np.where(chosen, a, b)


def _then_add(multiply: Function) -> Function:
    return lambda a, b, c: multiply(a, b) + c


def _integers() -> None:
    for t in _INTEGERS:
        for name, compute in (
            ("add", operator.add),
            ("sub", operator.sub),
            ("mul.lo", operator.mul),
            ("mul.hi", arithmetic.multiply_high),
            ("div", arithmetic.divide),
            ("rem", arithmetic.remainder),
            ("min", np.minimum),
            ("max", np.maximum),
        ):
            _add(f"{name}.{t}", compute, t, t, t)
        for name, compute in {"mad.lo": operator.mul, "mad.hi": arithmetic.multiply_high}.items():
            _add(f"{name}.{t}", _then_add(compute), t, t, t, t)
        _add(f"shr.{t}", arithmetic.shift_right, t, t, "u32")
    for t in ("s16", "s32", "u16", "u32"):
        _add(f"mul.wide.{t}", arithmetic.multiply_wide, _twice_as_wide(t), t, t)
        _add(f"mad.wide.{t}", _then_add(arithmetic.multiply_wide), _twice_as_wide(t), t, t, _twice_as_wide(t))
    for t in _SIGNED:
        _add(f"neg.{t}", operator.neg, t, t)
        _add(f"abs.{t}", np.abs, t, t)
    for t in ("s32", "u32", "s64", "u64"):
        _add(f"bfe.{t}", arithmetic.extract_bits, t, t, "u32", "u32")


def _bit_patterns() -> None:
    for t in ("pred", *_BITS):
        for name, compute in {"and": operator.and_, "or": operator.or_, "xor": operator.xor}.items():
            _add(f"{name}.{t}", compute, t, t, t)
        _add(f"not.{t}", np.invert, t, t)
    for t in _BITS:
        _add(f"shl.{t}", arithmetic.shift_left, t, t, "u32")
        _add(f"shr.{t}", arithmetic.shift_right, t, t, "u32")
    for t in ("b32", "b64"):
        _add(f"bfi.{t}", arithmetic.insert_bits, t, t, t, "u32", "u32")
    _add("prmt.b32", arithmetic.permute_bytes, "b32", "b32", "b32", "b32")
    _add("lop3.b32", arithmetic.logic_of_three, "b32", "b32", "b32", "b32", "b32")
    _add("shf.l.wrap.b32", arithmetic.funnel_shift_left, "b32", "b32", "b32", "u32")
    _add("shf.r.wrap.b32", arithmetic.funnel_shift_right, "b32", "b32", "b32", "u32")
    for t in (*_INTEGERS, *_BITS, "f16", *_FLOATS, "pred"):
        _add(f"mov.{t}", lambda a: a, t, t)
    for t in (*_INTEGERS, *_BITS, *_FLOATS):
        _add(f"selp.{t}", _select, t, t, t, "pred")


def _floats() -> None:
    fma = {"f32": arithmetic.fma_f32, "f32x2": arithmetic.fma_f32, "f64": arithmetic.fma_f64}
    for t in (*_FLOATS, "f32x2"):
        for name, compute in {"add": operator.add, "sub": operator.sub, "mul": operator.mul}.items():
            _add(f"{name}.rn.{t}", _gpu_nan(compute), t, t, t)
        _add(f"fma.rn.{t}", fma[t], t, t, t, t)
    for t in _FLOATS:
        _add(f"div.rn.{t}", _gpu_nan(operator.truediv), t, t, t)
        _add(f"sqrt.rn.{t}", _gpu_nan(np.sqrt), t, t)
        _add(f"rcp.rn.{t}", _gpu_nan(lambda a: np.array([1], dtype=a.dtype) / a), t, t)
        _add(f"neg.{t}", arithmetic.negative, t, t)
        _add(f"abs.{t}", arithmetic.absolute, t, t)
        _add(f"copysign.{t}", lambda sign, magnitude: np.copysign(magnitude, sign), t, t, t)
    for t, (name, choose) in product(("f32", *_HALVES), _CHOICES.items()):
        _add(f"{name}.{t}", choose if t == "f32" else _in_f32(t, choose), t, t, t)
    for t in _HALVES:
        _add(f"neg.{t}", arithmetic.negative, t, t)
        _add(f"abs.{t}", arithmetic.absolute, t, t)
    _add("min.f64", arithmetic.minimum, "f64", "f64", "f64")
    _add("max.f64", arithmetic.maximum, "f64", "f64", "f64")


def _in_f32(name: str, choose: Function) -> Function:
    """Of 16-bit floats, which fp32 holds exactly: the result is one of them, or NaN."""
    widen, narrow = _WIDEN[name.removesuffix("x2")], _NARROW[name.removesuffix("x2")]
    return lambda a, b: narrow(choose(widen(a), widen(b)))


def _of_three(compute: Function) -> Function:
    return lambda a, b, c: compute(compute(a, b), c)


THREE_OPERANDS: dict[str, Operation] = {  # of sm_100, under the names of those with two
    f"{name}.f32": Operation(TYPES["f32"], (TYPES["f32"],) * 3, _of_three(compute)) for name, compute in _CHOICES.items()
}


def _comparisons() -> None:
    equal = {"eq": operator.eq, "ne": operator.ne}
    ordered = {"lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge}
    unsigned = {"lo": operator.lt, "ls": operator.le, "hi": operator.gt, "hs": operator.ge}
    of_floats: dict[str, Function] = {  # false where an operand is NaN, as numpy's are but for !=; those with a u are true there
        **ordered,
        "eq": operator.eq,
        "ne": lambda a, b: (a < b) | (a > b),
        "ltu": lambda a, b: ~(a >= b),
        "leu": lambda a, b: ~(a > b),
        "gtu": lambda a, b: ~(a <= b),
        "geu": lambda a, b: ~(a < b),
        "equ": lambda a, b: ~((a < b) | (a > b)),
        "neu": operator.ne,
        "num": lambda a, b: (a == a) & (b == b),
        "nan": lambda a, b: (a != a) | (b != b),
    }
    for types, comparisons in (
        (_BITS, equal),
        (_SIGNED, equal | ordered),
        (_UNSIGNED, equal | ordered | unsigned),
        (("f16", *_FLOATS), of_floats),
        (("bf16",), {name: _of_bf16(compare) for name, compare in of_floats.items()}),
    ):
        for t, (name, compare) in product(types, comparisons.items()):
            _add(f"setp.{name}.{t}", compare, "pred", t, t)
            for combine, combined in {"and": operator.and_, "or": operator.or_, "xor": operator.xor}.items():
                _add(f"setp.{name}.{combine}.{t}", _combined(compare, combined), "pred", t, t, "pred")


def _of_bf16(compare: Function) -> Function:
    return lambda a, b: compare(arithmetic.f32_of_bf16(a), arithmetic.f32_of_bf16(b))


def _combined(compare: Function, combine: Function) -> Function:
    return lambda a, b, other: combine(compare(a, b), other)


def _conversions() -> None:
    whole = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
    integers = [f"{kind}{bits}" for kind in "su" for bits in (8, 16, 32, 64)]
    for result, source in product(integers, integers):
        _add(f"cvt.{result}.{source}", _cast(result), result, source)
        _add(f"cvt.sat.{result}.{source}", _clamped(result), result, source)
    for t, i in product(_FLOATS, integers):
        _add(f"cvt.rn.{t}.{i}", _cast(t), t, i)
        for name, rounding in whole.items():
            _add(f"cvt.{name}.{i}.{t}", arithmetic.float_to_int(rounding, TYPES[i].dtype), i, t)
    for t, (name, rounding) in product(_FLOATS, whole.items()):
        _add(f"cvt.{name}.{t}.{t}", _gpu_nan(rounding), t, t)
    _add("cvt.f64.f32", _cast("f64"), "f64", "f32")
    _add("cvt.rn.f32.f64", _gpu_nan(_cast("f32")), "f32", "f64")
    for t, narrow in _NARROW.items():
        for name, compute in {"add": operator.add, "sub": operator.sub}.items():  # of sm_100: the first operand is widened
            _add(f"{name}.rn.f32.{t}", _gpu_nan(_first_widened(compute, _WIDEN[t])), "f32", t, "f32")
        _add(f"cvt.f32.{t}", _WIDEN[t], "f32", t)
        _add(f"cvt.f64.{t}", _then(_WIDEN[t], _cast("f64")), "f64", t)
        _add(f"cvt.rn.{t}.f32", narrow, t, "f32")
        _add(f"cvt.rn.{t}x2.f32", _packed(narrow), f"{t}x2", "f32", "f32")


def _cast(result: str) -> Function:
    return lambda a: a.astype(TYPES[result].dtype)


def _first_widened(compute: Function, widen: Function) -> Function:
    return lambda a, b: compute(widen(a), b)


def _then(first: Function, second: Function) -> Function:
    return lambda a: second(first(a))


def _clamped(result: str) -> Function:
    limits = np.iinfo(TYPES[result].dtype)

    def convert(a: Array) -> Array:
        own = np.iinfo(a.dtype)
        return np.clip(a, max(limits.min, own.min), min(limits.max, own.max)).astype(limits.dtype)

    return convert


def _packed(narrow: Function) -> Function:
    """The first operand into the upper half."""
    return lambda high, low: np.stack(np.broadcast_arrays(narrow(low), narrow(high)), axis=-1)


for _fill in (_integers, _bit_patterns, _floats, _comparisons, _conversions):
    _fill()
