"""torch.compile of the model, of step(), and of functions that call it: the bits of the program that is not compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import fused_opt
from helpers import CLASSES, assert_same_bits, make_problem, params_of
from pairs import ALL_STATES, assert_native, make, set_grads, step_with

# From within torch's compiler, about itself.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated"),
]

BACKENDS = ["eager", pytest.param("inductor", marks=pytest.mark.slow)]
STEPS = 4


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def train(name: str, compile_step: Callable[[Any], Any], compile_loss: Callable[[Any], Any], schedule: bool) -> list[torch.Tensor]:
    """Losses and final parameters of a short course with a changing lr."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    optimizer = getattr(fused_opt, name)(model.parameters(), **{"lr": 0.01, **ALL_STATES[name]})
    lr_schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5) if schedule else None

    def mean_square(x: torch.Tensor) -> torch.Tensor:
        return model(x).square().mean()

    loss_of = compile_loss(mean_square)

    def training_step(x: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_of(x)
        loss.backward()
        optimizer.step()
        return loss.detach()

    compiled = compile_step(training_step)
    losses = []
    for _ in range(STEPS):
        losses.append(compiled(torch.randn(4, 8)))
        if lr_schedule:
            lr_schedule.step()
    assert_native(optimizer)
    return [*losses, *(p.detach() for p in model.parameters())]


def as_it_is(function: Any) -> Any:
    return function


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CLASSES)
def test_a_compiled_training_step_with_a_changing_lr(name: str, backend: str) -> None:
    """Model and loss are left as they are, so that no bit may change."""
    expected = train(name, as_it_is, torch.compiler.disable, schedule=True)
    actual = train(name, lambda f: torch.compile(f, backend=backend), torch.compiler.disable, schedule=True)
    for a, b in zip(actual, expected, strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_model_beside_an_optimizer_as_it_is(backend: str) -> None:
    expected = train("AdamW", as_it_is, as_it_is, schedule=False)
    actual = train("AdamW", as_it_is, lambda f: torch.compile(f, backend=backend), schedule=False)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)  # inductor's matrix products and sums round otherwise


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CLASSES)
def test_a_compiled_step_alone(name: str, backend: str) -> None:
    """torch.compile(optimizer.step), with lr a number and then a tensor, and then a parameter without gradient."""
    values, grads = make_problem([(8, 5), (33,)], STEPS, torch.float32)
    optimizer, expected = (make(fused_opt, name, values) for _ in range(2))
    step = torch.compile(optimizer.step, backend=backend)
    for number, step_grads in enumerate(grads):
        given = [None, *step_grads[1:]] if number == 3 else step_grads
        for each in (optimizer, expected):
            if number == 2:
                each.param_groups[0]["lr"] = torch.tensor(0.02, dtype=torch.float64)
        set_grads(optimizer, given)
        step()
        step_with(expected, given)
    for p, q in zip(params_of(optimizer), params_of(expected), strict=True):
        assert_same_bits(p, q)


def test_a_step_with_closure_in_a_compiled_function() -> None:
    results = []
    for compiler in (as_it_is, lambda f: torch.compile(f, backend="eager")):
        param = torch.nn.Parameter(torch.linspace(-1, 1, 9))
        optimizer = fused_opt.SGD([param], lr=0.1, momentum=0.9)

        def run(param: torch.nn.Parameter = param, optimizer: torch.optim.Optimizer = optimizer) -> Any:
            def closure() -> torch.Tensor:
                optimizer.zero_grad()
                loss = (param**2).sum()
                loss.backward()
                return loss

            return optimizer.step(closure)

        compiled = compiler(run)
        results.append((*(compiled().detach() for _ in range(3)), param.detach()))
    for a, b in zip(*results, strict=True):
        assert_same_bits(a, b)
