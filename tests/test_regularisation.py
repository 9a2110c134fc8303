"""L1, the pull to reference weights and decoupled weight decay: each against a training loop that is written out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from plain_loops import add_l1, add_pull, shrink, soft_threshold, train

import fused_opt
from fused_opt.bench.stage_cases import ALL_DTYPES, RULES
from helpers import CLASSES, assert_same_bits, make_problem, params_of, run_steps

Optimizer = torch.optim.Optimizer


RULES_IN_FULL = [(name, {**RULES[name], "maximize": False}) for name in CLASSES]


def ours(name: str, values: Sequence[torch.Tensor], grads: Sequence[Sequence[torch.Tensor]], **options: Any) -> Optimizer:
    optimizer: Optimizer = getattr(fused_opt, name)([torch.nn.Parameter(value.clone()) for value in values], **options)
    run_steps(optimizer, [[grad.clone() for grad in step_grads] for step_grads in grads])
    return optimizer


def assert_same_weights(optimizer: Optimizer, expected: Optimizer) -> None:
    for i, (p, q) in enumerate(zip(params_of(optimizer), params_of(expected), strict=True)):
        assert_same_bits(p, q, f"parameter {i}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("name", "rule"), RULES_IN_FULL)
def test_regularisation(name: str, rule: dict[str, Any], dtype: torch.dtype) -> None:
    """L1 both ways, the pull to the first weights and to others, and decoupled decay; with `maximize`, too, of gradients turned round."""
    values, grads = make_problem(((4, 5), (33,)), 6, dtype)
    turned = [[-grad for grad in step_grads] for step_grads in grads]
    others = [value * 0.5 for value in values]
    loops: list[tuple[dict[str, Any], Optimizer]] = [
        ({"l1": 0.3, "l1_method": "subgradient"}, train(name, values, grads, add_l1(0.3), **rule)),
        ({"l1": 0.3}, train(name, values, grads, after=soft_threshold(0.02 * 0.3), **rule)),
        ({"anchor_decay": 0.3}, train(name, values, grads, add_pull(0.3, values), **rule)),
    ]
    if "betas" not in getattr(fused_opt, name)([torch.zeros(())]).defaults:
        plain = {**rule, "weight_decay": 0.0}
        loops.append(({"decoupled_weight_decay": True, "weight_decay": 0.3}, train(name, values, grads, shrink(1 - 0.02 * 0.3), **plain)))
    for options, expected in loops:
        for given, maximize in ((grads, False), (turned, True)):
            assert_same_weights(ours(name, values, given, **{**rule, **options, "maximize": maximize}), expected)
    optimizer = getattr(fused_opt, name)([torch.nn.Parameter(value.clone()) for value in values], **rule, anchor_decay=0.3)
    optimizer.set_anchors(dict(zip(params_of(optimizer), others, strict=True)))
    run_steps(optimizer, grads)
    assert_same_weights(optimizer, train(name, values, grads, add_pull(0.3, others), **rule))


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_proximal_l1_gives_exact_zeros_and_keeps_what_is_needed(dtype: torch.dtype) -> None:
    """Lasso by hand: the minimum of (w - target)^2 / 2 + l1 * |w| is target, moved towards zero by l1, and zero if it is nearer."""
    target = torch.tensor([3.0, -2.0, 0.25, -0.25, 0.0, 1.0])
    param = torch.nn.Parameter(torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, -1.0]).to(dtype))
    optimizer = fused_opt.SGD([param], lr=0.5, l1=0.5, **({"weights": "master"} if dtype in (torch.bfloat16, torch.float16) else {}))
    for _ in range(60):
        param.grad = (param.detach() - target).to(dtype)
        optimizer.step()
    assert param[2:5].tolist() == [0.0, 0.0, 0.0]
    expected = torch.tensor([2.5, -1.5, 0.0, 0.0, 0.0, 0.5], dtype=torch.float64)
    torch.testing.assert_close(param.detach().double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=0)  # the gradient is of `dtype`


def test_anchors_are_the_weights_of_the_first_step() -> None:
    """Not those at construction: a model may be loaded in between. One that is given counts from the next step on."""
    param = torch.nn.Parameter(torch.zeros(3))
    optimizer = fused_opt.SGD([param], lr=0.5, anchor_decay=1.0)
    with torch.no_grad():
        param.fill_(2.0)
    param.grad = torch.ones(3)
    optimizer.step()
    assert param.tolist() == [1.5] * 3
    optimizer.step()
    assert param.tolist() == [1.25] * 3  # 1.5 - 0.5 * (1 + (1.5 - 2))
    optimizer.set_anchors({param: torch.full((3,), 0.25)})
    optimizer.step()
    assert param.tolist() == [0.25] * 3  # 1.25 - 0.5 * (1 + (1.25 - 0.25))
