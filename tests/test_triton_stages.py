"""Stages on Triton: the same bits as those of the CPU's kernels, by the PTX for GPUs, executed on the CPU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

import fused_opt
from fused_opt import plan
from fused_opt.bench.cases import Case
from fused_opt.device_norm import DeviceNorm
from helpers import assert_same_bits, assert_same_state, params_of
from test_triton_ptx import Launcher, OnGpu, on_gpu  # noqa: F401
from triton_steps import BF16_INT8, LARGE, SMALL, STAGES_TOGETHER, Format, Placed, UseBackend, compare, stages_of_all_rules, step_by


@pytest.mark.parametrize(("format_", "case"), STAGES_TOGETHER, ids=str)
def test_together(format_: Format, case: Case, use_backend: UseBackend, on_gpu: OnGpu) -> None:  # noqa: F811
    launcher = on_gpu(90)
    compare(use_backend, case, format_, LARGE, steps=3)
    assert launcher.statistics.loaded[16] + launcher.statistics.loaded[8] > 0, "most of it by wide accesses"


@pytest.mark.slow
@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize(("format_", "case"), stages_of_all_rules(), ids=str)
def test_alone(format_: Format, case: Case, special: bool, use_backend: UseBackend, on_gpu: OnGpu) -> None:  # noqa: F811
    on_gpu(90)
    compare(use_backend, case, format_, LARGE, steps=4, special=special)


@pytest.mark.slow
@pytest.mark.parametrize("block_size", [32, 128, 1024, 4096])
def test_draws_of_blocks(block_size: int, use_backend: UseBackend, on_gpu: OnGpu) -> None:  # noqa: F811
    """Blocks of codes are shorter or longer than those that share a draw of random numbers."""
    on_gpu(90)
    compare(use_backend, Case("AdamW", {"weights": "stochastic"}), BF16_INT8, LARGE, steps=2, block_size=block_size)


@pytest.mark.parametrize(("format_", "case"), [STAGES_TOGETHER[0], STAGES_TOGETHER[4]], ids=str)
def test_scalars_computed_on_the_device(format_: Format, case: Case, use_backend: UseBackend, on_gpu: OnGpu) -> None:  # noqa: F811
    on_gpu(90)
    optimizer = step_by("triton", use_backend, case, format_, SMALL, 4, capturable=True)
    assert optimizer._last_launched.scalar_launches == 1
    assert_same_state(optimizer, step_by("cpu", use_backend, case, format_, SMALL, 4))


def gradients(dtype: torch.dtype, layout: Sequence[Placed]) -> torch.optim.Optimizer:
    """Of whole numbers, whose squares and sums are exact whatever their order; but for one pair, which is not in any dtype."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.zeros(placed.count, dtype=dtype)) for placed in layout]
    for param, placed in zip(params, layout, strict=True):
        param.grad = placed.place(torch.randint(-100, 100, (placed.count,), generator=generator).to(dtype))
    return fused_opt.AdamW(params)


def measure(optimizer: torch.optim.Optimizer, launcher: Launcher, largest: bool) -> torch.Tensor:
    launcher.optimizer = optimizer
    batches = [group.batch for group in plan.plan(optimizer).groups if group.batch is not None]
    (total,) = DeviceNorm([]).measure(batches, largest)
    assert total.dtype == torch.float64
    assert total.shape == ()
    return total


@pytest.mark.parametrize("largest", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_norm(dtype: torch.dtype, largest: bool, use_backend: UseBackend, on_gpu: OnGpu) -> None:  # noqa: F811
    """Before there are any states, too. Sums are those of float64, where squares of the largest numbers do not overflow."""
    launcher = on_gpu(90)
    use_backend("triton")
    optimizer = gradients(dtype, LARGE)
    grads = torch.cat([param.grad.double() for param in params_of(optimizer)])
    expected = grads.abs().amax() if largest else grads.square().sum()
    assert_same_bits(measure(optimizer, launcher, largest), expected)
    params_of(optimizer)[0].grad[5] = torch.finfo(dtype).max
    assert measure(optimizer, launcher, largest) >= torch.finfo(dtype).max ** (1 if largest else 2)
    for value in (torch.inf, torch.nan):
        params_of(optimizer)[3].grad[-1] = value
        assert_same_bits(measure(optimizer, launcher, largest), torch.tensor(value, dtype=torch.float64))


@pytest.mark.parametrize("scale", [1.0, 1024.0])
@pytest.mark.parametrize("nonfinite", ["as_torch", "skip"])
@pytest.mark.parametrize("options", [{"maximize": True}, {"max_grad_value": 0.02, "grad_norm_type": math.inf}], ids=str)
def test_clipping_by_a_norm_on_the_device(
    options: dict[str, Any],
    nonfinite: str,
    scale: float,
    use_backend: UseBackend,
    on_gpu: OnGpu,  # noqa: F811
) -> None:
    """One norm is below the limit; one is infinite: then there is no step, or one with gradients of 0 and NaN, as torch makes them."""
    launcher = on_gpu(90)
    generator = torch.Generator().manual_seed(0)
    grads = [[torch.randint(-100, 100, (count,), generator=generator).float() for count in (1300, 7)] for _ in range(4)]
    grads[1] = [grad / 1024 for grad in grads[1]]
    grads[2][1][3] = torch.inf
    results = []
    for backend, own in (("triton", {"capturable": True}), ("cpu", {})):
        use_backend(backend)
        params = [torch.nn.Parameter(torch.ones_like(grad)) for grad in grads[0]]
        optimizer: Any = fused_opt.AdamW(params, max_grad_norm=0.5, nonfinite_grad_norm=nonfinite, **options, **own)
        norms = []
        for step_grads in grads:
            for param, grad in zip(params, step_grads, strict=True):
                param.grad = grad * scale
            if scale != 1:
                optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.zeros(())
            optimizer.step()
            norms.append(optimizer.last_grad_norm.clone())
        states = [tensor for param in params for tensor in (param, *optimizer.state[param].values())]
        results.append([*norms, *states])
    for actual, expected in zip(*results, strict=True):
        assert_same_bits(actual, expected)
    assert int(optimizer.state[params[0]]["step"]) == (3 if nonfinite == "skip" else 4)
    assert launcher.launched == 4 * 4, "norms of chunks, of all; scalars, step"
