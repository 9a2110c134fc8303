"""Averages of weights, updated in the step, against torch.optim.swa_utils; evaluating with them; saving them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn

import fused_opt
from fused_opt.bench.stage_cases import RULES
from helpers import CLASSES, assert_same_bits, assert_same_state, make_problem, params_of, run_steps
from pairs import assert_resumes, nothing_changes, set_grads, step_with, through_file

Optimizer = torch.optim.Optimizer
SHAPES = ((4, 5), (33,), ())


class Weights(torch.nn.Module):
    """A model that is nothing but parameters."""

    def __init__(self, values: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self.weights = torch.nn.ParameterList([torch.nn.Parameter(value.clone()) for value in values])


def averaged(kind: str, decay: float, model: Weights) -> AveragedModel:
    rule = get_ema_multi_avg_fn(decay) if kind == "ema" else get_swa_multi_avg_fn()  # type: ignore[no-untyped-call]
    return AveragedModel(model, multi_avg_fn=rule)


def averages_of(optimizer: Optimizer) -> list[torch.Tensor]:
    return [optimizer.state[param]["average"] for param in params_of(optimizer)]


KINDS = [("ema", None), ("ema", 0.9), ("ema", 0.2), ("ema", 0.0), ("ema", 1.0), ("swa", None)]
SCHEDULES = [(0, 1), (3, 1), (0, 3), (2, 4)]
TABLE = [("SGD", *kind, *schedule) for kind in KINDS for schedule in SCHEDULES]
TABLE += [(name, *kind, 2, 3) for name in CLASSES if name != "SGD" for kind in (KINDS[1], KINDS[5])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("name", "kind", "decay", "start", "every"), TABLE)
def test_averages_are_those_of_swa_utils(name: str, kind: str, decay: float | None, start: int, every: int, dtype: torch.dtype) -> None:
    """The bits of AveragedModel, updated after each `every`-th step after the first `start` ones. (float64: torch's 1 / n is float32's.)"""
    values, grads = make_problem(SHAPES, 11, dtype)
    model = Weights(values)
    given = {"average_decay": decay, "average_start": start or None, "average_every": None if every == 1 else every}
    optimizer = getattr(fused_opt, name)(model.parameters(), **RULES[name], average=kind, **given)
    average = averaged(kind, 0.999 if decay is None else decay, model)
    for step, step_grads in enumerate(grads):
        step_with(optimizer, step_grads)
        if step >= start and (step - start) % every == 0:
            average.update_parameters(model)
        expected = list(average.module.weights) if step >= start else values
        for ours, theirs in zip(averages_of(optimizer), expected, strict=True):
            if kind == "swa" and dtype == torch.float64:
                torch.testing.assert_close(ours, theirs.detach(), rtol=1e-6, atol=1e-6)
            else:
                assert_same_bits(ours, theirs)


def test_equal_weights_are_the_mean() -> None:
    values, grads = make_problem(SHAPES, 9, torch.float64)
    optimizer = fused_opt.SGD([torch.nn.Parameter(value.clone()) for value in values], lr=0.1, average="swa")
    seen: list[list[torch.Tensor]] = []
    for step_grads in grads:
        step_with(optimizer, step_grads)
        seen.append([param.detach().clone() for param in params_of(optimizer)])
    for average, each in zip(averages_of(optimizer), zip(*seen, strict=True), strict=True):
        torch.testing.assert_close(average, torch.stack(each).mean(0), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("weights", [None, "master", "kahan"])
def test_averages_of_16_bit_weights_are_float32(dtype: torch.dtype, weights: str | None) -> None:
    """So that a thousandth of a change counts: an average in bfloat16 would stand still while weights go up by a hundredth, 150 times."""
    param = torch.nn.Parameter(torch.full((9,), 1.0, dtype=dtype))
    optimizer = fused_opt.SGD([param], lr=1.0, average="ema", weights=weights)
    expected = torch.ones(9)
    for step in range(150):
        param.grad = torch.full((9,), -0.01, dtype=dtype)
        optimizer.step()
        exact = optimizer.state[param].get("master", param.detach().float())
        if weights == "kahan":
            exact = param.detach().float() + optimizer.state[param]["compensation"].float()
        if step == 0:
            expected.copy_(exact)
        elif weights == "kahan":  # what it leaves out is of `dtype`, too
            expected.lerp_(exact, 1 - 0.999)
            torch.testing.assert_close(averages_of(optimizer)[0], expected, rtol=1e-4, atol=0)
        else:
            expected.lerp_(exact, 1 - 0.999)
            assert_same_bits(averages_of(optimizer)[0], expected)
    assert averages_of(optimizer)[0].dtype == torch.float32
    assert float(expected[0]) > 1.05


# --- evaluating with them ---


def trained(name: str = "AdamW", **options: Any) -> Optimizer:
    values, grads = make_problem(SHAPES, 5, torch.float32)
    optimizer = getattr(fused_opt, name)([torch.nn.Parameter(value.clone()) for value in values], **RULES[name], **options)
    run_steps(optimizer, grads)
    assert isinstance(optimizer, Optimizer)
    return optimizer


def test_the_weights_are_the_averages_inside_and_what_they_were_afterwards() -> None:
    optimizer = trained(average="ema", average_decay=0.5)
    before = [param.detach().clone() for param in params_of(optimizer)]
    addresses = [param.data_ptr() for param in params_of(optimizer)]
    with nothing_changes(optimizer):
        with optimizer.average_weights():
            for param, average, value in zip(params_of(optimizer), averages_of(optimizer), before, strict=True):
                assert_same_bits(param, average)
                assert not torch.equal(param, value)
        assert [param.data_ptr() for param in params_of(optimizer)] == addresses


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
def test_weights_come_back_whatever_is_raised(error: type[BaseException]) -> None:
    optimizer = trained(average="swa")

    def evaluate() -> None:
        with optimizer.average_weights():
            params_of(optimizer)[0].data.fill_(7.0)
            raise error("the evaluation failed")

    for _ in range(2):
        with nothing_changes(optimizer), pytest.raises(error):
            evaluate()


def test_nan_and_infinity_come_back() -> None:
    param = torch.nn.Parameter(torch.ones(4))
    optimizer = fused_opt.SGD([param], lr=1.0, average="swa")
    run_steps(optimizer, [[torch.ones(4)], [torch.tensor([1.0, torch.inf, -torch.inf, torch.nan])]])
    with nothing_changes(optimizer), optimizer.average_weights():
        pass


@pytest.mark.parametrize("weights", [None, "split", "kahan", "master", "stochastic"])
def test_16_bit_weights_are_rounded_averages_and_come_back(weights: str | None) -> None:
    """With what their 16 bits leave out: the next step is as if nobody had evaluated."""
    values, grads = make_problem(SHAPES, 8, torch.bfloat16)
    optimizers = [
        fused_opt.AdamW([torch.nn.Parameter(value.clone()) for value in values], lr=1e-3, average="ema", average_decay=0.9, weights=weights)
        for _ in range(2)
    ]
    for step_grads in grads:
        for optimizer in optimizers:
            step_with(optimizer, step_grads)
        with optimizers[0].average_weights():
            for param, average in zip(params_of(optimizers[0]), averages_of(optimizers[0]), strict=True):
                assert_same_bits(param, average.bfloat16())
    assert_same_state(*optimizers)


def test_stepping_meanwhile_is_refused() -> None:
    optimizer = trained(average="ema")
    with optimizer.average_weights():
        with nothing_changes(optimizer), pytest.raises(RuntimeError, match="average_weights"):
            optimizer.step()
        with pytest.raises(RuntimeError, match="average_weights"), optimizer.average_weights():
            pass
    optimizer.step()


def test_groups_without_an_average_stay_as_they_are() -> None:
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(3)]
    optimizer = fused_opt.SGD([{"params": params[:1], "average": "swa"}, {"params": params[1:]}], lr=1.0)
    for _ in range(3):
        for param in params[:2]:
            param.grad = torch.ones(3)
        optimizer.step()
    with optimizer.average_weights():
        assert [param[0].item() for param in params] == [-1.0, -2.0, 1.0]
    assert [param[0].item() for param in params] == [-2.0, -2.0, 1.0]
    with pytest.raises(RuntimeError, match="average"), trained().average_weights():
        pass


def test_before_the_first_step() -> None:
    """There are no averages: the weights stay."""
    optimizer = fused_opt.SGD([torch.nn.Parameter(torch.ones(3))], lr=1.0, average="ema")
    with nothing_changes(optimizer), optimizer.average_weights():
        assert params_of(optimizer)[0].tolist() == [1.0] * 3


def test_a_model_that_evaluates() -> None:
    """Batch statistics aside, it computes what torch's averaged model does."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))  # type: ignore[no-untyped-call]
    optimizer = fused_opt.Adam(model.parameters(), lr=1e-2, average="ema", average_decay=0.9)
    x, y = torch.randn(32, 6), torch.randn(32, 1)
    for _ in range(10):
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
        average.update_parameters(model)
    own = model(x)
    with optimizer.average_weights():
        assert_same_bits(model(x), average(x))
    assert_same_bits(model(x), own)
    assert not torch.equal(own, average(x))


# --- saving them ---


@pytest.mark.parametrize("how", [copy.deepcopy, through_file], ids=["in memory", "through a file"])
@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize(("dtype", "kind"), [(torch.float32, "swa"), (torch.bfloat16, "ema")])
def test_resumed_training_goes_on_as_if_it_had_not_been_interrupted(
    name: str, dtype: torch.dtype, kind: str, how: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    values, grads = make_problem(SHAPES, 8, dtype)
    options: dict[str, Any] = {**RULES[name], "average": kind, "average_start": 1, "average_every": 2}

    def make(weights: Sequence[torch.Tensor]) -> Optimizer:
        optimizer: Optimizer = getattr(fused_opt, name)([torch.nn.Parameter(weight.detach().clone()) for weight in weights], **options)
        return optimizer

    assert_resumes(make, values, grads, how)


@pytest.mark.parametrize("average", ["ema", "swa"])
@pytest.mark.parametrize("name", CLASSES)
def test_an_average_that_is_asked_for_later_begins_when_it_is_told(name: str, average: str) -> None:
    """In its first step it is the weights. Without a beginning it would be weighed as if it had been there from the first step on."""
    optimizer = trained(name)
    (group,) = optimizer.param_groups
    done = next(iter(optimizer.state.values())).get("step", torch.tensor(0.0)).item()  # SGD has not counted
    group.update(average=average)
    ones = [torch.ones_like(param) for param in params_of(optimizer)]
    if done:
        set_grads(optimizer, ones)
        with nothing_changes(optimizer), pytest.raises(ValueError, match=rf"no average; set average_start={done:.0f} "):
            optimizer.step()
        group["average_start"] = int(done)
    run_steps(optimizer, [ones])
    for param, average_of_one in zip(params_of(optimizer), averages_of(optimizer), strict=True):
        assert_same_bits(average_of_one, param)
    before = [param.detach().clone() for param in params_of(optimizer)]
    run_steps(optimizer, [ones])
    for param, second, first in zip(params_of(optimizer), averages_of(optimizer), before, strict=True):
        assert_same_bits(second, torch.lerp(first, param.detach(), 0.5 if average == "swa" else 1 - 0.999))


def test_a_checkpoint_of_another_average_brings_all_of_its_options() -> None:
    """What belongs to an option is not kept from one optimizer where the option is the other's."""
    saved = fused_opt.AdamW([torch.nn.Parameter(torch.ones(3))], average="swa", average_every=4).state_dict()
    optimizer = fused_opt.AdamW([torch.nn.Parameter(torch.ones(3))], average="ema", average_decay=0.5, max_grad_norm=2.0)
    optimizer.load_state_dict(saved)
    (group,) = optimizer.param_groups
    assert (group["average"], group["average_every"], group["max_grad_norm"]) == ("swa", 4, 2.0)
    assert "average_decay" not in group
