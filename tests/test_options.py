"""foreach, fused, capturable, differentiable, and lr as a tensor: each combination is accepted or refused as torch's class does."""

from __future__ import annotations

import inspect
import itertools
from typing import Any

import pytest
import torch

import fused_opt
from helpers import CLASSES, assert_same_state, make_problem, params_of
from pairs import SHAPES, assert_native, make, make_pair, nothing_changes, outcome, set_grads, step_alike, step_with

SWITCHES: dict[str, tuple[bool | None, ...]] = {
    "foreach": (None, False, True),
    "fused": (None, False, True),
    "capturable": (False, True),
    "differentiable": (False, True),
}


def combinations_of(name: str) -> list[dict[str, bool | None]]:
    """Every combination of the switches that the class has."""
    known = inspect.signature(getattr(torch.optim, name)).parameters
    switches = {switch: values for switch, values in SWITCHES.items() if switch in known}
    return [dict(zip(switches, values, strict=True)) for values in itertools.product(*switches.values())]


def lr_as(kind: str) -> float | torch.Tensor:
    return 0.02 if kind == "float" else torch.tensor(0.02, dtype=torch.float64)


every_kind = pytest.mark.parametrize(
    ("name", "lr", "dtype"),
    [
        pytest.param(name, lr, dtype, id=f"{name}-{lr} lr-{str(dtype).removeprefix('torch.')}")
        for name in CLASSES
        for lr in ("float", "tensor")
        for dtype in (torch.float32, torch.bfloat16, torch.complex64)
    ],
)


@every_kind
def test_every_combination_is_accepted_or_refused_as_by_torch(name: str, lr: str, dtype: torch.dtype) -> None:
    """An accepted one has the bits of no switch at all."""
    values = [torch.linspace(-1, 1, 64).to(dtype)]
    plain = make(fused_opt, name, values, lr=lr_as(lr))
    step_with(plain, values)
    outcomes: dict[str, list[type[Exception] | None]] = {}
    accepted = []
    for switches in combinations_of(name):
        for module in (fused_opt, torch.optim):

            def run(module: Any = module, switches: dict[str, Any] = switches) -> None:
                optimizer = make(module, name, values, lr=lr_as(lr), **switches)
                set_grads(optimizer, values)
                optimizer.step()
                if module is fused_opt:
                    accepted.append(optimizer)

            outcomes.setdefault(str(switches), []).append(outcome(run))
    assert {switches: both for switches, both in outcomes.items() if both[0] is not both[1]} == {}
    assert [None, None] in outcomes.values()
    assert [RuntimeError, RuntimeError] in outcomes.values()
    for optimizer in accepted:
        assert_same_state(optimizer, plain)


@every_kind
def test_a_combination_that_the_step_refuses_changes_nothing(name: str, lr: str, dtype: torch.dtype) -> None:
    """Not even a state is created."""
    values = [torch.linspace(-1, 1, 64).to(dtype)]
    refused = 0
    for switches in combinations_of(name):
        if outcome(lambda switches=switches: make(torch.optim, name, values, lr=lr_as(lr), **switches)) is not None:
            continue  # by its constructor
        pair = make_pair(name, values, lr=lr_as(lr), **switches)
        for optimizer in pair:
            set_grads(optimizer, values)
        if outcome(pair[1].step) is not None:
            refused += 1
            with nothing_changes(pair[0]):
                assert outcome(pair[0].step) is not None
    assert refused > 0


@pytest.mark.parametrize("switch", ["foreach", "fused", "capturable"])
@pytest.mark.parametrize("name", CLASSES)
def test_switches_set_in_the_group_later(name: str, switch: str) -> None:
    """The constructor has not seen them; with a tensor lr, some are refused by the step."""
    values, grads = make_problem(SHAPES, 2, torch.float32)
    pair = make_pair(name, values)
    for optimizer in pair:
        step_with(optimizer, grads[0])
        optimizer.param_groups[0].update({switch: True, "lr": lr_as("tensor")})
        set_grads(optimizer, grads[1])
    if step_alike(pair):
        for p, q in zip(*map(params_of, pair), strict=True):  # torch's fused and foreach steps round some square roots otherwise
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
@pytest.mark.parametrize("name", CLASSES)
def test_tensor_lr_mutated_in_place_between_steps(name: str, shape: tuple[int, ...]) -> None:
    values, grads = make_problem(SHAPES, 4, torch.float32)
    pair = make_pair(name, values)
    lrs = [torch.full(shape, 0.02, dtype=torch.float64) for _ in pair]
    for optimizer, lr in zip(pair, lrs, strict=True):
        optimizer.param_groups[0]["lr"] = lr
    if outcome(lambda: step_with(pair[1], grads[0])) is not None:
        pytest.skip(f"this torch refuses an lr of shape {shape}")
    step_with(pair[0], grads[0])
    for step, step_grads in enumerate(grads[1:]):
        for optimizer, lr in zip(pair, lrs, strict=True):
            lr.mul_(0.5) if step % 2 else lr.fill_(0.1)
            step_with(optimizer, step_grads)
            assert optimizer.param_groups[0]["lr"] is lr
    assert_same_state(*pair)
    assert_native(pair[0])


@pytest.mark.parametrize("name", CLASSES)
def test_one_tensor_as_the_lr_of_two_groups(name: str) -> None:
    values, grads = make_problem(SHAPES, 3, torch.float32)
    pair = make_pair(name, values[:2])
    for optimizer in pair:
        lr = torch.tensor(0.02, dtype=torch.float64)
        optimizer.add_param_group({"params": [torch.nn.Parameter(values[2].clone())]})
        for group in optimizer.param_groups:
            group["lr"] = lr
        for step_grads in grads:
            step_with(optimizer, step_grads)
            lr.mul_(0.5)
    assert_same_state(*pair)
