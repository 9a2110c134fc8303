"""Conversions between stored and computed numbers, seen through steps that do nothing else, and kernels and threads in 16 bits."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

import fused_opt
from fused_opt.bench.rounding import correctly_rounded
from helpers import SUPPORTED_ISAS, assert_same_bits, needs_grad_dtype

SHORT = (torch.bfloat16, torch.float16)


def all_numbers(dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)


def around_every_tie(dtype: torch.dtype, real: torch.dtype) -> torch.Tensor:
    """Every 16-bit number, the midpoint between it and the next one, and the neighbours of both in `real`."""
    numbers = all_numbers(dtype)[:32768].to(real)
    numbers = numbers[numbers.isfinite()].unique()
    overflow = numbers[-1] + (numbers[-1] - numbers[-2])
    numbers = torch.cat([numbers, overflow.reshape(1)])
    midpoints = (numbers[:-1] + numbers[1:]) / 2
    exact = torch.cat([numbers, midpoints])
    infinity = torch.full_like(exact, math.inf)
    special = torch.tensor([math.inf, math.nan], dtype=real)
    values = torch.cat([exact, torch.nextafter(exact, infinity), torch.nextafter(exact, -infinity), special])
    return torch.cat([values, -values])


@needs_grad_dtype
@pytest.mark.parametrize("isa", SUPPORTED_ISAS)
@pytest.mark.parametrize("real", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", SHORT, ids=str)
def test_every_16_bit_number_is_read_as_itself(dtype: torch.dtype, real: torch.dtype, isa: str, use_isa) -> None:
    use_isa(isa)
    numbers = all_numbers(dtype)
    param = torch.nn.Parameter(torch.full((65536,), -0.0, dtype=real))  # -0 + x is x, for both zeros
    param.grad_dtype = dtype
    param.grad = numbers
    optimizer = fused_opt.SGD([param], lr=1.0, maximize=True)
    optimizer.step()
    assert optimizer._last_ran.isa == isa
    assert_same_bits(param, numbers.to(real))


@pytest.mark.parametrize("isa", SUPPORTED_ISAS)
@pytest.mark.parametrize("real", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", SHORT, ids=str)
def test_numbers_are_stored_in_16_bits_with_one_rounding(dtype: torch.dtype, real: torch.dtype, isa: str, use_isa) -> None:
    """The first momentum buffer is the gradient, rounded."""
    use_isa(isa)
    values = around_every_tie(dtype, real)
    param = torch.nn.Parameter(torch.zeros(len(values), dtype=real))
    param.grad = values
    optimizer = fused_opt.SGD([param], lr=1.0, momentum=0.5, state_dtype=dtype)
    optimizer.step()
    assert optimizer._last_ran.isa == isa
    stored = optimizer.state[param]["momentum_buffer"]
    if dtype == torch.float16:
        with np.errstate(over="ignore"):
            expected = torch.from_numpy(values.numpy().astype(np.float16))
    elif real == torch.float32:
        expected = values.to(dtype)
    else:
        finite = values.isfinite()
        expected = torch.where(finite, correctly_rounded(torch.where(finite, values, 0.0), dtype).to(real), values).to(dtype)
        assert_same_bits(expected[finite].signbit().to(torch.int8), values[finite].signbit().to(torch.int8))
    assert_same_bits(stored, expected)


@pytest.mark.parametrize("dtype", SHORT, ids=str)
def test_flushing_subnormal_numbers_does_not_touch_stored_ones(dtype: torch.dtype) -> None:
    smallest = all_numbers(dtype)[1:9].clone()
    if dtype == torch.bfloat16:
        smallest = smallest.view(torch.int16).add_(0x80).view(dtype)  # bfloat16's subnormal numbers are those of float, which are flushed
    param = torch.nn.Parameter(smallest.clone())
    param.grad = torch.zeros_like(param)
    optimizer = fused_opt.SGD([param], lr=1.0)
    assert torch.set_flush_denormal(True)
    try:
        optimizer.step()
    finally:
        torch.set_flush_denormal(False)
    assert_same_bits(param, smallest)


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *SHORT], ids=str)
def test_state_dtype_makes_every_state(dtype: torch.dtype, state_dtype: torch.dtype) -> None:
    every = {"Adam": {"amsgrad": True}, "AdamW": {}, "RMSprop": {"centered": True, "momentum": 0.9}, "SGD": {"momentum": 0.9}}
    for name, options in every.items():
        param = torch.nn.Parameter(torch.ones(5, 7, dtype=dtype))
        param.grad = torch.full_like(param, 0.5)
        optimizer = getattr(fused_opt, name)([param], lr=0.1, state_dtype=state_dtype, **options)
        optimizer.step()
        states = {key: value for key, value in optimizer.state[param].items() if key != "step"}
        assert len(states) == len(optimizer._rule.slots(optimizer.param_groups[0]))
        assert {value.dtype for value in states.values()} == {state_dtype}
        assert fused_opt.explain(optimizer).rows[0].state_bytes == sum(value.nbytes for value in states.values())
        assert bool((param < 1).all())


def test_state_dtype_may_differ_between_groups_and_is_refused_where_it_is_none() -> None:
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(3)]
    groups = [{"params": params[:1]}, {"params": params[1:2], "state_dtype": torch.float64}, {"params": params[2:], "state_dtype": None}]
    optimizer = fused_opt.AdamW(groups, state_dtype=torch.bfloat16)
    for param in params:
        param.grad = torch.ones(3)
    optimizer.step()
    assert [optimizer.state[p]["exp_avg"].dtype for p in params] == [torch.bfloat16, torch.float64, torch.float32]
    for bad in (torch.int8, torch.complex64, "float32", 16):
        with pytest.raises(ValueError, match=r"Invalid state_dtype: .*torch.bfloat16.*None"):
            fused_opt.AdamW(params, state_dtype=bad)
        with pytest.raises(ValueError, match="Invalid state_dtype"):
            optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))], "state_dtype": bad})
        optimizer.param_groups[0]["state_dtype"] = bad
        with pytest.raises(ValueError, match="Invalid state_dtype"):
            optimizer.step()
        optimizer.param_groups[0]["state_dtype"] = torch.bfloat16
    complex_param = torch.nn.Parameter(torch.ones(3, dtype=torch.complex64))
    complex_param.grad = torch.ones_like(complex_param)
    with pytest.raises(ValueError, match=r"bfloat16 has no complex counterpart.*complex64"):
        fused_opt.AdamW([complex_param], state_dtype=torch.bfloat16).step()


MIXED = (
    ("Adam", {}),
    ("Adam", {"weight_decay": 0.1}),
    ("AdamW", {}),
    ("RMSprop", {}),
    ("RMSprop", {"weight_decay": 0.1, "momentum": 0.9}),
    ("RMSprop", {"centered": True}),
    ("SGD", {}),
    ("SGD", {"momentum": 0.9}),
    ("SGD", {"momentum": 0.9, "weight_decay": 0.1, "nesterov": True}),
)
REALS = (torch.float32, torch.float64, *SHORT)


@needs_grad_dtype
@pytest.mark.parametrize("grad_dtype", REALS, ids=str)
@pytest.mark.parametrize("dtype", REALS, ids=str)
@pytest.mark.parametrize(("name", "options"), MIXED, ids=str)
def test_gradients_of_another_dtype(name: str, options: dict[str, float], dtype: torch.dtype, grad_dtype: torch.dtype) -> None:
    """Accepted and refused as by torch's for-loop, with states of the same dtypes; the first step is no farther from the float64 result."""

    def run(module: Any, dtype: torch.dtype, grad_dtype: torch.dtype) -> tuple[str, list[torch.Tensor], dict[str, torch.dtype]]:
        param = torch.nn.Parameter(torch.linspace(0.5, 1.5, 40).to(stored[0]).to(dtype))
        param.grad_dtype = grad_dtype
        optimizer = getattr(module, name)([param], lr=0.01, foreach=False, **options)
        refused, results = "", []
        for step in range(3):
            param.grad = torch.linspace(1 + step, 2, 40).to(stored[1]).to(grad_dtype)
            try:
                optimizer.step()
            except RuntimeError as error:
                refused = str(error)
                break
            results.append(param.detach().double().clone())
        states = {key: value.dtype for key, value in optimizer.state.get(param, {}).items() if key != "step"}
        return refused, results, states

    stored = (dtype, grad_dtype)
    refused, expected, dtypes = run(torch.optim, dtype, grad_dtype)
    our_refusal, actual, our_dtypes = run(fused_opt, dtype, grad_dtype)
    assert bool(our_refusal) == bool(refused)
    if refused:
        assert "state_dtype" in our_refusal
        assert our_dtypes == {}
        return
    assert our_dtypes == dtypes
    _, exact, _ = run(torch.optim, torch.float64, torch.float64)
    # Both have rounding errors of the arithmetic: 4 units of what is computed in are allowed beside torch's error.
    computed_in = torch.float64 if torch.float64 in (dtype, grad_dtype) else torch.float32
    slack = 4 * torch.finfo(computed_in).eps * float(exact[0].abs().max())
    assert len(actual) == len(expected) == 3
    assert float((actual[0] - exact[0]).abs().max()) <= float((expected[0] - exact[0]).abs().max()) + slack
    torch.testing.assert_close(
        actual[2].to(dtype), exact[2].to(dtype), rtol=0.03 if dtype in SHORT or grad_dtype in SHORT else 1e-5, atol=1e-3
    )


@pytest.mark.slow
def test_more_than_2_to_the_31_elements() -> None:
    """A whole 16-bit parameter of 4.3 GB; the gradient is expanded from one value. Every element must have moved, and only once."""
    count = 2**31 + 4099
    param = torch.nn.Parameter(torch.ones(count, dtype=torch.bfloat16))
    param.grad = torch.ones((), dtype=torch.bfloat16).expand(count)
    optimizer = fused_opt.SGD([param], lr=0.5)
    optimizer.step()
    assert optimizer._last_ran is not None
    for start in range(0, count, 2**28):
        assert bool((param.detach()[start : start + 2**28] == 0.5).all())


@pytest.mark.slow
def test_more_than_2_to_the_31_elements_with_gaps() -> None:
    """Offsets beyond 2^31 elements and 2^32 bytes: columns of a matrix whose rows are far apart."""
    storage = torch.ones(2**20, 2**11 + 8, dtype=torch.bfloat16)
    param = torch.nn.Parameter(storage[:, : 2**11 : 2])
    param.grad = torch.ones((), dtype=torch.bfloat16).expand(param.shape)
    optimizer = fused_opt.SGD([param], lr=0.5)
    optimizer.step()
    assert optimizer._last_ran is not None
    assert bool((storage[:, : 2**11 : 2] == 0.5).all())
    assert bool((storage[:, 1 : 2**11 : 2] == 1).all())
    assert bool((storage[:, 2**11 :] == 1).all())
