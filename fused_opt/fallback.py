"""Torch's share of a step: parameters that the native code does not take are stepped by torch's own code on the same state."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.optimizer import Optimizer

if TYPE_CHECKING:
    from fused_opt.rules import Group
    from fused_opt.step import FusedStep, GroupPlan

# What torch wraps around the step of an optimizer class: hooks and the profiler's range.
_HOOKS_CODE = Optimizer.profile_hook_step(Optimizer.step).__code__


def check(optimizer: FusedStep, groups: list[GroupPlan]) -> None:
    """Raise, before anything is written, what torch's step would raise for a sparse gradient, or would ignore.

    A parameter with a sparse gradient is not saved for `_undone_on_failure`: it is usually large, and a step touches a few of its rows.

    Raises:
        RuntimeError: the update cannot be done with a sparse gradient; or `state_dtype` is asked for, which torch's step does not have.
    """
    for number, group in enumerate(groups):
        for index, reason in group.declined:
            param = group.group["params"][index]
            where = f"parameter {index} of group {number}"
            dtype = group.group.get("state_dtype")
            if dtype not in (None, param.dtype) and optimizer._rule.slots(group.group):
                raise RuntimeError(f"state_dtype={dtype} cannot be had for {where}, which torch steps: {reason}; put it in a group without")
            if param.grad is not None and param.grad.layout != torch.strided:
                _check_sparse(optimizer, group.group, param, f"{where} has a gradient of layout {param.grad.layout}")


def _check_sparse(optimizer: FusedStep, group: Group, param: torch.Tensor, what: str) -> None:
    name, rule = optimizer._torch_class.__name__, optimizer._rule
    if not rule.sparse:
        raise RuntimeError(f"{name} does not support sparse gradients: {what}; use SparseAdam, SGD, or sparse=False")
    option = "weight_decay" if rule.l2(group) else "nesterov" if group.get("nesterov") else ""
    buffer = optimizer.state.get(param, {}).get("momentum_buffer")
    if option == "weight_decay" or (option and buffer is not None and buffer.layout == torch.strided):
        raise RuntimeError(
            f"{name} with {option}={group[option]} does not support sparse gradients"
            f"{' once there is a dense momentum buffer' if option == 'nesterov' else ''}: {what}; "
            f"put it in a group without {option}, or make it with sparse=False"
        )


def step(optimizer: FusedStep, groups: list[GroupPlan], grad_scale: torch.Tensor | None) -> None:
    """Let torch step the parameters that the native code declined. If that fails, they and their states are as before."""
    torch_step: Any = optimizer._torch_class.step
    while torch_step.__code__ is _HOOKS_CODE:  # hooks and profiling have been entered already, by our own step
        torch_step = torch_step.__wrapped__
    params = [group.group["params"][index] for group in groups for index, _ in group.declined]
    with _undone_on_failure(optimizer, params, with_grads=grad_scale is not None), _only_declined(optimizer, groups):
        if grad_scale is not None:
            unscale(params, grad_scale)
        torch_step(optimizer)


@torch.no_grad()
def unscale(params: list[torch.Tensor], grad_scale: torch.Tensor) -> bool:
    """Divide gradients by `grad_scale`, in place where that is possible, as torch's fused kernels do.

    Returns:
        Whether a gradient had to be replaced: one of an expanded or an inference tensor.
    """
    replaced = False
    for param in params:
        grad = param.grad
        if grad is None:
            continue
        scale = grad_scale.to(grad.device)
        expanded = grad.layout == torch.strided and any(n > 1 and s == 0 for n, s in zip(grad.shape, grad.stride(), strict=True))
        if expanded or (grad.is_inference() and not torch.is_inference_mode_enabled()):
            param.grad = grad.div(scale)
            replaced = True
        else:
            grad.div_(scale)
    return replaced


@contextlib.contextmanager
def _undone_on_failure(optimizer: FusedStep, params: list[torch.Tensor], with_grads: bool) -> Iterator[None]:
    """Put everything back if torch's step fails midway. Costs a copy, so on accelerators, where memory is scarce, it is not done."""
    states = {param: dict(optimizer.state[param]) for param in params if param in optimizer.state}
    grads = [(param, param.grad) for param in params] if with_grads else []
    saved = [
        (value, value.detach().clone())
        for param in params
        if param.device.type == "cpu" and (param.grad is None or param.grad.layout == torch.strided)
        for value in (param, *states.get(param, {}).values(), param.grad if with_grads else None)
        if isinstance(value, torch.Tensor)
    ]
    try:
        yield
    except BaseException:
        for param in params:
            if param in states:
                optimizer.state[param].clear()
                optimizer.state[param].update(states[param])
            else:
                optimizer.state.pop(param, None)
        with torch.no_grad():
            for param, grad in grads:
                param.grad = grad
            for value, copy in saved:
                value.copy_(copy)
        raise


@contextlib.contextmanager
def _only_declined(optimizer: FusedStep, groups: list[GroupPlan]) -> Iterator[None]:
    """Show the optimizer to torch's step without the parameters that the native code serves; as it is if there are none."""
    if all(group.batch is None for group in groups):
        yield
        return
    attributes: dict[str, Any] = optimizer.__dict__
    original = optimizer.param_groups
    amp = {name: attributes.pop(name) for name in ("found_inf", "grad_scale") if name in attributes}  # dealt with already
    optimizer.param_groups = [{**g.group, "params": params, **options} for g in groups for params, options in _shares(g)]
    try:
        yield
    finally:
        optimizer.param_groups = original
        for name, value in amp.items():
            setattr(optimizer, name, value)


def _shares(plan: GroupPlan) -> Iterator[tuple[list[torch.Tensor], dict[str, Any]]]:
    params = [plan.group["params"][index] for index, _ in plan.declined]
    on_cpu = [p for p in params if p.device.type == "cpu"]
    elsewhere = [p for p in params if p.device.type != "cpu"]
    if on_cpu:
        # torch's fused CPU kernels misread strides and lose 16-bit updates (pytorch 191763): the for-loop is the one to trust.
        yield on_cpu, {option: False for option in ("foreach", "fused") if option in plan.group}
    if elsewhere:
        yield elsewhere, {}
