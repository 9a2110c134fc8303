"""The tensors of `optimizer.state`: how new ones are made, in which dtype, and how saved ones are loaded."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from fused_opt.rules import Group, Rule

State = dict[str, torch.Tensor]

STATE_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_COMPLEX = {torch.float32: torch.complex64, torch.float64: torch.complex128, torch.float16: torch.complex32}


def check_state_dtype(value: Any) -> None:
    """Raise ValueError if `value` can be no `state_dtype`."""
    if value is not None and value not in STATE_DTYPES:
        names = ", ".join(map(str, STATE_DTYPES))
        raise ValueError(f"Invalid state_dtype: {value!r}; use one of {names} (of the parts of complex numbers), or None as torch")


def check_gradient_dtype(rule: Rule, group: Group, index: int, param: torch.Tensor) -> None:
    """Raise RuntimeError where torch's own update would refuse a gradient of another dtype than the parameter's.

    With `state_dtype` it is accepted: states are then not expected to have the gradient's dtype.
    """
    grad = param.grad
    if grad is None or group.get("state_dtype") is not None or not rule.lerps(group):
        return
    if (torch.promote_types(param.dtype, grad.dtype) if rule.l2(group) else grad.dtype) != param.dtype:
        raise RuntimeError(
            f"parameter {index} of its group has dtype {param.dtype} and a gradient of dtype {grad.dtype}, expected {param.dtype}: "
            "torch keeps its states in the parameter's dtype and refuses to mix; pass state_dtype=torch.float32, or cast the gradient"
        )


def dtype_of_new_states(rule: Rule, group: Group, param: torch.Tensor) -> torch.dtype:
    """The dtype in which a step creates the states of `param`: `state_dtype` if it is given, else torch's.

    Raises:
        ValueError: `state_dtype` cannot be had for a complex parameter.
    """
    asked: torch.dtype | None = group.get("state_dtype")
    if asked is None:
        if rule.zero_states or param.grad is None:
            return param.dtype
        return torch.promote_types(param.dtype, param.grad.dtype) if rule.l2(group) else param.grad.dtype
    check_state_dtype(asked)
    if not param.is_complex():
        return asked
    if asked not in _COMPLEX:
        names = ", ".join(map(str, _COMPLEX))
        raise ValueError(f"state_dtype={asked} has no complex counterpart, as a {param.dtype} parameter needs; use one of {names}, or None")
    return _COMPLEX[asked]


def new_state(rule: Rule, group: Group, param: torch.Tensor) -> State:
    """States as torch's own step creates them for `param`'s first gradient, but for their dtype (see `dtype_of_new_states`)."""
    state = {}
    if rule.counter:
        wide = torch.get_default_dtype() == torch.float64 and not group.get("fused")
        state[rule.counter] = torch.zeros((), dtype=torch.float64 if wide else torch.float32, device="cpu")
    dtype = dtype_of_new_states(rule, group, param)
    new = torch.zeros_like if rule.zero_states else torch.empty_like
    for slot in rule.slots(group):
        state[slot] = new(param, dtype=dtype, memory_format=torch.preserve_format, requires_grad=False)
    return state


@contextlib.contextmanager
def keeping_dtypes(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Within this context `optimizer.load_state_dict` does not round states that were saved wider than their parameter.

    torch casts every state to its parameter's dtype. Here a state has, after loading: the dtype of the group's `state_dtype` if there is
    one (the saved group's, or else the one that this optimizer has), otherwise the saved dtype if it is wider than the parameter's,
    otherwise the parameter's. Hooks of the user see the state_dict before, and the states after.
    """
    seen: dict[str, Any] = {}
    asked = [group.get("state_dtype") for group in optimizer.param_groups]

    def before(_: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
        for group in state_dict["param_groups"]:
            check_state_dtype(group.get("state_dtype"))
        seen.update(state_dict)

    def after(_: torch.optim.Optimizer) -> None:
        for group, saved_group, own in zip(optimizer.param_groups, seen["param_groups"], asked, strict=True):
            if own is not None:
                group.setdefault("state_dtype", own)
            for param, key in zip(group["params"], saved_group["params"], strict=True):
                for name, saved in seen["state"].get(key, {}).items():
                    if name != "step" and isinstance(saved, torch.Tensor):
                        dtype = _dtype_to_load(group.get("state_dtype"), saved, param)
                        if optimizer.state[param][name].dtype != dtype:
                            optimizer.state[param][name] = saved.to(dtype=dtype, device=param.device)

    handles = [optimizer.register_load_state_dict_pre_hook(before), optimizer.register_load_state_dict_post_hook(after, prepend=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _dtype_to_load(asked: torch.dtype | None, saved: torch.Tensor, param: torch.Tensor) -> torch.dtype:
    if saved.is_complex() and param.is_complex():  # torch casts none of these
        return saved.dtype if asked is None else _COMPLEX.get(asked, saved.dtype)
    if not (saved.is_floating_point() and param.is_floating_point()):
        return saved.dtype
    if asked is not None:
        return asked
    return saved.dtype if saved.dtype.itemsize > param.dtype.itemsize else param.dtype
