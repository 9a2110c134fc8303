"""Reads checkpoints of other packages' 8-bit optimizers: bitsandbytes and torchao. Neither is imported.

Both store an 8-bit state as codes, a table of the 256 values that a code can mean, and a scale for each block of the flattened parameter:
value = table[code] * scale, in fp32. What they save for a parameter:

bitsandbytes: `step`, an int. `state1`, `state2`: uint8 codes in the parameter's shape, with tables `qmap1`, `qmap2` and scales `absmax1`,
    `absmax2`; or fp32 values, without tables and scales, for small parameters and for its 32-bit classes. Blocks have 256 values, 2048
    before version 0.44; the last one may be short. Since 0.49.2 all but `step` lies in a dict of its own.
torchao: torch's names; each 8-bit state is a tensor subclass with the attributes `codes` (uint8), `qmap` (the table) and `scale`. Blocks
    divide the parameter; small and indivisible parameters have plain tensors. Its files can be loaded only where torchao is installed.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch

_BNB_NESTED = "__bnb_optimizer_quant_state__"
_BNB_STATES = ("state1", "state2")
_BNB_KEYS = frozenset(name + number for name in ("state", "qmap", "absmax", "max") for number in "12")
_BNB_BLOCK_SIZES = (256, 2048)
_COMMON_OPTIONS = frozenset(("lr", "betas", "eps", "weight_decay"))  # of both packages
_ADEMAMIX_OPTIONS = ("alpha", "t_alpha", "t_beta3")  # in every group of bitsandbytes' optimizers with two states
_TABLE_SIZE = 256
_PIECE = 1 << 18  # values decoded at a time: temporaries of 1 MiB each, for parameters of any size


def is_foreign(state: Any) -> bool:
    """Whether one parameter's saved state has one of the formats that `read_foreign` reads."""
    if not isinstance(state, dict):
        return False
    return _BNB_NESTED in state or not _BNB_KEYS.isdisjoint(state) or any(map(_is_torchao, state.values()))


def read_foreign(state: dict[str, Any], slots: tuple[str, ...]) -> dict[str, torch.Tensor] | None:
    """One parameter's saved state in torch's format, or None if it already has that format.

    Args:
        state: what the checkpoint has for the parameter.
        slots: the states that the optimizer needs, in torch's order; for bitsandbytes these are state1, state2.

    Returns:
        The slots in fp32, in the saved shape, and "step" as a 0-dim fp32 tensor if the checkpoint counts steps (bitsandbytes always
        does, for SGD too). A scale that is NaN makes its block NaN.

    Raises:
        ValueError: the checkpoint lacks something, or is inconsistent, or is laid out in a way that this function does not know.
    """
    nested = state.get(_BNB_NESTED, state)
    if not _BNB_KEYS.isdisjoint(nested):
        read = _read_bitsandbytes(nested, slots)
    elif any(map(_is_torchao, state.values())):
        read = _read_torchao(state, slots)
    else:
        return None
    if "step" in state:
        read["step"] = torch.tensor(float(state["step"]), dtype=torch.float32)
    return read


def foreign_group_options(group: dict[str, Any], rule_name: str) -> dict[str, Any] | None:
    """The options of a saved param group by torch's names, or None if they have these names already.

    Options that the other package does not have (amsgrad, centered, nesterov, ...) are left out. Keys that the user added are kept.
    Values are those that were in effect, so that the run goes on as it was: bitsandbytes saves RMSprop's momentum and SGD's dampening,
    but does not apply them; and its Adam decays weights as AdamW does.

    Args:
        group: a param group of the checkpoint.
        rule_name: "adam" (AdamW, too), "rmsprop" or "sgd".

    Raises:
        ValueError: the group is one of AdEMAMix.
    """
    if not _COMMON_OPTIONS.issubset(group) or "maximize" in group:  # torch's groups have the latter, but for those of old versions
        return None
    from_bitsandbytes = "amsgrad" not in group
    if not from_bitsandbytes and not isinstance(group["lr"], torch.Tensor):
        return None  # torch's, of such an old version
    options = {key: value for key, value in group.items() if key != "params"}
    for key in ("lr", "initial_lr"):  # torchao keeps lr as a tensor, and a scheduler keeps a copy of it
        if key in options:
            options[key] = float(options[key])
    if not from_bitsandbytes:
        return options
    for key in ("betas", *_ADEMAMIX_OPTIONS):
        options.pop(key, None)
    betas = tuple(map(float, group["betas"]))
    if len(betas) != 2:
        raise ValueError(
            f"the checkpoint's param group has betas={betas}, expected 2 values: with 3 it is one of AdEMAMix, which none of these "
            "optimizers can continue; load the checkpoint of another class"
        )
    if rule_name == "rmsprop":
        return options | {"alpha": betas[0], "momentum": _not_applied("RMSprop", "momentum", betas[1])}
    if rule_name == "sgd":
        del options["eps"]
        return options | {"momentum": betas[0], "dampening": _not_applied("SGD", "dampening", betas[1])}
    return options | {"betas": betas} | ({"decoupled_weight_decay": True} if options["weight_decay"] else {})


def _not_applied(optimizer: str, option: str, saved: float) -> float:
    if saved:
        warnings.warn(
            f"the checkpoint has {option}={saved:g}, but bitsandbytes' {optimizer} does not apply it; "
            f"loaded as {option}=0, with which the run goes on as it was",
            stacklevel=3,
        )
    return 0.0


def _read_bitsandbytes(state: dict[str, Any], slots: tuple[str, ...]) -> dict[str, torch.Tensor]:
    saved = [name for name in _BNB_STATES if name in state]
    if len(saved) != len(slots):
        raise ValueError(
            f"the bitsandbytes checkpoint has {len(saved)} states for a parameter ({', '.join(saved) or 'none'}), but this optimizer needs "
            f"{len(slots)} ({', '.join(slots) or 'none'}); load it into one of the class that saved it, without amsgrad, centered or "
            "(RMSprop) momentum, which bitsandbytes does not have"
        )
    return {slot: _read_bitsandbytes_state(state, number) for number, slot in enumerate(slots, 1)}


def _read_bitsandbytes_state(state: dict[str, Any], number: int) -> torch.Tensor:
    name, table_name, scales_name = f"state{number}", f"qmap{number}", f"absmax{number}"
    codes: torch.Tensor = _required(state, name, "the checkpoint")
    if not codes.is_contiguous():
        # CUDA steps take the elements in the order of memory, as those of the parameter, which bitsandbytes has made contiguous; CPU
        # steps take them by their indices. A file does not say which it was.
        raise ValueError(
            f"{name} of shape {tuple(codes.shape)} has strides {codes.stride()}, expected contiguous: bitsandbytes does not save in which "
            f"order it took the elements; put {name}.contiguous() into the checkpoint if the steps were made on a CPU, otherwise "
            "torch.as_strided with the shape and the strides of a contiguous tensor"
        )
    if codes.is_floating_point():
        return codes.to(torch.float32, copy=True)
    if scales_name not in state and f"max{number}" in state:
        raise ValueError(
            f"the checkpoint has max{number} and no {scales_name}: {name} is not quantized in blocks (block_wise=False), which is not "
            "supported; let bitsandbytes save it with block_wise=True or as 32-bit states"
        )
    table, scales = _required(state, table_name, name), _required(state, scales_name, name)
    numbers = {-(-codes.numel() // size): size for size in _BNB_BLOCK_SIZES}  # of blocks
    if scales.ndim != 1 or scales.numel() not in numbers:
        raise ValueError(
            f"{scales_name} has shape {tuple(scales.shape)}, but {name} has {codes.numel()} codes; expected "
            f"{' or '.join(f'({n},), blocks of {size}' for n, size in sorted(numbers.items(), reverse=True))}: the checkpoint is damaged, "
            "or of an optimizer or version that is not known here; save it with bitsandbytes' Adam, AdamW, RMSprop or SGD"
        )
    return _dequantize(name, codes, table, scales, numbers[scales.numel()])


def _is_torchao(value: Any) -> bool:
    return hasattr(value, "codes") and hasattr(value, "scale")


def _read_torchao(state: dict[str, Any], slots: tuple[str, ...]) -> dict[str, torch.Tensor]:
    read = {}
    for slot in slots:
        value = _required(state, slot, "the torchao checkpoint")
        if not _is_torchao(value):
            read[slot] = value.to(torch.float32, copy=True)
            continue
        if not hasattr(value, "qmap"):
            raise ValueError(f"{slot} ({type(value).__name__}) has no table 'qmap'; only torchao's Adam8bit and AdamW8bit can be read")
        codes, scales = value.codes, value.scale
        if scales.ndim != 1 or scales.numel() == 0 or codes.numel() % scales.numel():
            raise ValueError(
                f"{slot} has {codes.numel()} codes and scales of shape {tuple(scales.shape)}; expected one dimension, and a number that "
                "divides the codes into equal blocks: the checkpoint is damaged, or a part of a sharded one; save it again in full"
            )
        read[slot] = _dequantize(slot, codes, value.qmap, scales, codes.numel() // scales.numel())
    return read


def _required(state: dict[str, Any], key: str, owner: str) -> Any:
    if key not in state:
        raise ValueError(f"{owner} needs {key!r}, but the saved state has only {sorted(state)}; save it again in full")
    return state[key]


def _dequantize(name: str, codes: torch.Tensor, table: torch.Tensor, scales: torch.Tensor, block_size: int) -> torch.Tensor:
    """table[codes] * scales, blocks running over `codes` in row-major order."""
    if table.numel() != _TABLE_SIZE:
        raise ValueError(
            f"the table of {name} has {table.numel()} values, expected {_TABLE_SIZE}, one for each 8-bit code; save 8-bit or 32-bit states"
        )
    if codes.dtype != torch.uint8:
        raise ValueError(f"{name} has codes of dtype {codes.dtype}, expected torch.uint8; save 8-bit or 32-bit states")
    table, scales = table.to(torch.float32), scales.to(torch.float32)
    out = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
    flat_codes, flat_out = codes.reshape(-1), out.view(-1)
    blocks = max(1, _PIECE // block_size)
    for first in range(0, scales.numel(), blocks):
        piece = slice(first * block_size, (first + blocks) * block_size)
        values = table[flat_codes[piece].int()]
        factors = scales[first : first + blocks].repeat_interleave(block_size)
        torch.mul(values, factors[: values.numel()], out=flat_out[piece])
    return out
