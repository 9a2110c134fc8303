"""What becomes of stages' states on loading: see `fused_opt.checkpoints`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from fused_opt.attached import ANCHOR_DTYPES
from fused_opt.rules import Group
from fused_opt.stages import ANCHOR_STATE, COMPANIONS, LOW_PRECISION, MASK_STATE, stage_dtypes

_REMEDY = "load what fused_opt saved for such a parameter (torch.optim casts states), or leave this state out"


@torch.no_grad()
def loaded_stage_state(group: Group, name: str, value: Any, param: torch.Tensor, where: str) -> torch.Tensor | None:
    """A copy in the parameter's strides, in a dtype that steps take; None for a companion that the parameter does not have.

    Raises:
        ValueError: its shape is not the parameter's; or it is of another dtype and has lost what it was there for.
    """
    if name in COMPANIONS.values() and name not in stage_dtypes(group, param):
        return None
    if not isinstance(value, torch.Tensor) or value.shape != param.shape:
        shape = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
        raise ValueError(f"{where} has shape {shape}, its parameter {tuple(param.shape)}; load a state_dict of the same model")
    dtype = _checked_dtype(group, name, value, param, where)
    return torch.empty_like(param, dtype=dtype, memory_format=torch.preserve_format, requires_grad=False).copy_(value)


def _checked_dtype(group: Group, name: str, value: torch.Tensor, param: torch.Tensor, where: str) -> torch.dtype:
    """The one that it is to have."""
    if name == MASK_STATE:
        others = value[(value != 0) & (value != 1)]
        if others.numel():
            raise ValueError(f"{where} has the value {others[0].item():g}, but a mask has 0 and 1 only; {_REMEDY}")
        return torch.bool
    dtypes = stage_dtypes({**group, "average": group.get("average") or "ema"}, param)  # it may be switched on again
    allowed = (dtypes[name],) if name in COMPANIONS.values() else ANCHOR_DTYPES[param.is_complex()]
    if value.dtype not in allowed:
        names = ", ".join(map(str, allowed))
        raise ValueError(f"{where} has dtype {value.dtype}; for a parameter of {param.dtype} it must be one of {names}; {_REMEDY}")
    return torch.promote_types(value.dtype, param.dtype) if name == ANCHOR_STATE else dtypes[name]


def lost_companions(group: Group, saved_group: Group, states: Mapping[Any, Any]) -> Iterator[str]:
    """What is lost of 16-bit weights because this optimizer has other `weights` than the checkpoint."""
    theirs, ours = saved_group.get("weights"), group.get("weights")
    name = COMPANIONS.get(theirs or "")
    if name is None or theirs == ours:
        return
    for key, param in zip(saved_group["params"], group["params"], strict=True):
        if name in states.get(key, {}) and param.dtype in LOW_PRECISION:
            yield (
                f"the checkpoint has weights={theirs!r}, this optimizer weights={ours!r}: {name!r}, what the checkpoint has of weights "
                f"beyond their 16 bits, is lost; make the optimizer with weights={theirs!r}, or export float32_weights() of one made so"
            )
