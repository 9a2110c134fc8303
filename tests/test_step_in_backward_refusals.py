"""What cannot work inside of backward is refused, and what fails there changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from backward_runs import adamw, assert_same_run, loss_of, make_net, make_runs, nothing_changed
from torch import nn

import fused_opt
from fused_opt.backward import step_in_backward
from helpers import assert_same_bits


@pytest.fixture(autouse=True)
def one_thread(threads: Callable[[int], None]) -> None:
    threads(1)


class OwnStep(fused_opt.AdamW):
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


def swapped(model: Any) -> tuple[Any, Any]:
    return adamw(model), model


def listed_twice(model: Any) -> tuple[Any, Any]:
    optimizer = adamw(model)
    optimizer.param_groups[0]["params"].append(model.body.weight)
    return model, optimizer


def again(model: Any) -> tuple[Any, Any]:
    optimizer = adamw(model)
    step_in_backward(model.body, optimizer)
    return model, optimizer


def by_two(model: Any) -> tuple[Any, Any]:
    step_in_backward(model, adamw(model))
    return model, adamw(model)


def clipped_group(model: Any) -> tuple[Any, Any]:
    optimizer = adamw(model)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    optimizer.param_groups[1]["max_grad_norm"] = 2.0
    return model, optimizer


def scaled(model: Any) -> tuple[Any, Any]:
    optimizer = adamw(model)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(0.0)
    return model, optimizer


REFUSED: dict[str, tuple[Callable[[Any], tuple[Any, Any]], type[Exception], str]] = {
    "torch's": (
        lambda model: (model, torch.optim.AdamW(model.parameters())),
        TypeError,
        "is a torch.optim.adamw.AdamW.*make it with fused_opt",
    ),
    "swapped": (swapped, TypeError, "second, after the model"),
    "own step": (lambda model: (model, OwnStep(model.parameters())), RuntimeError, "OwnStep has a step.* of its own.*normal loop"),
    "a tensor": (lambda model: (model.body.weight, adamw(model)), TypeError, "a Parameter is neither a model nor a list.*pass model"),
    "a number": (lambda model: ([1.0], adamw(model)), TypeError, "a float is among the parameters.*pass model"),
    "none": (lambda model: ([model.frozen], adamw(model)), ValueError, "no parameter that requires gradients"),
    "another's": (
        lambda model: (model, adamw(model.body)),
        ValueError,
        r"shape \(11, 8\) and dtype torch.float32 is not in the optimizer; pass",
    ),
    "twice": (listed_twice, ValueError, "as parameters 4 of group 0 and 8 of group 0"),
    "again": (again, RuntimeError, "steps in backward already; add"),
    "by two": (by_two, RuntimeError, "parameter 1 of group 0 is stepped in backward already; leave it out, or remove"),
    "norm": (lambda model: (model, adamw(model, max_grad_norm=1.0)), RuntimeError, "group 0 has max_grad_norm=1.0.*use max_grad_value"),
    "norm of a group": (clipped_group, RuntimeError, "group 1 has max_grad_norm=2.0"),
    "differentiable": (lambda model: (model, adamw(model, differentiable=True)), RuntimeError, "differentiable=True.*leave it out"),
    "scaler": (scaled, RuntimeError, "GradScaler's attributes.*bfloat16"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    make, error, message = REFUSED[name]
    model = make_net()
    given, optimizer = make(model)
    hooks = {param: dict(param._post_accumulate_grad_hooks or {}) for param in model.parameters()}
    with nothing_changed(optimizer if isinstance(optimizer, torch.optim.Optimizer) else given), pytest.raises(error, match=message):
        step_in_backward(given, optimizer)
    assert {param: dict(param._post_accumulate_grad_hooks or {}) for param in model.parameters()} == hooks


def test_the_same_parameter_is_added_once() -> None:
    model = make_net()
    handle = step_in_backward(model.body, adamw(model))
    with pytest.raises(RuntimeError, match="parameter 4 of group 0 is stepped in backward already"):
        handle.add([model.norm.weight, model.body.weight])
    loss_of(model, 0).backward()
    assert model.norm.weight.grad is not None


def test_distributed_modules_are_refused() -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = nn.Sequential(nn.Linear(2, 2), nn.parallel.DistributedDataParallel(nn.Linear(2, 2)))
        with pytest.raises(RuntimeError, match=r"module '1' is a DistributedDataParallel.*average param.grad in a hook"):
            step_in_backward(model, adamw(model))
    finally:
        torch.distributed.destroy_process_group()


def set_norm(optimizer: Any) -> None:
    optimizer.param_groups[1]["max_grad_norm"] = 1.0


def set_scale(optimizer: Any) -> None:
    optimizer.grad_scale = torch.tensor(2.0)


def set_rate(optimizer: Any) -> None:
    for group in optimizer.param_groups:
        group["lr"] = "much"


def spoil(optimizer: Any) -> None:
    for state in optimizer.state.values():
        state["exp_avg"] = state["exp_avg"].flatten()[:1]


@pytest.mark.parametrize(
    ("spoils", "message"),
    [
        (set_norm, "group 1 has max_grad_norm=1.0"),
        (set_scale, "GradScaler's attributes"),
        (
            spoil,
            r"parameter \d of group \d \((norm|body).*\) could not be stepped in backward \(alone, as parameter 0 .*\): .*exp_avg",
        ),
        (set_rate, "an option of a value that cannot be used"),
    ],
)
def test_errors_in_backward_leave_the_parameter_as_it_was(spoils: Callable[[Any], None], message: str) -> None:
    ours, _ = make_runs()
    ours.train()
    spoils(ours.optimizer)
    with nothing_changed(ours.optimizer), pytest.raises((RuntimeError, ValueError), match=message):
        loss_of(ours.model, 0).backward()
    assert any(param.grad is not None for param in ours.model.parameters())


def test_an_error_in_the_middle() -> None:
    ours, normal = make_runs()
    for run in (ours, normal):
        run.train()
    ours.optimizer.state[ours.model.norm.weight]["exp_avg"] = torch.zeros(1)
    before = ours.model.norm.weight.detach().clone(), ours.model.token.weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"\(norm.weight\) could not be stepped"):
        loss_of(ours.model, 4).backward()
    normal.optimizer.zero_grad()
    loss_of(normal.model, 4).backward()
    normal.optimizer.step()
    assert_same_bits(ours.model.body.weight, normal.model.body.weight)  # complete before
    assert_same_bits(ours.model.norm.weight, before[0])
    assert_same_bits(ours.model.token.weight, before[1])  # not complete
    assert ours.model.body.weight.grad is None
    assert ours.model.norm.weight.grad is not None


@pytest.mark.parametrize("fused", [False, True])
def test_a_scaler_is_refused_when_it_steps(fused: bool) -> None:
    ours, normal = make_runs(fused=fused)
    assert ours.handle is not None
    scaler, other = (torch.amp.GradScaler("cpu", init_scale=8.0) for _ in range(2))
    for run, its in ((ours, scaler), (normal, other)):  # with gradients left to the scaler it can work
        with ours.handle.accumulating():
            its.scale(loss_of(run.model, 0)).backward()
        its.step(run.optimizer)
        its.update()
        run.optimizer.zero_grad()
    assert_same_run(ours, normal)
    scaler.scale(loss_of(ours.model, 1)).backward()
    with pytest.raises(RuntimeError, match="GradScaler cannot be used with step_in_backward"):
        scaler.step(ours.optimizer)
    ours.optimizer.step()  # goes on without
    ours.train(range(2))
