"""The norm of all gradients, and what follows from it: `max_grad_norm`, with what torch.nn.utils.clip_grad_norm_ computes.

Nothing is written to gradients. The norm is a pass over them that only reads; the factor that shortens them is one of the step's scalars.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
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

    In numbers, not tensors, of which a dozen operations would take longer than the norm of 65,536 gradients.

    Raises:
        RuntimeError: the norm is not finite and nonfinite_grad_norm="raise".
    """
    options = optimizer.param_groups[0]
    limit = options.get("max_grad_norm")
    if limit is None:
        return Clip()
    largest = math.isinf(options.get("grad_norm_type") or 2)
    total = _combined(optimizer, _total(groups, backend, largest))
    norm = total if largest else math.sqrt(total) if total >= 0 else math.nan
    if scaler is not None and scaler.grad_scale is not None:
        norm /= float(scaler.grad_scale)
    grads = (param.grad for group in optimizer.param_groups for param in group["params"])
    dtypes = {grad.dtype for grad in grads if grad is not None}
    wide = bool(dtypes) and dtypes <= {torch.float64, torch.complex128}
    rounded: Callable[[float], float] = float if wide else _to_float32
    norm = rounded(norm)
    optimizer._last_grad_norm = norm, torch.float64 if wide else torch.float32
    asked = options.get("nonfinite_grad_norm")
    if asked in ("raise", "skip") and not math.isfinite(norm):
        if asked == "skip":
            return Clip(skips=True)
        raise RuntimeError(
            f"the norm of all gradients is {norm}, so they cannot be clipped to max_grad_norm={limit}; nothing has been changed: look for "
            "the gradient that is not finite, pass nonfinite_grad_norm='skip' to leave such steps out, or 'as_torch'"
        )
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
        if group.batch is not None and group.batch.in_kernels:
            if largest and group.batch.complex:  # to the kernels they are pairs of numbers
                by_torch += group.batch.indices
            else:
                norms.append(group.batch.gradient_norm(backend.isa, largest, torch.get_num_threads()))
        norms += [_norm_by_torch(group.group["params"][index].grad, largest) for index in by_torch]
    if largest:
        return math.nan if any(map(math.isnan, norms)) else max(norms, default=0.0)
    return sum(norms)


@torch.no_grad()
def _norm_by_torch(grad: Any, largest: bool) -> float:
    if grad is None:
        return 0.0
    values = grad.coalesce().values() if grad.layout == torch.sparse_coo else grad
    magnitudes = values.abs() if values.is_complex() else values
    norm = float(torch.linalg.vector_norm(magnitudes, math.inf if largest else 2, dtype=torch.float64))
    return norm if largest else norm * norm


def _combined(optimizer: FusedStep, total: float) -> float:
    """With what other ranks have."""
    if optimizer.reduce_grad_norm is None:
        return total
    tensor = torch.tensor(total, dtype=torch.float64, device="cpu")
    result = optimizer.reduce_grad_norm(tensor)
    return float(tensor if result is None else result)
