"""Every configuration of torch's own optimizer database in every dtype: the numbers are those of torch's for-loop."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import fused_opt
from exactness import continued, pairs
from forloop import (
    ALL_DTYPES,
    COMPLEX_DTYPES,
    SHORT_DTYPES,
    as_real,
    assert_same_optimizer,
    assert_same_values,
    forloop,
    forloop_step,
    proven_step,
)
from fused_opt.bench.rounding import correctly_rounded, error_of, spacing_at
from fused_opt.bench.ulp import distance
from helpers import CLASSES, params_of
from optim_database import CONFIGURATIONS, INFOS, inputs, options

# Scalar, one element, empty, tails of every instruction set, two dimensions; the last one is stored transposed.
SHAPES: tuple[tuple[int, ...], ...] = ((), (1,), (0, 3), (7,), (130,), (4, 9), (33, 5))

Step = Callable[[torch.optim.Optimizer], Any]


def random_values(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Like a gradient's: from 1e-3 to 1e1, so that no square underflows in float16."""
    wide = torch.complex128 if dtype.is_complex else torch.float64
    exponent = torch.empty(shape, dtype=torch.float64).uniform_(-3, 0.5, generator=generator)
    return (torch.randn(shape, dtype=wide, generator=generator) * 10**exponent).to(dtype)


def make_problem(
    dtype: torch.dtype, steps: int, shapes: tuple[tuple[int, ...], ...]
) -> tuple[list[torch.Tensor], list[list[torch.Tensor]]]:
    """Start values, and for each step a gradient for each of them."""
    generator = torch.Generator().manual_seed(len(shapes))
    wide = torch.complex128 if dtype.is_complex else torch.float64
    values = [torch.randn(shape, dtype=wide, generator=generator).to(dtype) for shape in shapes]
    grads = [[random_values(shape, dtype, generator) for shape in shapes] for _ in range(steps)]
    if len(shapes) > 1:
        values[-1] = values[-1].t().contiguous().t()
    return values, grads


def parameters(values: list[torch.Tensor]) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(value.clone(memory_format=torch.preserve_format)) for value in values]


def set_grads(optimizer: torch.optim.Optimizer, grads: list[torch.Tensor]) -> None:
    for param, grad in zip(params_of(optimizer), grads, strict=True):
        param.grad = grad.clone()


def test_the_database_knows_our_optimizers() -> None:
    assert tuple(INFOS) == CLASSES
    assert all(info.supports_complex and len(inputs(name)) > 4 for name, info in INFOS.items())


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize(("name", "index"), CONFIGURATIONS)
def test_steps_have_torchs_bits(name: str, index: int, dtype: torch.dtype) -> None:
    """Complex parameters as pairs of reals; 16-bit ones in fp32, rounded once."""
    values, grads = make_problem(dtype, 5, SHAPES)
    ours = getattr(fused_opt, name)(parameters(values), **options(name, index, dtype))
    theirs = forloop(name, parameters(values), **options(name, index, dtype))
    for step_grads in grads:
        for optimizer, step in ((ours, lambda o: proven_step(o, native=True)), (theirs, forloop_step)):
            set_grads(optimizer, step_grads)
            step(optimizer)
    assert_same_optimizer(ours, theirs)


@pytest.mark.parametrize(("name", "index"), CONFIGURATIONS)
def test_one_optimizer_may_have_every_dtype(name: str, index: int) -> None:
    problems = [make_problem(dtype, 3, ((5, 7), (3,))) for dtype in ALL_DTYPES]
    values = [value for each, _ in problems for value in each]
    ours = getattr(fused_opt, name)(parameters(values), **options(name, index))
    theirs = forloop(name, parameters(values), **options(name, index))
    for number in range(3):
        for optimizer, step in ((ours, lambda o: proven_step(o, native=True)), (theirs, forloop_step)):
            set_grads(optimizer, [grad for _, grads in problems for grad in grads[number]])
            step(optimizer)
    assert_same_optimizer(ours, theirs)


@pytest.mark.parametrize("dtype", COMPLEX_DTYPES, ids=str)
@pytest.mark.parametrize(("name", "index"), CONFIGURATIONS)
def test_complex_steps_are_close_to_torchs_own(name: str, index: int, dtype: torch.dtype) -> None:
    """torch's for-loop as it is: it rounds a complex product before it is added, and its roots are off by an ulp here and there."""
    values, grads = make_problem(dtype, 5, ((33, 5),))
    ours = getattr(fused_opt, name)(parameters(values), **options(name, index))
    theirs = forloop(name, parameters(values), **options(name, index))
    for step_grads in grads:
        for optimizer, step in ((ours, lambda o: proven_step(o, native=True)), (theirs, lambda o: o.step())):
            set_grads(optimizer, step_grads)
            step(optimizer)
    for key, (actual, expected) in pairs(ours, theirs):
        error = (as_real(actual) - as_real(expected)).abs().max()
        assert error <= 4 * torch.finfo(dtype).eps * as_real(expected).abs().max(), key


# --- 16 bits: how far from the exact result, which is torch's for-loop in float64 ---


def ours_of(name: str, params: Any, **kwargs: Any) -> torch.optim.Optimizer:
    optimizer: torch.optim.Optimizer = getattr(fused_opt, name)(params, **kwargs)
    return optimizer


@pytest.mark.parametrize("dtype", SHORT_DTYPES, ids=str)
@pytest.mark.parametrize(("name", "index"), CONFIGURATIONS)
def test_16_bit_steps_are_never_less_exact_than_torchs(name: str, index: int, dtype: torch.dtype) -> None:
    """Along torch's own trajectory; every step of ours, of torch's and of the exact one starts from the same 16-bit numbers.

    A result is the fp32 one, rounded once. Rounding an fp32 result that is itself off by e is off by at most 2 e more than rounding the
    exact one, which is the least that 16 bits allow, and so by no more than torch's error + 2 e, for each element. Where e is less than a
    quarter of the spacing of 16-bit numbers (for all but a few elements, in which nearly equal numbers were subtracted), the result is the
    correctly rounded one or its neighbour.
    """
    kwargs = options(name, index, dtype)
    values, grads = make_problem(dtype, 6, ((4099,),))
    theirs = forloop(name, parameters(values), **kwargs)
    for step_grads in grads:
        set_grads(theirs, step_grads)
        ours = continued(name, kwargs, theirs, ours_of, dtype)
        single, exact = (continued(name, kwargs, theirs, forloop, wide) for wide in (torch.float32, torch.float64))
        proven_step(ours, native=True)
        for optimizer in (single, exact):
            forloop_step(optimizer)
        theirs.step()
        for (key, (actual, expected)), (_, (intermediate, torchs)) in zip(pairs(ours, exact), pairs(single, theirs), strict=True):
            assert actual.dtype == torchs.dtype == dtype
            rounded = correctly_rounded(expected, dtype)
            slack = 2 * error_of(intermediate, expected)
            error, torchs_error = error_of(actual, expected), error_of(torchs, expected)
            assert bool((error <= error_of(rounded, expected) + slack).all()), key
            assert bool((error <= torchs_error + slack).all()), key
            assert error.mean() <= torchs_error.mean(), key
            certain = slack <= spacing_at(expected, dtype) / 2
            assert certain.double().mean() > 0.99, key
            assert int(distance(actual, rounded)[certain].max()) <= 1, key


@pytest.mark.parametrize("dtype", SHORT_DTYPES, ids=str)
def test_16_bit_trajectories_stay_as_close_to_float64_as_torchs(dtype: torch.dtype) -> None:
    """Free runs of 30 steps. States: the mean error is never larger than torch's, for each configuration. Parameters: that error is
    mostly the rounding of the parameter itself, which is torch's, too; a single configuration may come out 1 percent on either side, so
    the mean over the database counts."""
    logs = []
    for name in CLASSES:
        for index in range(len(inputs(name))):
            kwargs = options(name, index, dtype)
            values, grads = make_problem(dtype, 30, ((4099,),))
            runs: list[tuple[torch.optim.Optimizer, Step]] = [
                (ours_of(name, parameters(values), **kwargs), proven_step),
                (forloop(name, parameters(values), **kwargs), lambda o: o.step()),
                (forloop(name, parameters([value.double() for value in values]), **kwargs), forloop_step),
            ]
            for step_grads in grads:
                for optimizer, step in runs:
                    set_grads(optimizer, [grad.to(params_of(optimizer)[0].dtype) for grad in step_grads])
                    step(optimizer)
            ours, theirs, exact = (optimizer for optimizer, _ in runs)
            for (key, (actual, expected)), (_, (torchs, _)) in zip(pairs(ours, exact), pairs(theirs, exact), strict=True):
                error, torchs_error = error_of(actual, expected), error_of(torchs, expected)
                assert int(error.isinf().sum()) <= int(torchs_error.isinf().sum()), (name, kwargs, key)
                finite = error.isfinite() & torchs_error.isfinite()
                ratio = float(error[finite].mean() / torchs_error[finite].mean())
                if key == "param":
                    logs.append(math.log(ratio))
                else:
                    assert ratio <= 1, (name, kwargs, key)
    assert len(logs) == len(CONFIGURATIONS)
    assert sum(logs) < 0


def test_rounding_to_16_bits_is_correct_where_torchs_rounds_twice() -> None:
    """The oracle itself. 1 + 2^-8 + 2^-30 lies above the middle of two bf16 numbers, and float32 rounds it to the middle."""
    exact = torch.tensor([1 + 2.0**-8 + 2.0**-30, 1 + 2.0**-8, 3.0e38, 4.0e38, -1e-45, 65519.0, 0.0], dtype=torch.float64)
    up = torch.tensor(1 + 2.0**-7, dtype=torch.bfloat16)
    assert_same_values(correctly_rounded(exact[0], torch.bfloat16), up)
    assert not torch.equal(exact[0].to(torch.bfloat16), up)
    for dtype in SHORT_DTYPES:
        assert_same_values(correctly_rounded(exact[1:], dtype), exact[1:].to(dtype))
