"""Whether a compiled kernel computes what its text says: nothing contracted, roots and divisions as IEEE 754 asks, denormals kept."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Operations:
    """How many there are of those that rounding depends on."""

    fma: int
    div: int
    sqrt: int


def written(ttir: str) -> Operations:
    """In the kernel's text, as Triton has read it; an operation on a tensor counts once."""
    found = Counter(re.findall(r"= (math\.fma|tt\.precise_divf|tt\.precise_sqrt) ", ttir))
    return Operations(found["math.fma"], found["tt.precise_divf"], found["tt.precise_sqrt"])


def differences(asm: Mapping[str, str]) -> list[str]:
    """What the compiler did otherwise than it was told to, in words.

    Instructions are compared with LLVM's IR, in which nothing is contracted yet: that is done where an operation allows it by a flag, or
    by the generator of machine code. It may compute something once that stands twice, so there may be fewer, but never more.

    Args:
        asm: what triton.compile gives.
    """
    asked = asm["llir"]
    approximate = [f"approximate {name} in the text" for name in sorted(set(_APPROXIMATE.findall(asm["ttir"])))]
    flagged = [f"LLVM may change {line.strip()}" for line in asked.splitlines() if _FAST.search(line)]
    return [*approximate, *flagged, *(_in_ptx(asm["ptx"], asked) if "ptx" in asm else _in_amdgcn(asm["amdgcn"], asked))]


# Triton's other divisions and functions of single precision; of double precision they are exact.
_APPROXIMATE = re.compile(r"= (arith\.divf|math\.(?!fma|abs)\w+) .*(?:\b|x)f32\b")
_FAST = re.compile(r"= (?:\w+ )*(?:f\w+|call) (?:\w+ )*(?:fast|contract|reassoc|afn|arcp|nsz)\b|!fpmath")


def _at_most(what: str, made: int, asked: int) -> Iterator[str]:
    if made > asked:
        yield f"{made} {what}, {asked} were asked for"


def _elements(asked: str, pattern: str) -> int:
    """In all operations on vectors together; `pattern` has a group for their number, empty for scalars."""
    return sum(int(count or 1) for count in re.findall(pattern, asked))


# Arithmetic that rounds. Without .rn ptxas may contract it.
_PTX_ARITHMETIC = re.compile(
    r"^\s+(?:@\S+\s+)?((?:add|sub|mul|mad|fma|div|sqrt|rsqrt|rcp|ex2|lg2|sin|cos|tanh)\.(?:\w+\.)*(?:bf16|f16|f32|f64)\S*)", re.MULTILINE
)
_PTX_EXACT = re.compile(r"(add|sub|mul|fma|div|sqrt)\.rn\.f(32(x2|\.f16|\.bf16)?|64)")  # a second type is that of an operand


def _in_ptx(ptx: str, asked: str) -> Iterator[str]:
    found = Counter(_PTX_ARITHMETIC.findall(ptx))
    yield from (f"{count} {name}" for name, count in found.items() if not _PTX_EXACT.fullmatch(name))
    yield from sorted(set(re.findall(r"^\s+(?:@\S+\s+)?(\w[\w.]*\.(?:approx|full|ftz)\b\S*)", ptx, re.MULTILINE)))
    fused = sum(count * (2 if "x2" in name else 1) for name, count in found.items() if name.startswith("fma."))
    yield from _at_most("fused multiply-adds", fused, _elements(asked, r"call .*@llvm\.fma\.(?:v(\d+))?f(?:32|64)\("))


# So many fused multiply-adds LLVM makes of a division and of a root, beside the operation by which they are counted here; of a division of
# 64-bit integers as many as reciprocals.
_IN_DIVISION, _IN_ROOT, _IN_LONG_DIVISION = 5, 2, 2


def _in_amdgcn(text: str, asked: str) -> Iterator[str]:
    lines = re.findall(r"^\t(v_\w+ [^;\n]*)", text, re.MULTILINE)

    def made(pattern: str) -> int:
        return sum(2 if line.startswith("v_pk_") else 1 for line in lines if re.match(pattern, line))

    divisions, roots, long_divisions = made("v_div_fixup_f32"), made("v_sqrt_f32"), len(re.findall(r"= [su](?:div|rem) i64", asked))
    yield from _at_most("divisions", divisions, _elements(asked, r"= fdiv (?:<(\d+) x )?float"))
    yield from _at_most("roots", roots, _elements(asked, r"call .*@llvm\.sqrt\.(?:v(\d+))?f32\("))
    yield from _at_most("reciprocals", made("v_rcp(_iflag)?_f32"), divisions + _IN_LONG_DIVISION * long_divisions)
    # Triton 3.6 makes a root of this and fused multiply-adds itself. Nobody has shown that it is exact for denormals, too.
    yield from _at_most("approximate roots", made("v_rsq_f32"), len(re.findall(r"call .*@llvm\.amdgcn\.rsq\.f32\(", asked)))
    # v_fma_mix reads 16-bit operands; with a factor of 1 or an addend of 0 it is an addition or a multiplication. v_fma_mixlo also rounds
    # its result to 16 bits, and may stand beside the same operation whose result is used in 32.
    plain = sum(line.startswith("v_fma_mix") and bool(re.search(r" 1\.0|neg\(0\)", line)) for line in lines)
    expanded = _IN_DIVISION * divisions + _IN_ROOT * roots + _IN_LONG_DIVISION * long_divisions
    fused = made("v_(pk_)?fma(c|mk|ak)?_f32|v_fma_mix_") - plain - expanded
    yield from _at_most("fused multiply-adds", fused, _elements(asked, r"call .*@llvm\.fma\.(?:v(\d+))?f32\("))
    if not re.search(r"\.amdhsa_float_denorm_mode_32 3\b", text):
        yield "denormals are flushed"
