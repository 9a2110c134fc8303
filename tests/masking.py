"""Masked optimizers for tests, and what must hold of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

import fused_opt
from fused_opt.bench.cases import Case
from fused_opt.rules import SLOTS
from fused_opt.stages import ANCHOR_STATE, MASK_STATE, STAGE_STATES
from fused_opt.step import FusedStep
from helpers import CLASSES, assert_same_bits, make_problem, params_of
from pairs import ALL_STATES, step_with

Tensors = list[torch.Tensor]

every_class = pytest.mark.parametrize("name", CLASSES)

ZEROED = (SLOTS | STAGE_STATES) - {MASK_STATE, ANCHOR_STATE}

# How weights and states are kept.
STORAGE: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "fp32": (torch.float32, {}),
    "fp64": (torch.float64, {}),
    "int8": (torch.float32, {"state_dtype": "int8", "min_8bit_size": 0, "block_size": 32}),
    "bf16": (torch.bfloat16, {}),
    "bf16, stochastic, int8": (torch.bfloat16, {"weights": "stochastic", "state_dtype": "int8", "min_8bit_size": 0, "block_size": 32}),
    "bf16, kahan": (torch.bfloat16, {"weights": "kahan"}),
    "bf16, split, fp32 states": (torch.bfloat16, {"weights": "split", "state_dtype": torch.float32}),
    "bf16, master, int8": (torch.bfloat16, {"weights": "master", "state_dtype": "int8", "min_8bit_size": 0, "block_size": 32}),
}

# What else a step is asked for.
EXTRAS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "l1": {"l1": 0.01},
    "subgradient, anchor, average": {"l1": 0.01, "l1_method": "subgradient", "anchor_decay": 0.1, "average": "ema", "average_decay": 0.5},
    "clipping, swa": {"max_grad_value": 0.5, "max_grad_norm": 3.0, "average": "swa"},
}

SHAPES = ((9, 33), (100,), (3,))


def problem(steps: int, dtype: torch.dtype) -> tuple[Tensors, list[Tensors], Tensors]:
    """Values, gradients, and masks that prune about a half; the last tensor has none."""
    values, grads = make_problem(SHAPES, steps, torch.float32, seed=3)
    masks = [torch.rand(shape, generator=torch.Generator().manual_seed(5)) < 0.5 for shape in SHAPES[:-1]]
    return [value.to(dtype) for value in values], [[grad.to(dtype) for grad in each] for each in grads], masks


def masked(optimizer: FusedStep, masks: Tensors) -> dict[torch.Tensor, torch.Tensor]:
    """The masks, given to it, by parameter."""
    by_param = dict(zip(params_of(optimizer), masks, strict=False))
    optimizer.set_masks(by_param)
    return by_param


def assert_held(optimizer: torch.optim.Optimizer, masks: Mapping[torch.Tensor, torch.Tensor], what: str = "") -> None:
    """Bit for bit, and what is not under a mask is neither zero nor NaN."""
    for param, mask in masks.items():
        state = optimizer.state[param]
        assert state[MASK_STATE].dtype == torch.bool
        assert torch.equal(state[MASK_STATE], mask), what
        tensors = {"weight": param.detach(), **{name: value for name, value in state.items() if name in ZEROED}}
        for name, tensor in tensors.items():
            assert_same_bits(tensor[~mask], torch.zeros_like(tensor[~mask]), f"{what} {name}")
            assert bool(tensor[mask].isfinite().all()), f"{what} {name}"
        assert int(param[mask].count_nonzero()) > 0.8 * int(mask.sum()), f"{what}: weights that are kept must be there"
        for name, value in state.items():
            assert bool(value.isfinite().all()), f"{what} {name}"


def assert_same_where_kept(actual: FusedStep, expected: FusedStep, masks: Mapping[torch.Tensor, torch.Tensor]) -> None:
    """Parameters and states bit for bit, but for zeros under the masks, of which a minus is not held."""
    for param, other in zip(params_of(actual), params_of(expected), strict=True):
        pruned = ~masks.get(param, torch.ones(param.shape, dtype=torch.bool))
        assert_same_bits(param.detach().masked_fill(pruned, 0), other.detach().masked_fill(pruned, 0))
        state = {name: value for name, value in actual.state.get(param, {}).items() if name != MASK_STATE}
        assert set(state) == set(expected.state.get(other, {}))
        for name, value in state.items():
            hidden = pruned if value.shape == pruned.shape else torch.zeros_like(value, dtype=torch.bool)
            assert_same_bits(value.masked_fill(hidden, 0), expected.state[other][name].masked_fill(hidden, 0), name)


# Beside the table's: updates that divide zero by zero where there was never a gradient.
def trained(name: str, storage: str, steps: int = 2, **options: Any) -> tuple[FusedStep, dict[torch.Tensor, torch.Tensor]]:
    """An optimizer after some steps without masks, and masks for it."""
    dtype, own = STORAGE[storage]
    values, grads, masks = problem(steps, dtype)
    optimizer = with_weights(Case(name, ALL_STATES[name]), values, {**own, **options})
    for step_grads in grads:
        step_with(optimizer, step_grads)
    return optimizer, dict(zip(params_of(optimizer), masks, strict=False))


def with_weights(case: Case, values: Tensors, options: dict[str, Any]) -> FusedStep:
    params = [torch.nn.Parameter(value.clone()) for value in values]
    optimizer: FusedStep = getattr(fused_opt, case.optimizer)(params, **{**case.options, **options})
    return optimizer


def distinct(*shapes: tuple[int, ...], seed: int = 0) -> Tensors:
    """Parameters whose magnitudes all differ, so that there is one answer to which of them are the smallest."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [torch.Size(shape).numel() for shape in shapes]
    values = (torch.randperm(sum(sizes), generator=generator) + 1.0) * 0.1
    values *= torch.randint(0, 2, values.shape, generator=generator) * 2 - 1
    return [torch.nn.Parameter(part.view(shape)) for part, shape in zip(values.split(sizes), shapes, strict=True)]


def model_of(params: Tensors) -> torch.nn.ModuleList:
    """A module for each, for torch.nn.utils.prune."""
    modules = torch.nn.ModuleList()
    for param in params:
        module = torch.nn.Module()
        module.register_parameter("weight", torch.nn.Parameter(param.detach().clone()))
        modules.append(module)
    return modules
