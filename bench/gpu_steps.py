"""What the checks of `fused-opt gpu-check` step: tensors of all sizes and alignments, on the GPU and on the CPU, and comparing both."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

import fused_opt
from fused_opt.bench.cases import Case
from fused_opt.bench.layouts import permuted
from fused_opt.native import native

# "parameter 0", "parameter 0, exp_avg" and so on -> values, on the CPU.
Tensors = dict[str, torch.Tensor]

# What lies around parameters and gradients, and must stay as it is: so many elements of that value on both sides. They are a multiple of
# 16 bytes in all dtypes.
GUARDS, GUARD = 64, 7.0


@dataclass(frozen=True)
class Format:
    """Dtypes of a parameter and its gradient, and of its states; None: the parameter's."""

    param: torch.dtype
    states: torch.dtype | str | None = None

    def __str__(self) -> str:
        name = str(self.param)
        return (name if self.states is None else f"{name}, {self.states} states").replace("torch.", "")

    def allows(self, case: Case) -> bool:
        """Whether there are such states: plain SGD has none, centered RMSprop none in 8-bit codes."""
        if case.optimizer == "SGD" and "momentum" not in case.options:
            return self.states is None
        return self.states != "int8" or "centered" not in case.options

    @property
    def options(self) -> dict[str, Any]:
        """Of the optimizer's constructor."""
        if self.states is None:
            return {}
        return {"state_dtype": self.states, **({"min_8bit_size": 0} if self.states == "int8" else {})}


@dataclass(frozen=True)
class Place:
    """A tensor in memory.

    Attributes:
        shape: a matrix is transposed, dense but not contiguous.
        offset: of the parameter, in elements, from an address that is a multiple of 16 bytes.
        grad_offset: of the gradient, likewise.
    """

    shape: tuple[int, ...]
    offset: int = 0
    grad_offset: int = 0


class Guarded:
    """Copies of values at such places, with guards around them.

    Attributes:
        views: of the values, in the order of the places.
    """

    def __init__(self, values: Sequence[torch.Tensor], offsets: Sequence[int], device: torch.device) -> None:
        self.views: list[torch.Tensor] = []
        self._guards: list[torch.Tensor] = []
        for value, offset in zip(values, offsets, strict=True):
            first, count = GUARDS + offset, value.numel()
            storage = torch.full((first + count + GUARDS,), GUARD, dtype=value.dtype, device=device)
            self._guards += [storage[:first], storage[first + count :]]
            self.views.append(storage[first : first + count].as_strided(value.shape, value.stride(), first).copy_(value))

    @property
    def damaged(self) -> int:
        """How many elements beside the values were changed."""
        return sum(int((guard != GUARD).sum()) for guard in self._guards)


@dataclass(frozen=True)
class Stepped:
    """An optimizer's results.

    Attributes:
        tensors: parameters and states.
        paths: what `explain` says of them.
        launches: of each step: of the step kernel, or -1 where none of ours ran on a device.
        damaged: elements beside parameters and gradients that were changed.
    """

    tensors: Tensors
    paths: list[str]
    launches: list[int]
    damaged: int


def step_all(
    case: Case,
    format_: Format,
    places: Sequence[Place],
    values: Sequence[torch.Tensor],
    grads: Sequence[Sequence[torch.Tensor]],
    device: torch.device,
) -> Stepped:
    """Step copies of `values` through `grads`, in two groups, on `device`, by whatever serves it."""
    memory = Guarded([permuted(value) for value in values], [place.offset for place in places], device)
    params = [torch.nn.Parameter(view) for view in memory.views]
    half = len(params) // 2
    groups = [{"params": params[:half]}, {"params": params[half:], "lr": 0.05}]
    optimizer = getattr(fused_opt, case.optimizer)(groups, **case.options, **format_.options)
    launches, damaged = [], 0
    for step_grads in grads:
        given = Guarded([permuted(grad) for grad in step_grads], [place.grad_offset for place in places], device)
        for param, grad in zip(params, given.views, strict=True):
            param.grad = grad
        launches.append(step(optimizer))
        damaged += given.damaged
    paths = sorted({row.path for row in fused_opt.explain(optimizer).rows})
    return Stepped(results(optimizer), paths, launches, damaged + memory.damaged)


def step(optimizer: Any) -> int:
    """Take a step. Returns how often the step kernel was launched on a device; -1: it was not, or somebody else stepped as well."""
    optimizer._last_launched = optimizer._last_ran = None
    optimizer.step()
    return -1 if optimizer._last_launched is None or optimizer._last_ran is not None else int(optimizer._last_launched.step_launches)


def cpu_path() -> str:
    """What `explain` calls the CPU's kernels."""
    return f"cpu-{native().isa}"


def results(optimizer: torch.optim.Optimizer) -> Tensors:
    """Copies of all parameters and states."""
    found = {}
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for i, param in enumerate(params):
        found[f"parameter {i}"] = param.detach().cpu().clone()
        for name, state in optimizer.state.get(param, {}).items():
            found[f"parameter {i}, {name}"] = state.detach().cpu().clone()
    return found


@dataclass(frozen=True)
class Comparison:
    """Of bits; any NaN equals any NaN.

    Attributes:
        values: how many were compared.
        different: how many of them differ.
        first: the first difference, in words, or "".
    """

    values: int
    different: int
    first: str

    @classmethod
    def of(cls, ours: Tensors, theirs: Tensors) -> Comparison:
        """Of all of both. What only one of them has is a difference."""
        values, different, first = 0, 0, ""
        for name in dict.fromkeys([*ours, *theirs]):
            a, b = ours.get(name), theirs.get(name)
            if a is None or b is None or a.dtype != b.dtype or a.shape != b.shape:
                described = ["nothing" if t is None else f"{tuple(t.shape)} of {t.dtype}" for t in (a, b)]
                different, first = different + 1, first or f"{name}: {described[0]} instead of {described[1]}"
                continue
            wrong = _differ(a, b)
            values += a.numel()
            different += int(wrong.sum())
            if not first and wrong.any():
                i = int(wrong.nonzero()[0])
                first = f"{name}, element {i} of {a.numel()}: {a.reshape(-1)[i].item():.9g} instead of {b.reshape(-1)[i].item():.9g}"
        return cls(values, different, first)


def _differ(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Elementwise, flattened."""
    a, b = a.reshape(-1), b.reshape(-1)
    if not a.is_floating_point():
        return a != b
    return ((a != b) | (a.signbit() != b.signbit())) & ~(a.isnan() & b.isnan())


def elements(places: Sequence[Place]) -> int:
    """Of all of them together."""
    return sum(math.prod(place.shape) for place in places)
