"""Which forms of the kernels there are: what a rule, dtypes and a format of states make of their compile-time arguments."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import triton.language as tl

from fused_opt import rules as specs
from fused_opt import stages as specs_of_stages
from fused_opt.kernels import codecs
from fused_opt.kernels.norm import combine_partials, measure_gradients
from fused_opt.kernels.quantize import MAX_PIECE, dequantize, largest_magnitudes, quantize
from fused_opt.kernels.rules import RULES
from fused_opt.kernels.scalars import FORMULAS, compute_scalars
from fused_opt.kernels.stages import DRAW, OPERANDS
from fused_opt.kernels.step import step

# Elements of a program. With four times as many, 124M parameters would be too few programs for a GPU of 132 multiprocessors.
CHUNK = 8192
# Of a program, in warps of 32 threads; a tile is four elements a thread, 16 bytes of fp32.
WARPS = 8
TILE = WARPS * 32 * 4
# With codes it is at least a block, and eight elements a thread, which share what is computed for each block: with four, issuing the
# instructions of most kernels would take longer than 0.7 times what their memory takes (bench/roofline.py).
CODED_TILE = 2 * TILE

POINTERS = {"float32": "*fp32", "float64": "*fp64", "bfloat16": "*bf16", "float16": "*fp16"}
_COUNTS = {"count": "i64", "block_size": "i64", "parts": "i64"}
TYPES = {"float32": tl.float32, "bfloat16": tl.bfloat16, "float16": tl.float16, "bool": tl.int8, "int16": tl.int16}

# For all kernels: nothing is contracted that is not written as fma.
OPTIONS: dict[str, Any] = {"enable_fp_fusion": False}


@dataclass(frozen=True, eq=False)
class Variant:
    """One compiled form of a kernel.

    Attributes:
        kernel: a triton.JITFunction.
        arguments: its run-time arguments and their Triton types, in order, such as {"tensors": "*i64"}; "constexpr" for one that is None.
        constants: its compile-time arguments.
        num_warps: of a program, in warps of 32 threads.
    """

    kernel: Any
    arguments: dict[str, str]
    constants: dict[str, Any]
    num_warps: int

    @property
    def counts_steps(self) -> bool:
        """Whether this is the kernel that computes scalars."""
        return self.kernel is compute_scalars

    def options(self, warp_size: int = 32) -> dict[str, Any]:
        """What to compile with, for warps of so many threads (AMD's have 64)."""
        return {"num_warps": max(self.num_warps * 32 // warp_size, 1), **OPTIONS}

    @property
    def constexprs(self) -> dict[str, Any]:
        """All that is known at compile time, as triton.compiler.ASTSource takes it."""
        return {**{name: None for name, kind in self.arguments.items() if kind == "constexpr"}, **self.constants}

    @property
    def signature(self) -> dict[str, str]:
        """As triton.compiler.ASTSource takes it."""
        return {**self.arguments, **dict.fromkeys(self.constants, "constexpr")}


@functools.cache
def step_variant(
    rule: str,
    flags: int,
    param: str,
    grad: str,
    states: tuple[str, ...],
    block_size: int = 0,
    unscale: bool = False,
    stages: int = 0,
    operands: tuple[str, ...] = (),
) -> Variant:
    """The step kernel for these.

    Args:
        rule: its name in `RULES`.
        flags: compile-time options, as in fused_opt/rules.py.
        param, grad, states: dtypes, keys of `TYPES`; the states in torch's order.
        block_size: of states in 8-bit codes, whose `states` do not matter; 0 if they are none.
        unscale: whether gradients are divided by a gradient scaler's scale where they lie.
        stages: which there are, as in fused_opt/stages.py.
        operands: dtypes of what stages use: mask, anchor, average, companion; anything for one that is not there. None without stages.
    """
    chosen = RULES[rule]
    kinds = tuple(chosen.kinds(flags).values())
    size = block_size or (DRAW.value if stages & specs_of_stages.STOCHASTIC else TILE)  # a row of a tile shares a draw of random numbers
    if block_size:
        state_types: tuple[Any, ...] = tuple(tl.int8 if kind.signed else tl.uint8 for kind in kinds)
    else:
        state_types = tuple(TYPES[state] for state in states)
    constants = {
        "ACCUMULATE": chosen.accumulate,
        "MOVE": chosen.move,
        "L2": bool(flags & chosen.l2),
        "FLAGS": flags,
        "KINDS": tuple(map(tuple, kinds)),
        "N_SCALARS": chosen.scalars,
        "PARAM_TYPE": TYPES[param],
        "GRAD_TYPE": TYPES[grad],
        "STATE_TYPES": state_types,
        "STAGES": stages,
        "OPERAND_TYPES": tuple(TYPES[kind] if stages & flag else None for flag, kind in zip(OPERANDS, operands, strict=bool(stages))),
        "UNSCALE": unscale,
        "CHUNK": CHUNK,
        "ROWS": max((CODED_TILE if block_size else TILE) // size, 1),
        "SIZE": size,
        "CODED": block_size > 0,
    }
    # A block of 4096 needs 255 registers a thread with half as many threads.
    warps = 2 * WARPS if size > CODED_TILE else WARPS
    return Variant(step, {"tensors": "*i64", "chunks": "*i32", "scalars": "*fp32"}, constants, warps)


@functools.cache
def scalars_variant(rule: str, scaled: bool, stages: int = 0, clips: bool = False, skips: bool = False) -> Variant:
    """The kernel that computes a rule's scalars, and those of `stages`.

    Args:
        rule: its name in `RULES`.
        scaled: whether it honours a gradient scaler.
        stages: which there are, as in fused_opt/stages.py.
        clips: whether gradients are shortened to a norm.
        skips: whether the step is left out where the norm is not finite; only with `clips`.
    """
    formula, count = FORMULAS[rule]
    scaler = dict.fromkeys(("found_inf", "grad_scale"), "*fp32" if scaled else "constexpr")
    norm = {"norm": "*fp32", "max_norm": "fp32"} if clips else {"norm": "constexpr", "max_norm": "constexpr"}
    return Variant(
        compute_scalars,
        {"tensors": "*i64", "constants": "*fp64", "scalars": "*fp32", **scaler, **norm},
        {
            "FORMULA": formula,
            "N_CONSTANTS": count,
            "STAGED": stages != 0,
            "OF_GRADIENT": stages & specs_of_stages.OF_GRADIENT != 0,
            "SKIPS": skips,
        },
        num_warps=1,
    )


@functools.cache
def gradients_variant(dtype: str, largest: bool) -> Variant:
    """The kernel that measures gradients of a dtype: the sum of their squares, or the largest magnitude."""
    constants = {"TYPE": TYPES[dtype], "LARGEST": largest, "CHUNK": CHUNK, "TILE": TILE}
    return Variant(measure_gradients, {"tensors": "*i64", "chunks": "*i32", "partials": "*fp64"}, constants, WARPS)


@functools.cache
def total_variant(largest: bool) -> Variant:
    """The kernel that combines what was measured."""
    arguments = {"partials": "*fp64", "total": "*fp64", "count": "i64"}
    return Variant(combine_partials, arguments, {"LARGEST": largest, "TILE": TILE}, WARPS)


# Name of a code -> whether it has a sign, and how units, inverses, codes and values are made.
CODES: dict[str, tuple[bool, Any, Any, Any, Any]] = {
    "linear": (True, codecs.linear_unit, codecs.linear_inverse, codecs.linear_encode, codecs.linear_decode),
    "mulaw": (True, codecs.mulaw_unit, codecs.mulaw_inverse, codecs.mulaw_encode, codecs.mulaw_decode),
    "unsigned_mulaw": (False, codecs.mulaw_unit, codecs.mulaw_inverse, codecs.mulaw_encode, codecs.mulaw_decode),
    "table": (True, None, None, None, None),  # whose codes are without sign all the same
}


@dataclass(frozen=True)
class Pieces:
    """How a tensor's blocks are laid out in tiles.

    Attributes:
        parts: pieces of a block.
        rows: pieces of a tile.
        size: elements of a row of a tile.
        exact: whether a block is a row and addresses are multiples of 16 bytes.
    """

    parts: int
    rows: int
    size: int
    exact: bool

    @staticmethod
    def of(block_size: int, aligned: bool) -> Pieces:
        """For blocks of that size."""
        size = max(1 << (min(block_size, MAX_PIECE.value) - 1).bit_length(), 32)
        return Pieces(-(-block_size // MAX_PIECE.value), max(CODED_TILE // size, 1), size, aligned and size == block_size)


def _code_pointer(code: str) -> str:
    return "*u8" if code in ("unsigned_mulaw", "table") else "*i8"


@functools.cache
def measure_variant(dtype: str, shape: Pieces) -> Variant:
    """The kernel that measures scales, for values of a dtype."""
    arguments = {"values": POINTERS[dtype], "scales": "*u32", "count": "i64", "block_size": "i64", "parts": "i64"}
    return Variant(largest_magnitudes, arguments, {"ROWS": shape.rows, "SIZE": shape.size}, WARPS)


@functools.cache
def quantize_variant(dtype: str, code: str, shape: Pieces, measured: bool, seeds: int | None) -> Variant:
    """The kernel that quantizes values of a dtype. `seeds`: 1 for one for each block, 0 for one for all, None to round to the nearest."""
    signed, _, inverse, encode, _ = CODES[code]
    arguments = {
        "values": POINTERS[dtype],
        "codes": _code_pointer(code),
        "scales": "*fp32",
        "seeds": "constexpr" if seeds is None else "*i64",
        "table": "*fp32" if code == "table" else "constexpr",
        **_COUNTS,
    }
    constants = {
        "SIGNED": signed,
        "INVERSE": inverse,
        "ENCODE": encode,
        "MEASURED": measured,
        "SEED_STRIDE": seeds or 0,
        "ROWS": shape.rows,
        "SIZE": shape.size,
        "EXACT": shape.exact,
    }
    return Variant(quantize, arguments, constants, WARPS)


@functools.cache
def dequantize_variant(dtype: str, code: str, shape: Pieces) -> Variant:
    """The kernel that makes values of a dtype from codes."""
    signed, unit, _, _, decode = CODES[code]
    arguments = {
        "values": POINTERS[dtype],
        "codes": _code_pointer(code),
        "scales": "*fp32",
        "table": "*fp32" if code == "table" else "constexpr",
        **_COUNTS,
    }
    constants = {"SIGNED": signed, "UNIT": unit, "DECODE": decode, "ROWS": shape.rows, "SIZE": shape.size, "EXACT": shape.exact}
    return Variant(dequantize, arguments, constants, WARPS)


# Options that stand for all: name, rule, flags.
_OPTIONS = (
    ("adamw", "adam", 0),
    ("adam amsgrad l2", "adam", specs.AMSGRAD | specs.ADAM_L2),
    ("rmsprop", "rmsprop", 0),
    ("rmsprop momentum", "rmsprop", specs.RMSPROP_MOMENTUM),
    ("rmsprop centered momentum l2", "rmsprop", specs.CENTERED | specs.RMSPROP_MOMENTUM | specs.RMSPROP_L2),
    ("sgd", "sgd", 0),
    ("sgd momentum", "sgd", specs.SGD_MOMENTUM),
    ("sgd nesterov l2", "sgd", specs.SGD_MOMENTUM | specs.NESTEROV | specs.SGD_L2),
)
# Formats likewise: name, dtype of parameter and gradient, of states, block size of their codes.
_FORMATS = (
    ("fp32", "float32", "float32", 0),
    ("bf16", "bfloat16", "bfloat16", 0),
    ("fp16", "float16", "float16", 0),
    ("bf16, fp32 states", "bfloat16", "float32", 0),
    ("fp32, bf16 states", "float32", "bfloat16", 0),
    ("fp32, int8 states", "float32", "", 256),
    ("bf16, int8 states", "bfloat16", "", 256),
)


# Stages likewise: name, rule, flags, dtype of parameter and gradient, of states, block size of their codes, stages, dtype of a companion.
_GRADIENT = specs_of_stages.OF_GRADIENT
_WEIGHT = specs_of_stages.MASK | specs_of_stages.SHRINK | specs_of_stages.PROXIMAL | specs_of_stages.AVERAGE
_MOMENTUM = specs.RMSPROP_MOMENTUM
_STAGED = (
    ("clip l1 anchor mask", "adam", 0, "float32", "float32", 0, _GRADIENT, ""),
    ("ema", "adam", 0, "float32", "float32", 0, specs_of_stages.AVERAGE, ""),
    ("mask shrink l1 ema", "sgd", specs.SGD_MOMENTUM, "float32", "", 256, _WEIGHT, ""),
    ("stochastic", "adam", 0, "bfloat16", "bfloat16", 0, specs_of_stages.STOCHASTIC, ""),
    ("stochastic", "adam", 0, "bfloat16", "", 256, specs_of_stages.STOCHASTIC, ""),
    ("kahan", "adam", 0, "bfloat16", "bfloat16", 0, specs_of_stages.KAHAN, "bfloat16"),
    ("kahan", "adam", 0, "float16", "float16", 0, specs_of_stages.KAHAN, "float16"),
    ("split", "adam", 0, "bfloat16", "", 256, specs_of_stages.SPLIT, "int16"),
    ("master", "adam", 0, "bfloat16", "float32", 0, specs_of_stages.MASTER, "float32"),
    ("all but stochastic", "rmsprop", _MOMENTUM, "bfloat16", "", 256, _GRADIENT | _WEIGHT | specs_of_stages.SPLIT, "int16"),
    ("all but split", "rmsprop", _MOMENTUM, "bfloat16", "float32", 0, _GRADIENT | _WEIGHT | specs_of_stages.STOCHASTIC, ""),
)


def typical_variants() -> Iterator[tuple[str, Variant]]:
    """Named forms of the kernels that stand for all: every rule and option, every dtype of parameters and states."""
    for option, rule, flags in _OPTIONS:
        slots = RULES[rule].kinds(flags)
        for name, param, state, block_size in _FORMATS:
            if (block_size or state != param) and not slots:
                continue
            if block_size and "grad_avg" in slots:  # keeps fp32 states
                continue
            yield f"{option}, {name}", step_variant(rule, flags, param, param, (state,) * len(slots), block_size)
    for block_size in (32, 1024, 4096):
        yield f"adamw, fp32, int8 states in blocks of {block_size}", step_variant("adam", 0, "float32", "float32", (), block_size)
    for name, rule, flags, param, state, block_size, stages, companion in _STAGED:
        states = (state,) * len(RULES[rule].kinds(flags))
        operands = ("bool", param, "float32", companion or param)
        yield (
            f"{name} around {rule}, {param}, {state or 'int8'} states",
            step_variant(rule, flags, param, param, states, block_size, stages=stages, operands=operands),
        )
    whole = Pieces.of(256, aligned=True)
    for dtype in ("float32", "bfloat16"):
        for code in ("linear", "mulaw", "unsigned_mulaw"):
            yield f"quantize {code}, {dtype}", quantize_variant(dtype, code, whole, False, None)
            yield f"dequantize {code}, {dtype}", dequantize_variant(dtype, code, whole)
    yield "quantize mulaw, float32, stochastic", quantize_variant("float32", "mulaw", whole, False, 0)
    yield "quantize table, float32", quantize_variant("float32", "table", whole, False, None)
    yield "dequantize table, float32", dequantize_variant("float32", "table", whole)
    yield "measure, float32", measure_variant("float32", Pieces.of(MAX_PIECE.value * 2, aligned=True))
    for rule in RULES:
        for scaled in (False, True):
            yield f"scalars of {rule}{', with a scaler' if scaled else ''}", scalars_variant(rule, scaled)
        yield f"scalars of {rule}, clipped, with stages", scalars_variant(rule, True, _GRADIENT, clips=True, skips=True)
    for dtype in ("float32", "bfloat16"):
        yield f"squares of gradients, {dtype}", gradients_variant(dtype, largest=False)
        yield f"largest of gradients, {dtype}", gradients_variant(dtype, largest=True)
    for largest in (False, True):
        yield f"total of {'magnitudes' if largest else 'squares'}", total_variant(largest)
