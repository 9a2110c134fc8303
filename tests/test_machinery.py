"""What a program does around step(): groups, names, hooks, copies, parameters that change between steps. The result is torch's."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

import fused_opt
from helpers import CLASSES, assert_same_bits, assert_same_state, make_problem, params_of
from pairs import ALL_STATES, SHAPES, assert_native, make, make_pair, oracle_arithmetic, set_grads, step_alike, step_with

Optimizer = torch.optim.Optimizer


@pytest.mark.parametrize("name", CLASSES)
def test_closures_are_called_once_a_step_and_may_change_options(name: str) -> None:
    values, grads = make_problem(SHAPES, 4, torch.float64)
    pair = make_pair(name, values)
    calls = []
    for optimizer in pair:
        for step, step_grads in enumerate(grads):

            def closure(optimizer: Optimizer = optimizer, step: int = step, given: list[torch.Tensor] = step_grads) -> int:
                calls.append(torch.is_grad_enabled())
                set_grads(optimizer, given)
                optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
                return step

            with torch.no_grad(), oracle_arithmetic(optimizer):
                assert optimizer.step(closure) == step
    assert calls == [True] * 8
    assert_same_state(*pair)


@pytest.mark.parametrize("name", CLASSES)
def test_a_closure_that_raises_changes_nothing(name: str) -> None:
    values, grads = make_problem(SHAPES, 2, torch.float32)
    optimizer = make(fused_opt, name, values)
    step_with(optimizer, grads[0])
    before = copy.deepcopy(optimizer)

    def closure() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        optimizer.step(closure)
    assert torch.is_grad_enabled()
    assert_same_state(optimizer, before)


@pytest.mark.parametrize("name", CLASSES)
def test_groups_added_and_changed_in_mid_training(name: str) -> None:
    """A group of its own options after two steps, then a parameter put into a group by hand, then one taken out."""
    values, grads = make_problem([*SHAPES, (7, 3), (16,)], 8, torch.float64)
    pair = make_pair(name, values[:3])
    for optimizer in pair:
        for step, step_grads in enumerate(grads):
            if step == 2:
                optimizer.add_param_group(
                    {"params": torch.nn.Parameter(values[3].clone()), "lr": 0.3, "weight_decay": 0.2, "maximize": True}
                )
            if step == 4:
                optimizer.param_groups[1]["params"].append(torch.nn.Parameter(values[4].clone()))
            if step == 6:
                del optimizer.param_groups[0]["params"][1]
            count = len(params_of(optimizer))
            by_shape = {grad.shape: grad for grad in step_grads}
            step_with(optimizer, [by_shape[p.shape] for p in params_of(optimizer)])
            assert len(params_of(optimizer)) == count
    assert_same_state(*pair)
    assert len(pair[0].state) == len(pair[1].state)
    assert_native(pair[0])


@pytest.mark.parametrize("name", CLASSES)
def test_a_parameter_put_into_two_groups_steps_in_both_in_order(name: str) -> None:
    """By mutation, which no check of torch's sees: the second group continues from what the first wrote, with its own options."""
    values, grads = make_problem(SHAPES, 4, torch.float64)
    pair = make_pair(name, values)
    for optimizer in pair:
        first = params_of(optimizer)[0]
        optimizer.add_param_group({"params": [torch.nn.Parameter(values[1].clone())], "lr": 0.3, "weight_decay": 0.05})
        optimizer.param_groups[1]["params"].append(first)
        for g0, g1, g2 in grads:
            step_with(optimizer, [g0, g1, g2, g1, g0])
    assert_same_state(*pair)
    if name != "SGD":
        assert pair[0].state[params_of(pair[0])[0]]["step"] == 8


def named_model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))


@pytest.mark.parametrize("name", CLASSES)
def test_named_parameters(name: str) -> None:
    pair = []
    for module in (fused_opt, torch.optim):
        model = named_model()
        optimizer = getattr(module, name)(model.named_parameters(), **ALL_STATES[name])
        optimizer.add_param_group({"params": [("extra", torch.nn.Parameter(torch.ones(3)))]})
        step_with(optimizer, [torch.ones_like(p) for p in params_of(optimizer)])
        pair.append(optimizer)
    ours, theirs = pair
    names = ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert [group["param_names"] for group in ours.param_groups] == [names, ["extra"]]
    assert_same_state(ours, theirs)
    saved = ours.state_dict()
    assert saved["param_groups"] == theirs.state_dict()["param_groups"]
    unnamed = getattr(fused_opt, name)([{"params": list(named_model().parameters())}, {"params": [torch.nn.Parameter(torch.ones(3))]}])
    unnamed.load_state_dict(saved)
    assert unnamed.param_groups[0]["param_names"] == names
    with pytest.raises(ValueError, match="without names"):
        ours.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))]})


def test_hooks_of_step_and_of_checkpoints_are_called_as_torch_calls_them() -> None:
    """All six kinds; those of checkpoints replace what is saved and what is loaded."""
    recorded: list[list[Any]] = []
    for optimizer in make_pair("AdamW", [torch.ones(4)]):
        seen: list[Any] = []

        def halve_lr(_: Optimizer, saved: dict[str, Any], seen: list[Any] = seen) -> dict[str, Any]:
            seen.append("replace")
            return {**saved, "param_groups": [{**group, "lr": group["lr"] / 2} for group in saved["param_groups"]]}

        optimizer.register_step_pre_hook(lambda *_, seen=seen: seen.append("before step"))
        optimizer.register_step_post_hook(lambda o, *_, seen=seen: seen.append(("after step", params_of(o)[0][0].item())))
        optimizer.register_state_dict_pre_hook(lambda _, seen=seen: seen.append("before saving"))
        optimizer.register_state_dict_post_hook(halve_lr)
        optimizer.register_load_state_dict_pre_hook(halve_lr)
        optimizer.register_load_state_dict_post_hook(lambda o, seen=seen: seen.append(("loaded", o.param_groups[0]["lr"], len(o.state))))
        step_with(optimizer, [torch.ones(4)])
        optimizer.load_state_dict(optimizer.state_dict())
        step_with(optimizer, [torch.ones(4)])
        recorded.append(seen)
    assert recorded[0] == recorded[1]
    assert ("loaded", 0.001 / 4, 1) in recorded[0]
    assert [entry if isinstance(entry, str) else entry[0] for entry in recorded[0]] == [
        *("before step", "after step", "before saving", "replace", "replace", "loaded", "before step", "after step")
    ]


def saved_and_loaded(optimizer: Optimizer) -> Optimizer:
    file = io.BytesIO()
    torch.save(optimizer, file)
    file.seek(0)
    loaded: Optimizer = torch.load(file, weights_only=False)
    return loaded


Duplicate = Callable[[Optimizer], Optimizer]
DUPLICATES: dict[str, Duplicate] = {"deepcopy": copy.deepcopy, "pickle": lambda o: pickle.loads(pickle.dumps(o)), "save": saved_and_loaded}


@pytest.mark.parametrize("state_dtype", [None, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("duplicate", DUPLICATES)
def test_copies_continue_with_the_same_bits(duplicate: str, name: str, state_dtype: torch.dtype | None) -> None:
    values, grads = make_problem(SHAPES, 5, torch.float32)
    optimizer = make(fused_opt, name, values, **({} if state_dtype is None else {"state_dtype": state_dtype}))
    for step_grads in grads[:2]:
        step_with(optimizer, step_grads)
    copied = DUPLICATES[duplicate](optimizer)
    assert type(copied) is type(optimizer)
    assert copied.param_groups[0].get("state_dtype") is state_dtype
    for each in (optimizer, copied):
        for step_grads in grads[2:]:
            step_with(each, step_grads)
    assert_same_state(copied, optimizer)
    assert {p.data_ptr() for p in params_of(copied)}.isdisjoint(p.data_ptr() for p in params_of(optimizer))


Change = Callable[[torch.Tensor], torch.Tensor]

CHANGES: dict[str, Change] = {
    "other storage": lambda data: data.clone(),
    "a view into a larger storage": lambda data: torch.cat([torch.full((3,), 7.0), data, torch.full((5,), 7.0)])[3 : 3 + len(data)],
    "gaps": lambda data: data.new_zeros(2 * len(data))[::2].copy_(data),
    "float64": lambda data: data.double(),
    "bfloat16": lambda data: data.bfloat16(),
    "complex64": lambda data: data.to(torch.complex64),
    "longer": lambda data: torch.cat([data, data]),
    "shorter": lambda data: data[:3].clone(),
    "other shape": lambda data: data.reshape(2, -1).clone(),
    "empty": lambda data: data.new_empty(0),
    "expanded": lambda data: data[:1].expand(len(data)),
    "int64": lambda data: data.long(),
    "meta": lambda data: data.to("meta"),
}

# The wider tensor decides the result's precision, and torch's for-loop rounds to a narrower one after every operation.
TOLERANCES = {"float64": {"rtol": 1e-6, "atol": 1e-6}, "bfloat16": {"rtol": 1.6e-2, "atol": 1e-2}}


VARIANTS = [*((name, ALL_STATES[name]) for name in CLASSES), ("SGD", {"momentum": 0}), ("RMSprop", {"centered": False})]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=str)
def test_data_replaced_between_steps(name: str, options: dict[str, Any], change: str) -> None:
    """By assignment to .data; the states stay. Accepted or refused as by torch, and a refusal changes nothing."""
    pair = make_pair(name, [torch.linspace(-1, 1, 64), torch.ones(3)], **options)
    for optimizer in pair:
        step_with(optimizer, [torch.linspace(1, -1, 64), torch.ones(3)])
        optimizer.zero_grad()
    refused = []
    for optimizer in pair:
        param = params_of(optimizer)[0]
        try:
            param.data = CHANGES[change](param.data)
        except RuntimeError:
            refused.append(True)
    if refused:  # by the assignment itself, so the next step is an ordinary one
        assert refused == [True, True]
    for optimizer in pair:
        for each in params_of(optimizer):
            each.grad = torch.ones_like(each, memory_format=torch.contiguous_format)
    where = params_of(pair[0])[0].data_ptr()
    if change in TOLERANCES:  # torch wants states of the parameter's dtype; ours takes them as they are
        for each in params_of(pair[1]):
            state = pair[1].state[each]
            state.update({key: value.to(each.dtype) for key, value in state.items() if key != "step"})
    if not step_alike(pair):
        return
    assert params_of(pair[0])[0].data_ptr() == where
    for p, q in zip(*map(params_of, pair), strict=True):
        tolerance = TOLERANCES.get(change)
        if tolerance:
            torch.testing.assert_close(p, q, **tolerance)
        else:
            assert_same_bits(p, q)


def test_data_replaced_leaves_the_old_storage_alone() -> None:
    values, grads = make_problem(SHAPES, 4, torch.float32)
    pair = make_pair("RMSprop", values)
    for step_grads in grads:
        for optimizer in pair:
            step_with(optimizer, step_grads)
        for param in params_of(pair[0]):
            old = param.data
            param.data = old.clone()
            old.fill_(float("nan"))
    assert_same_state(*pair)


@pytest.mark.parametrize("name", CLASSES)
def test_a_model_converted_and_its_optimizer_reloaded(name: str) -> None:
    """model.double() in mid-training, and the optimizer's own state_dict loaded so that its states follow."""
    values, grads = make_problem(SHAPES, 4, torch.float32)
    pair = make_pair(name, values)
    for optimizer in pair:
        for step_grads in grads[:2]:
            step_with(optimizer, step_grads)
        for param in params_of(optimizer):
            param.grad = None
            param.data = param.data.double()
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for step_grads in grads[2:]:
            step_with(optimizer, [grad.double() for grad in step_grads])
    assert_same_state(*pair)
    assert_native(pair[0])


@pytest.mark.parametrize("name", CLASSES)
def test_an_optimizer_for_each_parameter_stepped_during_backward(name: str) -> None:
    """From hooks on gradients, which autograd calls in the midst of its work, to free each gradient at once."""
    results = []
    for during_backward in (True, False):
        model = named_model()
        optimizers = {p: getattr(fused_opt, name)([p], **ALL_STATES[name]) for p in model.parameters()}
        generator = torch.Generator().manual_seed(1)

        def step_and_free(param: torch.Tensor, optimizers: dict[torch.Tensor, Optimizer] = optimizers) -> None:
            optimizers[param].step()
            optimizers[param].zero_grad()

        if during_backward:
            for param in model.parameters():
                param.register_post_accumulate_grad_hook(step_and_free)
        for _ in range(3):
            model(torch.randn(5, 4, generator=generator)).square().mean().backward()
            if not during_backward:
                for param in model.parameters():
                    step_and_free(param)
            assert all(p.grad is None for p in model.parameters())
        assert all(optimizer._last_ran is not None for optimizer in optimizers.values())
        results.append(list(model.parameters()))
    for p, q in zip(*results, strict=True):
        assert_same_bits(p, q)
