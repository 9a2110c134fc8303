"""Tensors that the user attaches to parameters, beside what a step itself keeps for them: pruning masks, and anchors."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from fused_opt.fallback import writable
from fused_opt.rules import SLOTS
from fused_opt.stages import ANCHOR_STATE, MASK_STATE, STAGE_STATES

Attached = Mapping[torch.Tensor, torch.Tensor | None]

ATTACHED_STATES = (MASK_STATE, ANCHOR_STATE)

# The states that are zero where the mask is False. In 8-bit codes, too, 0 is zero.
ZEROED_STATES = (SLOTS | STAGE_STATES).difference(ATTACHED_STATES)


@torch.no_grad()
def set_masks(optimizer: torch.optim.Optimizer, masks: Attached) -> None:
    """Keep weights at zero: where a parameter's mask is False, its weight and all its states are exactly zero from now on.

    They become zero at once and stay so through every step, whatever gradient, weight decay, momentum or average say. To prune and go on
    training that way is "train, prune, retrain" of Han et al., 2015, https://arxiv.org/abs/1506.02626; `fused_opt.pruning` makes masks.

    Args:
        optimizer: one of fused_opt.
        masks: parameter -> mask, or None to take its mask away: the weights then stay as they are until the next step, which moves them
            again. Of the parameter's shape and device; bool, or another dtype with no values but 0 and 1. Copied (one byte a weight).
            Parameters that are not in the mapping keep the mask that they have, or go on without. So do those of which a loaded
            checkpoint has none.

    Raises:
        TypeError: `masks` is no mapping; a mask is no tensor or is complex; a parameter with a mask is complex.
        ValueError: a parameter is not in the optimizer; a mask has another shape, device or layout, or other values than 0 and 1; the
            parameter, or a state of it, cannot be written.
        RuntimeError: within `average_weights()`. Nothing has been changed, whatever is raised.
    """
    if getattr(optimizer, "_evaluates", False):
        raise RuntimeError("the weights are their averages, which masks are not to zero; leave average_weights() first")
    made = _checked(optimizer, masks, "mask", _mask)
    for param, mask in made.items():
        if mask is not None:
            pruned = mask.logical_not()
            for tensor in (param, *_states_of(optimizer, param).values()):
                tensor.masked_fill_(pruned, 0)
    _attach(optimizer, MASK_STATE, made)
    for group in optimizer.param_groups:
        if any(MASK_STATE in optimizer.state.get(param, {}) for param in group["params"]):
            group["masked"] = True
        else:
            group.pop("masked", None)


@torch.inference_mode(False)  # what is made there cannot be written later
@torch.no_grad()
def set_anchors(optimizer: torch.optim.Optimizer, anchors: Attached) -> None:
    """Say which weights `anchor_decay` pulls towards: L2-SP of Li, Grandvalet & Davoine, 2018, https://arxiv.org/abs/1802.01483.

    Without this they are those before the first step. An anchor has no effect in a group without `anchor_decay`.

    Args:
        optimizer: one of fused_opt.
        anchors: parameter -> anchor, or None to take its anchor away: the next step then takes the weights that it finds. Of the
            parameter's shape and device; float32, float64, bfloat16 or float16, or complex for a complex parameter. Not copied, so that
            those of a model that is there anyway take no memory: what is written to it counts. Copied only if it shares memory with
            the parameter, has other strides, or has a dtype that does not hold all values of the parameter's; is lazily conjugated or
            negated, or was made in inference mode. Those that `load_state_dict` finds in a checkpoint are copies.
            Parameters that are not in the mapping keep the anchor that they have, as do those of which a loaded checkpoint has none.

    Raises:
        TypeError: `anchors` is no mapping; an anchor is no tensor, or has none of these dtypes.
        ValueError: a parameter is not in the optimizer; an anchor has another shape, device or layout. Nothing has been changed then.
    """
    _attach(optimizer, ANCHOR_STATE, _checked(optimizer, anchors, "anchor", _anchor))


def _checked(
    optimizer: torch.optim.Optimizer,
    attached: Attached,
    what: str,
    make: Callable[[torch.optim.Optimizer, torch.Tensor, torch.Tensor, str], torch.Tensor],
) -> dict[torch.Tensor, torch.Tensor | None]:
    """Parameter -> what is to be in its state. Writes nothing."""
    if not isinstance(attached, Mapping):
        raise TypeError(f"{what}s must be a mapping, parameter -> {what}, not a {type(attached).__name__}; pass {{parameter: {what}}}")
    places = {
        param: f"parameter {index} of group {number}"
        for number, group in enumerate(optimizer.param_groups)
        for index, param in enumerate(group["params"])
    }
    made: dict[torch.Tensor, torch.Tensor | None] = {}
    for param, value in attached.items():
        if not isinstance(param, torch.Tensor) or param not in places:
            is_tensor = isinstance(param, torch.Tensor)
            found = f"a tensor of shape {tuple(param.shape)}" if is_tensor else f"{param!r} of type {type(param).__name__}"
            by_name = ": {parameter: by_name[name] for name, parameter in model.named_parameters()}" if isinstance(param, str) else ""
            raise ValueError(
                f"the {what}s have {found}, which is no parameter of this optimizer; give keys out of its param_groups{by_name}"
            )
        if value is not None:
            _check_like(param, value, what, places[param])
            value = make(optimizer, param, value, places[param])
        made[param] = value
    return made


def _check_like(param: torch.Tensor, value: torch.Tensor, what: str, place: str) -> None:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"the {what} of {place} is a {type(value).__name__}; it must be a tensor, or None to take it away")
    if value.shape != param.shape:
        raise ValueError(f"the {what} of {place} has shape {tuple(value.shape)}; give it the parameter's, {tuple(param.shape)}")
    if value.device != param.device:
        raise ValueError(f"the {what} of {place} is on {value.device}, the parameter on {param.device}; pass {what}.to(parameter.device)")
    if value.layout != torch.strided:
        raise ValueError(f"the {what} of {place} has layout {value.layout}; it must be torch.strided: pass {what}.to_dense()")


def _mask(optimizer: torch.optim.Optimizer, param: torch.Tensor, mask: torch.Tensor, place: str) -> torch.Tensor:
    if param.is_complex():
        raise TypeError(f"{place} has dtype {param.dtype}, and a complex parameter cannot have a mask; leave it out of the masks")
    if mask.is_complex():
        raise TypeError(f"the mask of {place} has dtype {mask.dtype}; it must be bool, or have real values 0 and 1: pass mask != 0")
    if mask.dtype != torch.bool:
        others = mask[(mask != 0) & (mask != 1)]
        if others.numel():
            raise ValueError(f"the mask of {place} has the value {others[0].item():g}; it must have 0 and 1 only: pass mask != 0")
    for name, tensor in {"weight": param, **_states_of(optimizer, param)}.items():
        if tensor.layout != torch.strided or tensor.shape != param.shape or not writable(tensor):
            raise ValueError(
                f"the {name} of {place} cannot be zeroed under a mask: it has layout {tensor.layout}, shape {tuple(tensor.shape)} and "
                f"strides {tensor.stride() if tensor.layout == torch.strided else None}; it must be dense, of shape {tuple(param.shape)}, "
                "neither expanded nor made in inference mode: give the optimizer a clone, or leave it out of the masks"
            )
    return torch.empty_like(param, dtype=torch.bool, memory_format=torch.preserve_format, requires_grad=False).copy_(mask)


ANCHOR_DTYPES = {
    False: (torch.float32, torch.float64, torch.bfloat16, torch.float16),
    True: (torch.complex64, torch.complex128, torch.complex32),
}


def _anchor(optimizer: torch.optim.Optimizer, param: torch.Tensor, anchor: torch.Tensor, place: str) -> torch.Tensor:
    dtypes = ANCHOR_DTYPES[param.is_complex()]
    if anchor.dtype not in dtypes:
        names = ", ".join(map(str, dtypes))
        raise TypeError(f"the anchor of {place}, which is {param.dtype}, has dtype {anchor.dtype}; use one of {names}")
    dtype = torch.promote_types(param.dtype, anchor.dtype)
    shared = anchor.untyped_storage().data_ptr() == param.untyped_storage().data_ptr()
    special = anchor.is_conj() or anchor.is_neg() or anchor.is_inference()
    if anchor.dtype == dtype and anchor.stride() == param.stride() and not shared and not special:
        return anchor.detach()
    return torch.empty_like(param, dtype=dtype, memory_format=torch.preserve_format, requires_grad=False).copy_(anchor)


def _states_of(optimizer: torch.optim.Optimizer, param: torch.Tensor) -> dict[str, torch.Tensor]:
    state = optimizer.state.get(param, {})
    return {name: value for name, value in state.items() if name in ZEROED_STATES and isinstance(value, torch.Tensor)}


def _attach(optimizer: torch.optim.Optimizer, name: str, made: Attached) -> None:
    for param, value in made.items():
        if value is not None:
            optimizer.state[param][name] = value
        elif param in optimizer.state:
            optimizer.state[param].pop(name, None)
            if not optimizer.state[param]:  # as if it had never been stepped
                del optimizer.state[param]
