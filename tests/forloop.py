"""torch's for-loop as the oracle for every dtype and layout, and steps of ours that prove which code ran."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

import fused_opt
from fused_opt.bench.reference import IeeeSqrt
from fused_opt.bench.rounding import correctly_rounded
from helpers import assert_same_bits

REAL_DTYPES = (torch.float32, torch.float64)
SHORT_DTYPES = (torch.bfloat16, torch.float16)
COMPLEX_DTYPES = (torch.complex64, torch.complex128)
ALL_DTYPES = (*REAL_DTYPES, *SHORT_DTYPES, *COMPLEX_DTYPES)


def as_real(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory; complex numbers as pairs of reals."""
    return torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()


def forloop(name: str, params: Any, **options: Any) -> torch.optim.Optimizer:
    """torch's optimizer, made to run its for-loop."""
    return getattr(torch.optim, name)(params, **{**options, "foreach": False})


def forloop_step(optimizer: torch.optim.Optimizer) -> None:
    """Step torch's `optimizer` as ours promises to.

    With correctly rounded square roots. fp32 and fp64: torch's for-loop on the very tensors. Others: torch's for-loop on a copy of each
    parameter, of complex ones as pairs of reals, in fp32, or fp64 if a tensor of the parameter has that; the results are rounded once, new
    states to the group's `state_dtype` if it has one. A Tensor lr is read as a double, as torch's fused step does; Adam's for-loop would
    divide it in float32.
    """
    with IeeeSqrt(), _numbers_as_lr(optimizer):  # type: ignore[no-untyped-call]
        if all(_is_plain(optimizer, group, param) for group in optimizer.param_groups for param in group["params"]):
            optimizer.step()
            return
        optimizer._opt_called = True  # what schedulers ask whether a step came first
        for group in optimizer.param_groups:
            options = {name: value for name, value in group.items() if name != "params"}
            state_dtype = options.pop("state_dtype", None)
            for param in group["params"]:
                if param.grad is not None:
                    _step_copy(optimizer, param, options, state_dtype or param.dtype)


@contextlib.contextmanager
def _numbers_as_lr(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    before = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = float(group["lr"])
    yield
    for group, lr in zip(optimizer.param_groups, before, strict=True):
        group["lr"] = lr


def _is_plain(optimizer: torch.optim.Optimizer, group: dict[str, Any], param: torch.Tensor) -> bool:
    if group.get("state_dtype") is not None:
        return False
    states = [value for key, value in optimizer.state.get(param, {}).items() if key != "step"]
    return param.dtype in REAL_DTYPES and all(value.dtype == param.dtype for value in states)


@torch.no_grad()
def _step_copy(optimizer: torch.optim.Optimizer, param: torch.Tensor, options: dict[str, Any], state_dtype: torch.dtype) -> None:
    state = dict(optimizer.state.get(param, {}))
    tensors = {key: as_real(value) for key, value in state.items() if key != "step"}
    dtypes = {as_real(param).dtype, as_real(param.grad).dtype, *(value.dtype for value in tensors.values())}
    if not tensors and not param.is_complex():
        dtypes.add(state_dtype)
    wide = torch.float64 if torch.float64 in dtypes else torch.float32
    copy = torch.nn.Parameter(as_real(param).to(wide, copy=True))
    copy.grad = as_real(param.grad).to(wide)
    alone = type(optimizer)([copy])
    alone.param_groups[0].update(options)
    if state:
        alone.state[copy] = {key: tensors[key].to(wide, copy=True) if key in tensors else value for key, value in state.items()}
    alone.step()
    _store(copy, param)
    for key, value in alone.state.get(copy, {}).items():
        if key == "step":
            state[key] = value
        else:
            state.setdefault(key, torch.zeros_like(param, dtype=state_dtype, memory_format=torch.preserve_format))
            _store(value, state[key])
    if state:
        optimizer.state[param] = state


def _store(value: torch.Tensor, target: torch.Tensor) -> None:
    rounds_twice = value.dtype == torch.float64 and target.dtype in SHORT_DTYPES  # torch's conversion does, through float32
    as_real(target).copy_(correctly_rounded(value, target.dtype) if rounds_twice else value)


def proven_step(optimizer: torch.optim.Optimizer, native: bool = False) -> None:
    """Step ours, and show that the native code ran if, and not unless, explain() says that it serves a parameter.

    Args:
        native: no parameter may be left to torch.
    """
    rows = fused_opt.explain(optimizer).rows
    paths = {row.path for row in rows}
    if native:
        assert len(paths) == 1, rows
        assert "torch" not in paths, rows
    served = [optimizer.param_groups[row.group]["params"][i] for row in rows if row.path != "torch" for i in row.indices]
    optimizer._last_ran = None
    optimizer.step()
    if any(p.grad is not None and p.numel() for p in served):
        assert optimizer._last_ran is not None, rows
    if not served:
        assert optimizer._last_ran is None, rows


def assert_same_values(actual: torch.Tensor, expected: torch.Tensor, what: str = "") -> None:
    """Bit for bit, of any dtype."""
    assert actual.dtype == expected.dtype, what
    assert_same_bits(as_real(actual), as_real(expected), what)


def assert_same_optimizer(actual: torch.optim.Optimizer, expected: torch.optim.Optimizer) -> None:
    """Parameters and states bit for bit; the states' keys, their order, dtypes, shapes and devices; every option of the groups."""
    for group, expected_group in zip(actual.param_groups, expected.param_groups, strict=True):
        for i, (p, q) in enumerate(zip(group["params"], expected_group["params"], strict=True)):
            assert_same_values(p, q, f"parameter {i}, {q.dtype}, {tuple(q.shape)}")
            state, expected_state = actual.state.get(p, {}), expected.state.get(q, {})
            assert list(state) == list(expected_state)
            for key, value in expected_state.items():
                assert_same_values(state[key], value, f"parameter {i}, {q.dtype}, {tuple(q.shape)}, {key}")
                assert state[key].device == value.device
