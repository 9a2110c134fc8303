"""Weights with all that their companions know of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fused_opt.stages import COMPANIONS

if TYPE_CHECKING:
    from fused_opt.step import FusedStep


@torch.no_grad()
def float32_weights(optimizer: FusedStep) -> dict[torch.Tensor, torch.Tensor]:
    """See `FusedStep.float32_weights`."""
    return {param: _joined(param, optimizer.state.get(param, {})) for group in optimizer.param_groups for param in group["params"]}


def _joined(param: torch.Tensor, state: dict[str, torch.Tensor]) -> torch.Tensor:
    weight = param.detach().float()
    if COMPANIONS["split"] in state:
        return (weight.view(torch.int32) + state[COMPANIONS["split"]].int()).view(torch.float32)
    if COMPANIONS["kahan"] in state:
        return weight + state[COMPANIONS["kahan"]].float()
    if COMPANIONS["master"] in state:
        master = state[COMPANIONS["master"]]
        return torch.where(master.to(param.dtype) == param.detach(), master, weight)  # a weight that was set since counts
    return weight.clone() if weight.data_ptr() == param.data_ptr() else weight
