"""What is checked of every implementation: options and ways of use, the tensors that it steps, and how."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from fused_opt.bench.cases import Case
from fused_opt.bench.implementations import state_bytes
from fused_opt.bench.layouts import LAYOUTS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# After these steps parameters are compared; for ways of use, which show early, after the first ones only.
STEPS = (1, 10, 100)
FEW_STEPS = STEPS[:2]

# A vector and matrices of odd and even sizes. Two are large enough for 8-bit codes, one of them a multiple of every block size.
SHAPES = ((33,), (31, 9), (64, 128), (67, 67))
EMPTY = (0, 3)

# After this step a learning rate changes, or a checkpoint is loaded. A late gradient is there from the next one on.
TURN = 5

# Values of the one tensor by which the size of states is found: what small tensors have beside them no longer counts.
SIZED = 2**16

Tensors = list[torch.Tensor]
Make = Callable[[Case, Any], torch.optim.Optimizer]
Key = tuple[str, str]  # optimizer and option


@dataclass(frozen=True)
class Way:
    """How an optimizer is used.

    Attributes:
        layout: of parameters and gradients, a key of `layouts.LAYOUTS`.
        more: shapes of further parameters.
        tensor_lr: whether the learning rate is given as a Tensor.
        two_groups: whether the second half of the parameters is a group with twice the learning rate and a decay of its own.
        without_gradient: the number of first steps in which the second parameter has none.
        turn: what happens after step `TURN`: "", "schedule" (the learning rate is doubled, as torch's schedulers do it), "assign" (a number
            is assigned to it) or "resume" (a new optimizer of new parameters loads what was saved).
    """

    layout: str = "contiguous"
    more: tuple[tuple[int, ...], ...] = ()
    tensor_lr: bool = False
    two_groups: bool = False
    without_gradient: int = 0
    turn: str = ""


@dataclass(frozen=True)
class Check:
    """An option, or a way of use, to be compared.

    Attributes:
        option: what tables call it.
        case: the optimizer with it.
        without: the `option` of the check that has all but it, or its own.
        steps: after which parameters are compared.
        way: of use.
    """

    option: str
    case: Case
    without: str
    steps: tuple[int, ...] = STEPS
    way: Way = Way()


DEFAULTS, MOMENTUM = "defaults", "momentum"

# name -> options, and the name of those without. What an option does must be far more than 8-bit states do (a test says how far): torch's
# defaults of lr and weight_decay do too little in so few steps, and amsgrad does nothing while the average of squares still grows.
_ADAM: dict[str, tuple[dict[str, Any], str]] = {
    DEFAULTS: ({"lr": 0.01}, DEFAULTS),
    "betas": ({"lr": 0.01, "betas": (0.5, 0.6)}, DEFAULTS),
    "eps": ({"lr": 0.01, "eps": 0.1}, DEFAULTS),
    "weight_decay": ({"lr": 0.01, "weight_decay": 0.5}, DEFAULTS),
    "amsgrad": ({"lr": 0.01, "betas": (0.5, 0.6), "amsgrad": True}, "betas"),
    "maximize": ({"lr": 0.01, "maximize": True}, DEFAULTS),
}
_RMSPROP: dict[str, tuple[dict[str, Any], str]] = {
    DEFAULTS: ({"lr": 0.005}, DEFAULTS),
    "alpha": ({"lr": 0.005, "alpha": 0.6}, DEFAULTS),
    "eps": ({"lr": 0.005, "eps": 0.01}, DEFAULTS),
    "weight_decay": ({"lr": 0.005, "weight_decay": 0.5}, DEFAULTS),
    MOMENTUM: ({"lr": 0.005, "momentum": 0.9}, DEFAULTS),
    "centered": ({"lr": 0.005, "alpha": 0.6, "centered": True}, "alpha"),
    "maximize": ({"lr": 0.005, "maximize": True}, DEFAULTS),
}
_SGD: dict[str, tuple[dict[str, Any], str]] = {
    DEFAULTS: ({"lr": 0.01}, DEFAULTS),
    MOMENTUM: ({"lr": 0.01, "momentum": 0.9}, DEFAULTS),
    "dampening": ({"lr": 0.01, "momentum": 0.9, "dampening": 0.3}, MOMENTUM),
    "nesterov": ({"lr": 0.01, "momentum": 0.9, "nesterov": True}, MOMENTUM),
    "weight_decay": ({"lr": 0.01, "momentum": 0.9, "weight_decay": 0.5}, MOMENTUM),
    "maximize": ({"lr": 0.01, "momentum": 0.9, "maximize": True}, MOMENTUM),
}
WAYS = {
    "lr as a Tensor": Way(tensor_lr=True),
    "lr by a scheduler": Way(turn="schedule"),
    "lr assigned": Way(turn="assign"),
    "two groups": Way(two_groups=True),
    "transposed": Way("permuted"),
    "with gaps": Way("gaps"),
    "other grad strides": Way("other-grad"),
    "empty tensor": Way(more=(EMPTY,)),
    "no gradient": Way(without_gradient=max(STEPS)),
    "late gradient": Way(without_gradient=TURN),
    "checkpoint": Way(turn="resume"),
}


def _checks() -> dict[Key, Check]:
    checks = []
    for optimizer, table in (("AdamW", _ADAM), ("Adam", _ADAM), ("RMSprop", _RMSPROP), ("SGD", _SGD)):
        checks += [Check(name, Case(optimizer, options), without) for name, (options, without) in table.items()]
        used = MOMENTUM if optimizer == "SGD" else DEFAULTS
        if optimizer != "Adam":  # whose code is AdamW's everywhere
            checks += [Check(name, Case(optimizer, table[used][0]), used, FEW_STEPS, way) for name, way in WAYS.items()]
    return {(check.case.optimizer, check.option): check for check in checks}


CHECKS = _checks()


@cache
def problem(dtype: torch.dtype) -> tuple[Tensors, list[Tensors]]:
    """Start values of `SHAPES`, and gradients for each of max(STEPS) steps, all distinct; the same ones in every process.

    Start values have magnitudes of 0.5 to 1.5 and mostly grow, so that hardly one passes zero, where any error is many ULP. Gradients have
    magnitudes of their own, 0.1 to 1, and shrink to a sixteenth within five steps, again and again: then amsgrad's maximum is not the
    average. One decade only: over three within one block torchao's 8-bit states lose the small squares, and after 10 steps parameters are
    off by 7 times the way that torch's have gone (fp8: 37 times), so that nothing could be said of formulas.
    """
    generator = torch.Generator().manual_seed(0)

    def uniform(shape: Sequence[int], low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(tuple(shape), generator=generator)

    signs = [torch.where(uniform(shape, 0, 1) < 0.5, -1.0, 1.0) for shape in SHAPES]
    values = [(sign * uniform(sign.shape, 0.5, 1.5)).to(dtype) for sign in signs]
    sizes = [10 ** uniform(shape, -1, 0) for shape in SHAPES]

    def gradient(step: int, sign: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
        return (0.5 ** (step % 5) * size * (torch.randn(sign.shape, generator=generator) - 0.5 * sign)).to(dtype)

    return values, [[gradient(step, *each) for each in zip(signs, sizes, strict=True)] for step in range(max(STEPS))]


@dataclass
class Result:
    """What a run came to.

    Attributes:
        params: after each of the check's steps, all parameters' values in a row.
        keeps_gradients: whether the gradients were the same after each step as before.
    """

    params: Tensors
    keeps_gradients: bool


def run(make: Make, check: Check, start: Tensors, grads: Sequence[Tensors]) -> Result:
    """Step through `grads` from `start`, in the way of `check`.

    Raises:
        Exception: whatever the implementation raises.
    """
    torch.manual_seed(0)
    way, layout = check.way, LAYOUTS[check.way.layout]
    more = [start[0].new_zeros(shape) for shape in way.more]
    params = [torch.nn.Parameter(layout.parameter(value.clone())) for value in [*start, *more]]
    optimizer = _make(make, check, params)
    found, kept = [], True
    for step, given in enumerate(grads[: max(check.steps)], 1):
        given = [*given, *more]
        for i, (param, grad) in enumerate(zip(params, given, strict=True)):
            # A copy: some implementations write into it.
            param.grad = None if i == 1 and step <= way.without_gradient else layout.gradient(grad.clone())
        optimizer.step()
        kept = kept and all(param.grad is None or torch.equal(param.grad, grad) for param, grad in zip(params, given, strict=True))
        if step in check.steps:
            found.append(torch.cat([param.detach().reshape(-1) for param in params]))
        if step == TURN and way.turn == "resume":
            saved = io.BytesIO()
            torch.save(optimizer.state_dict(), saved)
            saved.seek(0)
            params = [torch.nn.Parameter(param.detach().clone()) for param in params]
            optimizer = _make(make, check, params)
            optimizer.load_state_dict(torch.load(saved, weights_only=False))
        elif step == TURN and way.turn:
            _double_rates(optimizer, in_place=way.turn == "schedule")
    return Result(found, kept)


def bytes_a_value(make: Make, case: Case, dtype: torch.dtype) -> float:
    """The size of an optimizer's states for a large tensor, in bytes for each of its values."""
    param = torch.nn.Parameter(torch.ones(SIZED, dtype=dtype))
    optimizer = make(case, [param])
    param.grad = torch.linspace(-1, 1, SIZED).to(dtype)
    optimizer.step()
    return state_bytes(optimizer) / SIZED


def _make(make: Make, check: Check, params: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    case, lr = check.case, check.case.options["lr"]
    # Not for exact results: with a float32 Tensor torch's for-loop computes the step size of float64 parameters in float32.
    if check.way.tensor_lr and params[0].dtype != torch.float64:
        case = Case(case.optimizer, {**case.options, "lr": torch.tensor(lr)})
    if not check.way.two_groups:
        return make(case, params)
    return make(case, [{"params": params[:2]}, {"params": params[2:], "lr": 2 * lr, "weight_decay": 0.5}])


def _double_rates(optimizer: torch.optim.Optimizer, in_place: bool) -> None:
    """If `in_place`, Tensors are filled, as torch's schedulers do."""
    for group in optimizer.param_groups:
        if in_place and isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(2 * group["lr"])
        else:
            group["lr"] = 2 * float(group["lr"])
