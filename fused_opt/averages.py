"""Evaluating with averaged weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from fused_opt.stages import AVERAGE_STATE, counter_of

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
    averages = averages_of(optimizer)
    weights = {param: param.detach().clone() for param in averages}
    optimizer._evaluates = True
    try:
        _set(averages)
        yield
    finally:
        _set(weights)
        optimizer._evaluates = False


def averages_of(optimizer: FusedStep) -> dict[torch.Tensor, torch.Tensor]:
    """The averages that have begun, of groups that average: until `average_start` a state only has the weight before the first step."""
    averages = {}
    for group in optimizer.param_groups:
        if group.get("average") is not None:
            counter, start = counter_of(optimizer._rule, group), group.get("average_start") or 0
            for param in group["params"]:
                state = optimizer.state.get(param, {})
                if AVERAGE_STATE in state and float(state.get(counter, 0)) > start:
                    averages[param] = state[AVERAGE_STATE]
    return averages


@torch.no_grad()
def _set(values: dict[torch.Tensor, torch.Tensor]) -> None:
    for param, value in values.items():
        param.copy_(value)
