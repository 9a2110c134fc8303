"""Sparse gradients: SGD takes them as torch's does, the others refuse them before anything is written."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import fused_opt
from helpers import CLASSES, assert_same_bits, assert_same_state, make_problem, params_of
from pairs import Optimizers, make, make_pair, nothing_changes, set_grads, step_alike, step_with

SGD_OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"maximize": True},
    {"weight_decay": 0.1},
    {"momentum": 0.9},
    {"momentum": 0.9, "dampening": 0.5},
    {"momentum": 0.9, "nesterov": True},
    {"momentum": 0.9, "weight_decay": 0.1},
    {"momentum": 0.9, "nesterov": True, "maximize": True},
)

# A letter for each step: s for a sparse gradient, d for a dense one, - for none.
SEQUENCES = ("sss", "sds", "dss", "dds", "-s-s", "s-d")


def sparse_grad(step: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Of shape (6, 4), with a row given twice, as embeddings make them."""
    rows = torch.tensor([[0, 2, (step + 2) % 6]])
    values = torch.linspace(-1, 1 + step, 12).reshape(3, 4).to(dtype)
    return torch.sparse_coo_tensor(rows, values, (6, 4), check_invariants=True)


def grad_for(letter: str, step: int) -> torch.Tensor | None:
    return {"s": sparse_grad(step), "d": torch.linspace(-1, step, 24).reshape(6, 4), "-": None}[letter]


def assert_same_values(pair: Optimizers) -> None:
    """Also where a state is sparse."""
    for p, q in zip(*map(params_of, pair), strict=True):
        assert_same_bits(p, q)
        states = [optimizer.state.get(param, {}) for optimizer, param in zip(pair, (p, q), strict=True)]
        assert list(states[0]) == list(states[1])
        for key, value in states[1].items():
            assert states[0][key].layout == value.layout
            assert_same_bits(states[0][key].to_dense(), value.to_dense(), key)


@pytest.mark.parametrize("sequence", SEQUENCES)
@pytest.mark.parametrize("options", SGD_OPTIONS, ids=str)
def test_sgd_steps_and_refuses_as_torchs(options: dict[str, Any], sequence: str) -> None:
    """Beside a dense parameter, before it and behind it, in another group. A refused step changes neither, though torch steps one."""
    values = [torch.ones(5), torch.ones(6, 4), torch.ones(3)]
    pair = make_pair("SGD", values[:2], **{"momentum": 0, "weight_decay": 0, **options})
    for optimizer in pair:
        optimizer.add_param_group({"params": [torch.nn.Parameter(values[2].clone())]})
    for step, letter in enumerate(sequence):
        for optimizer in pair:
            for param, grad in zip(params_of(optimizer), (torch.ones(5), grad_for(letter, step), torch.ones(3)), strict=True):
                param.grad = None if grad is None else grad.clone()
        if not step_alike(pair):
            return
        assert_same_values(pair)


def test_an_embedding_trains_as_with_torch() -> None:
    results = []
    for module in (fused_opt, torch.optim):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Embedding(50, 8, sparse=True), torch.nn.Linear(8, 1))
        optimizer = module.SGD(model.parameters(), lr=0.1)
        for _ in range(5):
            optimizer.zero_grad()
            model(torch.randint(0, 50, (16,))).square().mean().backward()
            assert model[0].weight.grad.is_sparse
            optimizer.step()
        results.append(list(model.parameters()))
    for p, q in zip(*results, strict=True):
        assert_same_bits(p, q)


@pytest.mark.parametrize("steps_before", [0, 2])
@pytest.mark.parametrize("name", [name for name in CLASSES if name != "SGD"])
def test_the_others_refuse_before_the_first_write(name: str, steps_before: int) -> None:
    """Though the sparse gradient is the last of the second group."""
    values, grads = make_problem([(8, 8), (5,), (6, 4)], 3, torch.float32)
    pair = make_pair(name, values[:1])
    for optimizer in pair:
        optimizer.add_param_group({"params": [torch.nn.Parameter(v.clone()) for v in values[1:]], "lr": 0.5})
        for step_grads in grads[:steps_before]:
            step_with(optimizer, step_grads)
        for param, grad in zip(params_of(optimizer), [*grads[2][:2], sparse_grad(0)], strict=True):
            param.grad = grad.clone()
    assert not step_alike(pair)


def test_a_sparse_gradient_among_others_leaves_those_to_the_kernels() -> None:
    values, grads = make_problem([(8, 8), (6, 4)], 2, torch.float32)
    optimizer = make(fused_opt, "SGD", values, weight_decay=0)
    expected = make(fused_opt, "SGD", values[:1], weight_decay=0)
    for step, step_grads in enumerate(grads):
        step_with(optimizer, [step_grads[0], sparse_grad(step)])
        step_with(expected, step_grads[:1])
    rows = {row.path.split("-")[0]: row for row in fused_opt.explain(optimizer).rows}
    assert list(rows["cpu"].indices) == [0]
    assert "plain strided" in rows["torch"].reason
    assert_same_bits(params_of(optimizer)[0], params_of(expected)[0])
    assert optimizer._last_ran is not None  # type: ignore[attr-defined]


def test_a_state_of_a_sparse_gradient_goes_through_a_checkpoint() -> None:
    pair = make_pair("SGD", [torch.ones(6, 4)], weight_decay=0)
    for optimizer in pair:
        for step in range(2):
            step_with(optimizer, [sparse_grad(step)])
    resumed = make_pair("SGD", [params_of(pair[0])[0].detach()], weight_decay=0)
    for optimizer in resumed:
        optimizer.load_state_dict(copy.deepcopy(pair[0].state_dict()))
    for optimizer in (*pair, *resumed):
        step_with(optimizer, [sparse_grad(2)])
    assert_same_values(pair)
    assert_same_values((resumed[0], pair[0]))
    assert_same_values((resumed[0], resumed[1]))


def test_state_dtype_is_not_ignored_silently() -> None:
    """torch's own step, which serves sparse gradients, would create a state in the gradient's dtype."""
    optimizer = make(fused_opt, "SGD", [torch.ones(5), torch.ones(6, 4)], weight_decay=0, state_dtype=torch.bfloat16)
    set_grads(optimizer, [torch.ones(5), sparse_grad(0)])
    with nothing_changes(optimizer), pytest.raises(RuntimeError, match=r"state_dtype=torch.bfloat16 cannot be had for parameter 1"):
        optimizer.step()


def test_16_bit_sparse_gradients() -> None:
    pair = make_pair("SGD", [torch.ones(6, 4).bfloat16()], weight_decay=0, momentum=0)
    for optimizer in pair:
        step_with(optimizer, [sparse_grad(0, torch.bfloat16)])
    assert_same_state(*pair)


def test_sparse_parameters_are_stepped_after_all_that_may_fail() -> None:
    """A sparse one is not copied to be put back; so the dense one that torch refuses must come before it."""
    params = [torch.nn.Parameter(torch.ones(4, 2)) for _ in range(2)]
    optimizer = make(fused_opt, "SGD", [p.detach() for p in params], lr=1.0, weight_decay=0.0)
    set_grads(optimizer, [torch.ones(4, 2).to_sparse(1)] * 2)
    optimizer.step()
    set_grads(optimizer, [torch.ones(4, 2).to_sparse(1), torch.ones(4, 2)])
    with nothing_changes(optimizer), pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
