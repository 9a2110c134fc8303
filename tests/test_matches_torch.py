"""The promise: fp32 and fp64 steps equal torch's, bit for bit, for every case of the table, on every instruction set."""

from __future__ import annotations

import pytest
import torch

from fused_opt.bench.cases import CASES, DTYPES, Case
from fused_opt.bench.reference import reference_steps
from helpers import SUPPORTED_ISAS, assert_same_bits, make_problem, ours, run_steps

# Tails of every length up to a vector, several tensors that share a thread, and one that is split between threads.
SHAPES = ((), (1,), (3, 5), (16,), (31,), (64,), (127,), (10, 100), (20011,))


@pytest.mark.parametrize("isa", SUPPORTED_ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_twenty_steps_have_torchs_bits(case: Case, dtype: torch.dtype, isa: str, use_isa) -> None:
    use_isa(isa)
    values, grads = make_problem(SHAPES, steps=20, dtype=dtype)
    expected = reference_steps(case, values, grads)
    params, optimizer = ours(case, values)
    run_steps(optimizer, grads)
    assert optimizer._last_ran.isa == isa
    for i, (param, tensors) in enumerate(zip(params, expected, strict=True)):
        actual = {"param": param, **optimizer.state[param]}
        assert list(actual) == list(tensors)
        for name, value in tensors.items():
            assert_same_bits(actual[name], value, f"{case} {dtype} tensor {i} {name}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [case for case in CASES if case.optimizer != "RMSprop"], ids=str)
def test_torchs_fused_step_has_the_same_bits_as_it_comes(case: Case, dtype: torch.dtype) -> None:
    """Without the oracle's padding: sizes that leave torch's kernels no tail, its own default number of threads."""
    values, grads = make_problem([(64, 64), (128,)], steps=5, dtype=dtype)
    theirs = [torch.nn.Parameter(value.clone()) for value in values]
    torch_optimizer = getattr(torch.optim, case.optimizer)(theirs, fused=True, **case.options)
    params, optimizer = ours(case, values)
    run_steps(torch_optimizer, grads)
    run_steps(optimizer, grads)
    for param, their in zip(params, theirs, strict=True):
        assert_same_bits(param, their, str(case))


@pytest.mark.parametrize("case", [case for case in CASES if case.optimizer == "RMSprop"], ids=str)
def test_rmsprop_is_within_rounding_of_torchs_own_for_loop(case: Case) -> None:
    """The oracle replaces torch's square root; this one does not. One ulp in a root moves a parameter by at most a few."""
    values, grads = make_problem([(1000,)], steps=1, dtype=torch.float32)
    their = torch.nn.Parameter(values[0].clone())
    torch_optimizer = torch.optim.RMSprop([their], foreach=False, **case.options)
    params, optimizer = ours(case, values)
    run_steps(torch_optimizer, grads)
    run_steps(optimizer, grads)
    torch.testing.assert_close(params[0], their, rtol=1e-6, atol=1e-7)


SPECIAL = (0.0, -0.0, 1.0, -1.0, float("inf"), float("-inf"), float("nan"), 1e-45, -1e-45, 1e-38, 3e38, -3e38, 5e-324, 1e308)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_special_values_have_torchs_bits(case: Case, dtype: torch.dtype) -> None:
    """Every pair of parameter and gradient from zeros, infinities, NaN, subnormals and the largest numbers."""
    special = torch.tensor(SPECIAL, dtype=dtype)
    n = len(special)
    values = [special.repeat_interleave(n)]
    grads = [[special.repeat(n)], [special.flip(0).repeat(n)], [special.roll(3).repeat(n)]]
    expected = reference_steps(case, values, grads)[0]
    params, optimizer = ours(case, values)
    run_steps(optimizer, grads)
    for name, value in expected.items():
        assert_same_bits({"param": params[0], **optimizer.state[params[0]]}[name], value, f"{case} {name}")
