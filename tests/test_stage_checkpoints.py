"""Loading, copying and pickling what stages keep beside a rule's states: masks, anchors, averages and companions."""

from __future__ import annotations

import copy
import pickle
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from masking import assert_held

import fused_opt
from fused_opt.bench.layouts import gaps
from fused_opt.stages import COMPANIONS, MASK_STATE
from fused_opt.step import FusedStep
from helpers import CLASSES, assert_same_bits, assert_same_state, params_of
from pairs import ALL_STATES, nothing_changes, step_with, through_file

every_class = pytest.mark.parametrize("name", CLASSES)
REMEDY = "load what fused_opt saved for such a parameter (torch.optim casts states), or leave this state out"


def new(name: str = "AdamW", dtype: torch.dtype = torch.float32, **options: Any) -> FusedStep:
    """On three parameters, of which `stepped` leaves the last one alone."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(40, generator=generator).to(dtype)) for _ in range(3)]
    optimizer: FusedStep = getattr(fused_opt, name)(params, **{"lr": 0.01, **ALL_STATES[name], **options})
    return optimizer


def stepped(optimizer: FusedStep, steps: int = 2) -> FusedStep:
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        step_with(optimizer, [*(torch.randn(40, generator=generator).to(param.dtype) for param in params_of(optimizer)[:2]), None])
    return optimizer


def masks_of(optimizer: FusedStep) -> dict[torch.Tensor, torch.Tensor]:
    """For all but the first parameter: one that is stepped, and one that is not."""
    return {param: torch.arange(40) % 3 > 0 for param in params_of(optimizer)[1:]}


def loaded(optimizer: FusedStep) -> FusedStep:
    other = copy.deepcopy(optimizer)
    for state in other.state.values():
        for value in state.values():
            value.zero_()
    other.load_state_dict(through_file(optimizer.state_dict()))
    return other


WAYS: dict[str, Callable[[FusedStep], FusedStep]] = {
    "load": loaded,
    "deepcopy": copy.deepcopy,
    "pickle": lambda optimizer: pickle.loads(pickle.dumps(optimizer)),
}


# --- parameters that have only a mask or an anchor ---


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("way", WAYS)
@every_class
def test_states_without_a_counter(name: str, way: str, steps: int) -> None:
    """torch's __setstate__ reads the counter of each state that is not empty, also before the first step and of frozen layers."""
    optimizer = new(name, anchor_decay=0.1)
    optimizer.set_masks(masks_of(optimizer))
    optimizer.set_anchors({param: torch.zeros(40) for param in params_of(optimizer)})
    stepped(optimizer, steps)
    assert set(optimizer.state[params_of(optimizer)[2]]) == {"mask", "anchor"}
    other = WAYS[way](optimizer)
    assert_same_state(other, optimizer)
    assert_same_state(stepped(other), stepped(optimizer))
    assert_held(other, masks_of(other))


@every_class
def test_a_checkpoint_is_loaded_by_one_that_never_stepped(name: str) -> None:
    optimizer = new(name)
    optimizer.set_masks(masks_of(optimizer))
    other = new(name)
    with torch.no_grad():
        for param, value in zip(params_of(other), params_of(optimizer), strict=True):
            param.copy_(value)
    other.load_state_dict(through_file(optimizer.state_dict()))
    assert other.param_groups[0]["masked"] is True
    assert_same_state(stepped(other), stepped(optimizer))


def test_counters_that_are_numbers_become_tensors_as_before() -> None:
    """Of old checkpoints: torch does it, wherever the state has been stepped."""
    optimizer = new("Adam")
    optimizer.set_masks(masks_of(optimizer))
    saved = stepped(optimizer).state_dict()
    for state in saved["state"].values():
        if "step" in state:
            state["step"] = 2
    optimizer.load_state_dict(saved)
    assert [float(state["step"]) for state in optimizer.state.values() if "step" in state] == [2, 2]
    assert all(isinstance(state.get("step", torch.ones(())), torch.Tensor) for state in optimizer.state.values())


# --- masks and anchors that have been set here ---


@pytest.mark.parametrize("options", [{}, {"state_dtype": "int8", "min_8bit_size": 0, "block_size": 32}, {"average": "ema"}], ids=str)
@every_class
def test_they_stay_where_the_checkpoint_has_none(name: str, options: dict[str, Any]) -> None:
    """As in "prune, rewind, train": what is loaded is zero under the masks, and the checkpoint is not."""
    saved = stepped(new(name, **options)).state_dict()
    before = copy.deepcopy(saved)
    optimizer = stepped(new(name, **options))
    first, _, frozen = params_of(optimizer)
    anchors = {first: torch.ones(40), frozen: torch.ones(40)}
    optimizer.set_masks(masks_of(optimizer))
    optimizer.set_anchors(anchors)
    optimizer.load_state_dict(saved)
    for param, anchor in anchors.items():
        assert optimizer.state[param]["anchor"].data_ptr() == anchor.data_ptr()
    assert_held(optimizer, masks_of(optimizer))
    assert optimizer.param_groups[0]["masked"] is True
    for index, state in before["state"].items():
        for key, value in state.items():
            if isinstance(value, torch.Tensor):
                assert_same_bits(saved["state"][index][key], value)
    for key, value in before["state"][0].items():  # this one has no mask
        assert_same_bits(optimizer.state[first][key], value["codes"] if isinstance(value, dict) else value)
    assert_held(stepped(optimizer), masks_of(optimizer))


def test_those_of_the_checkpoint_come_first() -> None:
    theirs, ours = new(), new()
    theirs.set_masks(masks_of(theirs))
    theirs.set_anchors({param: torch.ones(40) for param in params_of(theirs)})
    ours.set_masks({param: torch.zeros(40) for param in params_of(ours)})
    ours.set_anchors({param: torch.zeros(40) for param in params_of(ours)})
    ours.load_state_dict(theirs.state_dict())
    for param, mask in masks_of(ours).items():
        assert torch.equal(ours.state[param][MASK_STATE], mask)
    assert not bool(ours.state[params_of(ours)[0]][MASK_STATE].any())
    assert all(bool((ours.state[param]["anchor"] == 1).all()) for param in params_of(ours))


def test_masked_is_what_the_states_say() -> None:
    """A checkpoint whose option says otherwise: its masks were left out, or it is of torch.optim."""
    saved = new().state_dict()
    saved["param_groups"][0]["masked"] = True
    optimizer = new()
    optimizer.load_state_dict(saved)
    assert "masked" not in optimizer.param_groups[0]
    optimizer.set_masks(masks_of(optimizer))
    optimizer.load_state_dict(torch.optim.AdamW(params_of(optimizer)).state_dict())
    assert optimizer.param_groups[0]["masked"] is True
    masked = optimizer.state_dict()
    del masked["param_groups"][0]["masked"]
    other = new()
    other.load_state_dict(masked)
    assert other.param_groups[0]["masked"] is True


def test_a_load_that_fails_leaves_them() -> None:
    optimizer = stepped(new())
    optimizer.set_masks(masks_of(optimizer))
    saved = new().state_dict()
    saved["state"][0] = {"anchor": torch.ones(3)}
    with nothing_changes(optimizer), pytest.raises(ValueError, match="load a state_dict of the same model"):
        optimizer.load_state_dict(saved)


# --- dtypes ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.int64, torch.bfloat16], ids=str)
def test_masks_of_another_dtype_become_bool(dtype: torch.dtype) -> None:
    optimizer = new()
    optimizer.set_masks(masks_of(optimizer))
    saved = stepped(optimizer).state_dict()
    for state in saved["state"].values():
        if MASK_STATE in state:
            state[MASK_STATE] = state[MASK_STATE].to(dtype)
    optimizer.load_state_dict(saved)
    assert_held(stepped(optimizer), masks_of(optimizer))


@every_class
def test_through_torch_optim_and_back(name: str) -> None:
    """It casts masks to the parameter's dtype, and averages of 16-bit weights."""
    optimizer = new(name, torch.bfloat16, average="ema")
    optimizer.set_masks(masks_of(optimizer))
    stepped(optimizer)
    for param in params_of(optimizer)[2:]:  # torch cannot load what has only a mask
        optimizer.set_masks({param: None})
    theirs = getattr(torch.optim, name)([param.detach().clone() for param in params_of(optimizer)])
    theirs.load_state_dict(optimizer.state_dict())
    state = theirs.state[theirs.param_groups[0]["params"][1]]
    assert (state[MASK_STATE].dtype, state["average"].dtype) == (torch.bfloat16, torch.bfloat16)
    optimizer.load_state_dict(theirs.state_dict())
    state = optimizer.state[params_of(optimizer)[1]]
    assert (state[MASK_STATE].dtype, state["average"].dtype) == (torch.bool, torch.float32)
    stepped(optimizer)


BAD: dict[str, tuple[dict[str, Any], str, torch.Tensor, str]] = {
    "mask": ({}, "mask", torch.full((40,), 0.5), "has the value 0.5, but a mask has 0 and 1 only"),
    "NaN": ({}, "mask", torch.full((40,), torch.nan), "has the value nan, but a mask has 0 and 1 only"),
    "split": ({"weights": "split"}, "low_bits", torch.ones(40).bfloat16(), "has dtype torch.bfloat16; .* must be one of torch.int16"),
    "master": ({"weights": "master"}, "master", torch.ones(40).half(), "has dtype torch.float16; .* must be one of torch.float32"),
    "kahan": (
        {"weights": "kahan"},
        "compensation",
        torch.ones(40),
        "has dtype torch.float32; for a parameter of torch.bfloat16 it must be one of torch.bfloat16",
    ),
    "average": ({"average": "ema"}, "average", torch.ones(40, dtype=torch.int32), "has dtype torch.int32; .* torch.float16"),
    "anchor": ({}, "anchor", torch.ones(40) + 0j, "has dtype torch.complex64; .* torch.float16"),
}


@pytest.mark.parametrize("bad", BAD)
def test_states_that_have_lost_what_they_were_for_are_refused(bad: str) -> None:
    options, key, value, message = BAD[bad]
    optimizer = stepped(new(dtype=torch.bfloat16, **options))
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][1][key] = value
    with (
        nothing_changes(optimizer),
        pytest.raises(ValueError, match=f"state '{key}' of parameter 1 of its group {message}; {re.escape(REMEDY)}"),
    ):
        optimizer.load_state_dict(saved)
    del saved["state"][1][key]
    optimizer.load_state_dict(saved)
    if key == "average":
        optimizer.param_groups[0]["average_start"] = 2  # it begins anew
    stepped(optimizer)


@pytest.mark.parametrize("weights", COMPANIONS)
def test_float32_parameters_have_no_companions(weights: str) -> None:
    """A checkpoint of 16-bit training goes on in float32."""
    optimizer = stepped(new(dtype=torch.bfloat16, weights=weights, average="ema"))
    other = new(weights=weights)
    other.load_state_dict(optimizer.state_dict())
    assert not any(COMPANIONS[weights] in state for state in other.state.values())
    for state, expected in zip(other.state.values(), optimizer.state.values(), strict=True):
        assert_same_bits(state["average"], expected["average"])
    stepped(other)


def test_averages_and_anchors_hold_the_parameters_values() -> None:
    """In a float64 model they are float64, of whatever model they were."""
    optimizer = stepped(new(average="swa", anchor_decay=0.1))
    other = new(dtype=torch.float64)
    other.load_state_dict(optimizer.state_dict())
    for state, expected in zip(other.state.values(), optimizer.state.values(), strict=True):
        for key in ("average", "anchor"):
            assert_same_bits(state[key], expected[key].double())
    stepped(other)


# --- companions that are lost ---


@pytest.mark.parametrize("ours", ["stochastic", "split", "kahan", "master"])
@pytest.mark.parametrize("theirs", COMPANIONS)
def test_a_companion_that_is_lost_is_said(theirs: str, ours: str) -> None:
    saved = stepped(new(dtype=torch.bfloat16, weights=theirs)).state_dict()
    optimizer = new(dtype=torch.bfloat16, weights=ours)
    if ours == theirs:
        optimizer.load_state_dict(saved)
    else:
        with pytest.warns(UserWarning, match="is lost") as caught:
            optimizer.load_state_dict(saved)
        (warning,) = caught
        assert str(warning.message) == (
            f"the checkpoint has weights='{theirs}', this optimizer weights='{ours}': '{COMPANIONS[theirs]}', what the checkpoint has of "
            f"weights beyond their 16 bits, is lost; make the optimizer with weights='{theirs}', or export float32_weights() of one made so"
        )
        assert warning.filename == __file__
    assert any(COMPANIONS[theirs] in state for state in optimizer.state.values()) == (ours == theirs)
    stepped(optimizer)


def test_where_the_warning_is_an_error_nothing_changes() -> None:
    saved = stepped(new(dtype=torch.bfloat16, weights="split")).state_dict()
    optimizer = stepped(new(dtype=torch.bfloat16, weights="kahan"))
    with warnings.catch_warnings(), nothing_changes(optimizer):
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="is lost"):
            optimizer.load_state_dict(saved)


# --- anchors of odd kinds ---


def odd_anchors() -> dict[str, tuple[torch.Tensor, torch.dtype]]:
    with torch.inference_mode():
        inference = torch.ones(6)
    return {
        "conjugated": (torch.complex(torch.ones(6), torch.ones(6)).conj(), torch.complex64),
        "negated": (torch._neg_view(torch.ones(6)), torch.float32),  # type: ignore[attr-defined]
        "inference": (inference, torch.float32),
        "gaps": (gaps(torch.ones(6)), torch.float32),
    }


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("kind", ["conjugated", "negated", "inference", "gaps"])
@every_class
def test_odd_anchors_are_copied(name: str, kind: str, inside: bool) -> None:
    """Inside inference mode, too, where what is made cannot be written to later."""
    anchor, dtype = odd_anchors()[kind]
    param = torch.nn.Parameter(torch.ones(6, dtype=dtype))
    optimizer = getattr(fused_opt, name)([param], lr=0.1, anchor_decay=0.5)
    with torch.inference_mode(inside):
        optimizer.set_anchors({param: anchor})
    state = optimizer.state[param]["anchor"]
    assert not any((state.is_conj(), state.is_neg(), state.is_inference()))
    assert_same_bits(state, anchor.clone().resolve_conj().resolve_neg())
    for _ in range(2):
        step_with(optimizer, [torch.ones_like(param)])
    assert_same_bits(optimizer.state[param]["anchor"], state)


def test_names_are_refused_with_the_way_to_parameters() -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = fused_opt.SGD(model.parameters())
    by_name = model.state_dict()
    remedy = "give keys out of its param_groups: {parameter: by_name[name] for name, parameter in model.named_parameters()}"
    with nothing_changes(optimizer), pytest.raises(ValueError, match=re.escape(remedy)):
        optimizer.set_anchors(by_name)  # type: ignore[arg-type]
    optimizer.set_anchors({parameter: by_name[name] for name, parameter in model.named_parameters()})
    assert all("anchor" in state for state in optimizer.state.values())
