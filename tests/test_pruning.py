"""Masks: those that `fused_opt.pruning` makes, and that optimizers hold what is under them at zero, whatever else they are asked for."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.utils import prune

import fused_opt
from fused_opt.bench.cases import CASES, Case
from fused_opt.pruning import magnitude_masks, n_of_m_masks, pruned_masks
from fused_opt.rules import SLOTS
from fused_opt.stages import ANCHOR_STATE, MASK_STATE, STAGE_STATES
from fused_opt.step import FusedStep
from helpers import CLASSES, assert_same_bits, assert_same_state, make_problem, params_of
from pairs import ALL_STATES, nothing_changes, set_grads, step_with, through_file

Tensors = list[torch.Tensor]

every_class = pytest.mark.parametrize("name", CLASSES)

# --- which weights are pruned ---


def distinct(*shapes: tuple[int, ...], seed: int = 0) -> Tensors:
    """Parameters whose magnitudes all differ, so that there is one answer to which of them are the smallest."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [torch.Size(shape).numel() for shape in shapes]
    values = (torch.randperm(sum(sizes), generator=generator) + 1.0) * 0.1
    values *= torch.randint(0, 2, values.shape, generator=generator) * 2 - 1
    return [torch.nn.Parameter(part.view(shape)) for part, shape in zip(values.split(sizes), shapes, strict=True)]


def model_of(params: Tensors) -> torch.nn.ModuleList:
    """A module for each, for torch.nn.utils.prune."""
    modules = torch.nn.ModuleList()
    for param in params:
        module = torch.nn.Module()
        module.register_parameter("weight", torch.nn.Parameter(param.detach().clone()))
        modules.append(module)
    return modules


@pytest.mark.parametrize("amount", [0, 0.0, 1, 0.1, 0.5, 37, 0.999, 600])
def test_magnitudes_as_torch_prunes_them(amount: float) -> None:
    params = distinct((20, 30), (7, 11, 13), (600,))
    apart, together = model_of(params), model_of(params)
    for module in apart:
        prune.l1_unstructured(module, "weight", amount)
    prune.global_unstructured([(module, "weight") for module in together], prune.L1Unstructured, amount=amount)
    for scope, modules in (("tensor", apart), ("global", together)):
        masks = magnitude_masks(params, amount, scope)
        assert list(map(id, masks)) == list(map(id, params))
        for param, module in zip(params, modules, strict=True):
            assert masks[param].dtype == torch.bool
            assert torch.equal(masks[param], module.weight_mask != 0), scope
    total = sum(param.numel() for param in params)
    pruned = sum(int((~mask).sum()) for mask in magnitude_masks(params, amount).values())
    assert pruned == (amount if isinstance(amount, int) else round(amount * total))


AWKWARD = [0.0, -0.0, 1.0, -1.0, 1.5, float("inf"), float("-inf"), float("nan"), 2.0**-133, -(2.0**-133), 2.0**-126, 1e4]


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_of_equal_magnitudes_the_first_are_pruned(data: st.DataObject) -> None:
    dtypes = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])
    lists = data.draw(st.lists(st.tuples(st.lists(st.sampled_from(AWKWARD), max_size=9), dtypes), min_size=1, max_size=4))
    tensors = [torch.tensor(values, dtype=dtype) for values, dtype in lists]
    flat = [float(x) for tensor in tensors for x in tensor.double().abs()]
    number = data.draw(st.integers(0, len(flat)))
    order = sorted(range(len(flat)), key=lambda i: (flat[i] != flat[i], flat[i] if flat[i] == flat[i] else 0.0, i))
    pruned = set(order[:number])
    masks = magnitude_masks(tensors, number)
    assert [bool(x) for tensor in tensors for x in masks[tensor]] == [i not in pruned for i in range(len(flat))]


def test_more_pruning_keeps_what_is_pruned() -> None:
    params = distinct((40, 50))
    optimizer = fused_opt.AdamW(params, weight_decay=0.1)
    before = torch.ones(40, 50, dtype=torch.bool)
    for amount in (0.2, 0.5, 0.8):
        masks = magnitude_masks(params, amount)
        assert not (masks[params[0]] & ~before).any()
        before = masks[params[0]]
        optimizer.set_masks(masks)
        step_with(optimizer, [torch.randn(40, 50)])
        assert int(params[0].count_nonzero()) == 2000 - round(amount * 2000)


def test_of_a_module_the_matrices() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(4, 8, 3), torch.nn.LayerNorm(8), torch.nn.Linear(8, 4))
    expected = [model[0].weight, model[2].weight]
    for masks in (magnitude_masks(model, 0.5), n_of_m_masks(model, dim=1)):
        assert list(map(id, masks)) == list(map(id, expected))
    twice = [model[2].weight, model[2].weight]
    assert int((~magnitude_masks(twice, 5)[model[2].weight]).sum()) == 5
    strided = torch.randn(6, 8).t()
    assert torch.equal(magnitude_masks([strided], 7)[strided], magnitude_masks([dense := strided.contiguous()], 7)[dense])


@pytest.mark.parametrize(
    ("shape", "n", "m", "dim"),
    [
        ((6, 8), 2, 4, -1),
        ((8, 6), 2, 4, 0),
        ((4, 8, 3, 3), 2, 4, 1),
        ((12,), 1, 3, 0),
        ((4, 16), 4, 8, 1),
        ((3, 4), 4, 4, 1),
        ((0, 4), 2, 4, 1),
    ],
)
def test_n_of_m(shape: tuple[int, ...], n: int, m: int, dim: int) -> None:
    values = torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(1)).bfloat16()  # many are equal
    mask = n_of_m_masks([values], n, m, dim)[values]
    assert mask.shape == values.shape
    rows = zip(values.movedim(dim, -1).reshape(-1, m).tolist(), mask.movedim(dim, -1).reshape(-1, m).tolist(), strict=True)
    count = 0
    for row, kept in rows:
        largest = sorted(range(m), key=lambda i: (abs(row[i]), i))[m - n :]
        assert [i for i in range(m) if kept[i]] == sorted(largest)
        count += 1
    assert count * m == values.numel()


BAD_MASKS: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "negative": (lambda: magnitude_masks(distinct((2, 3)), -1), ValueError, "Invalid amount: -1; give a fraction, at least 0.0"),
    "all": (lambda: magnitude_masks(distinct((2, 3)), 1.0), ValueError, "Invalid amount: 1.0; give a fraction, at least 0.0"),
    "nan": (lambda: magnitude_masks(distinct((2, 3)), float("nan")), ValueError, "Invalid amount: nan; give a fraction"),
    "true": (lambda: magnitude_masks(distinct((2, 3)), True), ValueError, "Invalid amount: True; give a fraction"),
    "many": (lambda: magnitude_masks(distinct((2, 3), (2,)), 9), ValueError, "amount=9, but there are 8 weights; give a fraction"),
    "many of one": (
        lambda: magnitude_masks(distinct((2, 3), (2,)), 3, "tensor"),
        ValueError,
        r"amount=3, but a tensor of shape \(2,\) has 2 weights; give a fraction, or a whole number of 2 or less",
    ),
    "scope": (lambda: magnitude_masks(distinct((2, 3)), 1, "layer"), ValueError, "Invalid scope: 'layer'; use 'global'"),
    "a tensor": (lambda: magnitude_masks(torch.ones(2, 3), 1), TypeError, r"a tensor of shape \(2, 3\); pass \[tensor\]"),
    "names": (
        lambda: magnitude_masks(torch.nn.Linear(2, 3).named_parameters(), 1),
        TypeError,
        r"params has a tuple; .*second of each pair",
    ),  # type: ignore[arg-type]
    "complex": (lambda: n_of_m_masks([torch.ones(4, dtype=torch.complex64)]), TypeError, "a tensor of torch.complex64 .*; leave it out"),
    "sparse": (lambda: n_of_m_masks([torch.ones(4).to_sparse()]), TypeError, "torch.sparse_coo; leave it out: it must be dense"),
    "n above m": (lambda: n_of_m_masks(distinct((2, 4)), 5, 4), ValueError, "Invalid n=5, m=4; give whole numbers with 1 <= n <= m"),
    "no n": (lambda: n_of_m_masks(distinct((2, 4)), 0, 4), ValueError, "Invalid n=0, m=4; give whole numbers"),
    "indivisible": (lambda: n_of_m_masks(distinct((4, 6))), ValueError, r"shape \(4, 6\) has 6 weights along dim=-1, .*m=4; leave it out"),
    "no such dim": (lambda: n_of_m_masks(distinct((4, 8)), dim=2), ValueError, r"dim=2, but a tensor has shape \(4, 8\): leave it out"),
}


@pytest.mark.parametrize("bad", BAD_MASKS)
def test_masks_that_cannot_be_made(bad: str) -> None:
    make, error, message = BAD_MASKS[bad]
    with pytest.raises(error, match=message):
        make()


# --- what is under a mask stays zero ---

ZEROED = (SLOTS | STAGE_STATES) - {MASK_STATE, ANCHOR_STATE}

# How weights and states are kept.
STORAGE: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "fp32": (torch.float32, {}),
    "fp64": (torch.float64, {}),
    "int8": (torch.float32, {"state_dtype": "int8", "min_8bit_size": 0, "block_size": 32}),
    "bf16": (torch.bfloat16, {}),
    "bf16, stochastic, int8": (torch.bfloat16, {"weights": "stochastic", "state_dtype": "int8", "min_8bit_size": 0, "block_size": 32}),
    "bf16, kahan": (torch.bfloat16, {"weights": "kahan"}),
    "bf16, split, fp32 states": (torch.bfloat16, {"weights": "split", "state_dtype": torch.float32}),
    "bf16, master, int8": (torch.bfloat16, {"weights": "master", "state_dtype": "int8", "min_8bit_size": 0, "block_size": 32}),
}

# What else a step is asked for.
EXTRAS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "l1": {"l1": 0.01},
    "subgradient, anchor, average": {"l1": 0.01, "l1_method": "subgradient", "anchor_decay": 0.1, "average": "ema", "average_decay": 0.5},
    "clipping, swa": {"max_grad_value": 0.5, "max_grad_norm": 3.0, "average": "swa"},
}

SHAPES = ((9, 33), (100,), (3,))


def problem(steps: int, dtype: torch.dtype) -> tuple[Tensors, list[Tensors], Tensors]:
    """Values, gradients, and masks that prune about a half; the last tensor has none."""
    values, grads = make_problem(SHAPES, steps, torch.float32, seed=3)
    masks = [torch.rand(shape, generator=torch.Generator().manual_seed(5)) < 0.5 for shape in SHAPES[:-1]]
    return [value.to(dtype) for value in values], [[grad.to(dtype) for grad in each] for each in grads], masks


def masked(optimizer: FusedStep, masks: Tensors) -> dict[torch.Tensor, torch.Tensor]:
    """The masks, given to it, by parameter."""
    by_param = dict(zip(params_of(optimizer), masks, strict=False))
    optimizer.set_masks(by_param)
    return by_param


def assert_held(optimizer: torch.optim.Optimizer, masks: Mapping[torch.Tensor, torch.Tensor], what: str = "") -> None:
    """Bit for bit, and what is not under a mask is neither zero nor NaN."""
    for param, mask in masks.items():
        state = optimizer.state[param]
        assert state[MASK_STATE].dtype == torch.bool
        assert torch.equal(state[MASK_STATE], mask), what
        tensors = {"weight": param.detach(), **{name: value for name, value in state.items() if name in ZEROED}}
        for name, tensor in tensors.items():
            assert_same_bits(tensor[~mask], torch.zeros_like(tensor[~mask]), f"{what} {name}")
            assert bool(tensor[mask].isfinite().all()), f"{what} {name}"
        assert int(param[mask].count_nonzero()) > 0.8 * int(mask.sum()), f"{what}: weights that are kept must be there"
        for name, value in state.items():
            assert bool(value.isfinite().all()), f"{what} {name}"


def assert_same_where_kept(actual: FusedStep, expected: FusedStep, masks: Mapping[torch.Tensor, torch.Tensor]) -> None:
    """Parameters and states bit for bit, but for zeros under the masks, of which a minus is not held."""
    for param, other in zip(params_of(actual), params_of(expected), strict=True):
        pruned = ~masks.get(param, torch.ones(param.shape, dtype=torch.bool))
        assert_same_bits(param.detach().masked_fill(pruned, 0), other.detach().masked_fill(pruned, 0))
        state = {name: value for name, value in actual.state.get(param, {}).items() if name != MASK_STATE}
        assert set(state) == set(expected.state.get(other, {}))
        for name, value in state.items():
            hidden = pruned if value.shape == pruned.shape else torch.zeros_like(value, dtype=torch.bool)
            assert_same_bits(value.masked_fill(hidden, 0), expected.state[other][name].masked_fill(hidden, 0), name)


# Beside the table's: updates that divide zero by zero where there was never a gradient.
HELD_CASES = (
    *CASES,
    Case("Adam", {"eps": 0.0, "amsgrad": True, "weight_decay": 0.1}),
    Case("RMSprop", {"eps": 0.0}),
    Case("RMSprop", {"eps": 0.0, "momentum": 0.9}),
    Case("RMSprop", {"eps": 0.0, "momentum": 0.9, "centered": True, "weight_decay": 0.1}),
)


def with_weights(case: Case, values: Tensors, options: dict[str, Any]) -> FusedStep:
    params = [torch.nn.Parameter(value.clone()) for value in values]
    optimizer: FusedStep = getattr(fused_opt, case.optimizer)(params, **{**case.options, **options})
    return optimizer


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


# --- attaching ---


def trained(name: str, storage: str, steps: int = 2, **options: Any) -> tuple[FusedStep, dict[torch.Tensor, torch.Tensor]]:
    """An optimizer after some steps without masks, and masks for it."""
    dtype, own = STORAGE[storage]
    values, grads, masks = problem(steps, dtype)
    optimizer = with_weights(Case(name, ALL_STATES[name]), values, {**own, **options})
    for step_grads in grads:
        step_with(optimizer, step_grads)
    return optimizer, dict(zip(params_of(optimizer), masks, strict=False))


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


# --- with what else there is ---


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
