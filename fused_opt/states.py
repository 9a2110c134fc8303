"""The tensors of `optimizer.state`: in which format they are, and how new ones are made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Any

import torch

from fused_opt.quantization import check_block_size, scale_count
from fused_opt.rules import NON_NEGATIVE, Group, Rule
from fused_opt.stages import counter_of, new_stage_states

State = dict[str, torch.Tensor]

STATE_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INT8 = "int8"
BLOCK_SIZE = 256
MIN_8BIT_SIZE = 4096
# Options of a group that say how its states are kept, beside torch's own options.
STORAGE_OPTIONS = ("state_dtype", "block_size", "min_8bit_size")

_COMPLEX = {torch.float32: torch.complex64, torch.float64: torch.complex128, torch.float16: torch.complex32}
_PARAM_DTYPES_8BIT = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Blocks:
    """A state in 8-bit codes with a scale for each block of `size` values."""

    size: int


Format = torch.dtype | Blocks


def scale_name(slot: str) -> str:
    """The state key of the scales that belong to the codes under `slot`."""
    return f"{slot}_scale"


def code_of(slot: str) -> str:
    """The code of an 8-bit state (see `fused_opt.quantize_blockwise`)."""
    return "unsigned_mulaw" if slot in NON_NEGATIVE else "mulaw"


def code_dtype(slot: str) -> torch.dtype:
    """The dtype of the codes of an 8-bit state."""
    return torch.uint8 if slot in NON_NEGATIVE else torch.int8


def check_storage_options(options: Mapping[str, Any]) -> None:
    """Raise ValueError if one of STORAGE_OPTIONS has a value that it cannot have."""
    _check_state_dtype(options.get("state_dtype"))
    if options.get("block_size") is not None:
        check_block_size(options["block_size"])
    size = options.get("min_8bit_size")
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 0):
        raise ValueError(f"Invalid min_8bit_size: {size!r}; give a number of elements, 0 or more (default: {MIN_8BIT_SIZE})")


def _check_state_dtype(value: Any) -> None:
    if isinstance(value, Mapping):
        for pattern, dtype in value.items():
            if not isinstance(pattern, str):
                raise ValueError(f"Invalid state_dtype: its key {pattern!r} is no pattern of parameter names, such as '*embed*'")
            if isinstance(dtype, Mapping):
                raise ValueError(f"Invalid state_dtype: for {pattern!r} it is {dtype!r}; give a dtype, 'int8', or None as torch")
            _check_state_dtype(dtype)
    elif value is not None and value not in (*STATE_DTYPES, INT8):
        names = ", ".join(map(str, STATE_DTYPES))
        raise ValueError(
            f"Invalid state_dtype: {value!r}; use one of {names} (of the parts of complex numbers), 'int8', a dict of those by patterns "
            "of parameter names, or None as torch"
        )


def asks_for_8bit(options: Mapping[str, Any]) -> bool:
    """Whether `state_dtype` can make a state 8-bit."""
    asked = options.get("state_dtype")
    return INT8 in asked.values() if isinstance(asked, Mapping) else asked == INT8


def asked_for(group: Group, index: int) -> Any:
    """What `state_dtype` says for a parameter of the group: a dtype, "int8", or None as torch.

    Raises:
        ValueError: it goes by names, and the group has none.
    """
    asked = group.get("state_dtype")
    if not isinstance(asked, Mapping):
        return asked
    names = group.get("param_names")
    if names is None:
        raise ValueError(
            f"state_dtype={asked} goes by names, but the group's parameters have none; make the optimizer with model.named_parameters()"
        )
    return next((dtype for pattern, dtype in asked.items() if fnmatchcase(names[index], pattern)), None)


def check_gradient_dtype(rule: Rule, group: Group, index: int) -> None:
    """Raise RuntimeError where torch's own update would refuse a gradient of another dtype than the parameter's.

    With `state_dtype` it is accepted: states are then not expected to have the gradient's dtype.
    """
    param = group["params"][index]
    grad = param.grad
    if grad is None or asked_for(group, index) is not None or not rule.lerps(group):
        return
    if (torch.promote_types(param.dtype, grad.dtype) if rule.l2(group) else grad.dtype) != param.dtype:
        raise RuntimeError(
            f"parameter {index} of its group has dtype {param.dtype} and a gradient of dtype {grad.dtype}, expected {param.dtype}: "
            "torch keeps its states in the parameter's dtype and refuses to mix; pass state_dtype=torch.float32, or cast the gradient"
        )


def format_of_new_states(rule: Rule, group: Group, index: int) -> Format:
    """The format in which a step creates the states of a parameter: as `state_dtype` asks if it is given, else torch's dtype.

    Raises:
        ValueError: the parameter cannot have states of that format.
    """
    param = group["params"][index]
    asked = asked_for(group, index)
    if asked is None:
        if rule.zero_states or param.grad is None:
            dtype: torch.dtype = param.dtype
            return dtype
        return torch.promote_types(param.dtype, param.grad.dtype) if rule.l2(group) else param.grad.dtype
    return format_asked_for(rule, asked, group, index)


def format_asked_for(rule: Rule, asked: Any, group: Group, index: int) -> Format:
    """The format of states that `asked` (not None) means for a parameter; see `format_of_new_states`."""
    param = group["params"][index]
    _check_state_dtype(asked)
    if asked == INT8:
        if param.dtype not in _PARAM_DTYPES_8BIT:
            raise ValueError(
                f"state_dtype='int8' cannot be had for parameter {index} of its group, which has dtype {param.dtype}; it needs one of "
                f"{', '.join(map(str, _PARAM_DTYPES_8BIT))}: cast it, or put it in a group with another state_dtype"
            )
        if param.numel() < _given(group, "min_8bit_size", MIN_8BIT_SIZE) or not rule.takes_codes(group):
            return torch.float32
        return Blocks(_given(group, "block_size", BLOCK_SIZE))
    if not param.is_complex():
        dtype: torch.dtype = asked
        return dtype
    if asked not in _COMPLEX:
        names = ", ".join(map(str, _COMPLEX))
        raise ValueError(f"state_dtype={asked} has no complex counterpart, as a {param.dtype} parameter needs; use one of {names}, or None")
    return _COMPLEX[asked]


def _given(group: Group, option: str, default: int) -> int:
    value = group.get(option)
    return default if value is None else value


def is_codes(tensor: Any) -> bool:
    """Whether a state is one of 8-bit codes."""
    return isinstance(tensor, torch.Tensor) and tensor.dtype in (torch.int8, torch.uint8)


def new_state(rule: Rule, group: Group, index: int, existing: Mapping[str, Any] = MappingProxyType({})) -> State:
    """What `existing` lacks: states as torch's own step creates them for a parameter's first gradient, but for their format (see
    `format_of_new_states`), and those of stages.
    """
    param = group["params"][index]
    state = {}
    counter = counter_of(rule, group)
    if counter and counter not in existing:
        wide = torch.get_default_dtype() == torch.float64 and not group.get("fused")
        beside_param = group.get("capturable") or group.get("fused")  # where torch has it
        device = param.device if beside_param else torch.device("cpu")
        state[counter] = torch.zeros((), dtype=torch.float64 if wide else torch.float32, device=device)
    if is_fresh(rule, group, existing):
        made = format_of_new_states(rule, group, index)
        for slot in rule.slots(group):
            state.update(new_slot(slot, param, made, zeros=rule.zero_states))
    return state | new_stage_states(group, param, existing)


def is_fresh(rule: Rule, group: Group, state: Mapping[str, Any]) -> bool:
    """Whether the rule's own states are yet to be made."""
    return rule.counter not in state if rule.counter else any(state.get(slot) is None for slot in rule.slots(group))


def new_slot(slot: str, param: torch.Tensor, made: Format, zeros: bool = True) -> State:
    """A new state in the parameter's shape and strides, zero or uninitialized; its scales, too, if it has any."""
    new = torch.zeros_like if zeros else torch.empty_like

    def like_param(dtype: torch.dtype) -> torch.Tensor:
        return new(param, dtype=dtype, memory_format=torch.preserve_format, requires_grad=False)

    if isinstance(made, torch.dtype):
        return {slot: like_param(made)}
    scales = torch.zeros(scale_count(param.numel(), made.size), dtype=torch.float32, device=param.device)
    return {slot: like_param(code_dtype(slot)), scale_name(slot): scales}
