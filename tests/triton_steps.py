"""The same steps by the CPU's kernels and by Triton's, which must end with the same bits. What runs the latter is up to the caller."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import fused_opt
from fused_opt.bench.cases import CASES, Case
from fused_opt.native import native
from helpers import assert_same_state, make_problem

UseBackend = Callable[[str], None]


@dataclass(frozen=True)
class Format:
    """Dtypes of a parameter and of its states; None: the parameter's."""

    param: torch.dtype
    states: torch.dtype | str | None = None

    def __str__(self) -> str:
        return f"{self.param}, states {self.states or 'alike'}".replace("torch.", "")

    def allows(self, case: Case) -> bool:
        """Plain SGD has no states."""
        return self.states is None or case.optimizer != "SGD" or "momentum" in case.options

    @property
    def options(self) -> dict[str, Any]:
        """Of the optimizer."""
        if self.states is None:
            return {}
        return {"state_dtype": self.states, **({"min_8bit_size": 0} if self.states == "int8" else {})}


def of_all_cases(formats: Sequence[Format]) -> list[tuple[Format, Case]]:
    """Every case of the table with every format that it can have."""
    return [(format_, case) for format_ in formats for case in CASES if format_.allows(case)]


FP32, BF16, FP16 = Format(torch.float32), Format(torch.bfloat16), Format(torch.float16)
FP32_INT8, BF16_INT8 = Format(torch.float32, "int8"), Format(torch.bfloat16, "int8")
FORMATS = (
    FP32,
    BF16,
    FP16,
    FP32_INT8,
    BF16_INT8,
    Format(torch.float16, "int8"),
    Format(torch.bfloat16, torch.float32),
    Format(torch.float32, torch.bfloat16),
)


# Every stage by itself: options, and the formats of a parameter that can have it. `masks`: see `step_by`.
STAGES: tuple[tuple[dict[str, Any], tuple[Format, ...]], ...] = (
    ({"max_grad_value": 0.01}, (FP32, BF16)),
    ({"l1": 0.05, "l1_method": "subgradient"}, (FP32, BF16)),
    ({"l1": 0.1}, (FP32, BF16)),
    ({"anchor_decay": 0.3}, (FP32, BF16)),
    ({"masks": True}, (FP32, BF16)),
    ({"decoupled_weight_decay": True, "weight_decay": 0.1}, (FP32, BF16)),
    ({"average": "ema", "average_decay": 0.7}, (FP32, BF16, FP16)),
    ({"average": "swa", "average_start": 1, "average_every": 2}, (FP32, BF16)),
    ({"weights": "stochastic", "rounding_seed": 2**24 - 1}, (BF16,)),
    ({"weights": "kahan"}, (BF16, FP16)),
    ({"weights": "split"}, (BF16,)),
    ({"weights": "master"}, (BF16, FP16)),
)
_ADAM = {"weight_decay": 0.1, "max_grad_value": 0.1, "l1": 0.02, "l1_method": "subgradient", "anchor_decay": 0.1, "masks": True}
_RMSPROP = {"momentum": 0.9, "decoupled_weight_decay": True, "weight_decay": 0.1, "l1": 0.05, "masks": True}
_SGD = {"momentum": 0.9, "nesterov": True, "maximize": True, "anchor_decay": 0.1, "l1": 0.01}
# Many together, with each of what weights can be.
STAGES_TOGETHER = (
    (Format(torch.bfloat16, torch.float32), Case("AdamW", {**_ADAM, "average": "ema", "weights": "stochastic"})),
    (BF16_INT8, Case("RMSprop", {**_RMSPROP, "average": "swa", "average_start": 1, "weights": "split"})),
    (FP16, Case("SGD", {**_SGD, "max_grad_value": 0.5, "average": "ema", "weights": "kahan"})),
    (FP32_INT8, Case("Adam", {**_ADAM, "amsgrad": True, "average": "ema"})),
    (Format(torch.float16, "int8"), Case("AdamW", {"masks": True, "average": "swa", "average_every": 2, "weights": "master"})),
)


def stages_of_all_rules() -> list[tuple[Format, Case]]:
    """Every stage with every rule and every format of states."""
    rules = {name: {} for name in ("Adam", "AdamW", "RMSprop")} | {"SGD": {"momentum": 0.9}}
    return [
        (format_, Case(rule, {**options, **stage}))
        for stage, formats in STAGES
        for rule, options in rules.items()
        if rule != "AdamW" or "decoupled_weight_decay" not in stage
        for format_ in FORMATS
        if Format(format_.param) in formats
    ]


@dataclass(frozen=True)
class Placed:
    """A tensor of so many elements that begins so many elements behind an address that is a multiple of 64 bytes."""

    count: int
    offset: int = 0

    def place(self, values: torch.Tensor) -> torch.Tensor:
        """A copy of `values`, a vector, there. Its neighbours are NaN."""
        storage = torch.full((self.offset + self.count + 8,), torch.nan, dtype=values.dtype)
        return storage[self.offset : self.offset + self.count].copy_(values)


# A whole tile and a tail; less than a tile; empty; at an odd address, more than a tile; one element.
SMALL = (Placed(1024 + 130), Placed(33), Placed(0), Placed(1060, offset=3), Placed(1))
# The same for tiles of 8-bit codes, which are twice as large.
MEDIUM = (Placed(2048 + 300), Placed(33, offset=1), Placed(0), Placed(1))
# Also more than a chunk, with a tail, and exactly a tile.
LARGE = (Placed(2 * 8192 + 1024 + 17), Placed(1024), Placed(8192 + 1, offset=1), *SMALL)


# Begin every gradient but the first, where a case asks for them.
SPECIAL = (math.nan, math.inf, -math.inf, 0.0, -0.0)


def step_by(
    backend: str,
    use_backend: UseBackend,
    case: Case,
    format_: Format,
    layout: Sequence[Placed],
    steps: int,
    special: bool = False,
    **options: Any,
) -> torch.optim.Optimizer:
    """An optimizer after so many steps. It proves that the backend ran them.

    With a case's option `masks` every parameter has one; with `special` gradients have infinities, NaN and zeros. Anchors are not the
    first weights.
    """
    options = {**case.options, **format_.options, **options}
    masks = options.pop("masks", False)
    values, grads = make_problem([(placed.count,) for placed in layout], steps, format_.param)
    for grad in (grad for step_grads in grads[1:] for grad in step_grads if special):
        grad[: len(SPECIAL)] = torch.tensor(SPECIAL)[: len(grad)]
    use_backend(backend)
    params = [torch.nn.Parameter(placed.place(value)) for placed, value in zip(layout, values, strict=True)]
    half = len(params) // 2
    groups = [{"params": params[:half]}, {"params": params[half:], "lr": 0.05}]
    optimizer: Any = getattr(fused_opt, case.optimizer)(groups, **options)
    if "anchor_decay" in options:
        optimizer.set_anchors({param: 0.1 * value.roll(1) for param, value in zip(params, values, strict=True)})
    if masks:
        optimizer.set_masks({param: value > -0.5 for param, value in zip(params, values, strict=True)})
    for step_grads in grads:
        for param, placed, grad in zip(params, layout, step_grads, strict=True):
            param.grad = placed.place(grad)
        optimizer.step()
        if backend == "triton":
            assert optimizer._last_ran is None
            assert optimizer._last_launched.step_launches == 1, "one launch for both groups and all tensors"
    assert {row.path for row in fused_opt.explain(optimizer).rows} == ({"triton"} if backend == "triton" else {optimizer_path()})
    return optimizer


def optimizer_path() -> str:
    """Of the CPU's kernels, as `explain` calls it."""
    return f"cpu-{native().isa}"


def compare(use_backend: UseBackend, case: Case, format_: Format, layout: Sequence[Placed], steps: int = 3, **options: Any) -> None:
    """Step by both backends and compare all bits."""
    triton = step_by("triton", use_backend, case, format_, layout, steps, **options)
    cpu = step_by("cpu", use_backend, case, format_, layout, steps, **options)
    assert_same_state(triton, cpu)
