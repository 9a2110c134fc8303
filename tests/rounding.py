"""Rounding to 16 bits, once."""

from __future__ import annotations

import math

import torch


def correctly_rounded(exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float64 to 16 bits with one rounding, to nearest even: torch's own conversion goes through float32 and rounds twice."""
    spacing = spacing_at(exact, dtype)
    return (torch.round(exact / spacing) * spacing).to(torch.float32).to(dtype)


def spacing_at(exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """How far apart neighbouring 16-bit numbers are there."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(exact).exponent - 1 + int(math.log2(info.eps))
    return torch.ldexp(torch.ones_like(exact), exponent.clamp(min=int(math.log2(info.tiny * info.eps))))
