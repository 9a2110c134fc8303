"""Torch's share of a step: parameters that the native code does not take are stepped by torch's own code on the same state."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.optimizer import Optimizer

from fused_opt.native import native
from fused_opt.plain_stages import Staged
from fused_opt.rules import eps_of
from fused_opt.stages import LOW_PRECISION, OF_WEIGHTS, STAGE_OPTIONS, has_stages, shrinks, stage_flags
from fused_opt.states import asked_for, format_asked_for, is_codes, is_fresh, new_state

if TYPE_CHECKING:
    from fused_opt.plan import GroupPlan
    from fused_opt.rules import Group
    from fused_opt.step import FusedStep

# What torch wraps around the step of an optimizer class: hooks and the profiler's range.
_HOOKS_CODE = Optimizer.profile_hook_step(Optimizer.step).__code__

_NO_STAGES = "for which clipping by value, regularisation, masks and averages cannot be had; put it in a group without, or use sparse=False"


def check_differentiable(group: Group, number: int) -> None:
    """Raise ValueError if group `number` asks for stages, which are not part of the graph, of a step that is to be."""
    if not group.get("differentiable"):
        return
    asked = {name: group[name] for name in STAGE_OPTIONS if group.get(name) is not None}
    if shrinks(group):
        asked["decoupled_weight_decay"] = True
    if asked:
        options = ", ".join(f"{name}={value!r}" for name, value in asked.items())
        raise ValueError(
            f"group {number} has differentiable=True and {options}, of which autograd would see nothing; leave out differentiable, or do "
            "without these and put them into the loss and the loop"
        )


def may_be_stepped(param: torch.Tensor) -> bool:
    """False of frozen ones, which are in a plan to be explained only: they can be what a step would refuse."""
    return param.requires_grad or param.grad is not None


def check(optimizer: FusedStep, groups: list[GroupPlan]) -> None:
    """Raise, before anything is written, what torch's step would raise for a sparse gradient, or would ignore.

    A parameter with a sparse gradient is not saved for `_undone_on_failure`: it is usually large, and a step touches a few of its rows.

    Raises:
        RuntimeError: the update cannot be done with a sparse gradient; or `state_dtype` is asked for, which torch's step does not have.
    """
    for number, group in enumerate(groups):
        for index, reason in group.declined:
            param = group.group["params"][index]
            if not may_be_stepped(param):
                continue
            where = f"parameter {index} of group {number}"
            if optimizer._rule.slots(group.group):
                if any(map(is_codes, optimizer.state.get(param, {}).values())):
                    raise RuntimeError(
                        f"the states of {where} are in 8-bit codes, but torch would have to step it: {reason}; put it in a group without "
                        "state_dtype='int8'"
                    )
                asked = asked_for(group.group, index)
                if asked is not None and format_asked_for(optimizer._rule, asked, group.group, index) != param.dtype:
                    raise RuntimeError(
                        f"state_dtype={asked} cannot be had for {where}, which torch steps: {reason}; put it in a group without"
                    )
            flags = stage_flags(group.group) if has_stages(group.group) else 0
            if flags & OF_WEIGHTS and param.dtype in LOW_PRECISION:
                raise RuntimeError(
                    f"weights={group.group['weights']!r} cannot be had for {where}, which torch steps: {reason}; put it in a group without"
                )
            if param.grad is not None and param.grad.layout != torch.strided:
                if flags:
                    raise RuntimeError(f"{where} has a gradient of layout {param.grad.layout}, {_NO_STAGES}")
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


def step(optimizer: FusedStep, groups: list[GroupPlan], grad_scale: torch.Tensor | None, factor: float) -> None:
    """Let torch step the parameters that the native code declined. If that fails, they and their states are as before.

    Without the extension (and with FUSED_OPT_BACKEND=torch) it is torch's step, as if this were torch's class: nothing is put back.
    Gradients are divided by `grad_scale` and multiplied with `factor`.
    """
    torch_step: Any = optimizer._torch_class.step
    while torch_step.__code__ is _HOOKS_CODE:  # hooks and profiling have been entered already, by our own step
        torch_step = torch_step.__wrapped__
    staged = factor != 1 or any(has_stages(group.group) for group in groups)
    if native().module is None and not staged:
        _complete(optimizer, groups)
        torch_step(optimizer)
        return
    params = [group.group["params"][index] for group in groups for index, _ in group.declined]
    with _undone_on_failure(optimizer, params), _own_gradients(params, grad_scale):
        _complete(optimizer, groups)
        with _staged(optimizer, groups, factor) if staged else contextlib.nullcontext():
            _step_parts(optimizer, groups, torch_step)


def _step_parts(optimizer: FusedStep, groups: list[GroupPlan], torch_step: Any) -> None:
    parts = [[share for group in groups for share in _shares(group, sparse)] for sparse in (False, True)]
    if all(group.batch is None for group in groups) and not all(parts) and all(_for_torch(group.group) is group.group for group in groups):
        torch_step(optimizer)
        return
    for shares in parts:  # sparse ones last: they are not put back, but they have been checked
        if shares:
            with _only(optimizer, shares):
                torch_step(optimizer)


def _complete(optimizer: FusedStep, groups: list[GroupPlan]) -> None:
    """Make the rule's states beside a mask or an anchor: torch makes them only where there are none at all."""
    rule = optimizer._rule
    for plan in groups if rule.zero_states else ():
        for index, _ in plan.declined:
            state = optimizer.state.get(plan.group["params"][index])
            if state and is_fresh(rule, plan.group, state):
                state.update(new_state(rule, plan.group, index, state))


@torch.no_grad()
def unscale(params: list[torch.Tensor], grad_scale: torch.Tensor) -> None:
    """Divide each gradient by `grad_scale`, once if parameters share it; in place where that is possible, as torch's fused kernels do."""
    grads = {}
    for param in params:
        grad = param.grad
        if grad is None:
            continue
        if not writable(grad):
            param.grad = grad.div(grad_scale.to(grad.device))
        else:
            grads[(grad.data_ptr(), grad.shape, grad.stride()) if grad.layout == torch.strided else id(grad)] = grad
    for grad in grads.values():
        grad.div_(grad_scale.to(grad.device))


def writable(tensor: torch.Tensor) -> bool:
    """Whether torch writes in place, to each element once."""
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        return False
    if tensor.layout != torch.strided or tensor.is_contiguous():
        return True
    reach = 0  # of the smaller strides together
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride <= reach:
            return False
        reach += stride * (size - 1)
    return True


@contextlib.contextmanager
def _own_gradients(params: list[torch.Tensor], grad_scale: torch.Tensor | None) -> Iterator[None]:
    """Within this context the parameters may have other gradients: unscaled copies, if there is a scale."""
    grads = [(param, param.grad) for param in params if param.grad is not None]
    try:
        if grad_scale is not None:
            with torch.no_grad():
                for param, grad in grads:
                    param.grad = grad.div(grad_scale.to(grad.device))
        yield
    finally:
        for param, grad in grads:
            param.grad = grad


@contextlib.contextmanager
def _staged(optimizer: FusedStep, groups: list[GroupPlan], factor: float) -> Iterator[None]:
    """What stages do before and after the step in this context."""
    with torch.no_grad():
        staged = []
        for plan in groups:
            for index, _ in plan.declined:
                param = plan.group["params"][index]
                if param.grad is not None:
                    of_param = Staged(optimizer._rule, plan.group, plan.number, index, optimizer.state[param], factor)
                    param.grad = of_param.before(param.grad)
                    staged.append(of_param)
    yield
    with torch.no_grad():
        for of_param in staged:
            of_param.after()


@contextlib.contextmanager
def _undone_on_failure(optimizer: FusedStep, params: list[torch.Tensor]) -> Iterator[None]:
    """Put everything back if torch's step fails midway. Costs a copy, so on accelerators, where memory is scarce, it is not done."""
    states = {param: dict(optimizer.state[param]) for param in params if param in optimizer.state}
    saved = [
        (value, value.detach().clone())
        for param in params
        if param.device.type == "cpu" and (param.grad is None or param.grad.layout == torch.strided)
        for value in (param, *states.get(param, {}).values())
        if isinstance(value, torch.Tensor) and writable(value)  # torch does not write to others
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
            for value, copy in saved:
                value.copy_(copy)
        raise


@contextlib.contextmanager
def _only(optimizer: FusedStep, groups: list[Group]) -> Iterator[None]:
    """Show the optimizer to torch's step with these groups only, and without GradScaler's attributes, which are dealt with."""
    attributes: dict[str, Any] = optimizer.__dict__
    original = optimizer.param_groups
    amp = {name: attributes.pop(name) for name in ("found_inf", "grad_scale") if name in attributes}
    optimizer.param_groups = groups
    try:
        yield
    finally:
        optimizer.param_groups = original
        for name, value in amp.items():
            setattr(optimizer, name, value)


def _for_torch(group: Group) -> Group:
    """The group as torch is to see it, which does not know our options; itself if that is how it is."""
    changes = {"weight_decay": 0.0} if shrinks(group) else {}
    if group.get("masked") and "alpha" in group:
        changes["eps"] = eps_of(group)
    return {**group, **changes} if changes else group


def _shares(plan: GroupPlan, sparse: bool) -> Iterator[Group]:
    params = [plan.group["params"][index] for index, _ in plan.declined]
    params = [p for p in params if (p.grad is not None and p.grad.layout != torch.strided) == sparse]
    on_cpu = [p for p in params if p.device.type == "cpu"]
    elsewhere = [p for p in params if p.device.type != "cpu"]
    group = _for_torch(plan.group)
    if on_cpu:
        # torch's fused CPU kernels misread strides and lose 16-bit updates (pytorch 191763): the for-loop is the one to trust.
        yield {**group, "params": on_cpu, **{option: False for option in ("foreach", "fused") if option in group}}
    if elsewhere:
        yield {**group, "params": elsewhere}
