"""Tensors that are more than memory: of inference mode, of subclasses, fake ones, and those of parametrizations and pruning."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.nn.utils import parametrizations, parametrize, prune
from torch.testing._internal.two_tensor import TwoTensor

import fused_opt
from helpers import CLASSES, assert_same_bits, assert_same_state, make_problem, params_of
from pairs import ALL_STATES, make_pair, nothing_changes, oracle_arithmetic, set_grads, step_alike, step_with

# Each letter is a step: i within inference mode, o outside of it.
INFERENCE_COURSES = ("i", "ii", "io", "oi", "oio", "oiio")


@pytest.mark.parametrize("course", INFERENCE_COURSES)
@pytest.mark.parametrize("name", CLASSES)
def test_steps_within_inference_mode_and_outside(name: str, course: str) -> None:
    """States that were created within it cannot be updated outside: refused as by torch, before the parameters are written."""
    values, grads = make_problem([(8, 5), (33,)], len(course), torch.float64)
    pair = make_pair(name, values)
    for where, step_grads in zip(course, grads, strict=True):
        for optimizer in pair:
            set_grads(optimizer, step_grads)
        with torch.inference_mode(where == "i"):
            if not step_alike(pair):
                assert course == "io"
                return
    assert course != "io"
    assert_same_state(*pair)
    for p, q in zip(*map(params_of, pair), strict=True):
        for key, value in pair[1].state[q].items():
            assert pair[0].state[p][key].is_inference() == value.is_inference(), key


@pytest.mark.parametrize("position", [0, 1])
@pytest.mark.parametrize("name", CLASSES)
def test_inference_parameters_are_refused_outside(name: str, position: int) -> None:
    """Also where they are the last of the second group; within inference mode they are stepped."""
    values, grads = make_problem([(8, 5), (33,)], 1, torch.float64)
    pair = make_pair(name, values[:1])
    for optimizer in pair:
        optimizer.add_param_group({"params": [torch.nn.Parameter(values[1].clone())]})
        with torch.inference_mode():
            optimizer.param_groups[position]["params"] = [torch.nn.Parameter(values[position].clone())]
        set_grads(optimizer, grads[0])
    assert params_of(pair[0])[position].is_inference()
    assert not step_alike(pair)
    inside = make_pair(name, values[:1])
    for optimizer in inside:
        with torch.inference_mode():
            optimizer.param_groups[0]["params"] = [torch.nn.Parameter(values[0].clone())]
            set_grads(optimizer, grads[0][:1])
    with torch.inference_mode():
        assert step_alike(inside)
    assert_same_state(*inside)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", CLASSES)
def test_inference_gradients_are_only_read(name: str, fused: bool) -> None:
    values, grads = make_problem([(64,)], 2, torch.float64)
    pair = make_pair(name, values, **({"fused": True} if fused and name != "RMSprop" else {}))
    with torch.inference_mode():
        grads = [[grad.clone() for grad in step_grads] for step_grads in grads]
    for step_grads in grads:
        for optimizer in pair:
            params_of(optimizer)[0].grad = step_grads[0]
        assert step_alike(pair)
    assert_same_state(*pair)
    assert not any(value.is_inference() for value in pair[0].state[params_of(pair[0])[0]].values())


class Logging(torch.Tensor):
    """Counts what torch does with it."""

    calls: list[str] = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.calls.append(getattr(func, "__name__", str(func)))
        return super().__torch_function__(func, types, args, kwargs)


def two(value: torch.Tensor) -> torch.Tensor:
    """A wrapper of two tensors that has no memory of its own."""
    return TwoTensor(value.clone(), value * -2)


SUBCLASSES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "__torch_function__": lambda value: value.clone().as_subclass(Logging),
    "__torch_dispatch__": two,
}


def parts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The plain tensors that hold the values of one of a subclass."""
    if isinstance(tensor, TwoTensor):
        yield from (tensor.a, tensor.b)
    else:
        yield tensor.detach().as_subclass(torch.Tensor)


@pytest.mark.parametrize("kind", SUBCLASSES)
@pytest.mark.parametrize("name", CLASSES)
def test_subclasses_are_stepped_beside_plain_parameters(name: str, kind: str) -> None:
    """With torch's own code, as explain says; the values are torch's."""
    wrap = SUBCLASSES[kind]
    value = torch.linspace(-1, 1, 12, dtype=torch.float64)
    pair = []
    for module in (fused_opt, torch.optim):
        plain = torch.nn.Parameter(value.clone())
        odd = torch.nn.Parameter(wrap(value.flip(0)))
        optimizer = getattr(module, name)([odd, plain], **ALL_STATES[name])
        for step in range(3):
            odd.grad = wrap(value + step)
            plain.grad = value + step
            optimizer.step()
        pair.append(optimizer)
    for p, q in zip(*map(params_of, pair), strict=True):
        assert type(p) is type(q)
        assert list(pair[0].state[p]) == list(pair[1].state[q])
        for ours, theirs in ((p, q), *((pair[0].state[p][key], pair[1].state[q][key]) for key in pair[1].state[q])):
            assert type(ours) is type(theirs)
            for a, b in zip(parts(ours), parts(theirs), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-15)  # torch's square roots of the wrapped tensors
    paths = {row.path.split("-")[0]: row.reason for row in fused_opt.explain(pair[0]).rows}
    assert list(paths) == ["torch", "cpu"]
    assert "plain strided" in paths["torch"]


@pytest.mark.parametrize("name", CLASSES)
def test_a_parameter_that_becomes_one_of_a_subclass(name: str) -> None:
    """Between two steps, with the same memory and states: the kernels must notice."""
    values, grads = make_problem([(12,)], 3, torch.float64)
    pair = make_pair(name, values)
    for optimizer in pair:
        for step, step_grads in enumerate(grads):
            if step == 1:
                param = params_of(optimizer)[0]
                param.grad = None
                optimizer.param_groups[0]["params"][0] = odd = torch.nn.Parameter(param.detach().as_subclass(Logging))
                optimizer.state[odd] = optimizer.state.pop(param)
            step_with(optimizer, step_grads)
    for p, q in zip(*map(params_of, pair), strict=True):
        assert_same_bits(p.as_subclass(torch.Tensor), q.as_subclass(torch.Tensor))


@pytest.mark.parametrize("name", CLASSES)
def test_state_dtype_of_subclasses_is_not_ignored_silently(name: str) -> None:
    """torch's own step, which serves them, would create states in the parameter's dtype."""
    odd = torch.nn.Parameter(torch.ones(4).as_subclass(Logging))
    optimizer = getattr(fused_opt, name)([torch.nn.Parameter(torch.ones(3)), odd], state_dtype=torch.bfloat16, **ALL_STATES[name])
    for param in params_of(optimizer):
        param.grad = torch.ones_like(param)
    with nothing_changes(optimizer), pytest.raises(RuntimeError, match="state_dtype"):
        optimizer.step()


@pytest.mark.parametrize("name", CLASSES)
def test_tensors_without_memory(name: str) -> None:
    """Fake ones, as programs use to learn what a model would need, and those on the device "meta"."""
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    for context, device, kind in ((FakeTensorMode(), "cpu", FakeTensor), (contextlib.nullcontext(), "meta", torch.Tensor)):
        with context:
            model = torch.nn.Linear(3, 2, device=device)
            optimizer = getattr(fused_opt, name)(model.parameters(), **ALL_STATES[name])
            for _ in range(2):
                optimizer.zero_grad()
                model(torch.ones(4, 3, device=device)).sum().backward()
                optimizer.step()
            assert all(row.path == "torch" for row in fused_opt.explain(optimizer).rows)
        states = [value for key, value in optimizer.state[model.weight].items() if key != "step"]
        assert states
        assert all(isinstance(value, kind) and value.shape == (2, 3) and value.device.type == device for value in states)


def weight_norm(model: torch.nn.Module) -> None:
    parametrizations.weight_norm(model[0])


def orthogonal(model: torch.nn.Module) -> None:
    parametrizations.orthogonal(model[0])


def spectral_norm(model: torch.nn.Module) -> None:
    parametrizations.spectral_norm(model[0])


class Symmetric(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.triu() + x.triu(1).mT


def symmetric(model: torch.nn.Module) -> None:
    parametrize.register_parametrization(model[2], "weight", Symmetric())


def pruned(model: torch.nn.Module) -> None:
    prune.l1_unstructured(model[0], "weight", amount=0.3)
    prune.random_unstructured(model[2], "bias", amount=0.5)


def tied(model: torch.nn.Module) -> None:
    model[2].weight = model[0].weight


def flattened(model: torch.nn.Module) -> None:
    """All parameters become views into one buffer, as some trainers do for communication."""
    flat = torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    torch.nn.utils.vector_to_parameters(flat, model.parameters())


@pytest.mark.parametrize("change", [weight_norm, orthogonal, spectral_norm, symmetric, pruned, tied, flattened], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", CLASSES)
def test_modules_whose_parameters_are_not_what_they_compute_with(name: str, change: Callable[[torch.nn.Module], None]) -> None:
    """Trained for some steps as with torch's optimizer, to the bit."""
    results = []
    for module in (fused_opt, torch.optim):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Tanh(), torch.nn.Linear(6, 6)).double()
        change(model)
        optimizer = getattr(module, name)(model.parameters(), **ALL_STATES[name])
        for _ in range(4):
            optimizer.zero_grad()
            model(torch.randn(5, 6, dtype=torch.float64)).square().mean().backward()
            with oracle_arithmetic(optimizer):
                optimizer.step()
        results.append((model, optimizer))
    (ours, optimizer), (theirs, _) = results
    assert_same_state(optimizer, results[1][1])
    assert_same_bits(ours[0].weight.detach(), theirs[0].weight.detach())
    assert optimizer._last_ran is not None


def test_pruned_values_stay_pruned() -> None:
    layer = torch.nn.Linear(8, 8)
    prune.l1_unstructured(layer, "weight", amount=0.5)
    optimizer = fused_opt.AdamW(layer.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        layer(torch.ones(2, 8)).square().mean().backward()
        optimizer.step()
    layer(torch.ones(2, 8))
    assert int((layer.weight == 0).sum()) == 32
