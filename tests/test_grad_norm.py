"""The norm of all gradients where it is not finite, scaled, of several ranks, or asked for differently by groups."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from test_clipping import SHAPES, both_types, clipped_by_ours, clipped_by_torch

import fused_opt
from fused_opt.bench.stage_cases import RULES
from fused_opt.bench.ulp import max_ulp
from helpers import CLASSES, assert_same_bits, assert_same_state, make_problem, params_of, run_steps
from pairs import nothing_changes, set_grads

Optimizer = torch.optim.Optimizer


# --- norms that are not finite ---

BROKEN = (math.inf, -math.inf, math.nan)
ARRANGEMENTS = [(value, place) for value in BROKEN for place in (0, 1, -1)]


def broken_problem(value: float, place: int) -> tuple[Optimizer, list[torch.Tensor]]:
    """An optimizer after two steps, and gradients of which one has such a value."""
    values, grads = make_problem(((50,), (33, 3), (7,)), 3, torch.float32)
    params = [torch.nn.Parameter(each.clone()) for each in values]
    optimizer = fused_opt.AdamW(params, max_grad_norm=1.0)
    run_steps(optimizer, grads[:2])
    grads[2][place].view(-1)[3] = value
    set_grads(optimizer, grads[2])
    return optimizer, grads[2]


@both_types
@pytest.mark.parametrize(("value", "place"), ARRANGEMENTS)
def test_as_torch(value: float, place: int, norm_type: float) -> None:
    """Infinity makes the others zero, and NaN everything NaN."""
    _, (grads,) = make_problem(((50,), (33, 3), (7,)), 1, torch.float32)
    grads[place].view(-1)[3] = value
    expected, norm = clipped_by_torch(grads, 1.0, norm_type)
    for given in ({}, {"nonfinite_grad_norm": "as_torch"}):
        found, found_norm = clipped_by_ours(grads, max_grad_norm=1.0, grad_norm_type=norm_type, **given)
        torch.testing.assert_close(found_norm, norm, equal_nan=True)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@both_types
@pytest.mark.parametrize(("value", "place"), ARRANGEMENTS)
def test_raise(value: float, place: int, norm_type: float) -> None:
    optimizer, _ = broken_problem(value, place)
    optimizer.param_groups[0].update(nonfinite_grad_norm="raise", grad_norm_type=norm_type)
    with nothing_changes(optimizer), pytest.raises(RuntimeError, match=r"cannot be clipped to max_grad_norm=1\.0"):
        optimizer.step()
    assert not torch.isfinite(optimizer.last_grad_norm)


@both_types
@pytest.mark.parametrize(("value", "place"), ARRANGEMENTS)
def test_skip(value: float, place: int, norm_type: float) -> None:
    """As if the step had not been: later ones are those of an optimizer that never saw it. Counters, averages, too."""
    optimizer, grads = broken_problem(value, place)
    optimizer.param_groups[0].update(nonfinite_grad_norm="skip", grad_norm_type=norm_type)
    with nothing_changes(optimizer):
        optimizer.step()
    assert not torch.isfinite(optimizer.last_grad_norm)
    other, _ = broken_problem(value, place)
    other.param_groups[0].update(nonfinite_grad_norm="skip", grad_norm_type=norm_type)
    again = [torch.ones_like(grad) for grad in grads]
    run_steps(optimizer, [again])
    run_steps(other, [again])
    assert_same_state(optimizer, other)


def test_the_first_step_is_skipped() -> None:
    """No state is made."""
    for name in CLASSES:
        param = torch.nn.Parameter(torch.ones(5))
        optimizer = getattr(fused_opt, name)([param], max_grad_norm=1.0, nonfinite_grad_norm="skip", average="ema", anchor_decay=0.1)
        param.grad = torch.full((5,), math.inf)
        with nothing_changes(optimizer):
            optimizer.step()
        assert len(optimizer.state) == 0


# --- together with GradScaler ---


@both_types
@pytest.mark.parametrize("name", [name for name in CLASSES if name != "RMSprop"])
@pytest.mark.parametrize("scale", [1024.0, 1000.0])
def test_with_a_scaler(name: str, scale: float, norm_type: float) -> None:
    """`fused=True` leaves unscaling to the step: norm and limit are those of unscaled gradients. A step with an infinity is left out."""
    values, grads = make_problem(((50,), (33, 3)), 4, torch.float32)
    options: dict[str, Any] = {**RULES[name], "max_grad_norm": 0.3, "grad_norm_type": norm_type}
    optimizer, expected = (
        getattr(fused_opt, name)([torch.nn.Parameter(value.clone()) for value in values], **options, **given)
        for given in ({"fused": True}, {})
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)
    scaler.scale(torch.zeros(()))
    exact = scale == 1024.0
    for step, step_grads in enumerate(grads):
        set_grads(optimizer, [grad * scaler.get_scale() for grad in step_grads])
        if step == 2:
            params_of(optimizer)[0].grad[5] = math.inf
            with nothing_changes(optimizer):
                scaler.step(optimizer)
        else:
            scaler.step(optimizer)
            set_grads(expected, step_grads)
            expected.step()
            assert max_ulp(optimizer.last_grad_norm, expected.last_grad_norm) <= (0 if exact else 2)
        scaler.update()
    if exact:
        assert_same_state(optimizer, expected)
    else:
        for p, q in zip(params_of(optimizer), params_of(expected), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


# --- ranks ---


@both_types
@pytest.mark.parametrize("in_place", [True, False])
def test_two_ranks(norm_type: float, in_place: bool) -> None:
    """Each has half of the parameters; the norm is that of all. What the hook is given is a sum of squares, or the largest magnitude."""
    values, (grads,) = make_problem(SHAPES, 1, torch.float32)
    combine = torch.add if norm_type == 2 else torch.maximum
    options: dict[str, Any] = {"lr": 1.0, "max_grad_norm": 1.0, "grad_norm_type": norm_type}
    whole = fused_opt.SGD([torch.nn.Parameter(value.clone()) for value in values], **options)
    set_grads(whole, grads)
    whole.step()
    halves = [slice(0, 2), slice(2, None)]
    ranks = [fused_opt.SGD([torch.nn.Parameter(value.clone()) for value in values[half]], **options) for half in halves]
    seen: list[torch.Tensor] = []
    for half, rank in zip(halves, ranks, strict=True):
        rank.reduce_grad_norm = lambda total: seen.append(total.clone())
        set_grads(rank, grads[half])
        with torch.no_grad():
            before = [param.clone() for param in params_of(rank)]
            rank.step()
            for param, value in zip(params_of(rank), before, strict=True):
                param.copy_(value)
    assert [(total.dtype, total.shape) for total in seen] == [(torch.float64, ())] * 2

    def reduce(total: torch.Tensor) -> torch.Tensor | None:
        combined = combine(*seen)
        if not in_place:
            return combined
        total.copy_(combined)
        return None

    for half, rank in zip(halves, ranks, strict=True):
        rank.reduce_grad_norm = reduce
        rank.step()
        assert max_ulp(rank.last_grad_norm, whole.last_grad_norm) == 0
        for param, expected in zip(params_of(rank), params_of(whole)[half], strict=True):
            assert_same_bits(param, expected)


def test_a_rank_without_gradients_takes_part() -> None:
    """Or the others would wait for it for ever."""
    optimizer = fused_opt.AdamW([torch.nn.Parameter(torch.ones(3))], max_grad_norm=1.0)
    seen: list[float] = []
    optimizer.reduce_grad_norm = lambda total: seen.append(float(total))
    optimizer.step()
    assert seen == [0.0]


def test_a_hook_that_fails_changes_nothing() -> None:
    optimizer, _ = broken_problem(1.0, 0)

    def hook(total: torch.Tensor) -> None:
        raise ConnectionError("the other rank is gone")

    optimizer.reduce_grad_norm = hook
    with nothing_changes(optimizer), pytest.raises(ConnectionError, match="the other rank"):
        optimizer.step()


def test_a_norm_that_the_hook_makes_infinite_is_handled_as_one() -> None:
    optimizer, _ = broken_problem(1.0, 0)
    optimizer.param_groups[0]["nonfinite_grad_norm"] = "skip"
    optimizer.reduce_grad_norm = lambda total: total.fill_(math.inf)
    with nothing_changes(optimizer):
        optimizer.step()


# --- one norm ---


@pytest.mark.parametrize(
    ("options", "other"),
    [
        ({"max_grad_norm": 1.0}, {"max_grad_norm": 2.0}),
        ({"max_grad_norm": 1.0}, {"max_grad_norm": None}),
        ({"max_grad_norm": 1.0, "grad_norm_type": 2}, {"grad_norm_type": math.inf}),
        ({"max_grad_norm": 1.0, "nonfinite_grad_norm": "skip"}, {"nonfinite_grad_norm": "raise"}),
    ],
    ids=str,
)
def test_groups_that_differ(options: dict[str, Any], other: dict[str, Any]) -> None:
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    for param in params:
        param.grad = torch.ones(3)
    optimizer = fused_opt.SGD([{"params": [param]} for param in params], **options)
    optimizer.step()
    optimizer.param_groups[1].update(other)
    with nothing_changes(optimizer), pytest.raises(ValueError, match=rf"{next(iter(other))} is .* in group 0 and .* in group 1"):
        optimizer.step()


def test_there_is_no_norm_without_the_option() -> None:
    optimizer = fused_opt.SGD([torch.nn.Parameter(torch.ones(3))], max_grad_value=1.0)
    run_steps(optimizer, [[torch.ones(3)]])
    assert optimizer.last_grad_norm is None
