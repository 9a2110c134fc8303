"""Distances between floating point numbers, counted in representable numbers (units in the last place, ULP)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

# The distance between NaN and a number, and where distances between fp64 numbers of opposite sign are cut off.
FAR = 2**63 - 1

_INTEGERS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
}

# Histogram buckets: label -> smallest and largest distance counted in it.
BUCKETS = {"0": (0, 0), "1": (1, 1), "2": (2, 2), "3-4": (3, 4), "5-16": (5, 16), ">16": (17, FAR)}

# Elements handled at a time: 1M int64 are 8 MB, so comparing a large model needs little memory beside the model's.
_CHUNK = 2**20


def bits_equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether `a` and `b` have the same bits: -0 is not +0, and a NaN equals only the same NaN.

    Args:
        a, b: tensors of one shape and one dtype (float16, bfloat16, float32 or float64) on the CPU.

    Raises:
        TypeError: the dtypes differ or are none of these.
        ValueError: the shapes differ.
    """
    integer = _integer(a, b)
    return torch.equal(a.detach().contiguous().view(integer), b.detach().contiguous().view(integer))


def distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The number of steps from one representable number to the next that lead from `a` to `b`, elementwise.

    +0 and -0 are 0 apart, two NaN are 0 apart, the largest number and infinity 1, NaN and a number `FAR`.

    Args:
        a, b: as for `bits_equal`.

    Returns:
        An int64 tensor of their shape.

    Raises:
        TypeError, ValueError: as `bits_equal`.
    """
    _integer(a, b)
    x, y = _ordered(a), _ordered(b)
    steps = x - y
    overflow = ((x ^ y) & (x ^ steps)) < 0  # the signs of x and y differ, and the difference's is not x's
    overflow |= steps.abs_() < 0  # int64's smallest number has no positive counterpart
    a_nan, b_nan = a.detach().isnan(), b.detach().isnan()
    return steps.masked_fill_(overflow | (a_nan ^ b_nan), FAR).masked_fill_(a_nan & b_nan, 0)


def max_ulp(a: torch.Tensor, b: torch.Tensor) -> int:
    """The largest `distance` of any element; 0 for empty tensors. Arguments and errors are those of `bits_equal`."""
    if bits_equal(a, b):
        return 0
    return max(int(steps.max()) for steps in _chunks(a, b))


def histogram(a: torch.Tensor, b: torch.Tensor) -> dict[str, int]:
    """How many elements lie in each of the `BUCKETS` of `distance`. Arguments and errors are those of `bits_equal`."""
    counts = dict.fromkeys(BUCKETS, 0)
    if bits_equal(a, b):
        return {**counts, "0": a.numel()}
    for steps in _chunks(a, b):
        for label, (low, high) in BUCKETS.items():
            counts[label] += int(((steps >= low) & (steps <= high)).sum())
    return counts


@dataclass(frozen=True)
class Difference:
    """How far tensors are apart: the number of values in each of `BUCKETS`, and the largest distance in ULP."""

    counts: Mapping[str, int]
    largest: int

    @classmethod
    def of(cls, a: torch.Tensor, b: torch.Tensor) -> Difference:
        """Of two tensors of one shape and one dtype."""
        return cls(histogram(a, b), max_ulp(a, b))

    @classmethod
    def sum(cls, parts: Sequence[Difference]) -> Difference:
        """Of all that `parts` compared."""
        return cls({label: sum(d.counts[label] for d in parts) for label in BUCKETS}, max(d.largest for d in parts))


def _integer(a: torch.Tensor, b: torch.Tensor) -> torch.dtype:
    if a.dtype != b.dtype or a.dtype not in _INTEGERS:
        names = ", ".join(str(dtype) for dtype in _INTEGERS)
        raise TypeError(f"cannot compare bits of {a.dtype} and {b.dtype}; both must be one of {names}")
    if a.shape != b.shape:
        raise ValueError(f"cannot compare bits of shapes {tuple(a.shape)} and {tuple(b.shape)}; they must be equal")
    return _INTEGERS[a.dtype]


def _ordered(x: torch.Tensor) -> torch.Tensor:
    """int64 numbers in the floats' order, neighbours 1 apart: the bits; for negative floats minus those of |x|."""
    integer = _INTEGERS[x.dtype]
    bits = x.detach().contiguous().view(integer).to(torch.int64)
    return torch.where(bits < 0, torch.iinfo(integer).min - bits, bits)


def _chunks(a: torch.Tensor, b: torch.Tensor) -> Iterator[torch.Tensor]:
    x, y = a.detach().reshape(-1), b.detach().reshape(-1)
    for start in range(0, x.numel(), _CHUNK):
        yield distance(x[start : start + _CHUNK], y[start : start + _CHUNK])
