"""Evaluating with averaged weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from fused_opt.stages import AVERAGE_STATE

if TYPE_CHECKING:
    from fused_opt.step import FusedStep


@contextlib.contextmanager
def average_weights(optimizer: FusedStep) -> Iterator[None]:
    """Within this context the parameters have their averages as values; afterwards they are what they were, bit for bit.

    See `FusedStep.average_weights`. Takes a copy of the weights meanwhile.
    """
    if all(group.get("average") is None for group in optimizer.param_groups):
        raise RuntimeError("no param group has an average of its weights; make the optimizer with average='ema' or 'swa'")
    if optimizer._evaluates:
        raise RuntimeError("the weights are their averages already; leave the other average_weights() first")
    averages = {
        param: state[AVERAGE_STATE]
        for param, state in optimizer.state.items()
        if isinstance(param, torch.Tensor) and AVERAGE_STATE in state
    }
    weights = {param: param.detach().clone() for param in averages}
    optimizer._evaluates = True
    try:
        _set(averages)
        yield
    finally:
        _set(weights)
        optimizer._evaluates = False


@torch.no_grad()
def _set(values: dict[torch.Tensor, torch.Tensor]) -> None:
    for param, value in values.items():
        param.copy_(value)
