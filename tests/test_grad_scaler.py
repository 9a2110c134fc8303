"""torch.amp.GradScaler on the CPU: with fused=True it leaves unscaling and skipping to step(), without it it does both itself."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fused_opt
from fused_opt.plan import _programs
from helpers import CLASSES, assert_same_bits, assert_same_state, make_problem, params_of
from pairs import assert_native, make, make_pair, nothing_changes, set_grads, step_with

SHAPES = ((8, 8), (128,))  # whole vectors: torch's fused kernels compute tails in double precision
STEPS = 6

# RMSprop has no fused=, so the scaler never leaves anything to it.
LEFT_TO_STEP = [(name, fused) for name in CLASSES for fused in (False, True) if not (fused and name == "RMSprop")]
both_ways = pytest.mark.parametrize(("name", "fused"), LEFT_TO_STEP, ids=lambda v: v if isinstance(v, str) else f"fused={v}")
fused_classes = pytest.mark.parametrize("name", [name for name, fused in LEFT_TO_STEP if fused])


def options_for(name: str, fused: bool) -> dict[str, Any]:
    return {"fused": True} if fused else {}


def make_scaler(scale: float = 2.0**10) -> torch.amp.GradScaler:
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=2)
    scaler.scale(torch.zeros(()))  # it makes its scale only now
    return scaler


def scaled(grads: list[torch.Tensor], scaler: torch.amp.GradScaler, overflow: bool) -> list[torch.Tensor]:
    grads = [grad * scaler.get_scale() for grad in grads]
    if overflow:
        grads[-1].view(-1)[-1] = float("inf")
    return grads


@both_ways
@pytest.mark.parametrize("overflows", [(), (0,), (2,), (0, 1, 4), (STEPS - 1,)], ids=str)
def test_overflow_steps_are_as_if_they_had_not_been(name: str, fused: bool, overflows: tuple[int, ...]) -> None:
    """An optimizer that is never given them has the same bits. Powers of two as the scale, so that unscaling is exact."""
    values, grads = make_problem(SHAPES, STEPS, torch.float32)
    optimizer, scaler = make(fused_opt, name, values, **options_for(name, fused)), make_scaler()
    expected = make(fused_opt, name, values)
    for step, step_grads in enumerate(grads):
        overflow = step in overflows
        set_grads(optimizer, scaled(step_grads, scaler, overflow))
        if overflow and fused:
            with nothing_changes(optimizer):  # gradients stay scaled, no state is created
                scaler.step(optimizer)
        elif overflow:
            before = [p.detach().clone() for p in params_of(optimizer)]
            scaler.step(optimizer)
            for param, value in zip(params_of(optimizer), before, strict=True):
                assert_same_bits(param, value)
        else:
            scaler.step(optimizer)
            step_with(expected, step_grads)
        scaler.update()
        assert len(optimizer.state) == len(expected.state)
    assert_same_state(optimizer, expected)
    assert_native(optimizer)


@both_ways
def test_scale_parameters_and_gradients_are_torchs(name: str, fused: bool) -> None:
    """Overflows in the middle (one in the first step leaves an uninitialised buffer in torch's fused SGD); a scale that rounds."""
    values, grads = make_problem(SHAPES, STEPS, torch.float32)
    pair = make_pair(name, values, **options_for(name, fused))
    scalers = [make_scaler(scale=1000.0) for _ in pair]
    for step, step_grads in enumerate(grads):
        for optimizer, scaler in zip(pair, scalers, strict=True):
            set_grads(optimizer, scaled(step_grads, scaler, overflow=step in (2, 3)))
            scaler.step(optimizer)
            scaler.update()
        assert scalers[0].state_dict() == scalers[1].state_dict()
        for i, (p, q) in enumerate(zip(*map(params_of, pair), strict=True)):
            assert p.grad is not None
            assert q.grad is not None
            assert_same_bits(p.grad, q.grad, f"gradient {i} in step {step}")
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
            assert pair[0].state[p].get("step") == pair[1].state[q].get("step")


@fused_classes
def test_unscaled_by_the_program_and_clipped(name: str) -> None:
    values, grads = make_problem(SHAPES, STEPS, torch.float32)
    optimizer, scaler = make(fused_opt, name, values, fused=True), make_scaler()
    expected = make(fused_opt, name, values)
    for step_grads in grads:
        set_grads(optimizer, scaled(step_grads, scaler, overflow=False))
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(params_of(optimizer), 0.5)
        scaler.step(optimizer)
        scaler.update()
        set_grads(expected, step_grads)
        torch.nn.utils.clip_grad_norm_(params_of(expected), 0.5)
        expected.step()
    assert_same_state(optimizer, expected)


@fused_classes
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes_and_parameters_without_gradient(name: str, dtype: torch.dtype) -> None:
    """A power of two as the scale, small enough for fp16, so that unscaling is exact there, too."""
    values, grads = make_problem(SHAPES, 3, torch.float32)
    values = [value.to(dtype) for value in values]
    optimizer, scaler = make(fused_opt, name, values, fused=True), make_scaler(scale=4.0)
    expected = make(fused_opt, name, values)
    for step, step_grads in enumerate(grads):
        given: list[torch.Tensor | None] = [grad.to(dtype) for grad in step_grads]
        if step == 1:
            given[0] = None
        step_with(expected, given)
        set_grads(optimizer, [None if grad is None else grad * scaler.get_scale() for grad in given])
        scaler.step(optimizer)
        scaler.update()
    assert_same_state(optimizer, expected)


@fused_classes
def test_a_failing_step_leaves_the_gradients_scaled(name: str) -> None:
    """So that the program may repair what was wrong and step again."""
    values, grads = make_problem(SHAPES, 2, torch.float32)
    optimizer, scaler = make(fused_opt, name, values, fused=True), make_scaler()
    step_with(optimizer, grads[0])
    last = optimizer.state[params_of(optimizer)[-1]]
    key = next(key for key in last if key != "step")
    good, last[key] = last[key], torch.zeros(7)
    set_grads(optimizer, scaled(grads[1], scaler, overflow=False))
    with nothing_changes(optimizer), pytest.raises(RuntimeError, match=key):
        scaler.step(optimizer)
    last[key] = good
    optimizer.step()  # the scaler's attributes are still there, as after a failing step of torch's
    expected = make(fused_opt, name, values)
    for step_grads in grads:
        step_with(expected, step_grads)
    assert_same_state(optimizer, expected)


@fused_classes
def test_a_disabled_scaler_does_nothing(name: str) -> None:
    values, grads = make_problem(SHAPES, 2, torch.float32)
    optimizer, expected = (make(fused_opt, name, values, fused=True) for _ in range(2))
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for step_grads in grads:
        set_grads(optimizer, step_grads)
        scaler.step(optimizer)
        scaler.update()
        step_with(expected, step_grads)
    assert_same_state(optimizer, expected)


@fused_classes
def test_attributes_set_by_hand(name: str) -> None:
    """As torch's fused step takes them: grad_scale and found_inf may be None or a tensor of one element of any shape."""
    values, grads = make_problem(SHAPES, 1, torch.float32)
    expected = make(fused_opt, name, values)
    step_with(expected, grads[0])
    for grad_scale, found_inf in ((torch.tensor(4.0), torch.tensor([0.0])), (torch.tensor([4.0]), None), (None, torch.tensor(0.0))):
        optimizer = make(fused_opt, name, values, fused=True)
        set_grads(optimizer, [grad * (1 if grad_scale is None else 4) for grad in grads[0]])
        optimizer.grad_scale, optimizer.found_inf = grad_scale, found_inf  # type: ignore[attr-defined]
        optimizer.step()
        assert_same_state(optimizer, expected)


def test_16_bit_gradients_are_unscaled_in_fp32() -> None:
    """Where that underflows in fp16, as loss scaling is there to prevent; and once, though two parameters share the gradient."""
    params = [torch.nn.Parameter(torch.full((64,), 1e-2, dtype=torch.float16)) for _ in range(2)]
    params[0].grad = params[1].grad = torch.full((64,), 2e-8 * 65536, dtype=torch.float16)
    exact = torch.nn.Parameter(params[0].detach().double())
    exact.grad = params[0].grad.double() / 65536
    torch.optim.Adam([exact], lr=1e-3, eps=1e-10).step()
    optimizer = fused_opt.Adam(params, lr=1e-3, eps=1e-10, fused=True, state_dtype=torch.float32)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(65536.0), torch.tensor(0.0)
    optimizer.step()
    for param in params:
        torch.testing.assert_close(param.double(), exact.detach(), rtol=1e-3, atol=0)
        torch.testing.assert_close(optimizer.state[param]["exp_avg"].double(), exact.grad * 0.1, rtol=1e-6, atol=0)


def test_gradients_that_cannot_be_divided_in_place() -> None:
    for grad in (torch.tensor(8.0).expand(4), torch.full((5,), 8.0)[:4]):
        param = torch.nn.Parameter(torch.ones(4))
        param.grad = grad
        optimizer = fused_opt.SGD([param], lr=0.5, fused=True)
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(0.0)
        optimizer.step()
        assert_same_bits(param, torch.full((4,), 0.5))
        assert_same_bits(param.grad, torch.ones(4))


@fused_classes
def test_a_group_without_gradients(name: str) -> None:
    values, grads = make_problem(SHAPES, 1, torch.float32)
    optimizer, expected = make_pair(name, values, fused=True)
    for each in (optimizer, expected):
        each.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))]})
        scaler = make_scaler()
        set_grads(each, [*scaled(grads[0], scaler, overflow=False), None])
        scaler.step(each)
    assert_same_state(optimizer, expected)


def test_scalars_of_a_group_whose_counters_are_partly_on_a_gpu() -> None:
    """The factor is in those that the host computes; the others, whose steps it does not know, are none of its business."""
    group = fused_opt.AdamW([torch.nn.Parameter(torch.ones(1))]).param_groups[0]
    batch: Any = SimpleNamespace(cohorts=[(-1.0, False), (3.0, False)], in_kernels=True)
    (_, unknown), (_, known) = _programs(fused_opt.AdamW._rule, group, 0, False, batch, in_tables=True, factor=0.25).rule
    assert unknown == ()
    assert known[0] == 0.25
    assert known[1:] == fused_opt.AdamW._rule.program(group, 4.0, False)[1][1:]
