"""Exact results in 16 bits: how far another one is off, and the nearest one there is."""

from __future__ import annotations

import math

import torch


def error_of(actual: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """Elementwise; infinity where one of the two is infinite or NaN and the other is not."""
    error = (actual.double() - exact).abs()
    return error.masked_fill((actual == exact) | (actual.isnan() & exact.isnan()), 0.0).nan_to_num(nan=math.inf, posinf=math.inf)


def correctly_rounded(exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float64 to 16 bits with one rounding, to nearest even: torch's own conversion goes through float32 and rounds twice."""
    spacing = spacing_at(exact, dtype)
    return (torch.round(exact / spacing) * spacing).to(torch.float32).to(dtype)


def spacing_at(exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """How far apart neighbouring 16-bit numbers are there."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(exact).exponent - 1 + int(math.log2(info.eps))
    return torch.ldexp(torch.ones_like(exact), exponent.clamp(min=int(math.log2(info.tiny * info.eps))))
