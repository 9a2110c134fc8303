"""How the benchmark's parameters and gradients lie in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

# Elements between the rows of a parameter with gaps: half a cache line of fp32.
GAP = 8


def contiguous(values: torch.Tensor) -> torch.Tensor:
    """As torch creates tensors; the argument itself if it is so already."""
    return values.contiguous()


def permuted(values: torch.Tensor) -> torch.Tensor:
    """A matrix transposed, a weight of four dimensions in channels_last; others contiguous."""
    if values.dim() == 2:
        return values.t().contiguous().t()
    if values.dim() == 4:
        return values.contiguous(memory_format=torch.channels_last)
    return values.contiguous()


def gaps(values: torch.Tensor) -> torch.Tensor:
    """A slice, in the second dimension, of a larger tensor; of a vector, a column of a matrix."""
    if values.dim() == 0:
        return values
    if values.dim() == 1:
        return values.new_zeros(len(values), 2)[:, 0].copy_(values)
    wider = values.new_zeros(len(values), values.shape[1] + GAP, *values.shape[2:])
    return wider[:, : values.shape[1]].copy_(values)


@dataclass(frozen=True)
class Layout:
    """What to do with each parameter and with each gradient."""

    parameter: Callable[[torch.Tensor], torch.Tensor]
    gradient: Callable[[torch.Tensor], torch.Tensor]


LAYOUTS = {
    "contiguous": Layout(contiguous, contiguous),
    "permuted": Layout(permuted, permuted),
    "other-grad": Layout(contiguous, permuted),
    "gaps": Layout(gaps, contiguous),  # autograd's gradients of parameters with gaps are contiguous
}
