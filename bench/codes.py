"""Candidate codes for 8-bit optimizer states: one byte a value, one float32 scale, the largest magnitude, a block."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

BLOCK = 256
ONE = 0x3F800000  # the bits of 1.0
MANTISSA_BITS = 23


class Code(Protocol):
    """Maps magnitudes relative to their block's largest to 0 ... 255 (or signed values to -127 ... 127) and back."""

    @property
    def name(self) -> str: ...

    def encode(self, x: Tensor, scale: Tensor, signed: bool, noise: Tensor | None) -> Tensor:
        """float32 of shape (blocks, size) and (blocks, 1) to codes: to the nearest, or the lower one + 1 if noise in [0, 1) says so."""

    def decode(self, codes: Tensor, scale: Tensor, signed: bool) -> Tensor:
        """The reverse, as far as there is one."""


def keep_positive(codes: Tensor, x: Tensor) -> Tensor:
    """Codes of second moments x, with 1 for 0 where x is positive: a denominator that becomes zero makes the update explode."""
    return codes.where((codes > 0) | (x == 0), 1)


def scales(x: Tensor) -> Tensor:
    """The largest magnitude of each row, shape (blocks, 1)."""
    return x.abs().amax(1, keepdim=True)


def relative(x: Tensor, scale: Tensor) -> Tensor:
    """x / scale, and 0 in blocks of zeros."""
    return x / scale.masked_fill(scale == 0, 1.0)


@dataclass(frozen=True)
class Companded:
    """A code in closed form: r in [0, 1] goes to the integer at y(r) in [0, top], with the sign, if any, kept apart.

    Attributes:
        name: of the code.
        compress: r and the top code to y, float32, not rounded.
        expand: an integer y, as float32, and the top code to r; 0 to 0 and the top code to 1, exactly.
    """

    name: str
    compress: Callable[[Tensor, int], Tensor]
    expand: Callable[[Tensor, int], Tensor]

    def encode(self, x: Tensor, scale: Tensor, signed: bool, noise: Tensor | None) -> Tensor:
        top = 127 if signed else 255
        y = self.compress(relative(x.abs(), scale), top)
        q = (y + (0.5 if noise is None else noise)).floor().clamp(max=top)  # 255 + (1 - 2**-24) rounds to 256
        return torch.copysign(q, x).to(torch.int8) if signed else q.to(torch.uint8)

    def decode(self, codes: Tensor, scale: Tensor, signed: bool) -> Tensor:
        q = codes.float()
        r = self.expand(q.abs(), 127 if signed else 255)
        return torch.copysign(r, q) * scale


def power(name: str, exponent: int) -> Companded:
    """r = (q / top) ** exponent, the exponent a power of two."""

    def root(r: Tensor, top: int) -> Tensor:
        for _ in range(exponent.bit_length() - 1):
            r = r.sqrt()
        return r * top

    return Companded(name, root, lambda q, top: (q / top) ** exponent)


def shift(name: str, places: int) -> Companded:
    """A power of 2 ** places without a root: the bits of r, shifted, are nearly those of its root, exact at powers of it."""
    offset = ONE - (ONE >> places)

    def compress(r: Tensor, top: int) -> Tensor:
        y = ((r.view(torch.int32) >> places) + offset).view(torch.float32)
        return y.masked_fill(r == 0, 0.0) * top

    def expand(q: Tensor, top: int) -> Tensor:
        r = (((q / top).view(torch.int32) - offset) << places).view(torch.float32)
        return r.masked_fill(q == 0, 0.0)

    return Companded(name, compress, expand)


def mu_law(mantissa_bits: int) -> Companded:
    """Mu-law companding, a logarithm of 1 + mu * r: the upper bits of that number, counted from those of 1.

    So it is a small float with gradual underflow, linear between neighbouring codes, because every power of two is one: stochastic
    rounding is unbiased and rounding to nearest gives the nearest value, neither of which holds for the powers.
    """
    place = MANTISSA_BITS - mantissa_bits

    def mu(top: int) -> float:
        return torch.tensor(ONE + (top << place), dtype=torch.int32).view(torch.float32).item() - 1.0

    def compress(r: Tensor, top: int) -> Tensor:
        return ((r * mu(top) + 1.0).view(torch.int32) - ONE).float() / (1 << place)

    def expand(q: Tensor, top: int) -> Tensor:
        return (((q.int() << place) + ONE).view(torch.float32) - 1.0) / mu(top)

    return Companded(f"mu-law {mantissa_bits}", compress, expand)


def of_root(outer: Companded) -> Companded:
    """A code, on the scale from 0 to 1, of the root of r as `shift 1` has it: twice as many powers of ten."""
    inner = shift("", 1)
    return Companded(
        f"root {outer.name}",
        lambda r, top: outer.compress(inner.compress(r, 1), top),
        lambda q, top: inner.expand(outer.expand(q, top), 1),
    )


@dataclass(frozen=True)
class Dynamic:
    """The 256-entry dynamic table: decades down to 1e-7, each with half the entries of the next, plus 0 and 1."""

    name: str = "dynamic"

    def encode(self, x: Tensor, scale: Tensor, signed: bool, noise: Tensor | None) -> Tensor:
        table = dynamic_table(signed)
        r = relative(x, scale)
        if noise is None:
            index = torch.bucketize(r, (table[1:] + table[:-1]) / 2)
        else:
            lower = (torch.bucketize(r, table, right=True) - 1).clamp(0, len(table) - 2)
            fraction = (r - table[lower]) / (table[lower + 1] - table[lower])
            index = lower + (noise >= 1 - fraction)
        return index.to(torch.uint8)

    def decode(self, codes: Tensor, scale: Tensor, signed: bool) -> Tensor:
        return dynamic_table(signed)[codes.int()] * scale


@functools.cache
def dynamic_table(signed: bool) -> Tensor:
    """Sorted, 256 values. A decade (0.1, 1] * 10**-k has 64 / 2**k values a sign, or 128 / 2**k without, at middles of equal parts."""
    values = [torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)]
    for decade in range(7):
        count = (64 if signed else 128) >> decade
        middles = (torch.arange(count, dtype=torch.float64) + 0.5) / count
        magnitudes = (0.1 + 0.9 * middles) * 10.0**-decade
        values += [magnitudes, -magnitudes] if signed else [magnitudes]
    return torch.cat(values).sort().values.float()


def random(scale: Tensor, size: int, generator: torch.Generator, bits: int) -> Tensor:
    """Noise in (0, 1), independent for each value and step."""
    return (torch.randint(1 << bits, (len(scale), size), generator=generator) + 0.5) / (1 << bits)


def dither(scale: Tensor, size: int, step: int, signed: bool, bits: int) -> Tensor:
    """Noise in (0, 1) without a random number: a Weyl sequence, the upper bits of index * K1 + step * K2 in 32 bits.

    K2 is 2**32 by the golden ratio: what one step rounds up by luck, the next ones round down, so that errors do not add up to a random
    walk. K1, of the plastic number, spreads the noise over neighbours. The two moments are half a turn apart.
    """
    word = _index_words(scale.numel() * size) + step * 0x9E3779B9 + (1 << 31 if signed else 0)
    return (((word & 0xFFFFFFFF) >> (32 - bits)) + 0.5).div_(1 << bits).view(-1, size)


@functools.cache
def _index_words(count: int) -> Tensor:
    return torch.arange(count) * 0xC13FA9A9


def block_hash(seed: Tensor, size: int) -> Tensor:
    """Noise in (0, 1), in each block a Weyl sequence of 14 bits whose start and stride are a hash of block number and seed.

    As `fused_opt.quantize_blockwise` has it: the hash is SplitMix64.

    Args:
        seed: of each block, int64.
    """
    word = seed + (torch.arange(len(seed)) + 1) * _signed(0x9E3779B97F4A7C15)
    word = (word ^ _shifted(word, 30)) * _signed(0xBF58476D1CE4E5B9)
    word = (word ^ _shifted(word, 27)) * _signed(0x94D049BB133111EB)
    word = (word ^ _shifted(word, 31))[:, None]
    start, stride = word & 0x3FFF, word >> 16 & 0xFFFF | 1
    return (((start + stride * torch.arange(size)) & 0x3FFF) + 0.5) / (1 << 14)


def _signed(word: int) -> int:
    """64 bits as int64 has them, in which torch computes modulo 2**64."""
    return word - (1 << 64) if word >> 63 else word


def _shifted(word: Tensor, places: int) -> Tensor:
    """To the right, with zeros from the left."""
    return word >> places & ((1 << (64 - places)) - 1)


def _scale_bits(scale: Tensor) -> Tensor:
    return scale.flatten().view(torch.int32).long()


CODES: dict[str, Code] = {
    code.name: code
    for code in (
        power("linear", 1),
        power("square", 2),
        shift("shift 1", 1),
        power("fourth", 4),
        shift("shift 2", 2),
        shift("shift 3", 3),
        mu_law(3),
        mu_law(4),
        mu_law(5),
        of_root(mu_law(5)),
        Dynamic(),
    )
}

# Of the blocks' scales, their size, the step, whether the moment is signed, and a generator; None is rounding to nearest.
ROUNDINGS: dict[str, Callable[[Tensor, int, int, bool, torch.Generator], Tensor | None]] = {
    "nearest": lambda scale, size, step, signed, generator: None,
    "SR": lambda scale, size, step, signed, generator: random(scale, size, generator, 16),
    "SR8": lambda scale, size, step, signed, generator: random(scale, size, generator, 8),
    "dither": lambda scale, size, step, signed, generator: dither(scale, size, step, signed, 16),
    "dither8": lambda scale, size, step, signed, generator: dither(scale, size, step, signed, 8),
    "dither4": lambda scale, size, step, signed, generator: dither(scale, size, step, signed, 4),
    "hash": lambda scale, size, step, signed, generator: block_hash(_scale_bits(scale), size),
    # fused_opt's, with the step in place of the bits of parameters and scales: so both moments have the same noise, too.
    "step-hash": lambda scale, size, step, signed, generator: block_hash(torch.full((len(scale),), step), size),
}


@dataclass(frozen=True)
class Format:
    """How a moment is stored: a code and a rounding, or neither, for float32."""

    code: Code | None = None
    rounding: str = ""

    @classmethod
    def parse(cls, text: str) -> Format:
        """ "fp32", or a code's name and a rounding's, as in "shift 2 nearest"."""
        code, _, rounding = text.rpartition(" ")
        return cls(CODES[code], rounding) if code else cls()

    def store(self, x: Tensor, signed: bool, step: int, generator: torch.Generator) -> Tensor:
        """What the next step reads of x, shape (blocks, size), which this step wrote."""
        if self.code is None:
            return x
        scale = scales(x)
        codes = self.code.encode(x, scale, signed, ROUNDINGS[self.rounding](scale, x.shape[1], step, signed, generator))
        return self.code.decode(codes if signed else keep_positive(codes, x), scale, signed)
