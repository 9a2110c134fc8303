"""How far 16-bit results lie from the exact ones, which are those of torch's for-loop in float64.

In 16 bits torch's for-loop rounds after each operation. Ours computes in fp32 and rounds once, and so must be closer to the exact result.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fused_opt.bench.cases import SHORT_DTYPES, Case
from fused_opt.bench.reference import IeeeSqrt
from fused_opt.bench.rounding import correctly_rounded, error_of, spacing_at
from fused_opt.bench.ulp import Difference, distance

# For each parameter "param" and its states, by torch's names.
Result = list[dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Exactness:
    """How a step's 16-bit results compare with the correctly rounded ones, and with torch's, of one kind of tensor.

    Attributes:
        difference: from the correctly rounded results, where fp32 can tell what these are.
        uncertain: the number of values where it cannot, because nearly equal numbers were subtracted.
        ours, torchs: mean distance from the unrounded exact results, in ULP, where fp32 can tell and both are finite.
        broken: what is promised and not kept, in words, or "".
    """

    difference: Difference
    uncertain: int
    ours: float
    torchs: float
    broken: str


def compare_step(case: Case, before: Result, grads: Sequence[torch.Tensor], after: Result) -> dict[str, Exactness]:
    """Judge a step of ours that led from `before` to `after`, by what torch's for-loop makes of `before`. For "param" and each state."""
    dtype = grads[0].dtype
    exact, single, torchs = (_step(case, before, grads, each) for each in (torch.float64, torch.float32, dtype))
    names = [name for name in after[0] if name != "step"]
    return {name: _compare(*(_flat(result, name) for result in (after, exact, single, torchs))) for name in names}


def _compare(ours: torch.Tensor, exact: torch.Tensor, single: torch.Tensor, torchs: torch.Tensor) -> Exactness:
    """Rounding an fp32 result that is off by e gives what is off by at most 2 e more than the correctly rounded result, which no 16-bit
    result beats: not torch's, for any element. Where 2 e is at most half the spacing of 16-bit numbers, it gives the correctly rounded
    result or its neighbour."""
    spacing = spacing_at(exact, ours.dtype)
    slack = 2 * error_of(single, exact)
    certain = slack <= spacing / 2
    rounded = correctly_rounded(exact, ours.dtype)
    error, torchs_error = error_of(ours, exact), error_of(torchs, exact)
    both = certain & error.isfinite() & torchs_error.isfinite()
    means = [float((e[both] / spacing[both]).mean()) for e in (error, torchs_error)]
    broken = ""
    for violation, what in (
        (certain & (distance(ours, rounded) > 1), "not within 1 ULP of the correctly rounded"),
        (error > torchs_error + slack, "farther than torch's for-loop from the exact"),
    ):
        if violation.any():
            i = int(violation.nonzero()[0])
            broken = f"{int(violation.sum())} values, first {ours[i].item():.9g}, {what} {exact[i].item():.17g}"
            break
    else:
        if means[0] > means[1]:
            broken = f"the mean error is {means[0]:.9g} ULP, torch's {means[1]:.9g}"
    return Exactness(Difference.of(ours[certain], rounded[certain]), int((~certain).sum()), means[0], means[1], broken)


def _step(case: Case, before: Result, grads: Sequence[torch.Tensor], dtype: torch.dtype) -> Result:
    """One step of torch's for-loop in `dtype`, from the values and states in `before`."""
    params = [torch.nn.Parameter(tensors["param"].to(dtype, copy=True)) for tensors in before]
    optimizer = getattr(torch.optim, case.optimizer)(params, **case.options, foreach=False)
    for param, tensors, grad in zip(params, before, grads, strict=True):
        param.grad = grad.to(dtype)
        states = {name: value for name, value in tensors.items() if name != "param"}
        if states:
            optimizer.state[param] = {name: value.to(value.dtype if name == "step" else dtype, copy=True) for name, value in states.items()}
    with contextlib.nullcontext() if dtype in SHORT_DTYPES else IeeeSqrt():  # type: ignore[no-untyped-call]
        optimizer.step()
    return [{"param": param.detach(), **optimizer.state[param]} for param in params]


def _flat(result: Result, name: str) -> torch.Tensor:
    return torch.cat([tensors[name].reshape(-1) for tensors in result])
