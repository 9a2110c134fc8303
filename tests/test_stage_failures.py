"""Stages where a step fails, is refused, or is torch's: each says what is wrong before anything changes, and nothing is lost."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

import fused_opt
from fused_opt import plan
from fused_opt.native import native
from fused_opt.stages import ANCHOR_STATE, AVERAGE_STATE
from fused_opt.step import FusedStep
from helpers import CLASSES, assert_same_bits, make_problem, params_of, run_steps
from pairs import ALL_STATES, nothing_changes, set_grads, step_with

Params = list[torch.nn.Parameter]

every_class = pytest.mark.parametrize("name", CLASSES)


# --- parameters that share memory, which are stepped one after the other ---


def listed_twice() -> Params:
    v, w = (torch.nn.Parameter(value) for value in make_problem(((4,), (3,)), 0, torch.float32)[0])
    return [v, w, w]


def overlapping() -> Params:
    base = make_problem(((8,),), 0, torch.float32)[0][0]
    return [torch.nn.Parameter(base[:5]), torch.nn.Parameter(base[3:])]


shared = pytest.mark.parametrize("params", [listed_twice, overlapping])


def grads_for(params: Sequence[torch.Tensor], steps: int = 3) -> list[list[torch.Tensor]]:
    """The same for the same parameter."""
    grads = make_problem([tuple(param.shape) for param in params], steps, torch.float32, seed=1)[1]
    places = [next(i for i, other in enumerate(params) if other is param) for param in params]
    return [[each[i] for i in places] for each in grads]


@shared
@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
@every_class
def test_an_average_that_begins_late_keeps_the_moments(name: str, params: Callable[[], Params]) -> None:
    theirs, ours = (getattr(module, name)(params(), **ALL_STATES[name]) for module in (torch.optim, fused_opt))
    first, *others = grads_for(params_of(ours))
    step_with(theirs, first)
    with torch.no_grad():
        for param, other in zip(params_of(ours), params_of(theirs), strict=True):
            param.copy_(other)
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    ours.param_groups[0].update(average="ema", average_start=2)
    for grads in others:
        step_with(theirs, grads)
        step_with(ours, grads)
    for param, other in zip(params_of(ours), params_of(theirs), strict=True):
        assert_same_bits(param, other)
        assert AVERAGE_STATE in ours.state[param]
        for key, value in theirs.state[other].items():
            assert_same_bits(ours.state[param][key], value, key)


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
@pytest.mark.parametrize("weights", ["split", "master"])
@every_class
def test_the_first_update_of_a_parameter_listed_twice_is_not_rounded(name: str, weights: str) -> None:
    value = torch.randn(50).bfloat16()
    grads = [[grad, grad] for grad in (torch.randn(50).bfloat16() for _ in range(3))]
    param, wide = torch.nn.Parameter(value.clone()), torch.nn.Parameter(value.float())
    exact = getattr(fused_opt, name)([wide, wide], **ALL_STATES[name])
    short = getattr(fused_opt, name)([param, param], **ALL_STATES[name], weights=weights, state_dtype=torch.float32)
    run_steps(exact, [[grad.float() for grad in each] for each in grads])
    run_steps(short, grads)
    assert_same_bits(short.float32_weights()[param], wide)


@shared
@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
def test_states_that_cannot_be_completed_are_found_before_any_parameter_is_stepped(params: Callable[[], Params]) -> None:
    optimizer = fused_opt.AdamW(params())
    first, second, _ = grads_for(params_of(optimizer))
    step_with(optimizer, first)
    del optimizer.state[params_of(optimizer)[-1]]["exp_avg"]
    optimizer.param_groups[0].update(average="ema", average_start=2)
    set_grads(optimizer, second)
    with nothing_changes(optimizer), pytest.raises(KeyError, match="has no state 'exp_avg'"):
        optimizer.step()


# --- states that kernels do not take ---


@every_class
def test_torch_steps_where_states_cannot_be_completed_here(name: str) -> None:
    """As it does when they are complete."""
    values, grads = make_problem(((6,), (5,)), 3, torch.float32)
    odd, plain = (getattr(fused_opt, name)([torch.nn.Parameter(v.clone()) for v in values], **ALL_STATES[name]) for _ in range(2))
    for optimizer in (odd, plain):
        step_with(optimizer, grads[0])
        optimizer.param_groups[0].update(average="ema", average_start=1, average_decay=0.5)
    param, _ = params_of(odd)
    slot = odd._rule.slots(odd.param_groups[0])[0]
    odd.state[param][slot] = torch._neg_view(-odd.state[param][slot])
    assert [row.path for row in fused_opt.explain(odd).rows] == ["torch", f"cpu-{native().isa}"]
    for each in grads[1:]:
        step_with(odd, each)
        step_with(plain, each)
    for param, other in zip(params_of(odd), params_of(plain), strict=True):
        torch.testing.assert_close(param, other)
        torch.testing.assert_close(odd.state[param][AVERAGE_STATE], plain.state[other][AVERAGE_STATE])


def test_new_states_that_are_declined_are_named() -> None:
    param = torch.nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    module = native().module
    assert module is not None
    batch = module.Batch([("momentum_buffer", "momentum_buffer_scale", False)], "", False, True)
    assert batch.gather([torch.nn.Parameter(torch.ones(2)), param], {})
    with pytest.raises(RuntimeError, match=r"parameter 1 of its group cannot .* lazily negated or conjugated; .* delete its state"):
        batch.adopt(0, {"momentum_buffer": torch._neg_view(torch.ones(3))})


# --- where torch steps ---


def left_to_torch(name: str, how: str, request: pytest.FixtureRequest) -> Callable[[Sequence[torch.Tensor]], FusedStep]:
    """What makes an optimizer of parameters of such values, all of which torch steps."""
    if how == "no extension":
        request.getfixturevalue("without_the_extension")
    options = {} if how == "no extension" else {how: True}

    def make(values: Sequence[torch.Tensor]) -> FusedStep:
        optimizer: FusedStep = getattr(fused_opt, name)([torch.nn.Parameter(value.clone()) for value in values], **options)
        assert {row.path for row in fused_opt.explain(optimizer).rows} == {"torch"}
        return optimizer

    return make


@pytest.mark.parametrize("how", ["no extension", "differentiable"])
@every_class
def test_an_anchor_without_anchor_decay_has_no_effect(name: str, how: str, request: pytest.FixtureRequest) -> None:
    """To torch a parameter has all of its moments or, if its state is empty, none."""
    values, grads = make_problem(((6,), (5,)), 2, torch.float32)
    make = left_to_torch(name, how, request)
    anchored, plain = make(values), make(values)
    anchored.set_anchors({params_of(anchored)[0]: torch.zeros(6)})
    for optimizer in (anchored, plain):
        for param in params_of(optimizer):
            param.requires_grad_(how != "differentiable")  # torch refuses to write to leaves that do
        run_steps(optimizer, grads)
    for param, other in zip(params_of(anchored), params_of(plain), strict=True):
        assert_same_bits(param, other)
        state = {key: value for key, value in anchored.state.get(param, {}).items() if key != ANCHOR_STATE}
        assert set(state) == set(plain.state.get(other, {}))
        for key, value in state.items():
            assert_same_bits(value, plain.state[other][key], key)
    assert ANCHOR_STATE in anchored.state[params_of(anchored)[0]]


def test_states_that_are_completed_for_torch_are_taken_out_again(request: pytest.FixtureRequest) -> None:
    optimizer = left_to_torch("Adam", "capturable", request)([torch.ones(3)])
    optimizer.set_anchors({params_of(optimizer)[0]: torch.zeros(3)})
    set_grads(optimizer, [torch.ones(3)])
    with nothing_changes(optimizer), pytest.raises(AssertionError, match="capturable"):  # of parameters on the CPU
        optimizer.step()


CHANGED: tuple[tuple[dict[str, Any], torch.dtype], ...] = (
    ({"l1": -1.0}, torch.float32),
    ({"max_grad_value": -1.0}, torch.float32),
    ({"average": "foo"}, torch.float32),
    ({"weights": "foo"}, torch.float32),
    ({"average_decay": 0.5}, torch.float32),
    ({"l1": 0.1}, torch.complex64),
    ({"max_grad_value": 0.1}, torch.complex64),
    ({"weights": "stochastic"}, torch.float16),
    ({"weights": "split"}, torch.float16),
)


@pytest.mark.parametrize("how", ["no extension", "capturable"])
@pytest.mark.parametrize(("options", "dtype"), CHANGED, ids=str)
def test_changed_options_are_checked(options: dict[str, Any], dtype: torch.dtype, how: str, request: pytest.FixtureRequest) -> None:
    ones = torch.ones(3, dtype=dtype)
    optimizer = left_to_torch("Adam", how, request)([ones])
    set_grads(optimizer, [ones])
    optimizer.param_groups[0].update(options)
    with nothing_changes(optimizer), pytest.raises(ValueError, match=next(iter(options))):
        optimizer.step()


DIFFERENTIABLE: tuple[dict[str, Any], ...] = (
    {"max_grad_norm": 1.0},
    {"max_grad_value": 0.5},
    {"l1": 0.1},
    {"anchor_decay": 0.1},
    {"average": "ema"},
    {"decoupled_weight_decay": True, "weight_decay": 0.1},
)


@pytest.mark.parametrize("options", DIFFERENTIABLE, ids=str)
def test_a_differentiable_step_has_no_stages(options: dict[str, Any]) -> None:
    """Autograd would not see them. In the constructor, in a group that is added, and in one that was changed."""
    culprit = rf"group \d has differentiable=True and {next(iter(options))}=.*; leave out differentiable, or"
    param, other = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    with pytest.raises(ValueError, match=culprit):
        fused_opt.SGD([param], differentiable=True, **options)
    for optimizer in (fused_opt.SGD([param], **options), fused_opt.SGD([param], differentiable=True)):
        if "max_grad_norm" not in options:  # which all groups have in common
            with nothing_changes(optimizer), pytest.raises(ValueError, match=culprit):
                optimizer.add_param_group({"params": [other], "differentiable": True, **options})
            assert len(optimizer.param_groups) == 1
        optimizer.param_groups[0].update(differentiable=True, **options)
        set_grads(optimizer, [torch.ones(2)])
        with nothing_changes(optimizer), pytest.raises(ValueError, match=culprit):
            optimizer.step()
        optimizer.param_groups[0]["differentiable"] = False
        optimizer.step()


# --- which parameters are looked at ---


@pytest.mark.parametrize("extension", [True, False])
@pytest.mark.parametrize("weights", ["stochastic", "split"])
def test_a_frozen_parameter_may_be_float16(weights: str, extension: bool, request: pytest.FixtureRequest) -> None:
    if not extension:
        request.getfixturevalue("without_the_extension")
    frozen = torch.nn.Parameter(torch.ones(3, dtype=torch.float16), requires_grad=False)
    trained = torch.nn.Parameter(torch.ones(3))
    optimizer = fused_opt.AdamW([frozen, trained], weights=weights)
    step_with(optimizer, [None, torch.ones(3)])
    assert list(optimizer.state) == [trained]
    assert len(fused_opt.explain(optimizer).rows) == 2
    frozen.requires_grad_()
    with pytest.raises(ValueError, match="float16"):
        fused_opt.explain(optimizer)


@pytest.mark.parametrize(
    "options", [{"max_grad_norm": 1.0}, {"max_grad_value": 1.0, "l1": 0.1}, {"average": "ema", "weights": "kahan"}], ids=str
)
def test_no_parameter_is_looked_at_where_all_can_be_served(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """It took half of the time of a step of many small ones."""
    monkeypatch.setattr(plan, "check_parameter", None)
    optimizer = fused_opt.AdamW([torch.nn.Parameter(torch.ones(3)) for _ in range(3)], **options)
    run_steps(optimizer, [[torch.ones(3)] * 3] * 2)


# --- before the first step, and before the closure ---


@pytest.mark.parametrize("option", [{"max_grad_norm": 1.0}, {"max_grad_norm": 2.0, "grad_norm_type": 2}, {"max_grad_norm": None}], ids=str)
def test_the_constructor_refuses_groups_that_differ_in_the_norm(option: dict[str, Any]) -> None:
    first, second, third = (torch.nn.Parameter(torch.ones(2)) for _ in range(3))
    everywhere: dict[str, Any] = {"max_grad_norm": 2.0}
    groups: list[dict[str, Any]] = [{"params": [first]}, {"params": [second], **option}]
    with pytest.raises(ValueError, match=r"in group 0 and .* in group 1, but there is one norm"):
        fused_opt.SGD(groups, **(everywhere if option != {"max_grad_norm": 1.0} else {}))
    optimizer = fused_opt.SGD([{"params": [first]}, {"params": [second], **everywhere}], lr=0.1, **everywhere)
    optimizer.add_param_group({"params": [third]})
    copied = copy.deepcopy(optimizer)
    for each in (optimizer, copied):
        with nothing_changes(each), pytest.raises(ValueError, match=r"in group 0 and .* in group 3, but there is one norm"):
            each.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))], **option})
        assert len(each.param_groups) == 3
        run_steps(each, [[torch.ones(2)] * 3])


def test_within_averages_a_step_does_not_run_the_closure() -> None:
    param = torch.nn.Parameter(torch.ones(2))
    optimizer = fused_opt.SGD([param], lr=0.1, average="ema")
    run_steps(optimizer, [[torch.ones(2)]])
    calls = []
    with optimizer.average_weights(), nothing_changes(optimizer), pytest.raises(RuntimeError, match=r"leave average_weights\(\) first"):
        optimizer.step(lambda: calls.append(1))
    assert not calls
    optimizer.step(lambda: calls.append(1))
    assert calls
