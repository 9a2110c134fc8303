"""state_dict() is torch's own format: it goes from ours to torch's and back in mid-training, and training goes on with the same bits."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

import fused_opt
from helpers import CLASSES, assert_same_bits, assert_same_state, make_problem, params_of
from pairs import ALL_STATES, SHAPES, assert_native, make, make_pair, nothing_changes, outcome, step_with, through_file

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64)
LATE = 2  # the parameter that gets its first gradient only after the checkpoint

every_class = pytest.mark.parametrize("name", CLASSES)


def problem(dtype: torch.dtype) -> tuple[list[torch.Tensor], list[list[torch.Tensor | None]]]:
    """Six steps; of the last parameter only the later half has gradients."""
    values, grads = make_problem(SHAPES, 6, torch.float64)
    given: list[list[torch.Tensor | None]] = [[(0.1 * grad).to(dtype) for grad in step_grads] for step_grads in grads]
    for step_grads in given[:3]:
        step_grads[LATE] = None
    return [value.to(dtype) for value in values], given


def resume(module: Any, name: str, optimizer: torch.optim.Optimizer, saved: dict[str, Any], **options: Any) -> torch.optim.Optimizer:
    """A new optimizer on copies of the parameters, with `saved` loaded."""
    resumed = make(module, name, [p.detach() for p in params_of(optimizer)], **options)
    resumed.load_state_dict(saved)
    return resumed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_class
def test_ours_continues_as_if_uninterrupted(name: str, dtype: torch.dtype) -> None:
    """From a file of our own, and from one that torch's optimizer has taken over and saved again."""
    values, grads = problem(dtype)
    optimizer = make(fused_opt, name, values)
    for step_grads in grads[:3]:
        step_with(optimizer, step_grads)
    saved = through_file(optimizer.state_dict())
    by_torch = resume(torch.optim, name, optimizer, copy.deepcopy(saved))
    resumed = [resume(fused_opt, name, optimizer, state_dict) for state_dict in (saved, through_file(by_torch.state_dict()))]
    for each in (optimizer, *resumed):
        for step_grads in grads[3:]:
            step_with(each, step_grads)
    for each in resumed:
        assert_same_state(each, optimizer)
        assert_native(each)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_class
def test_torchs_continues_as_if_uninterrupted(name: str, dtype: torch.dtype) -> None:
    """The other way: from a file of its own, and from one that ours has taken over and saved again."""
    values, grads = problem(dtype)
    optimizer = make(torch.optim, name, values)
    for step_grads in grads[:3]:
        step_with(optimizer, step_grads)
    saved = through_file(optimizer.state_dict())
    by_ours = resume(fused_opt, name, optimizer, copy.deepcopy(saved))
    resumed = [resume(torch.optim, name, optimizer, state_dict) for state_dict in (saved, through_file(by_ours.state_dict()))]
    for each in (optimizer, *resumed):
        for step_grads in grads[3:]:
            step_with(each, step_grads)
    for each in resumed:
        assert_same_state(each, optimizer)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@every_class
def test_taken_over_in_mid_training_either_way(name: str, dtype: torch.dtype) -> None:
    """Three steps by one and three by the other end in the bits of six by either: torch's with IEEE square roots."""
    values, grads = problem(dtype)
    ends = []
    for first in (fused_opt, torch.optim):
        for second in (fused_opt, torch.optim):
            optimizer = make(first, name, values)
            for step_grads in grads[:3]:
                step_with(optimizer, step_grads)
            optimizer = resume(second, name, optimizer, through_file(optimizer.state_dict()))
            for step_grads in grads[3:]:
                step_with(optimizer, step_grads)
            ends.append(optimizer)
    for end in ends[1:]:
        assert_same_state(end, ends[0])


@every_class
def test_keys_values_and_options_are_torchs(name: str) -> None:
    values, grads = problem(torch.float32)
    saved = []
    for optimizer in make_pair(name, values):
        for step_grads in grads[:3]:
            step_with(optimizer, step_grads)
        saved.append(optimizer.state_dict())
    ours, theirs = saved
    assert ours["param_groups"] == theirs["param_groups"]
    assert list(ours["state"]) == list(theirs["state"])
    for index, state in theirs["state"].items():
        assert list(ours["state"][index]) == list(state)
        for key, value in state.items():
            assert_same_bits(ours["state"][index][key], value, key)


@every_class
def test_the_saved_options_count_as_in_torch(name: str) -> None:
    """lr and the like come from the checkpoint, whatever the constructor was given."""
    values, grads = problem(torch.float32)
    optimizer = make(fused_opt, name, values, lr=0.25, maximize=True)
    step_with(optimizer, grads[0])
    resumed = resume(fused_opt, name, optimizer, copy.deepcopy(optimizer.state_dict()), lr=0.5, maximize=False)
    assert resumed.param_groups[0]["lr"] == 0.25
    for each in (optimizer, resumed):
        step_with(each, grads[4])
    assert_same_state(resumed, optimizer)


@pytest.mark.parametrize("param", DTYPES[:4], ids=lambda dtype: f"into {dtype}")
@pytest.mark.parametrize("saved", DTYPES[:4], ids=lambda dtype: f"from {dtype}")
@every_class
def test_parameters_of_another_dtype(name: str, saved: torch.dtype, param: torch.dtype) -> None:
    """States that were saved wider than the parameter keep every bit; others get the parameter's dtype, as in torch."""
    values, grads = problem(saved)
    optimizer = make(fused_opt, name, values)
    step_with(optimizer, grads[5])
    resumed = make(fused_opt, name, [p.detach().to(param) for p in params_of(optimizer)])
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    kept = saved if saved.itemsize > param.itemsize else param
    for p, q in zip(params_of(resumed), params_of(optimizer), strict=True):
        assert list(resumed.state[p]) == list(optimizer.state[q])
        for key, value in optimizer.state[q].items():
            assert_same_bits(resumed.state[p][key], value if key == "step" else value.to(kept), key)
    step_with(resumed, [None if grad is None else grad.to(param) for grad in grads[4]])
    assert all(value.dtype == kept for p in params_of(resumed) for key, value in resumed.state[p].items() if key != "step")


def without_a_group(saved: dict[str, Any]) -> None:
    saved["param_groups"] = saved["param_groups"][:-1]


def with_a_group(saved: dict[str, Any]) -> None:
    saved["param_groups"] = [*saved["param_groups"], {**saved["param_groups"][0], "params": [7]}]


def with_a_parameter(saved: dict[str, Any]) -> None:
    saved["param_groups"] = [{**saved["param_groups"][0], "params": [0, 1, 2, 3]}]


def without_groups(saved: dict[str, Any]) -> None:
    del saved["param_groups"]


def without_states(saved: dict[str, Any]) -> None:
    del saved["state"]


def with_groups_of_nothing(saved: dict[str, Any]) -> None:
    saved["param_groups"] = [{}]


BROKEN = [without_a_group, with_a_group, with_a_parameter, without_groups, without_states, with_groups_of_nothing]


@pytest.mark.parametrize("damage", BROKEN, ids=lambda f: f.__name__)
@every_class
def test_a_load_that_torch_refuses_is_refused_and_changes_nothing(name: str, damage: Any) -> None:
    values, grads = problem(torch.float32)
    pair = make_pair(name, values)
    saved = []
    for optimizer in pair:
        step_with(optimizer, grads[5])
        saved.append(copy.deepcopy(optimizer.state_dict()))
        damage(saved[-1])
        step_with(optimizer, grads[4])
    refused = outcome(lambda: pair[1].load_state_dict(saved[1]))
    assert refused is not None
    with nothing_changes(pair[0]), pytest.raises(refused):
        pair[0].load_state_dict(saved[0])


@every_class
def test_hooks_that_raise_leave_a_load_undone_or_done_as_torchs(name: str) -> None:
    """One before the load: nothing has changed. And the hooks of ours are gone afterwards."""
    values, grads = problem(torch.float32)
    optimizer = make(fused_opt, name, values)
    step_with(optimizer, grads[5])
    saved = copy.deepcopy(optimizer.state_dict())
    step_with(optimizer, grads[4])

    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    handle = optimizer.register_load_state_dict_pre_hook(fail)
    with nothing_changes(optimizer), pytest.raises(ZeroDivisionError):
        optimizer.load_state_dict(saved)
    handle.remove()
    assert len(optimizer._optimizer_load_state_dict_pre_hooks) == 0
    assert len(optimizer._optimizer_load_state_dict_post_hooks) == 0
    optimizer.load_state_dict(saved)
    assert outcome(optimizer.step) is None


@every_class
def test_helpers_of_distributed_checkpoints(name: str) -> None:
    """They create missing states by a step with lr 0 on gradients of zeros, and name the parameters."""
    ends = []
    for module in (fused_opt, torch.optim):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
        start = copy.deepcopy(model.state_dict())
        optimizer = getattr(module, name)(model.parameters(), **ALL_STATES[name])
        fresh = get_optimizer_state_dict(model, optimizer)
        for param, value in zip(model.parameters(), start.values(), strict=True):
            assert_same_bits(param, value)
        step_with(optimizer, [torch.ones_like(p) for p in model.parameters()])
        saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
        resumed_model = copy.deepcopy(model)
        resumed = getattr(module, name)(resumed_model.parameters(), **ALL_STATES[name])
        set_optimizer_state_dict(resumed_model, resumed, saved)
        for each in (optimizer, resumed):
            step_with(each, [torch.full_like(p, 0.5) for p in params_of(each)])
        assert_same_state(resumed, optimizer)
        ends.append((optimizer, fresh["param_groups"], list(fresh["state"]), [list(state) for state in fresh["state"].values()]))
    assert ends[0][1:] == ends[1][1:]
    assert_same_state(ends[0][0], ends[1][0])
