"""Optimizers hold what is under a mask at zero, whatever else they are asked for."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from masking import (
    EXTRAS,
    SHAPES,
    STORAGE,
    Tensors,
    assert_held,
    assert_same_where_kept,
    distinct,
    masked,
    problem,
    trained,
    with_weights,
)
from torch.nn.utils import prune

import fused_opt
from fused_opt.bench.cases import CASES, Case
from fused_opt.pruning import n_of_m_masks, pruned_masks
from fused_opt.stages import MASK_STATE
from fused_opt.step import FusedStep
from helpers import CLASSES, assert_same_bits, assert_same_state, params_of
from pairs import ALL_STATES, set_grads, step_with, through_file

every_class = pytest.mark.parametrize("name", CLASSES)

HELD_CASES = (
    *CASES,
    Case("Adam", {"eps": 0.0, "amsgrad": True, "weight_decay": 0.1}),
    Case("RMSprop", {"eps": 0.0}),
    Case("RMSprop", {"eps": 0.0, "momentum": 0.9}),
    Case("RMSprop", {"eps": 0.0, "momentum": 0.9, "centered": True, "weight_decay": 0.1}),
)


@pytest.mark.parametrize("storage", STORAGE)
@every_class
def test_held_through_training(name: str, storage: str) -> None:
    """With NaN in the gradients under the mask, all else becomes what it would without one, had weights and gradients been zero there."""
    dtype, options = STORAGE[storage]
    values, grads, masks = problem(3, dtype)
    for i, case in enumerate(case for case in HELD_CASES if case.optimizer == name):
        extra = list(EXTRAS)[(i + i // len(EXTRAS)) % len(EXTRAS)]
        own = {**options, **EXTRAS[extra]}
        if "betas" not in own and name in ("RMSprop", "SGD") and i % 2:
            own |= {"weight_decay": 0.1, "decoupled_weight_decay": True}
        what = f"{case}, {extra}"
        under = 0.0 if "max_grad_norm" in own else float("nan")
        optimizer = with_weights(case, values, own)
        by_param = masked(optimizer, masks)
        zeroed = [value.masked_fill(~mask, 0) for value, mask in zip(values, masks, strict=False)] + values[len(masks) :]
        plain = with_weights(case, zeroed, own)
        assert_held(optimizer, by_param, what)
        for step_grads in grads:
            for each, fill in ((optimizer, under), (plain, 0.0)):
                filled = [grad.masked_fill(~mask, fill) for grad, mask in zip(step_grads, masks, strict=False)]
                step_with(each, filled + step_grads[len(masks) :])
            assert_held(optimizer, by_param, what)
        if case.options.get("eps") != 0:  # without a mask, that is NaN
            assert_same_where_kept(optimizer, plain, by_param)


@pytest.mark.parametrize("storage", STORAGE)
@every_class
def test_set_in_the_middle(name: str, storage: str) -> None:
    """All that there is under the mask becomes zero at once, and nothing else changes."""
    optimizer, masks = trained(name, storage, average="ema", average_decay=0.5)
    before = copy.deepcopy(optimizer.state_dict())["state"]
    weights = [param.detach().clone() for param in masks]
    optimizer.set_masks(masks)
    assert_held(optimizer, masks)
    for i, (param, mask) in enumerate(masks.items()):
        assert_same_bits(param[mask], weights[i][mask])
        for key, value in optimizer.state_dict()["state"][i].items():
            if key not in before[i]:
                assert key == MASK_STATE
            elif isinstance(value, dict):
                assert_same_bits(value["codes"][mask], before[i][key]["codes"][mask], key)
                assert_same_bits(value["scales"], before[i][key]["scales"], key)
            elif value.shape == mask.shape:
                assert_same_bits(value[mask], before[i][key][mask], key)
            else:
                assert_same_bits(value, before[i][key], key)


@every_class
def test_taken_away_and_changed(name: str) -> None:
    optimizer, masks = trained(name, "fp32")
    (first, mask), (second, _) = masks.items()
    step = [torch.randn(shape) for shape in SHAPES]
    assert "masked" not in optimizer.param_groups[0]
    optimizer.set_masks(masks)
    assert optimizer.param_groups[0]["masked"] is True
    optimizer.set_masks({second: None})
    assert optimizer.param_groups[0]["masked"] is True
    step_with(optimizer, step)
    assert_held(optimizer, {first: mask})
    assert int(second.count_nonzero()) == second.numel()
    optimizer.set_masks({first: ~mask})
    step_with(optimizer, step)
    assert_held(optimizer, {first: ~mask})
    optimizer.set_masks({first: None, second: None})
    assert "masked" not in optimizer.param_groups[0]
    assert all(MASK_STATE not in state for state in optimizer.state.values())
    step_with(optimizer, step)
    assert int(first.count_nonzero()) == first.numel()


def test_of_some_groups_only() -> None:
    params = distinct((4, 5), (6,), (7,))
    optimizer = fused_opt.SGD([{"params": params[:1]}, {"params": params[1:]}], lr=0.1, maximize=True)
    optimizer.set_masks({params[1]: torch.arange(6) < 3, params[2]: None})
    assert ["masked" in group for group in optimizer.param_groups] == [False, True]
    assert list(optimizer.state) == [params[1]], "no empty states for the others"
    optimizer.set_masks({params[1]: None})
    assert list(optimizer.state) == [], "nor where there was nothing but a mask"
    optimizer.set_masks({params[1]: torch.arange(6) < 3})
    step_with(optimizer, [torch.ones_like(param) for param in params])
    plain = distinct((4, 5), (6,), (7,))
    for param, other, kept in zip(params, plain, (1, torch.arange(6) < 3, 1), strict=True):
        assert torch.equal(param, (other + 0.1) * kept)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float32, torch.bfloat16])
def test_a_mask_is_copied_into_the_parameters_layout(dtype: torch.dtype) -> None:
    param = torch.nn.Parameter(torch.randn(2, 8, 3, 3).to(memory_format=torch.channels_last))
    optimizer = fused_opt.AdamW([param])
    mask = (torch.rand(2, 8, 3, 3) < 0.5).to(dtype)
    kept = mask != 0
    optimizer.set_masks({param: mask})
    mask.zero_()
    assert optimizer.state[param][MASK_STATE].stride() == param.stride()
    step_with(optimizer, [torch.randn(2, 8, 3, 3)])
    assert_held(optimizer, {param: kept})


def test_strided_weights() -> None:
    storage = torch.randn(10, 12)
    param = torch.nn.Parameter(storage[::2, 1:9:2].t())
    mask = torch.rand(4, 5) < 0.5
    for options in ({}, {"state_dtype": "int8", "min_8bit_size": 0}):
        optimizer = fused_opt.AdamW([param], **options)
        optimizer.set_masks({param: mask})
        step_with(optimizer, [torch.randn(4, 5)])
        assert_held(optimizer, {param: mask})


@every_class
def test_complex_parameters_beside(name: str) -> None:
    """They cannot have a mask, but may be in a group in which others have one."""
    params = [torch.nn.Parameter(torch.randn(5)), torch.nn.Parameter(torch.randn(5, dtype=torch.complex64))]
    optimizer, alone = (getattr(fused_opt, name)(some, lr=0.1) for some in (params, [torch.nn.Parameter(params[1].detach().clone())]))
    mask = torch.arange(5) < 2
    optimizer.set_masks({params[0]: mask})
    step_with(optimizer, [torch.ones(5), torch.ones(5) * (1 + 2j)])
    step_with(alone, [torch.ones(5) * (1 + 2j)])
    assert_held(optimizer, {params[0]: mask})
    assert_same_bits(params[1], params_of(alone)[0])


@every_class
def test_where_torch_steps(name: str, without_the_extension: None) -> None:
    """The same promise, for masks that are there before the first step and for others."""
    values, grads, masks = problem(3, torch.float32)
    for i, case in enumerate(case for case in HELD_CASES if case.optimizer == name):
        optimizer = with_weights(case, values, {} if i % 2 else {"l1": 0.01, "average": "ema"})
        zeroed = [value.masked_fill(~mask, 0) for value, mask in zip(values, masks, strict=False)] + values[len(masks) :]
        plain = with_weights(case, zeroed, {} if i % 2 else {"l1": 0.01, "average": "ema"})
        by_param = masked(optimizer, masks)
        for step_grads in grads:
            for each, fill in ((optimizer, float("nan")), (plain, 0.0)):
                filled = [grad.masked_fill(~mask, fill) for grad, mask in zip(step_grads, masks, strict=False)]
                set_grads(each, filled + step_grads[len(masks) :])
                each.step()
            assert_held(optimizer, by_param, str(case))
        if case.options.get("eps") != 0:
            for param, other in zip(params_of(optimizer), params_of(plain), strict=True):
                assert torch.equal(param, other), str(case)  # zeros may have another sign


# What is given for the second parameter, of 100 elements.


@pytest.mark.parametrize("storage", STORAGE)
@every_class
def test_saved_and_loaded(name: str, storage: str) -> None:
    """In the middle of training, by an optimizer that never had a mask."""
    dtype, own = STORAGE[storage]
    optimizer, masks = trained(name, storage)
    optimizer.set_masks(masks)
    grads = problem(4, dtype)[1]
    step_with(optimizer, grads[2])
    other = with_weights(Case(name, ALL_STATES[name]), [param.detach() for param in params_of(optimizer)], own)
    other.load_state_dict(through_file(optimizer.state_dict()))
    for each in (optimizer, other):
        step_with(
            each,
            [torch.full(grad.shape, torch.nan, dtype=dtype).where(~m, grad) for grad, m in zip(grads[3], all_masks(masks), strict=True)],
        )
    assert_held(other, dict(zip(params_of(other), masks.values(), strict=False)))
    assert_same_state(other, optimizer)


def all_masks(masks: Mapping[torch.Tensor, torch.Tensor]) -> Tensors:
    return [*masks.values(), torch.ones(SHAPES[-1], dtype=torch.bool)]


@pytest.mark.parametrize("way", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("storage", ["fp32", "bf16, kahan", "int8"])
@every_class
def test_copies(name: str, storage: str, way: Callable[[Any], Any]) -> None:
    optimizer, masks = trained(name, storage)
    optimizer.set_masks(masks)
    other: FusedStep = way(optimizer)
    grads = problem(3, STORAGE[storage][0])[1][2]
    for each in (optimizer, other):
        step_with(each, grads)
    assert_held(other, dict(zip(params_of(other), masks.values(), strict=False)))
    assert_same_state(other, optimizer)


def pruned_model(seed: int) -> tuple[torch.nn.Sequential, list[tuple[torch.nn.Module, str]]]:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 4))
    pruned = [(model[0], "weight"), (model[2], "weight")]
    prune.global_unstructured(pruned, prune.L1Unstructured, amount=0.6)
    prune.random_unstructured(model[0], "bias", amount=5)
    prune.ln_structured(model[2], "weight", amount=0.25, n=2, dim=0)
    return model, [*pruned, (model[0], "bias")]


def train(model: torch.nn.Module, optimizer: FusedStep, steps: Sequence[int]) -> None:
    for step in steps:
        x = torch.randn(16, 8, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(model(x), x[:, :4]).backward()
        optimizer.step()


@every_class
def test_models_pruned_with_torch(name: str) -> None:
    """Trained with masks, and the pruning made permanent midway or at the end, or trained as torch does it: the same model."""
    results = []
    for sets_masks, removed_after in ((False, 8), (True, 8), (True, 4)):
        model, pruned = pruned_model(0)
        optimizer = getattr(fused_opt, name)(model.parameters(), lr=0.01, **ALL_STATES[name])
        masks = pruned_masks(model)
        assert {(id(param), id(mask)) for param, mask in masks.items()} == {
            (id(getattr(module, f"{tensor}_orig")), id(getattr(module, f"{tensor}_mask"))) for module, tensor in pruned
        }
        kept = {param: mask != 0 for param, mask in masks.items()}
        if sets_masks:
            optimizer.set_masks(masks)
        train(model, optimizer, range(removed_after))
        for module, tensor in pruned:
            prune.remove(module, tensor)
        assert pruned_masks(model) == {}
        train(model, optimizer, range(removed_after, 8))
        if sets_masks:
            assert_held(optimizer, kept)
        results.append([param.detach().clone() for param in model.state_dict().values()])
    for other in results[1:]:
        for actual, expected in zip(other, results[0], strict=True):
            assert torch.equal(actual, expected)


def test_a_shared_parameter_has_one_mask() -> None:
    first, second = torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4, bias=False)
    second.weight = first.weight
    prune.l1_unstructured(first, "weight", 5)
    prune.custom_from_mask(second, "weight", first.weight_mask)
    model = torch.nn.Sequential(first, second)
    assert list(map(id, pruned_masks(model))) == [id(first.weight_orig)]
    prune.random_unstructured(second, "weight", 3)
    with pytest.raises(ValueError, match=r"'weight_orig' of module '1' is a parameter of another module, too, .* prune both alike"):
        pruned_masks(model)


def test_two_of_four_is_held() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 4))
    optimizer = fused_opt.AdamW(model.parameters(), lr=0.01)
    optimizer.set_masks(n_of_m_masks(model))
    train(model, optimizer, range(5))
    for layer in (model[0], model[2]):
        assert torch.equal(layer.weight.view(-1, 4).count_nonzero(1), torch.full((layer.weight.numel() // 4,), 2))
