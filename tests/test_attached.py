"""Masks and anchors are checked before anything changes, and anchors pull."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from masking import (
    SHAPES,
    assert_held,
    trained,
    with_weights,
)

import fused_opt
from fused_opt.bench.cases import Case
from fused_opt.stages import ANCHOR_STATE
from fused_opt.step import FusedStep
from helpers import CLASSES, assert_same_bits, params_of
from pairs import nothing_changes, step_with

every_class = pytest.mark.parametrize("name", CLASSES)

BAD: dict[str, tuple[str, Callable[[torch.Tensor], Any], type[Exception], str]] = {
    "stranger": (
        "masks",
        lambda p: {torch.ones(3): torch.ones(3)},
        ValueError,
        r"the masks have a tensor of shape \(3,\), which is no parameter of this optimizer; give keys out of its param_groups",
    ),
    "name": ("masks", lambda p: {"weight": None}, ValueError, "the masks have 'weight' of type str, which is no parameter"),
    "no tensor": ("masks", lambda p: {p: True}, TypeError, "the mask of parameter 1 of group 0 is a bool; it must be a tensor, or None"),
    "shape": ("masks", lambda p: {p: torch.ones(1)}, ValueError, r"has shape \(1,\); give it the parameter's, \(100,\)"),
    "device": (
        "masks",
        lambda p: {p: torch.ones(100, device="meta")},
        ValueError,
        r"the mask of parameter 1 of group 0 is on meta, the parameter on cpu; pass mask.to\(parameter.device\)",
    ),
    "sparse": ("masks", lambda p: {p: torch.ones(100).to_sparse()}, ValueError, r"torch.sparse_coo; .* pass mask.to_dense\(\)"),
    "values": ("masks", lambda p: {p: torch.full((100,), 0.5)}, ValueError, "has the value 0.5; it must have 0 and 1 only: pass mask != 0"),
    "NaN": ("masks", lambda p: {p: torch.full((100,), torch.nan)}, ValueError, "has the value nan; it must have 0 and 1 only"),
    "complex": ("masks", lambda p: {p: torch.ones(100) + 0j}, TypeError, "torch.complex64; it must be bool, or have real values 0 and 1"),
    "anchor's shape": ("anchors", lambda p: {p: torch.ones(2, 50)}, ValueError, r"shape \(2, 50\); give it the parameter's, \(100,\)"),
    "anchor's dtype": (
        "anchors",
        lambda p: {p: torch.ones(100, dtype=torch.int32)},
        TypeError,
        "the anchor of parameter 1 of group 0, which is torch.float32, has dtype torch.int32; use one of torch.float32, torch.float64",
    ),
    "complex anchor": ("anchors", lambda p: {p: torch.ones(100) + 0j}, TypeError, "has dtype torch.complex64; use one of torch.float32"),
    "anchor's device": ("anchors", lambda p: {p: torch.ones(100, device="meta")}, ValueError, "the anchor of .* is on meta"),
    "anchor of a stranger": ("anchors", lambda p: {torch.ones(3): None}, ValueError, r"the anchors have a tensor of shape \(3,\)"),
}


def attach(optimizer: FusedStep, what: str, given: Any) -> None:
    {"masks": optimizer.set_masks, "anchors": optimizer.set_anchors}[what](given)


@pytest.mark.parametrize("bad", BAD)
def test_refused_before_anything_changes(bad: str) -> None:
    what, given, error, message = BAD[bad]
    optimizer, masks = trained("Adam", "int8")
    first, second = masks
    good = masks[first] if what == "masks" else torch.zeros(SHAPES[0])
    with nothing_changes(optimizer), pytest.raises(error, match=message):
        attach(optimizer, what, {first: good, **given(second)})


@pytest.mark.parametrize("what", ["masks", "anchors"])
def test_they_come_as_a_mapping(what: str) -> None:
    optimizer, masks = trained("SGD", "fp32")
    with (
        nothing_changes(optimizer),
        pytest.raises(TypeError, match=f"{what} must be a mapping, parameter -> {what[:-1]}, not a list; pass {{"),
    ):
        attach(optimizer, what, list(masks.items()))


def unmaskable() -> Iterator[tuple[FusedStep, torch.Tensor, str]]:
    """Optimizers, parameters of theirs that cannot have a mask, and what is said."""
    number = torch.nn.Parameter(torch.ones(4, dtype=torch.complex64))
    yield fused_opt.SGD([number]), number, "has dtype torch.complex64, and a complex parameter cannot have a mask; leave it out"
    spread = torch.nn.Parameter(torch.ones(1).expand(4))
    yield fused_opt.SGD([spread]), spread, r"the weight of .* cannot be zeroed under a mask: .* strides \(0,\); .* a clone"
    embedding = torch.nn.Embedding(4, 2, sparse=True)
    optimizer = fused_opt.SGD(embedding.parameters(), momentum=0.9)
    embedding(torch.tensor([1])).sum().backward()
    optimizer.step()
    yield optimizer, embedding.weight, "the momentum_buffer of .* cannot be zeroed under a mask: it has layout torch.sparse_coo"


def test_what_cannot_have_a_mask() -> None:
    count = 0
    for optimizer, param, message in unmaskable():
        with nothing_changes(optimizer), pytest.raises((TypeError, ValueError), match=message):
            optimizer.set_masks({param: torch.zeros(param.shape)})
        count += 1
    assert count == 3


def test_not_while_the_weights_are_averages() -> None:
    optimizer, masks = trained("Adam", "fp32", average="ema")
    with optimizer.average_weights(), nothing_changes(optimizer), pytest.raises(RuntimeError, match=r"leave average_weights\(\) first"):
        optimizer.set_masks(masks)
    optimizer.set_masks(masks)
    with optimizer.average_weights():
        for param, mask in masks.items():
            assert int(param[~mask].count_nonzero()) == 0
            assert int(param[mask].count_nonzero()) == int(mask.sum())
    assert_held(optimizer, masks)


# --- anchors ---


def test_anchors_are_not_copied_without_need() -> None:
    """Of the parameter's dtype or one that holds its values; others are, and those that would move with the weight."""
    for dtype, anchor_dtype, kept in (
        (torch.float32, torch.float32, torch.float32),
        (torch.float32, torch.float64, torch.float64),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float16, torch.float32),
        (torch.complex64, torch.complex64, torch.complex64),
    ):
        param = torch.nn.Parameter(torch.randn(3, 4).to(dtype))
        anchor = torch.nn.Parameter(torch.randn(3, 4).to(anchor_dtype))
        optimizer = fused_opt.SGD([param], anchor_decay=0.1)
        optimizer.set_anchors({param: anchor})
        state = optimizer.state[param][ANCHOR_STATE]
        assert (state.dtype, state.requires_grad) == (kept, False)
        assert torch.equal(state, anchor.detach().to(kept))
        assert (state.data_ptr() == anchor.data_ptr()) == (anchor_dtype == kept)
    for shared in (param, param.detach(), param.data.view(12).view(3, 4)):
        optimizer.set_anchors({param: shared})
        assert optimizer.state[param][ANCHOR_STATE].data_ptr() != param.data_ptr()
    anchor = torch.zeros(4, 3, dtype=torch.complex64).t()
    optimizer.set_anchors({param: anchor})
    assert optimizer.state[param][ANCHOR_STATE].stride() == param.stride()


@every_class
def test_the_pull_goes_to_the_anchor(name: str) -> None:
    """Given, then taken away: the next step anchors at the weights that it finds, where there is no pull."""
    values = [torch.randn(50)]
    still = [torch.zeros(50)]
    optimizer = with_weights(Case(name, {"lr": 0.01}), values, {"anchor_decay": 0.5})
    (param,) = params_of(optimizer)
    anchor = values[0] + torch.where(torch.rand(50) < 0.5, -2.0, 2.0)
    optimizer.set_anchors({param: anchor})
    for _ in range(3):
        before = param.detach().clone()
        step_with(optimizer, still)
        assert bool((((param - before) * (anchor - before)) > 0).all())
    assert optimizer.state[param][ANCHOR_STATE].data_ptr() == anchor.data_ptr()
    optimizer.set_anchors({param: None})
    assert ANCHOR_STATE not in optimizer.state.get(param, {})
    before = param.detach().clone()
    step_with(optimizer, still)
    assert_same_bits(optimizer.state[param][ANCHOR_STATE], before)
