"""Weights with all that their companions know of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fused_opt.averages import averages_of
from fused_opt.stages import COMPANIONS, LOW_PRECISION

if TYPE_CHECKING:
    from fused_opt.rules import Group
    from fused_opt.step import FusedStep


@torch.no_grad()
def float32_weights(optimizer: FusedStep) -> dict[torch.Tensor, torch.Tensor]:
    """See `FusedStep.float32_weights`."""
    averages = averages_of(optimizer) if optimizer._evaluates else {}
    return {
        param: _copied(averages[param]) if param in averages else _joined(group, param, optimizer.state.get(param, {}))
        for group in optimizer.param_groups
        for param in group["params"]
    }


def _copied(values: torch.Tensor) -> torch.Tensor:
    return values.detach().to(torch.complex64 if values.is_complex() else torch.float32, copy=True)


def _joined(group: Group, param: torch.Tensor, state: dict[str, torch.Tensor]) -> torch.Tensor:
    """As a step would join them: see `join` in csrc/kernels/stages.h."""
    weight, weights = _copied(param), group.get("weights") or ""
    companion = state.get(COMPANIONS.get(weights, "")) if param.dtype in LOW_PRECISION else None
    if companion is None:
        return weight
    if weights == "master":
        return torch.where(companion.to(param.dtype) == param, companion, weight)  # a weight that was set since counts
    if weights == "kahan":
        return weight + companion.float()
    # Below zero and above infinity are the bits of NaN: from there a lower half is that of a weight that was set since.
    limit = torch.where(companion < 0, 0.0, torch.inf)
    lower = torch.where(weight.abs() == limit, 0, companion.int())
    return (weight.view(torch.int32) + lower).view(torch.float32)
