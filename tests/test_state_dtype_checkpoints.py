"""Checkpoints of optimizers with `state_dtype`: no state loses a bit on the way, and torch.optim can load them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

import fused_opt
from helpers import CLASSES, assert_same_bits, assert_same_state, make_problem, params_of
from pairs import ALL_STATES, SHAPES, assert_native, make, nothing_changes, outcome, step_with, through_file

# Of the parameter, of its states.
FORMATS = (
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.float32, torch.float64),
    (torch.float64, torch.float32),
    (torch.bfloat16, torch.float16),
    (torch.complex64, torch.float64),
)
COMPLEX = {torch.float32: torch.complex64, torch.float64: torch.complex128}

every_class = pytest.mark.parametrize("name", CLASSES)
every_format = pytest.mark.parametrize(("dtype", "state_dtype"), FORMATS, ids=[f"{p} with {s}".replace("torch.", "") for p, s in FORMATS])
bf16_with_fp32: dict[str, Any] = {"dtype": torch.bfloat16, "state_dtype": torch.float32}


def trained(
    name: str, dtype: torch.dtype, steps: int = 2, module: Any = fused_opt, **options: Any
) -> tuple[torch.optim.Optimizer, list[list[torch.Tensor]]]:
    """After some steps, with gradients for three more."""
    values, grads = make_problem(SHAPES, steps + 3, torch.float64)
    given = [[(0.1 * grad).to(dtype) for grad in step_grads] for step_grads in grads]
    optimizer = make(module, name, [value.to(dtype) for value in values], **options)
    for step_grads in given[:steps]:
        step_with(optimizer, step_grads)
    return optimizer, given[steps:]


def twin(optimizer: torch.optim.Optimizer, module: Any = fused_opt, **options: Any) -> torch.optim.Optimizer:
    """New, of the same class, on copies of its parameters as they are now."""
    return make(module, type(optimizer).__name__, [p.detach() for p in params_of(optimizer)], **options)


def dtypes_of_states(optimizer: torch.optim.Optimizer) -> set[torch.dtype]:
    return {value.dtype for state in optimizer.state.values() for key, value in state.items() if key != "step"}


def assert_continues(resumed: torch.optim.Optimizer, optimizer: torch.optim.Optimizer, grads: list[list[torch.Tensor]]) -> None:
    """Both, from now on, with the same bits in parameters and states, and natively."""
    assert_same_state(resumed, optimizer)
    for step_grads in grads:
        for each in (resumed, optimizer):
            step_with(each, step_grads)
    assert_same_state(resumed, optimizer)
    assert_native(resumed)


@pytest.mark.parametrize("given", [True, False], ids=["with the option", "without it"])
@every_format
@every_class
def test_every_bit_is_kept(name: str, dtype: torch.dtype, state_dtype: torch.dtype, given: bool) -> None:
    """Into an optimizer that has the option, and into one that does not: it comes with the checkpoint, as lr does."""
    optimizer, grads = trained(name, dtype, state_dtype=state_dtype)
    expected = COMPLEX[state_dtype] if dtype.is_complex else state_dtype
    assert dtypes_of_states(optimizer) == {expected}
    resumed = twin(optimizer, **({"state_dtype": state_dtype} if given else {}))
    resumed.load_state_dict(through_file(optimizer.state_dict()))
    assert resumed.param_groups[0]["state_dtype"] is state_dtype
    assert_continues(resumed, optimizer, grads)


@every_class
def test_the_own_option_counts_where_both_have_one(name: str) -> None:
    """Unlike other options: it does not say what to compute, but how to keep it, and whoever asks for a format is to get it."""
    optimizer, grads = trained(name, torch.float32, state_dtype=torch.bfloat16)
    resumed = twin(optimizer, state_dtype=torch.float64)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert resumed.param_groups[0]["state_dtype"] is torch.float64
    for param, saved in zip(params_of(resumed), params_of(optimizer), strict=True):
        for key, value in optimizer.state[saved].items():
            assert_same_bits(resumed.state[param][key], value if key == "step" else value.to(torch.float64), key)
    step_with(resumed, grads[0])
    assert dtypes_of_states(resumed) == {torch.float64}
    assert_native(resumed)


@every_format
@every_class
def test_a_checkpoint_of_torch_gets_the_option_of_the_optimizer(name: str, dtype: torch.dtype, state_dtype: torch.dtype) -> None:
    """It has no such key, so the option stays, and the states are cast to it."""
    theirs, grads = trained(name, dtype, module=torch.optim)
    saved = through_file(theirs.state_dict())
    resumed = twin(theirs, state_dtype=state_dtype)
    resumed.load_state_dict(copy.deepcopy(saved))
    assert resumed.param_groups[0]["state_dtype"] is state_dtype
    expected = COMPLEX[state_dtype] if dtype.is_complex else state_dtype
    for index, param in enumerate(params_of(resumed)):
        for key, value in saved["state"][index].items():
            assert_same_bits(resumed.state[param][key], value if key == "step" else value.to(expected), key)
    step_with(resumed, grads[0])
    assert dtypes_of_states(resumed) == {expected}
    assert_native(resumed)


@every_format
@every_class
def test_torch_loads_it_and_continues(name: str, dtype: torch.dtype, state_dtype: torch.dtype) -> None:
    """torch casts real states to the parameter's dtype. Saved again by it, the checkpoint still says which dtype ours had."""
    optimizer, grads = trained(name, dtype, state_dtype=state_dtype)
    theirs = twin(optimizer, torch.optim)
    theirs.load_state_dict(through_file(optimizer.state_dict()))
    if not dtype.is_complex:  # torch leaves complex states as they are, and its step then refuses to mix them
        assert dtypes_of_states(theirs) == {dtype}
        step_with(theirs, grads[0])
        assert dtypes_of_states(theirs) == {dtype}
    back = twin(theirs)
    back.load_state_dict(through_file(theirs.state_dict()))
    assert dtypes_of_states(back) == {COMPLEX[state_dtype] if dtype.is_complex else state_dtype}


@every_class
def test_groups_with_and_without_the_option(name: str) -> None:
    """A group added later inherits the constructor's, unless it has its own; None in a group means as torch."""
    optimizer, grads = trained(name, **bf16_with_fp32)
    for options in ({}, {"state_dtype": torch.bfloat16}, {"state_dtype": None}):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))], **options})
    extra = [torch.full((4,), 0.25, dtype=torch.bfloat16)] * 3
    step_with(optimizer, [*grads[0], *extra])
    first_states = [optimizer.state[group["params"][0]] for group in optimizer.param_groups]
    dtypes = [next(value.dtype for key, value in state.items() if key != "step") for state in first_states]
    assert dtypes == [torch.float32, torch.float32, torch.bfloat16, torch.bfloat16]
    groups = [{"params": [torch.nn.Parameter(p.detach().clone()) for p in group["params"]]} for group in optimizer.param_groups]
    resumed = getattr(fused_opt, name)(groups, **ALL_STATES[name])
    resumed.load_state_dict(through_file(optimizer.state_dict()))
    assert_continues(resumed, optimizer, [[*step_grads, *extra] for step_grads in grads[1:]])


@every_class
def test_no_key_appears_where_the_option_was_not_given(name: str) -> None:
    optimizer, _ = trained(name, torch.bfloat16)
    assert "state_dtype" not in optimizer.state_dict()["param_groups"][0]
    assert "state_dtype" not in make(fused_opt, name, [torch.ones(3)], state_dtype=None).param_groups[0]


@every_class
def test_hooks_see_the_final_states_and_may_change_them(name: str) -> None:
    optimizer, grads = trained(name, **bf16_with_fp32)
    resumed = twin(optimizer)
    seen: list[set[torch.dtype]] = []

    def rename(_: torch.optim.Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
        """A checkpoint in another form, which the hook brings into torch's."""
        return saved["inner"]

    def zero(loaded: torch.optim.Optimizer) -> None:
        seen.append(dtypes_of_states(loaded))
        for state in loaded.state.values():
            for key, value in state.items():
                if key != "step":
                    value.zero_()

    resumed.register_load_state_dict_pre_hook(rename)
    resumed.register_load_state_dict_post_hook(zero)
    resumed.load_state_dict({"inner": copy.deepcopy(optimizer.state_dict())})
    assert seen == [{torch.float32}]
    for state in optimizer.state.values():
        for key, value in state.items():
            if key != "step":
                value.zero_()
    assert_continues(resumed, optimizer, grads)


@pytest.mark.parametrize("bad", ["float32", torch.int8, torch.complex64, 32], ids=str)
@every_class
def test_a_checkpoint_with_an_unknown_state_dtype_changes_nothing(name: str, bad: Any) -> None:
    optimizer, _ = trained(name, **bf16_with_fp32)
    saved = copy.deepcopy(optimizer.state_dict())
    step_with(optimizer, [torch.ones_like(p) for p in params_of(optimizer)])
    saved["param_groups"][0]["state_dtype"] = bad
    with nothing_changes(optimizer), pytest.raises(ValueError, match="state_dtype"):
        optimizer.load_state_dict(saved)


class Unreadable(dict[str, torch.Tensor]):
    """As a lazily loaded checkpoint whose file is gone."""

    def items(self) -> Any:
        raise OSError


@every_class
def test_a_load_that_fails_at_the_last_state_changes_nothing(name: str) -> None:
    optimizer, _ = trained(name, **bf16_with_fp32)
    saved = copy.deepcopy(optimizer.state_dict())
    step_with(optimizer, [torch.ones_like(p) for p in params_of(optimizer)])
    saved["state"][2] = Unreadable()
    assert outcome(lambda: twin(optimizer, torch.optim).load_state_dict(saved)) is OSError
    with nothing_changes(optimizer), pytest.raises(OSError):  # noqa: PT011
        optimizer.load_state_dict(saved)


@every_class
def test_an_empty_checkpoint_brings_the_option(name: str) -> None:
    """Saved before the first step: the states that the step creates have it."""
    optimizer, grads = trained(name, steps=0, **bf16_with_fp32)
    resumed = twin(optimizer)
    resumed.load_state_dict(through_file(optimizer.state_dict()))
    assert len(resumed.state) == 0
    assert_continues(resumed, optimizer, grads)
    assert dtypes_of_states(resumed) == {torch.float32}


@every_class
def test_helpers_of_distributed_checkpoints_keep_wide_states(name: str) -> None:
    model = torch.nn.Linear(8, 8, dtype=torch.bfloat16)
    optimizer = getattr(fused_opt, name)(model.parameters(), state_dtype=torch.float32, **ALL_STATES[name])
    for step in range(2):
        step_with(optimizer, [torch.full_like(p, 0.1 + step) for p in model.parameters()])
    saved = through_file(get_optimizer_state_dict(model, optimizer))
    other = copy.deepcopy(model)
    resumed = getattr(fused_opt, name)(other.parameters(), state_dtype=torch.float32, **ALL_STATES[name])
    set_optimizer_state_dict(other, resumed, saved)
    assert dtypes_of_states(resumed) == {torch.float32}
    assert_continues(resumed, optimizer, [[torch.full_like(p, 0.3) for p in model.parameters()]])
