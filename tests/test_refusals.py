"""Bad input: torch's exception type, a message with value, limit and remedy, and nothing changed. And what is left to torch's own step."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch

import fused_opt
from fused_opt.native import native
from fused_opt.plan import plan
from helpers import assert_same_bits

PARAM = [torch.nn.Parameter(torch.ones(2))]

BAD_ARGUMENTS: tuple[tuple[str, Any, dict[str, Any], str], ...] = (
    ("Adam", PARAM, {"lr": -0.5}, "-0.5.*0 or greater.*maximize"),
    ("AdamW", PARAM, {"lr": float("nan")}, "nan.*0 or greater"),
    ("AdamW", PARAM, {"eps": -1e-8}, "-1e-08.*0 or greater"),
    ("AdamW", PARAM, {"betas": (0.9, 1.0)}, "index 1: 1.0.*less than 1"),
    ("Adam", PARAM, {"betas": (-0.1, 0.9)}, "index 0: -0.1.*at least 0"),
    ("Adam", PARAM, {"weight_decay": -1}, "-1.*0 or greater"),
    ("RMSprop", PARAM, {"alpha": -0.1}, "-0.1.*0 or greater"),
    ("RMSprop", PARAM, {"momentum": -0.9}, "-0.9.*0 or greater"),
    ("SGD", PARAM, {"nesterov": True}, "momentum > 0 and dampening=0"),
    ("SGD", [], {}, "model.parameters"),
    ("SGD", [np.ones(3)], {}, "ndarray.*torch.nn.Parameter"),
    ("SGD", [PARAM[0] * 2], {}, "detach"),
    ("SGD", PARAM, {"momentum": -0.9}, "-0.9.*0 or greater"),
    ("SGD", torch.ones(3), {}, r"pass \[tensor\]"),
)


@pytest.mark.parametrize(("name", "params", "options", "message"), BAD_ARGUMENTS, ids=lambda value: str(value)[:40])
def test_constructors_refuse_what_torch_refuses(name: str, params: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(Exception) as torchs:  # noqa: PT011
        getattr(torch.optim, name)(params, **options)
    with pytest.raises(torchs.type, match=message) as ours:
        getattr(fused_opt, name)(params, **options)
    assert str(ours.value).startswith(str(torchs.value))


def test_unknown_options_are_refused() -> None:
    with pytest.raises(TypeError, match="no_such_option"):
        fused_opt.AdamW(PARAM, no_such_option=1)


def broken_state(change: Callable[[dict[str, torch.Tensor]], None]) -> tuple[torch.optim.Optimizer, list[torch.nn.Parameter]]:
    """An optimizer over three parameters in two groups, after one step, the last one's state then changed."""
    params = [torch.nn.Parameter(torch.full((4,), float(i))) for i in range(3)]
    optimizer = fused_opt.AdamW([{"params": params[:1]}, {"params": params[1:]}])
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    change(optimizer.state[params[2]])
    return optimizer, params


def delete_moment(state: dict[str, torch.Tensor]) -> None:
    del state["exp_avg_sq"]


BROKEN_STATES: tuple[tuple[Callable[[dict[str, torch.Tensor]], Any], type[Exception], str], ...] = (
    (lambda state: state.update(exp_avg=torch.zeros(5)), RuntimeError, r"'exp_avg' has shape \(5\).*parameter has shape \(4\).*delete"),
    (lambda state: state.update(exp_avg=torch.zeros(4).int()), RuntimeError, "dtype int32.*float32.*load a state_dict"),
    (lambda state: state.update(exp_avg=torch.zeros(4, dtype=torch.complex64)), RuntimeError, "complex64.*float32"),
    (delete_moment, KeyError, "parameter 1.* no state 'exp_avg_sq'.*another optimizer"),
)


@pytest.mark.parametrize(("change", "error", "message"), BROKEN_STATES)
def test_a_failing_step_changes_nothing(change: Any, error: type[Exception], message: str) -> None:
    optimizer, params = broken_state(change)
    before = [p.detach().clone() for p in params]
    states = [{k: v.clone() for k, v in optimizer.state[p].items()} for p in params]
    with pytest.raises(error, match=message):
        optimizer.step()
    for param, value, state in zip(params, before, states, strict=True):
        assert_same_bits(param, value)
        for key, tensor in state.items():
            assert_same_bits(optimizer.state[param][key], tensor)


def test_options_switched_on_late_fail_as_in_torch() -> None:
    for module in (fused_opt, torch.optim):
        param = torch.nn.Parameter(torch.ones(3))
        optimizer = module.RMSprop([param])
        param.grad = torch.ones(3)
        optimizer.step()
        optimizer.param_groups[0]["momentum"] = 0.9
        before = param.detach().clone()
        with pytest.raises(KeyError, match="momentum_buffer"):
            optimizer.step()
        assert_same_bits(param, before)


def test_bad_group_values_at_step_time_change_nothing() -> None:
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = fused_opt.AdamW([{"params": params[:1]}, {"params": params[1:]}])
    for param in params:
        param.grad = torch.ones(3)
    optimizer.param_groups[1]["lr"] = "fast"
    with pytest.raises(ValueError, match=r"param group 1.*could not convert.*'lr': 'fast'"):
        optimizer.step()
    assert all(bool((p == 1).all()) for p in params)
    assert len(optimizer.state) == 0


def test_sparse_gradients_are_torchs_business() -> None:
    embedding = torch.nn.Embedding(10, 4, sparse=True)
    dense = torch.nn.Parameter(torch.ones(4))
    for name, works in (("SGD", True), ("AdamW", False)):
        optimizer = getattr(fused_opt, name)([dense, embedding.weight])
        (embedding(torch.tensor([1, 2])).sum() + dense.sum()).backward()
        before = dense.detach().clone()
        if works:
            expected = embedding.weight.detach().clone()
            expected[1:3] -= 0.001
            optimizer.step()
            torch.testing.assert_close(embedding.weight.detach(), expected)
            assert not torch.equal(dense, before)
        else:
            with pytest.raises(RuntimeError, match="sparse"):
                optimizer.step()
            assert_same_bits(dense, before)
        optimizer.zero_grad()


def negated_grad(p: torch.nn.Parameter) -> None:
    p.grad = torch._neg_view(torch.arange(12.0).reshape(3, 4))


def zero_grad_without_memory(p: torch.nn.Parameter) -> None:
    p.grad = torch._efficientzerotensor((3, 4))


LEFT_TO_TORCH: tuple[tuple[str, torch.Tensor, Callable[[torch.nn.Parameter], None] | None], ...] = (
    ("overlap itself", torch.arange(8.0).as_strided((3, 3), (2, 1)), None),
    ("lazily negated", torch.ones(3, 4), negated_grad),
    ("lazily negated", torch._neg_view(torch.ones(3, 4)), None),
    ("plain strided", torch.ones(3, 4), zero_grad_without_memory),
    ("plain strided", torch.ones(3, 4).as_subclass(type("Mine", (torch.Tensor,), {})), None),
)


def copy_as_it_is(value: torch.Tensor) -> torch.Tensor:
    """With its overlaps, its subclass and its lazy negation, which clone() would resolve."""
    if value.is_neg():
        return torch._neg_view(torch._neg_view(value).clone())
    if not value.is_contiguous():
        return torch.arange(8.0).as_strided((3, 3), (2, 1))
    return value.clone()


@pytest.mark.parametrize("name", ["Adam", "AdamW", "RMSprop", "SGD"])
@pytest.mark.parametrize(("reason", "value", "set_grad"), LEFT_TO_TORCH, ids=lambda v: v if isinstance(v, str) else "")
def test_what_the_kernels_do_not_serve_is_stepped_by_torch(name: str, reason: str, value: torch.Tensor, set_grad: Any) -> None:
    """Beside a parameter that they do serve; both come out as from torch's for-loop."""
    results = []
    for module, options in ((fused_opt, {"fused": name != "RMSprop"}), (torch.optim, {"foreach": False})):
        if name == "RMSprop":
            options.pop("fused", None)
        odd = torch.nn.Parameter(copy_as_it_is(value))
        plain = torch.nn.Parameter(torch.ones(5))
        optimizer = getattr(module, name)([odd, plain], **options)
        for _ in range(3):
            odd.grad = torch.ones_like(odd)
            if set_grad is not None:
                set_grad(odd)
            plain.grad = torch.full((5,), 0.5)
            if module is fused_opt:
                assert [(i, reason in why) for i, why in plan(optimizer).groups[0].declined] == [(0, True)]
            optimizer.step()
        results.append((odd, plain, optimizer))
    (odd, plain, optimizer), (torch_odd, torch_plain, _) = results
    assert optimizer._last_ran is not None
    assert_same_bits(odd.detach().resolve_neg(), torch_odd.detach().resolve_neg())
    torch.testing.assert_close(plain, torch_plain, rtol=1e-6, atol=0)


def test_capturable_is_torchs_business_and_torch_refuses_it_on_the_cpu() -> None:
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = fused_opt.Adam([param], capturable=True)
    param.grad = torch.ones(3)
    assert "capturable" in fused_opt.explain(optimizer).rows[0].reason
    with pytest.raises((AssertionError, RuntimeError), match="capturable"):
        optimizer.step()


def test_differentiable_step_can_be_differentiated() -> None:
    grads = []
    for module in (fused_opt, torch.optim):
        start = torch.ones(3, requires_grad=True)
        param = start.clone()
        optimizer = module.SGD([torch.zeros(1, requires_grad=True)], lr=0.5, differentiable=True)
        optimizer.param_groups[0]["params"] = [param]
        param.grad = start * 3
        if module is fused_opt:
            assert "differentiable" in fused_opt.explain(optimizer).rows[0].reason
        optimizer.step()
        param.sum().backward()
        grads.append(start.grad)
    assert_same_bits(*grads)


def test_explain_refuses_other_optimizers() -> None:
    with pytest.raises(TypeError, match=r"torch.optim.sgd.SGD.*fused_opt.Adam"):
        fused_opt.explain(torch.optim.SGD(PARAM))


def test_explain_changes_nothing_and_tells_each_path() -> None:
    params = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))]
    params += [torch.nn.Parameter(torch._neg_view(torch.ones(5))), torch.nn.Parameter(torch.ones(6))]
    optimizer = fused_opt.AdamW([{"params": params[:3]}, {"params": params[3:], "state_dtype": torch.bfloat16}], amsgrad=True)
    explanation = fused_opt.explain(optimizer)
    isa = native().isa
    assert [(row.group, row.indices, row.path, row.isa, row.dtype, row.elements, row.state_bytes) for row in explanation.rows] == [
        (0, (0,), f"cpu-{isa}", isa, "float32", 3, 36),
        (0, (1,), f"cpu-{isa}", isa, "bfloat16", 4, 24),
        (0, (2,), "torch", "", "float32", 5, 60),
        (1, (0,), f"cpu-{isa}", isa, "float32", 6, 36),
    ]
    assert explanation.rows[3].states == (("exp_avg", "bfloat16"), ("exp_avg_sq", "bfloat16"), ("max_exp_avg_sq", "bfloat16"))
    assert json.loads(json.dumps(asdict(explanation)))["rows"][2]["reason"] == "the parameter or the gradient is lazily negated"
    assert "12 bytes a value" in str(explanation)
    assert len(optimizer.state) == 0
    assert all(p.grad is None for p in params)


def test_a_parameter_may_become_negated_where_it_is() -> None:
    results = []
    for module in (fused_opt, torch.optim):
        param = torch.nn.Parameter(torch.ones(4))
        optimizer = module.SGD([param], lr=0.5)
        for _ in range(2):
            param.grad = torch.ones(4)
            optimizer.step()
            param.data = torch._neg_view(param.data)
        results.append(param.detach().resolve_neg())
    assert_same_bits(*results)


def test_a_gradient_that_overlaps_its_parameter_is_refused_as_in_torch() -> None:
    for module in (fused_opt, torch.optim):
        storage = torch.ones(65)
        param = torch.nn.Parameter(storage[1:])
        param.grad = storage[:64]
        with pytest.raises(RuntimeError, match="memory"):
            module.SGD([param]).step()
        assert bool((storage == 1).all())


def test_running_out_of_memory_for_new_states_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    params = [torch.nn.Parameter(torch.ones(4)), torch.nn.Parameter(torch.ones(4)), torch.nn.Parameter(torch._neg_view(torch.ones(4)))]
    optimizer = fused_opt.AdamW([{"params": params[:1]}, {"params": params[1:]}])
    for param in params:
        param.grad = torch.ones_like(param)
    zeros_like = torch.zeros_like

    def fail_for_the_second(tensor: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        if tensor is params[1]:
            raise MemoryError
        return zeros_like(tensor, **kwargs)

    monkeypatch.setattr(torch, "zeros_like", fail_for_the_second)
    with pytest.raises(MemoryError):
        optimizer.step()
    assert all(bool((p.abs() == 1).all()) for p in params)
    assert len(optimizer.state) == 0


def test_a_bad_state_of_a_parameter_that_torch_steps_is_refused_before_the_first_write() -> None:
    params = [torch.nn.Parameter(torch._neg_view(torch.ones(4).bfloat16())) for _ in range(2)]
    optimizer = fused_opt.AdamW([{"params": params[:1]}, {"params": params[1:]}])
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    optimizer.state[params[1]]["exp_avg_sq"] = torch.zeros(5).bfloat16()
    before = params[0].detach().clone()
    with pytest.raises(RuntimeError, match=r"'exp_avg_sq' has shape \(5\), dtype bfloat16"):
        optimizer.step()
    assert_same_bits(params[0].resolve_neg(), before.resolve_neg())
    assert optimizer.state[params[0]]["step"] == 1


def test_torchs_share_is_undone_if_it_fails_midway() -> None:
    """Torch steps the first parameter, then finds that it cannot view the second one's gradient as real numbers."""
    negated = torch.nn.Parameter(torch._neg_view(torch.ones(4)))
    conjugated = torch.nn.Parameter(torch.ones(3, dtype=torch.complex64))
    plain = torch.nn.Parameter(torch.ones(5))
    optimizer = fused_opt.Adam([negated, conjugated, plain])
    negated.grad, plain.grad = torch.ones(4), torch.ones(5)
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    before = [p.detach().clone() for p in (negated, plain)]
    conjugated.grad = torch.complex(torch.arange(3.0), torch.ones(3)).conj()
    with pytest.raises(RuntimeError, match="conj"):
        optimizer.step()
    assert torch.equal(negated, before[0])
    assert_same_bits(plain, before[1])
    assert bool((conjugated == 1).all())
    assert {id(param) for param in optimizer.state} == {id(negated), id(plain)}
    for index, states in state["state"].items():
        for key, value in states.items():
            assert torch.equal(optimizer.state_dict()["state"][index][key], value)


@pytest.mark.parametrize("name", ["Adam", "AdamW", "RMSprop", "SGD"])
def test_an_expanded_parameter_is_refused_as_in_torch(name: str) -> None:
    for module in (fused_opt, torch.optim):
        first, expanded = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(1).expand(4))
        first.grad, expanded.grad = torch.ones(3), torch.ones(4)
        optimizer = getattr(module, name)([first, expanded])
        with pytest.raises(RuntimeError, match="memory location"):
            optimizer.step()
        if module is fused_opt:
            assert bool((first == 1).all())
            assert len(optimizer.state) == 0


def test_add_param_group_names_the_remedy_once() -> None:
    with pytest.raises(TypeError) as error:
        fused_opt.SGD(PARAM).add_param_group({"params": [np.ones(3)]})
    assert str(error.value).count("torch.nn.Parameter") == 1


def test_a_lazily_conjugated_state_is_left_to_torch() -> None:
    results = []
    for module in (torch.optim, fused_opt):
        param = torch.nn.Parameter(torch.ones(4))
        param.grad = torch.ones(4)
        optimizer = module.SGD([param], lr=0.1, momentum=0.9)
        optimizer.step()
        optimizer.state[param]["momentum_buffer"] = torch.full((4,), 1 - 1j).conj().imag
        optimizer.step()
        results.append(param.detach())
    assert_same_bits(results[1], results[0])


def test_a_failing_step_leaves_version_counters_alone() -> None:
    """So a loss computed before can still be differentiated."""
    native_one, declined = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3, dtype=torch.complex64))
    native_one.grad, declined.grad = torch.ones(3), torch.ones(3, dtype=torch.complex64).conj()
    optimizer = fused_opt.Adam([native_one, declined])
    loss = (native_one**2).sum()
    with pytest.raises(RuntimeError, match="conj"):
        optimizer.step()
    assert len(optimizer.state) == 0
    loss.backward()


def test_an_empty_parameter_may_have_huge_dimensions() -> None:
    for name in ("Adam", "RMSprop", "SGD"):
        param = torch.nn.Parameter(torch.empty(2**40, 0, 2**40))
        param.grad = torch.empty(2**40, 0, 2**40)
        optimizer = getattr(fused_opt, name)([param])
        optimizer.step()
        assert [row.path for row in fused_opt.explain(optimizer).rows] == [f"cpu-{native().isa}"]


def test_a_forced_torch_backend_copies_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSED_OPT_BACKEND", "torch")
    native.cache_clear()
    try:
        param = torch.nn.Parameter(torch.ones(3))
        param.grad = torch.ones(3)
        monkeypatch.setattr(torch.Tensor, "clone", lambda *_, **__: pytest.fail("cloned"))
        fused_opt.AdamW([param]).step()
    finally:
        native.cache_clear()
    assert bool((param < 1).all())
