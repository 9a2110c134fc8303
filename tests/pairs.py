"""An optimizer of ours beside torch's, given the same things, so that a test reads as what it does to both."""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

import fused_opt
from fused_opt.bench.reference import IeeeSqrt
from helpers import SUPPORTED_ISAS, assert_same_bits, assert_same_state, params_of, run_steps

# With every state that the class can have.
ALL_STATES: dict[str, dict[str, Any]] = {
    "Adam": {"amsgrad": True},
    "AdamW": {"weight_decay": 0.1},
    "RMSprop": {"momentum": 0.9, "centered": True},
    "SGD": {"momentum": 0.9, "weight_decay": 0.1},
}

SHAPES = ((8, 5), (33,), (1,))

Optimizers = tuple[torch.optim.Optimizer, torch.optim.Optimizer]


def make(module: Any, name: str, values: Sequence[torch.Tensor], **options: Any) -> torch.optim.Optimizer:
    """The class of that name in fused_opt or torch.optim, on parameters of these values, with all states."""
    params = [torch.nn.Parameter(v.clone()) for v in values]
    optimizer: torch.optim.Optimizer = getattr(module, name)(params, **{**ALL_STATES[name], **options})
    return optimizer


def make_pair(name: str, values: Sequence[torch.Tensor], **options: Any) -> Optimizers:
    """Ours and torch's, with the same options."""
    return make(fused_opt, name, values, **options), make(torch.optim, name, values, **options)


def is_ours(optimizer: torch.optim.Optimizer) -> bool:
    return type(optimizer).__module__.startswith("fused_opt")


def oracle_arithmetic(optimizer: torch.optim.Optimizer) -> contextlib.AbstractContextManager[Any]:
    """torch's for-loop has our bits in fp32 and fp64 if its square roots are rounded correctly, which torch's own are not."""
    real = all(p.dtype in (torch.float32, torch.float64) for p in params_of(optimizer))
    return IeeeSqrt() if real and not is_ours(optimizer) else contextlib.nullcontext()


def set_grads(optimizer: torch.optim.Optimizer, grads: Sequence[torch.Tensor | None]) -> None:
    """Copies of these, which lie parallel to the parameters."""
    for param, grad in zip(params_of(optimizer), grads, strict=True):
        param.grad = None if grad is None else grad.clone()


def step_with(optimizer: torch.optim.Optimizer, grads: Sequence[torch.Tensor | None]) -> None:
    """One step with these gradients."""
    set_grads(optimizer, grads)
    with oracle_arithmetic(optimizer):
        optimizer.step()


def assert_native(optimizer: torch.optim.Optimizer) -> None:
    """Nothing of it is left to torch."""
    rows = fused_opt.explain(optimizer).rows
    assert rows, "nothing to step"
    others = [row for row in rows if not row.path.startswith("cpu-")]
    assert others == [], str(others)


def outcome(action: Callable[[], Any]) -> type[Exception] | None:
    """The type of what it raises, or None."""
    try:
        action()
    except Exception as error:
        return type(error)
    return None


def through_file(saved: dict[str, Any]) -> dict[str, Any]:
    """Saved and loaded."""
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


@contextlib.contextmanager
def nothing_changes(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Parameters, gradients, states and options are afterwards what they were, to the bit and with the same keys."""

    def dense(tensor: torch.Tensor) -> torch.Tensor:
        return (tensor.detach().to_dense() if tensor.is_sparse else tensor.detach()).clone()

    def tensors() -> dict[str, torch.Tensor]:
        named = {}
        for i, param in enumerate(params_of(optimizer)):
            named[f"parameter {i}"] = dense(param)
            if param.grad is not None:
                named[f"gradient {i}"] = dense(param.grad)
            for key, value in optimizer.state.get(param, {}).items():
                named[f"state {key} of parameter {i}"] = dense(value)
        return named

    def options() -> list[dict[str, Any]]:
        return [copy.deepcopy({key: value for key, value in group.items() if key != "params"}) for group in optimizer.param_groups]

    before, options_before, stateful = tensors(), options(), len(optimizer.state)
    yield
    after = tensors()
    assert list(after) == list(before), f"{sorted(set(after) ^ set(before))} appeared or vanished"
    for key, value in before.items():
        assert_same_bits(after[key], value, key)
    assert options() == options_before, "the groups' options"
    assert len(optimizer.state) == stateful, "entries of the state"


def step_alike(pair: Optimizers) -> bool:
    """Step torch's and ours; return whether torch accepts it. If not, ours must raise the same type and change nothing."""
    with oracle_arithmetic(pair[1]):
        refused = outcome(pair[1].step)
    if refused is None:
        pair[0].step()
        return True
    with nothing_changes(pair[0]), pytest.raises(refused) as caught:
        pair[0].step()
    assert caught.type is refused, str(caught.value)
    return False


def assert_resumes(
    make: Callable[[Sequence[torch.Tensor]], torch.optim.Optimizer],
    values: Sequence[torch.Tensor],
    grads: Sequence[Sequence[torch.Tensor | None]],
    how: Callable[[dict[str, Any]], dict[str, Any]],
) -> None:
    """Interrupted in the middle and gone on with, on new parameters from a state_dict, a training ends as if it had not been."""
    half = len(grads) // 2
    whole, first = make(values), make(values)
    run_steps(whole, grads)
    run_steps(first, grads[:half])
    resumed = make(params_of(first))
    resumed.load_state_dict(how(first.state_dict()))
    assert_same_state(resumed, first)
    run_steps(resumed, grads[half:])
    assert_same_state(resumed, whole)


def assert_isas_and_threads_agree(
    make: Callable[[], Any], grads: Sequence[Sequence[torch.Tensor | None]], use_isa: Callable[[str], None], threads: Callable[[int], None]
) -> list[Any]:
    """Make an optimizer for each, step it there, and compare all bits. Returns them."""
    optimizers = []
    for isa, count in itertools.product(SUPPORTED_ISAS, (1, 3)):
        use_isa(isa)
        threads(count)
        optimizers.append(make())
        run_steps(optimizers[-1], grads)
        assert optimizers[-1]._last_ran == (isa, count)
    for other in optimizers[1:]:
        assert_same_state(other, optimizers[0])
    return optimizers
