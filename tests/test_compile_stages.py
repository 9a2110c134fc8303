"""What a step does beside its rule, under torch.compile: the graph breaks there, also where it is switched on after compiling."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fused_opt
from helpers import assert_same_state
from pairs import make

VALUES = [torch.linspace(-1, 1, 24).view(4, 6), torch.linspace(0.5, 2, 7)]
SWITCHED_ON: tuple[tuple[str, dict[str, Any]], ...] = (
    ("AdamW", {"max_grad_norm": 1e-3}),
    ("AdamW", {"max_grad_value": 1e-2}),
    ("SGD", {"max_grad_value": 0.0}),  # given, though false
    ("RMSprop", {"l1": 0.1}),
    ("Adam", {"anchor_decay": 0.5}),
    ("AdamW", {"average": "ema", "average_start": 2}),
    ("SGD", {"weight_decay": 0.3, "decoupled_weight_decay": True}),
)


def steps(optimizer: Any, count: int, compiles: bool) -> None:
    def step() -> None:
        optimizer.step()

    run = torch.compile(step, backend="eager") if compiles else step
    for _ in range(count):
        for number, param in enumerate(optimizer.param_groups[0]["params"]):
            param.grad = torch.full_like(param, 0.3 + number)
        run()


@pytest.fixture(autouse=True)
def compiled_anew() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize(("name", "options"), SWITCHED_ON, ids=str)
def test_what_is_switched_on_after_compiling_acts(name: str, options: dict[str, Any]) -> None:
    compiled, plain = (make(fused_opt, name, VALUES) for _ in range(2))
    steps(compiled, 2, True)
    steps(plain, 2, False)
    for optimizer in (compiled, plain):
        optimizer.param_groups[0].update(options)
    steps(compiled, 2, True)
    steps(plain, 2, False)
    assert_same_state(compiled, plain)
    steps(unchanged := make(fused_opt, name, VALUES), 4, False)
    assert any(not torch.equal(a, b) for a, b in zip(*(o.param_groups[0]["params"] for o in (compiled, unchanged)), strict=True)) or (
        "average" in options and all("average" in state for state in compiled.state.values())
    )


def test_masks_that_are_set_after_compiling_hold() -> None:
    optimizer = make(fused_opt, "AdamW", VALUES)
    steps(optimizer, 2, True)
    weight = optimizer.param_groups[0]["params"][0]
    mask = torch.arange(24).view(4, 6) % 2 == 0
    optimizer.set_masks({weight: mask})
    steps(optimizer, 2, True)
    assert not weight[~mask].any()
    assert weight[mask].all()


def test_a_step_without_stages_is_one_graph() -> None:
    optimizer = make(fused_opt, "AdamW", VALUES)
    for param in optimizer.param_groups[0]["params"]:
        param.grad = torch.ones_like(param)
    compiled = torch.compile(lambda: optimizer.step(), backend="eager", fullgraph=True)
    for _ in range(3):
        compiled()
    assert optimizer.state[optimizer.param_groups[0]["params"][0]]["step"] == 3
