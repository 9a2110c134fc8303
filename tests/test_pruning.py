"""Masks as `fused_opt.pruning` makes them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from masking import (
    distinct,
    model_of,
)
from torch.nn.utils import prune

import fused_opt
from fused_opt.pruning import magnitude_masks, n_of_m_masks
from helpers import CLASSES
from pairs import step_with

every_class = pytest.mark.parametrize("name", CLASSES)

# --- which weights are pruned ---


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
