"""The norm of all gradients, and what follows from it: `max_grad_norm`, with what torch.nn.utils.clip_grad_norm_ computes.

Nothing is written to gradients. The norm is a pass over them that only reads; the factor that shortens them is one of the step's scalars.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from fused_opt.device import Scaler
    from fused_opt.native import Native
    from fused_opt.plan import GroupPlan
    from fused_opt.step import FusedStep

_OPTIONS = ("max_grad_norm", "grad_norm_type", "nonfinite_grad_norm")


class Clip(NamedTuple):
    """What the norm means for a step.

    Attributes:
        factor: of all gradients, beside a scaler's; NaN if the norm is.
        skips: whether the step is to be left out.
    """

    factor: float = 1.0
    skips: bool = False


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


def measure(optimizer: FusedStep, groups: Sequence[GroupPlan], backend: Native, scaler: Scaler | None) -> Clip:
    """The norm of all gradients, which becomes `optimizer.last_grad_norm`, and what follows. Writes nothing else.

    Raises:
        RuntimeError: the norm is not finite and nonfinite_grad_norm="raise".
    """
    options = optimizer.param_groups[0]
    limit = options.get("max_grad_norm")
    if limit is None:
        return Clip()
    largest = math.isinf(options.get("grad_norm_type") or 2)
    total = _combined(optimizer, _total(groups, backend, largest))
    power = total if largest else total.sqrt()
    if scaler is not None and scaler.grad_scale is not None:
        power = power / scaler.grad_scale.to(power.device)
    grads = [param.grad for group in optimizer.param_groups for param in group["params"] if param.grad is not None]
    wide = bool(grads) and all(grad.dtype in (torch.float64, torch.complex128) for grad in grads)
    norm = power if wide else power.float()
    optimizer.last_grad_norm = norm
    asked = options.get("nonfinite_grad_norm")
    if asked in ("raise", "skip") and not math.isfinite(norm):
        if asked == "skip":
            return Clip(skips=True)
        raise RuntimeError(
            f"the norm of all gradients is {norm.item()}, so they cannot be clipped to max_grad_norm={limit}; nothing has been changed: look "
            "for the gradient that is not finite, pass nonfinite_grad_norm='skip' to leave such steps out, or 'as_torch'"
        )
    return Clip(float(torch.clamp(limit / (norm + 1e-6), max=1.0)))  # in the norm's precision, as torch computes it


def _total(groups: Sequence[GroupPlan], backend: Native, largest: bool) -> torch.Tensor:
    """The sum of all squares, or the largest magnitude, float64, without dimensions."""
    norms: list[float | torch.Tensor] = []
    for group in groups:
        if group.batch is not None and group.batch.in_kernels:
            norms.append(group.batch.gradient_norm(backend.isa, largest, torch.get_num_threads()))
        for index, _ in group.declined:
            norms.append(_norm_by_torch(group.group["params"][index].grad, largest))
    values = torch.tensor([float(norm) for norm in norms] or [0.0], dtype=torch.float64)
    return values.amax() if largest else values.sum()


@torch.no_grad()
def _norm_by_torch(grad: Any, largest: bool) -> torch.Tensor:
    if grad is None:
        return torch.zeros((), dtype=torch.float64)
    values = grad.coalesce().values() if grad.layout == torch.sparse_coo else grad
    norm = torch.linalg.vector_norm(values, math.inf if largest else 2, dtype=torch.float64 if not values.is_complex() else torch.complex128)
    return norm.real if largest else norm.real.square()


def _combined(optimizer: FusedStep, total: torch.Tensor) -> torch.Tensor:
    """With what other ranks have."""
    if optimizer.reduce_grad_norm is None:
        return total
    result = optimizer.reduce_grad_norm(total)
    return total if result is None else result
