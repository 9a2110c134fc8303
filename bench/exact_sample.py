"""Tells a right implementation from a wrong one: its parameters after some steps, beside those of a float64 run."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from fused_opt.bench.cases import Case

# Steps that every implementation takes before its parameters are compared.
COMPARED_STEPS = 3

# The largest error, in units of `ExactSample.error`, that rounding explains. With u = eps / 2: torch's for-loop rounds a parameter
# three times a step at the most (decay, product, sum), so that 9 u are due to that. A step's update is off by up to 20 u in the third
# step: states that sum up terms of one sign by 3 u a step (the first moment) and 4 u a step (the second, of which the square root takes
# half), then five roundings of the root, its correction, eps, the step size and the quotient: (3 + 2) 3 u + 5 u. The larger one times
# the sum of both magnitudes bounds the error: 20 u = 10 eps. What is wrong is off by about a whole step, for parameters that are
# smaller than their steps by 1 / (3 eps) or more: 43 in bfloat16, 340 in float16, 2.8 million in float32.
TOLERATED = 10.0

# Elements compared of a tensor: what is wrong in an implementation is wrong throughout.
_SAMPLE = 2**14


class ExactSample:
    """A float64 run of torch's for-loop on every k-th element of each tensor: an optimizer treats each element by itself.

    Args:
        case: the optimizer and its options.
        params: start values.
        grads: of every step, each of its parameter's shape. They must be nonzero, so that no sum cancels, and so large that a step is seen
            in the parameters' dtype.

    Attributes:
        indices: which elements of each tensor, counted in the order of its dimensions.
        epsilon: the spacing of the parameters' numbers at 1.
    """

    def __init__(self, case: Case, params: Sequence[torch.Tensor], grads: Sequence[torch.Tensor]) -> None:
        self.indices = sample_indices(params)
        self.epsilon = torch.finfo(params[0].dtype).eps
        exact = torch.nn.Parameter(self.take(params))
        exact.grad = self.take(grads)
        optimizer = getattr(torch.optim, case.optimizer)([exact], **case.options, foreach=False)
        size, moved = exact.detach().abs(), torch.zeros_like(exact.detach())
        for _ in range(COMPARED_STEPS):
            before = exact.detach().clone()
            optimizer.step()
            size = torch.maximum(size, exact.detach().abs())
            moved += (exact.detach() - before).abs()
        self._exact = exact.detach()
        self._moved = moved
        self._magnitude = size + moved

    def error(self, params: Sequence[torch.Tensor]) -> float:
        """See `error_of`."""
        return self.error_of(self.take(params))

    def error_of(self, values: torch.Tensor, epsilon: float = 0.0) -> float:
        """The largest error of parameters after `COMPARED_STEPS` steps, of which `take` took `values`; infinity if one is NaN.

        In units of eps (the spacing of numbers at 1) times the parameter's magnitude: the largest that it had plus all steps' lengths.
        eps is the parameters' or `epsilon`, if that is larger: the one of states that are less precise.
        """
        return largest((values - self._exact).abs() / (max(self.epsilon, epsilon) * self._magnitude))

    def detour(self, params: Sequence[torch.Tensor]) -> float:
        """See `detour_of`."""
        return self.detour_of(self.take(params))

    def detour_of(self, values: torch.Tensor) -> float:
        """As `error_of`, in units of the length of the way that the parameter went: the sum of its steps' lengths."""
        return largest((values - self._exact).abs() / self._moved)

    def take(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """The sampled elements of all tensors in a row, in float64."""
        return take(tensors, self.indices)


def sample_indices(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Of each tensor the elements that are compared."""
    # An odd distance, so that all places in a vector and all parities of a row are met.
    return [torch.arange(0, tensor.numel(), math.ceil(tensor.numel() / _SAMPLE) | 1) for tensor in tensors]


def take(tensors: Sequence[torch.Tensor], indices: Sequence[torch.Tensor]) -> torch.Tensor:
    """The elements with these indices of all tensors in a row, in float64."""
    return torch.cat([torch.take(tensor.detach(), index) for tensor, index in zip(tensors, indices, strict=True)]).double()


def largest(errors: torch.Tensor) -> float:
    """The largest one; infinity if one is NaN."""
    return float(errors.nan_to_num(nan=math.inf).max())
