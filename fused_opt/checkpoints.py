"""`state_dict` and back: the formats in which states are saved, and what becomes of them on loading.

A state in 8-bit codes is saved under torch's name as a dict:

    {"version": 1, "code": "mulaw", "block_size": 256, "codes": int8 tensor, "scales": float32 tensor, "order": [0, 1]}

and not as bare codes, which torch.optim would take for moments if it was given such a checkpoint. (It fails on a dict.) Blocks run over
codes in the order of their memory, which file formats may not keep; so codes are saved with the dimensions in that order, and "order" says
which dimension of the parameter each one is.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fused_opt.attached import ATTACHED_STATES, ZEROED_STATES
from fused_opt.foreign import foreign_group_options, is_foreign, read_foreign
from fused_opt.quantization import BLOCK_SIZES, block_size_of, decode, encode, scale_count
from fused_opt.rules import NON_NEGATIVE, SLOTS, Group, Rule
from fused_opt.stage_checkpoints import loaded_stage_state, lost_companions
from fused_opt.stages import MASK_STATE, NEEDS, STAGE_OPTIONS, STAGE_STATES, check_stage_options, shrinks
from fused_opt.states import (
    STORAGE_OPTIONS,
    Blocks,
    Format,
    State,
    asked_for,
    check_storage_options,
    code_dtype,
    code_of,
    format_asked_for,
    is_codes,
    new_slot,
    scale_name,
)

VERSION = 1
# Options that a loaded group keeps from this optimizer where the saved one does not have them, or what they belong to.
_KEPT = (*STAGE_OPTIONS, "decoupled_weight_decay")
_KEYS = frozenset(("version", "code", "block_size", "codes", "scales", "order"))


def saved(state_dict: dict[str, Any]) -> dict[str, Any]:
    """A state_dict with states as `optimizer.state` has them, in the form in which it is saved. Tensors are shared."""
    return {**state_dict, "state": {key: _saved_state(state) for key, state in state_dict["state"].items()}}


def torch_state_dict(source: torch.optim.Optimizer | dict[str, Any]) -> dict[str, Any]:
    """The state_dict of an optimizer in torch.optim's own format: 8-bit states become float32, and options that torch lacks are left out.

    Args:
        source: an optimizer, or what its `state_dict()` returned.

    Returns:
        A new state_dict. Tensors that need no conversion are shared.

    Raises:
        ValueError: an 8-bit state has a format that this version does not know; or weight decay is decoupled, which torch's RMSprop and SGD
            cannot do: they would add it to the gradient.
    """
    state_dict = source.state_dict() if isinstance(source, torch.optim.Optimizer) else source
    states = {
        key: {
            name: _dequantized(_read(value, name, f"state {name!r} of parameter {key}"))
            if name in SLOTS and isinstance(value, Mapping)
            else value
            for name, value in state.items()
            if name not in STAGE_STATES
        }
        for key, state in state_dict["state"].items()
    }
    groups = [_torch_group(number, group) for number, group in enumerate(state_dict["param_groups"])]
    return {**state_dict, "state": states, "param_groups": groups}


def _torch_group(number: int, group: Group) -> Group:
    """A param group without the options that torch lacks."""
    if shrinks(group):
        raise ValueError(
            f"param group {number} has weight_decay={group['weight_decay']} with decoupled_weight_decay=True, which torch.optim's class "
            "does not have: it would add the decay to the gradient; set weight_decay to 0 in a copy of the state_dict, and decay weights "
            "yourself"
        )
    own = {*STORAGE_OPTIONS, *STAGE_OPTIONS, *(() if "betas" in group else ("decoupled_weight_decay",))}
    return {name: value for name, value in group.items() if name not in own}


@contextlib.contextmanager
def loading(optimizer: torch.optim.Optimizer, rule: Rule) -> Iterator[None]:
    """Within this context `optimizer.load_state_dict` reads every format, and gives each state the one it is to have.

    That is the one that the group's `state_dtype` asks for, if there is any: this optimizer's own, or else the saved one. If there is none
    it is the saved one, but torch casts a state that was saved narrower than its parameter. Masks and anchors that this optimizer has and
    the checkpoint has not stay. Everything is converted before anything is changed. Hooks of the user see the state_dict before, and the
    states after.
    """

    def before(_: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        foreign = any(map(is_foreign, state_dict["state"].values()))
        groups = [
            _merged(own, group, rule, foreign) for own, group in zip(optimizer.param_groups, state_dict["param_groups"], strict=False)
        ]
        states = dict(state_dict["state"])
        sizes = [[len(group["params"]) for group in some] for some in (optimizer.param_groups, state_dict["param_groups"])]
        if sizes[0] == sizes[1]:  # otherwise torch will say what is wrong
            for own, group, saved_group in zip(optimizer.param_groups, groups, state_dict["param_groups"], strict=True):
                _check_names(own, group)
                view = {**own, **group, "params": own["params"]}
                lost.extend(lost_companions(view, saved_group, states))
                for index, (key, param) in enumerate(zip(group["params"], own["params"], strict=True)):
                    loaded = _loaded_state(rule, view, index, states[key]) if key in states else {}
                    loaded = _with_attached(loaded, optimizer.state.get(param, {}))
                    if loaded or key in states:
                        states[key] = loaded
                group.pop("masked", None)
                if any(MASK_STATE in states.get(key, {}) for key in group["params"]):
                    group["masked"] = True
        return {**state_dict, "state": states, "param_groups": groups + state_dict["param_groups"][len(groups) :]}

    def after(_: torch.optim.Optimizer) -> None:
        for state in optimizer.state.values():
            for name, value in state.items():
                if isinstance(value, _Ready):
                    state[name] = value.tensor

    lost: list[str] = []
    handles = [optimizer.register_load_state_dict_pre_hook(before), optimizer.register_load_state_dict_post_hook(after, prepend=True)]
    state, param_groups = optimizer.state, optimizer.param_groups
    try:
        yield
        for what in dict.fromkeys(lost):
            warnings.warn(what, stacklevel=4)
    except BaseException:  # torch may have put new ones in their place already
        optimizer.__dict__.update(state=state, param_groups=param_groups)
        raise
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class _Ready:
    """A tensor as it is to be after loading. torch casts tensors, and leaves alone what it does not know."""

    tensor: torch.Tensor


@dataclass(frozen=True)
class _Codes:
    """A state in 8-bit codes."""

    codes: torch.Tensor
    scales: torch.Tensor
    code: str
    block_size: int


def _saved_state(state: Any) -> Any:
    if not isinstance(state, dict):
        return state
    coded = [name for name in _coded_slots(state) if scale_name(name) in state]
    result = {name: value for name, value in state.items() if name not in map(scale_name, coded)}
    for name in coded:
        codes, scales = state[name], state[scale_name(name)]
        dims = range(codes.dim())
        order = list(dims) if codes.is_contiguous() else sorted(dims, key=codes.stride, reverse=True)
        result[name] = {
            "version": VERSION,
            "code": code_of(name),
            "block_size": block_size_of(codes.numel(), scales.numel()),
            "codes": codes if order == list(dims) else codes.permute(order),
            "scales": scales,
            "order": order,
        }
    return result


def _coded_slots(state: dict[str, Any]) -> list[str]:
    return [name for name, value in state.items() if name in SLOTS and is_codes(value)]


def _read(value: Mapping[str, Any], slot: str, where: str) -> _Codes:
    version = value.get("version")
    if "version" not in value or "codes" not in value:
        raise ValueError(
            f"{where} is a dict with the keys {sorted(map(str, value))}; 8-bit states have {sorted(_KEYS)}: it was not saved by fused_opt"
        )
    if version != VERSION:
        raise ValueError(f"{where} is in 8-bit codes of version {version!r}, and this fused_opt reads version {VERSION}: update fused_opt")
    if set(value) != _KEYS:
        raise ValueError(
            f"{where} has the keys {sorted(map(str, value))}, but 8-bit states have {sorted(_KEYS)}; it was not saved by fused_opt"
        )
    order, codes = value["order"], value["codes"]
    if not (isinstance(codes, torch.Tensor) and isinstance(value["scales"], torch.Tensor) and isinstance(value["code"], str)):
        raise ValueError(f"{where} has codes and scales that are no tensors, or a code that is no name; the checkpoint is damaged")
    if sorted(order) != list(range(codes.dim())):
        raise ValueError(f"{where} has the order of dimensions {order}, but {codes.dim()} dimensions; the checkpoint is damaged")
    read = _Codes(
        codes.contiguous().permute([order.index(d) for d in range(codes.dim())]), value["scales"], value["code"], value["block_size"]
    )
    if read.code != code_of(slot):
        raise ValueError(f"{where} is in code {read.code!r}, and this fused_opt reads {code_of(slot)!r} there: update fused_opt")
    if read.codes.dtype != code_dtype(slot) or read.scales.dtype != torch.float32 or read.block_size not in BLOCK_SIZES:
        raise ValueError(
            f"{where} has {read.codes.dtype} codes, {read.scales.dtype} scales and blocks of {read.block_size!r}, but {read.code!r} has "
            f"{code_dtype(slot)}, torch.float32 and one of {BLOCK_SIZES}; the checkpoint is damaged"
        )
    if bool((read.scales < 0).any()):
        raise ValueError(
            f"{where} has a negative scale, {read.scales.min().item():g}, but scales are magnitudes; the checkpoint is damaged"
        )
    if read.scales.shape != (scale_count(read.codes.numel(), read.block_size),):
        raise ValueError(
            f"{where} has {read.codes.numel()} codes in blocks of {read.block_size}, but {tuple(read.scales.shape)} scales; "
            "the checkpoint is damaged"
        )
    return read


def _check_names(own: Group, group: Group) -> None:
    theirs, ours = group.get("param_names"), own.get("param_names")
    if isinstance(group.get("state_dtype"), Mapping) and theirs is not None and ours is not None and theirs != ours:
        pairs = ", ".join(f"{a!r} for {b!r}" for a, b in zip(theirs, ours, strict=False) if a != b)
        raise ValueError(
            f"state_dtype={group['state_dtype']} goes by names, but the checkpoint has other names than this optimizer: {pairs}; "
            "make the optimizer with the parameters in the checkpoint's order"
        )


def _merged(own: Group, group: Group, rule: Rule, foreign: bool) -> Group:
    """A saved group with options by torch's names, and with this optimizer's own wishes for its states."""
    options = foreign_group_options(group, rule.name) if foreign else None
    if options is not None:
        group = {**own, **options, "params": group["params"]}
    check_storage_options(group)
    own_wishes = {name: own[name] for name in (*STORAGE_OPTIONS, "weights") if name in own}
    kept = {name: own[name] for name in _KEPT if name in own and NEEDS.get(name, name) not in group}
    merged = {**kept, **group, **own_wishes}
    if merged.get("weights") != "stochastic":
        merged.pop("rounding_seed", None)
    check_stage_options(merged)
    return merged


def _with_attached(loaded: dict[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """One parameter's loaded state with its own mask and anchor, where there are none; zero under a mask that it did not have."""
    kept = {name: own[name] for name in ATTACHED_STATES if name in own and name not in loaded}
    if MASK_STATE in kept:
        loaded = {name: _masked(value, kept[MASK_STATE]) if name in ZEROED_STATES else value for name, value in loaded.items()}
    return {**loaded, **{name: _Ready(value) for name, value in kept.items()}}


@torch.no_grad()
def _masked(value: Any, mask: torch.Tensor) -> Any:
    if isinstance(value, _Ready):
        return _Ready(_masked(value.tensor, mask))
    if not isinstance(value, torch.Tensor) or value.shape != mask.shape:
        return value
    return value.masked_fill(mask.logical_not().to(value.device), 0)


def _loaded_state(rule: Rule, group: Group, index: int, state: dict[str, Any]) -> dict[str, Any]:
    """One parameter's saved state, with `_Ready` tensors where torch must not cast."""
    foreign = read_foreign(state, rule.slots(group))
    if foreign is not None:
        state = {name: value for name, value in foreign.items() if name != "step" or rule.counter}
    result: dict[str, Any] = {}
    scales_of_codes = set(map(scale_name, _coded_slots(state)))
    for name, value in state.items():
        if name in scales_of_codes:
            continue
        where = f"state {name!r} of parameter {index} of its group"
        if name in STAGE_STATES:
            made = loaded_stage_state(group, name, value, group["params"][index], where)
            if made is not None:
                result[name] = _Ready(made)
        elif name not in SLOTS:  # the user's, and the counter
            wider = isinstance(value, torch.Tensor) and name != "step" and _wider(value, group["params"][index])
            result[name] = _Ready(value.to(group["params"][index].device)) if wider else value
        elif is_codes(value):  # as `optimizer.state` has them
            if scale_name(name) not in state:
                raise ValueError(f"{where} has {value.dtype} codes, but there is no {scale_name(name)!r}; the checkpoint is damaged")
            scales = state[scale_name(name)]
            raw = _Codes(value, scales, code_of(name), block_size_of(value.numel(), scales.numel()))
            if raw.block_size == 0 or value.dtype != code_dtype(name):
                raise ValueError(f"{where} has {value.numel()} {value.dtype} codes and {scales.numel()} scales; the checkpoint is damaged")
            result |= _converted(name, raw, _wanted(rule, group, index, raw), group["params"][index], where)
        elif isinstance(value, Mapping):
            codes = _read(value, name, where)
            result |= _converted(name, codes, _wanted(rule, group, index, codes), group["params"][index], where)
        elif isinstance(value, torch.Tensor):
            result |= _converted(name, value, _wanted(rule, group, index, value), group["params"][index], where)
        else:
            result[name] = value
    return result


def _wanted(rule: Rule, group: Group, index: int, value: torch.Tensor | _Codes) -> Format | None:
    """None: as it is, or as torch casts it."""
    param = group["params"][index]
    asked = asked_for(group, index)
    if isinstance(value, torch.Tensor):
        if value.is_complex() and param.is_complex() and asked is not None:
            return format_asked_for(rule, asked, group, index)
        if not (value.is_floating_point() and param.is_floating_point()):
            return None
        if asked is None:
            return value.dtype if _wider(value, param) else None
    elif asked is None:
        return param.dtype if isinstance(group.get("state_dtype"), Mapping) else Blocks(value.block_size)
    return format_asked_for(rule, asked, group, index)


def _wider(value: torch.Tensor, param: torch.Tensor) -> bool:
    floats = value.is_floating_point() and param.is_floating_point()
    return floats and value.dtype.itemsize > param.dtype.itemsize


def _converted(name: str, value: torch.Tensor | _Codes, wanted: Format | None, param: torch.Tensor, where: str) -> dict[str, Any]:
    if wanted is None:
        return {name: value}
    made: State
    if isinstance(wanted, Blocks):
        if isinstance(value, _Codes) and value.codes.shape != param.shape:
            raise ValueError(
                f"{where} has shape {tuple(value.codes.shape)}, its parameter {tuple(param.shape)}; load a state_dict of the same model"
            )
        if isinstance(value, _Codes) and value.block_size == wanted.size:
            made = {name: value.codes, scale_name(name): value.scales}
        else:
            values = _dequantized(value) if isinstance(value, _Codes) else value
            made = _quantized(name, values.cpu(), param if param.shape == values.shape else values, wanted, where)
    else:
        made = {name: _dequantized(value).to(wanted) if isinstance(value, _Codes) else value.to(wanted)}
    return {key: _Ready(tensor.to(param.device)) for key, tensor in made.items()}


def _quantized(slot: str, values: torch.Tensor, like: torch.Tensor, blocks: Blocks, where: str) -> State:
    made = new_slot(slot, torch.empty_like(like, device="cpu"), blocks)
    if slot in NON_NEGATIVE and values.numel() and bool((values.amin() < 0).item()):
        raise ValueError(f"{where} has a negative value, {values.amin().item():g}, but is a mean of squares; the checkpoint is damaged")
    encode(values, made[slot], made[scale_name(slot)], code_of(slot), blocks.size)
    if bool(made[scale_name(slot)].isnan().any()):
        raise ValueError(
            f"{where} has values that are not finite, for which there is no 8-bit code; mend it, or load it with state_dtype=torch.float32"
        )
    return made


def _dequantized(codes: _Codes) -> torch.Tensor:
    values = torch.empty_like(codes.codes, dtype=torch.float32, device="cpu")
    decode(codes.codes.cpu(), codes.scales.cpu(), codes.code, codes.block_size, values)
    return values.to(codes.codes.device)
