"""Stochastic rounding of bfloat16 weights: unbiased, and what is drawn depends on seed, step, parameter and place only."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

import fused_opt
from fused_opt.bench.layouts import permuted
from fused_opt.bench.plain_loop import stochastically_rounded
from fused_opt.bench.stage_cases import RULES
from helpers import CLASSES, assert_same_bits, make_problem, params_of, run_steps
from pairs import assert_isas_and_threads_agree, step_with

# By chance a test fails with this probability, that of a normal deviate beyond `Z` on either side; seeds are fixed, so always or never.
FALSE_ALARM = 1e-9
Z = 6.11


def rounded(values: torch.Tensor, steps: int = 1, **options: Any) -> list[torch.Tensor]:
    """Weights after steps of SGD that lead from bfloat16 1 to the same float32 numbers, close to it, each time."""
    param = torch.nn.Parameter(torch.ones(values.shape, dtype=torch.bfloat16))
    optimizer = fused_opt.SGD([param], lr=1.0, weights="stochastic", **options)
    results = []
    for _ in range(steps):
        with torch.no_grad():
            param.fill_(1.0)
        step_with(optimizer, [(1 - values).bfloat16()])
        results.append(param.detach().clone())
    return results


UNIT = 2.0**-7  # between bfloat16 numbers from 1 to 2


@pytest.mark.parametrize("fraction", [2**-7, 0.25, 0.5, 1 - 2**-7])
def test_stochastic_rounding_is_unbiased(fraction: float) -> None:
    """It goes up as often as the number's distance from the one below says: a z-test of independent draws, those of blocks of 256."""
    up = torch.stack([(result > 1).double() for result in rounded(torch.full((256 * 400,), 1 + fraction * UNIT), steps=30)])
    assert set(up.unique().tolist()) == {0.0, 1.0}
    draws = up.view(30, 400, 256)
    one_each = torch.stack([draws[:, block, (37 * block) % 256] for block in range(400)])  # another place in each block
    deviation = math.sqrt(fraction * (1 - fraction) / one_each.numel())
    assert abs(float(one_each.mean()) - fraction) < Z * deviation
    # All elements: those of a block are drawn together, so the deviation is that of the blocks' means.
    means = draws.mean(-1).flatten()
    assert abs(float(means.mean()) - fraction) < Z * float(means.std()) / math.sqrt(means.numel())


def test_draws_are_independent() -> None:
    """Of the steps, of blocks, of parameters, groups and seeds: pairs of draws agree as often as not."""

    def assert_uncorrelated(a: torch.Tensor, b: torch.Tensor) -> None:
        one_each = [(2.0 * (x.view(-1, 256)[:, 100] > 1) - 1).double() for x in (a, b)]
        product = one_each[0] * one_each[1]
        assert abs(float(product.mean())) < Z / math.sqrt(product.numel())

    halfway = torch.full((256 * 4000,), 1 + 0.5 * UNIT)
    first, second, third = rounded(halfway, steps=3)
    (seeded,) = rounded(halfway, rounding_seed=1)
    assert_uncorrelated(first, second)
    assert_uncorrelated(second, third)
    assert_uncorrelated(first, third)
    assert_uncorrelated(first, seeded)
    assert_uncorrelated(first[: 256 * 2000], first[256 * 2000 :])
    assert_uncorrelated(first[:-256], first[256:])
    params = [torch.nn.Parameter(torch.ones(256 * 4000, dtype=torch.bfloat16)) for _ in range(3)]
    optimizer = fused_opt.SGD([{"params": params[:2]}, {"params": params[2:]}], lr=1.0, weights="stochastic")
    step_with(optimizer, [(1 - halfway).bfloat16()] * 3)
    assert_same_bits(params[0], first)
    for a, b in itertools.combinations(params, 2):
        assert_uncorrelated(a.detach(), b.detach())


def test_small_steps_count_on_average() -> None:
    """1000 of a hundredth of the distance between two weights, of which the nearest would never leave one, are 10 of them. The deviation of
    a weight is sqrt(1000 * 0.01 * 0.99) = 3.1; of the mean of 128 blocks, each drawn together, it is 0.28 at the most."""
    param = torch.nn.Parameter(torch.ones(128 * 256, dtype=torch.bfloat16))
    optimizer = fused_opt.SGD([param], lr=1.0, weights="stochastic")
    grad = torch.full(param.shape, -0.01 * UNIT).bfloat16()
    step_size = -float(grad[0]) / UNIT
    for _ in range(1000):
        param.grad = grad
        optimizer.step()
    moved = (param.detach().double() - 1) / UNIT
    deviation = math.sqrt(1000 * step_size * (1 - step_size) / 128)
    assert abs(float(moved.mean()) - 1000 * step_size) < Z * deviation
    assert float(moved.std()) > 1


@pytest.mark.parametrize("states", [{}, {"state_dtype": "int8", "block_size": 32}], ids=["as-torch", "int8"])
@pytest.mark.parametrize("name", CLASSES)
def test_what_is_drawn_depends_on_seed_step_parameter_and_place_only(name: str, states: dict[str, Any], use_isa, threads) -> None:
    """Not on threads, the tensors beside it, or on who rounds: kernels themselves where fma is an instruction, and on others a stage. The
    draws themselves: see the next test."""
    values, grads = make_problem(((70_001,), (300, 101), (5,)), 3, torch.bfloat16)
    values = [permuted(value) for value in values]
    options = {**RULES[name], **states, "weights": "stochastic", "rounding_seed": 5}

    def make() -> Any:
        return getattr(fused_opt, name)([torch.nn.Parameter(value.clone()) for value in values], **options)

    optimizers = assert_isas_and_threads_agree(make, grads, use_isa, threads)
    fewer = getattr(fused_opt, name)([torch.nn.Parameter(values[0].clone())], **options)
    run_steps(fewer, [step_grads[:1] for step_grads in grads])
    assert_same_bits(params_of(fewer)[0], params_of(optimizers[0])[0])


@pytest.mark.parametrize("beside", [{}, {"average": "ema"}], ids=["in the kernel", "in a stage"])
def test_the_draws_are_those_that_are_documented(beside: dict[str, Any]) -> None:
    numbers = 1 + torch.rand(5000, generator=torch.Generator().manual_seed(0)) * 0.9
    (found,) = rounded(numbers, rounding_seed=77, **beside)
    gradients = (1 - numbers).bfloat16().float()
    assert_same_bits(found.float(), stochastically_rounded(1 - gradients, 77, 1, 0))


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 0.0, -0.0])
def test_numbers_that_bfloat16_has_stay(value: float) -> None:
    param = torch.nn.Parameter(torch.full((600,), value, dtype=torch.bfloat16))
    optimizer = fused_opt.SGD([param], lr=1.0, weights="stochastic")
    for _ in range(5):
        step_with(optimizer, [torch.zeros(600, dtype=torch.bfloat16)])
        assert_same_bits(param + 0.0, torch.full((600,), value, dtype=torch.bfloat16) + 0.0)
