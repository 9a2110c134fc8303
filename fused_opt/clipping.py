"""The norm of all gradients, and what follows from it: `max_grad_norm`, with what torch.nn.utils.clip_grad_norm_ computes.

Nothing is written to gradients. The norm is a pass over them that only reads; the factor that shortens them is one of the step's scalars.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from fused_opt.device import GradNorm
from fused_opt.device_norm import DeviceNorm

if TYPE_CHECKING:
    from fused_opt.device import Scaler
    from fused_opt.native import Native
    from fused_opt.plan import GroupPlan, Plan
    from fused_opt.step import FusedStep

_OPTIONS = ("max_grad_norm", "grad_norm_type", "nonfinite_grad_norm")


class Clip(NamedTuple):
    """What the norm means for a step.

    Attributes:
        factor: of gradients that the CPU's kernels or torch take, beside a scaler's; NaN if the norm is.
        skips: whether the step is to be left out.
        on_device: what kernels on devices make theirs of, if there are any.
    """

    factor: float = 1.0
    skips: bool = False
    on_device: GradNorm | None = None


NONE = Clip()


def check(optimizer: FusedStep) -> None:
    """Raise ValueError if groups differ in what is one for all of them."""
    first = optimizer.param_groups[0]
    for number, group in enumerate(optimizer.param_groups):
        for name in _OPTIONS:
            if group.get(name) != first.get(name):
                raise ValueError(
                    f"{name} is {first.get(name)!r} in group 0 and {group.get(name)!r} in group {number}, but there is one norm of all "
                    "gradients; give it to the optimizer, or the same in every group"
                )


def measure(plan: Plan, scaler: Scaler | None) -> Clip:
    """The norm of all gradients, which becomes `optimizer.last_grad_norm`, and what follows. Writes nothing else.

    Where only kernels on devices take gradients, nobody waits for it, unless the host has to know whether the step is left out.

    Raises:
        RuntimeError: the norm is not finite and nonfinite_grad_norm="raise".
    """
    optimizer, options = plan.optimizer, plan.optimizer.param_groups[0]
    limit, asked = options.get("max_grad_norm"), options.get("nonfinite_grad_norm")
    if limit is None:
        return NONE
    largest = math.isinf(options.get("grad_norm_type") or 2)
    here = _total(plan.groups, plan.backend, largest)
    total: float | torch.Tensor = here
    on_devices = _totals_on_devices(plan, largest)
    if on_devices:
        there = on_devices[0].device
        totals = torch.stack([torch.full((), here, dtype=torch.float64, device=there), *(each.to(there) for each in on_devices)])
        total = totals.amax() if largest else totals.sum()
    total = _combined(optimizer, total)
    scale = None if scaler is None else scaler.grad_scale
    if isinstance(total, torch.Tensor):
        norm = total if largest else total.sqrt()
        norm = (norm if scale is None else norm / scale.to(norm.device)).float()
        optimizer._last_grad_norm = norm
        clip = Clip(on_device=GradNorm(norm, float(limit), asked == "skip"))
        on_host = any(group.declined or (group.batch is not None and group.batch.in_kernels) for group in plan.groups)
        if on_host or asked == "raise" or (asked == "skip" and plan.host_must_know()):
            clip = _clip(norm.item(), _to_float32, limit, asked)._replace(on_device=clip.on_device)
        return clip
    number = total if largest else math.sqrt(total) if total >= 0 else math.nan
    if scale is not None:
        number /= float(scale)
    grads = (param.grad for group in optimizer.param_groups for param in group["params"])
    dtypes = {grad.dtype for grad in grads if grad is not None}
    wide = bool(dtypes) and dtypes <= {torch.float64, torch.complex128}
    rounded: Callable[[float], float] = float if wide else _to_float32
    optimizer._last_grad_norm = rounded(number), torch.float64 if wide else torch.float32
    clip = _clip(rounded(number), rounded, limit, asked)
    if any(group.in_tables for group in plan.groups):
        norm = torch.tensor(rounded(number), dtype=torch.float32, device="cpu")
        clip = clip._replace(on_device=GradNorm(norm, float(limit), asked == "skip"))
    return clip


def _clip(norm: float, rounded: Callable[[float], float], limit: float, asked: str | None) -> Clip:
    """In numbers, not tensors, of which a dozen operations would take longer than the norm of 65,536 gradients."""
    if asked in ("raise", "skip") and not math.isfinite(norm):
        if asked == "skip":
            return Clip(skips=True)
        raise RuntimeError(
            f"the norm of all gradients is {norm}, so they cannot be clipped to max_grad_norm={limit}; nothing has been changed: look for "
            "the gradient that is not finite, pass nonfinite_grad_norm='skip' to leave such steps out, or 'as_torch'"
        )
    if limit == math.inf:  # it only measures, where torch makes NaN of an infinite norm
        return NONE
    # Each operation rounded as torch's are, of which `limit / tensor` is two.
    factor = rounded(rounded(1 / rounded(norm + rounded(1e-6))) * rounded(limit))
    return Clip(min(factor, 1.0) if factor == factor else factor)


def _to_float32(x: float) -> float:
    return ctypes.c_float(x).value


def _total(groups: Sequence[GroupPlan], backend: Native, largest: bool) -> float:
    """The sum of all squares, or the largest magnitude; NaN if one is."""
    norms: list[float] = []
    for group in groups:
        by_torch = [index for index, _ in group.declined]
        if _has_pairs(group, largest):
            by_torch += group.batch.indices if group.batch is not None else []
        elif group.batch is not None and group.batch.in_kernels:
            norms.append(group.batch.gradient_norm(backend.isa, largest, torch.get_num_threads()))
        norms += [_norm_by_torch(group.group["params"][index].grad, largest) for index in by_torch]
    if largest:
        return math.nan if any(map(math.isnan, norms)) else max(norms, default=0.0)
    return sum(norms)


def _has_pairs(group: GroupPlan, largest: bool) -> bool:
    """Whether complex numbers, which to kernels are pairs of numbers, have another norm than those."""
    return largest and group.batch is not None and bool(group.batch.complex)


@torch.no_grad()
def _norm_by_torch(grad: Any, largest: bool) -> float:
    if grad is None:
        return 0.0
    values = grad.coalesce().values() if grad.layout == torch.sparse_coo else grad
    if values.numel() == 0:  # of which torch knows no largest one
        return 0.0
    magnitudes = values.abs() if values.is_complex() else values
    norm = float(torch.linalg.vector_norm(magnitudes, math.inf if largest else 2, dtype=torch.float64))
    return norm if largest else norm * norm


def _totals_on_devices(plan: Plan, largest: bool) -> list[torch.Tensor]:
    """The same of gradients that kernels on devices take: a tensor on each of them."""
    batches = [group.batch for group in plan.groups if group.batch is not None and group.in_tables and not _has_pairs(group, largest)]
    if not batches:
        return []
    if plan.kept.norm is None:
        plan.kept.norm = DeviceNorm(plan.optimizer.__dict__.setdefault("_captured", []))
    return plan.kept.norm.measure(batches, largest)


def _combined(optimizer: FusedStep, total: float | torch.Tensor) -> float | torch.Tensor:
    """With what other ranks have."""
    if optimizer.reduce_grad_norm is None:
        return total
    tensor = total if isinstance(total, torch.Tensor) else torch.tensor(total, dtype=torch.float64, device="cpu")
    result = optimizer.reduce_grad_norm(tensor)
    tensor = tensor if result is None else result
    if not isinstance(tensor, torch.Tensor) or tensor.numel() != 1:
        found = (
            f"a tensor of shape {tuple(tensor.shape)}"
            if isinstance(tensor, torch.Tensor)
            else f"{tensor!r} of type {type(tensor).__name__}"
        )
        raise TypeError(
            f"reduce_grad_norm returned {found}; it must return a tensor of one number, or None if it changed the one it was given"
        )
    if isinstance(total, torch.Tensor):  # nobody waits for the device
        return tensor
    number = float(tensor)
    if number < 0:
        raise ValueError(
            f"reduce_grad_norm returned {number}; sums of squares and magnitudes are 0 or more: add or compare them, of all ranks"
        )
    return number
