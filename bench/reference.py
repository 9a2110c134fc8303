"""torch.optim as the oracle: the implementation whose bits ours must equal, run so that it is defined for every element.

Adam, AdamW and SGD: torch's fused CPU kernels. They compute the last elements of a thread's chunk, those that fill no vector, in double
precision; so the oracle runs on one thread and on tensors padded to whole vectors, of which the padding is dropped again.

RMSprop has no fused kernel: torch's for-loop, with square roots rounded as IEEE 754 asks. torch's own square root of a large tensor is off
by one unit in the last place here and there.

Parameters of 16 bits: the same in fp32, with parameters and states rounded once after each step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fused_opt.bench.cases import SHORT_DTYPES, Case

# Elements of padding are added up to a multiple of this: torch's widest unrolled vector loop takes 64 fp32 elements.
VECTORS = 64


class IeeeSqrt(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's base class
    """Within this context aten::sqrt of CPU float tensors is correctly rounded (numpy's is)."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in ("sqrt", "sqrt_"):
            return func(*args, **(kwargs or {}))
        with np.errstate(invalid="ignore"):  # centered RMSprop's variance may be negative: NaN, as in torch
            root = torch.from_numpy(np.asarray(np.sqrt(args[0].detach().numpy())))  # of a scalar, numpy's root is no array
        return args[0].copy_(root) if name == "sqrt_" else root


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _pad(tensor: torch.Tensor) -> torch.Tensor:
    missing = -tensor.numel() % VECTORS
    return torch.cat([tensor.detach().reshape(-1), tensor.new_ones(missing)])


def _round(optimizer: torch.optim.Optimizer, dtype: torch.dtype) -> None:
    """Parameters and states to the nearest numbers that `dtype` has."""
    for param in optimizer.param_groups[0]["params"]:
        for tensor in (param.detach(), *optimizer.state[param].values()):
            if tensor.dim():  # not the step counter
                tensor.copy_(tensor.to(dtype))


def reference_steps(case: Case, params: Sequence[torch.Tensor], grads: Sequence[Sequence[torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
    """Step copies of `params` through `grads` (one sequence of gradients, parallel to `params`, for each step) with torch's optimizer.

    Returns:
        For each parameter "param" and its states by torch's names, in the parameter's shape; `step` stays a scalar.
    """
    dtype = params[0].dtype
    wide = torch.float32 if dtype in SHORT_DTYPES else dtype
    copies = [torch.nn.Parameter(_pad(p.to(wide))) for p in params]
    fused = {} if case.optimizer == "RMSprop" else {"fused": True}
    optimizer = getattr(torch.optim, case.optimizer)(copies, **case.options, **fused)
    with _one_thread(), contextlib.nullcontext() if fused else IeeeSqrt():  # type: ignore[no-untyped-call]
        for step_grads in grads:
            for copy, grad in zip(copies, step_grads, strict=True):
                copy.grad = _pad(grad.to(wide))
            optimizer.step()
            if wide != dtype:
                _round(optimizer, dtype)

    def unpad(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        return tensor.detach()[: like.numel()].reshape(like.shape).to(dtype) if tensor.dim() else tensor

    return [
        {name: unpad(value, p) for name, value in {"param": copy, **optimizer.state[copy]}.items()}
        for copy, p in zip(copies, params, strict=True)
    ]
