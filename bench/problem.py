"""Random start values and gradients for comparing two implementations."""

from __future__ import annotations

from collections.abc import Sequence

import torch

# Start values, and for each step a gradient for each of them.
Problem = tuple[list[torch.Tensor], list[list[torch.Tensor]]]


def make_problem(
    shapes: Sequence[Sequence[int]],
    steps: int,
    dtype: torch.dtype,
    seed: int = 0,
    decades: tuple[float, float] = (-6, 1),
    zeros: float = 0.0,
) -> Problem:
    """Normal start values; gradients of both signs.

    Args:
        decades: each element has a magnitude of its own, 10 to a power between these; every step's gradient is of that size.
        zeros: the share of gradients that are zero, of either sign.
    """
    generator = torch.Generator().manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(shape: Sequence[int]) -> torch.Tensor:
        return torch.randn(tuple(shape), dtype=wide, generator=generator)

    def uniform(shape: Sequence[int]) -> torch.Tensor:
        return torch.rand(tuple(shape), dtype=wide, generator=generator)

    values = [normal(shape).to(dtype) for shape in shapes]
    low, high = decades
    scales = [10 ** (low + (high - low) * uniform(shape)) for shape in shapes]

    def gradient(scale: torch.Tensor) -> torch.Tensor:
        return (normal(scale.shape) * scale * (uniform(scale.shape) >= zeros)).to(dtype)

    return values, [[gradient(scale) for scale in scales] for _ in range(steps)]
