"""Stages on Triton: the same bits as those of the CPU's kernels, by the PTX for GPUs, executed on the CPU."""

from __future__ import annotations

import contextlib
import functools
import math
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

import fused_opt
from fused_opt import plan, stages
from fused_opt.bench import kernel_costs
from fused_opt.bench.cases import Case
from fused_opt.bench.kernel_arithmetic import Operations
from fused_opt.device_norm import DeviceNorm
from helpers import assert_same_bits, assert_same_state, make_problem, params_of
from ptx.stepping import OnGpu, StepLauncher, gpu
from triton_steps import BF16_INT8, LARGE, MEDIUM, STAGES_TOGETHER, Format, Placed, UseBackend, compare, stages_of_all_rules, step_by


def slow(cases: Sequence[tuple[Any, ...]]) -> list[Any]:
    return [pytest.param(*case, marks=pytest.mark.slow) for case in cases]


@pytest.fixture
def on_gpu() -> Iterator[OnGpu]:
    """Call it with an architecture to have Triton's kernels compiled for it, and run here."""
    with contextlib.ExitStack() as until_the_end:
        yield lambda architecture: until_the_end.enter_context(gpu(architecture))


@pytest.mark.parametrize(("format_", "case"), [*STAGES_TOGETHER[:2], *slow(STAGES_TOGETHER[2:])], ids=str)
def test_together(format_: Format, case: Case, use_backend: UseBackend, on_gpu: OnGpu) -> None:
    on_gpu(90)
    compare(use_backend, case, format_, MEDIUM, steps=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "format_", "case"),
    [(architecture, *each) for architecture in (80, 100) for each in STAGES_TOGETHER if architecture == 80 or each[0].states != "int8"],
    ids=str,
)
def test_together_elsewhere(architecture: int, format_: Format, case: Case, use_backend: UseBackend, on_gpu: OnGpu) -> None:
    """For sm_100, with codes, LLVM reads registers that it never writes, and drops what it read: the machine refuses that."""
    on_gpu(architecture)
    compare(use_backend, case, format_, LARGE, steps=3)


@pytest.mark.slow
@pytest.mark.parametrize(("format_", "case"), stages_of_all_rules(), ids=str)
def test_alone(format_: Format, case: Case, use_backend: UseBackend, on_gpu: OnGpu) -> None:
    """With infinities and NaN, but in blocks of codes, which would be NaN as a whole."""
    on_gpu(90)
    compare(use_backend, case, format_, MEDIUM, steps=3, special=format_.states != "int8")


@pytest.mark.slow
@pytest.mark.parametrize("block_size", [32, 128, 1024, 4096])
def test_draws_of_blocks(block_size: int, use_backend: UseBackend, on_gpu: OnGpu) -> None:
    """Blocks of codes are shorter or longer than those that share a draw of random numbers."""
    on_gpu(90)
    compare(use_backend, Case("AdamW", {"weights": "stochastic"}), BF16_INT8, LARGE, steps=2, block_size=block_size)


@pytest.mark.parametrize(("format_", "case"), [STAGES_TOGETHER[0], *slow(STAGES_TOGETHER[3:])], ids=str)
def test_scalars_computed_on_the_device(format_: Format, case: Case, use_backend: UseBackend, on_gpu: OnGpu) -> None:
    on_gpu(90)
    optimizer = step_by("triton", use_backend, case, format_, MEDIUM, 2, capturable=True)
    assert optimizer._last_launched.scalar_launches == 1
    assert_same_state(optimizer, step_by("cpu", use_backend, case, format_, MEDIUM, 2))


def test_parameters_with_and_without_masks(use_backend: UseBackend, on_gpu: OnGpu) -> None:
    """Two launches; of masks and averages, too, addresses count: one of each begins where no wide access can."""
    launcher = on_gpu(90)
    results = []
    for backend in ("triton", "cpu"):
        use_backend(backend)
        values, (grads,) = make_problem([(1100,), (1100,), (70,)], 1, torch.float32)
        params = [torch.nn.Parameter(value) for value in values]
        optimizer: Any = fused_opt.SGD(params, lr=0.1, maximize=True, average="ema", average_decay=0.5)
        optimizer.set_masks({param: param > 0 for param in params[:2]})
        for _ in range(2):
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad
            optimizer.step()
            odd = Placed(1100, offset=3)
            optimizer.state[params[0]]["mask"] = odd.place(optimizer.state[params[0]]["mask"])
            optimizer.state[params[1]]["average"] = odd.place(optimizer.state[params[1]]["average"])
        results.append(optimizer)
    assert_same_state(*results)
    assert launcher.launched == 2 * 2


def gradients(dtype: torch.dtype, layout: Sequence[Placed]) -> torch.optim.Optimizer:
    """Of whole numbers, whose squares and sums are exact whatever their order."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.zeros(placed.count, dtype=dtype)) for placed in layout]
    for param, placed in zip(params, layout, strict=True):
        param.grad = placed.place(torch.randint(-100, 100, (placed.count,), generator=generator).to(dtype))
    return fused_opt.AdamW(params)


def measure(optimizer: torch.optim.Optimizer, launcher: StepLauncher, largest: bool) -> torch.Tensor:
    launcher.optimizer = optimizer
    batches = [group.batch for group in plan.plan(optimizer).groups if group.batch is not None]
    (total,) = DeviceNorm([]).measure(batches, largest)
    assert total.dtype == torch.float64
    assert total.shape == ()
    return total


@pytest.mark.parametrize(
    ("dtype", "largest"),
    [
        (torch.float32, False),
        (torch.float32, True),
        (torch.bfloat16, False),
        *slow([(torch.bfloat16, True), (torch.float16, False), (torch.float16, True)]),
    ],
    ids=str,
)
def test_norm(dtype: torch.dtype, largest: bool, use_backend: UseBackend, on_gpu: OnGpu) -> None:
    """Before there are any states, too. Sums are those of float64, where squares of the largest numbers do not overflow."""
    launcher = on_gpu(90)
    use_backend("triton")
    optimizer = gradients(dtype, LARGE)
    grads = torch.cat([param.grad.double() for param in params_of(optimizer)])
    expected = grads.abs().amax() if largest else grads.square().sum()
    assert_same_bits(measure(optimizer, launcher, largest), expected)
    of_chunks, _ = launcher.all_statistics
    assert of_chunks.loaded[4 * dtype.itemsize] >= 2 * 8192 * dtype.itemsize, "four elements by an access, where there are whole tiles"
    params_of(optimizer)[0].grad[5] = torch.finfo(dtype).max
    assert measure(optimizer, launcher, largest) >= torch.finfo(dtype).max ** (1 if largest else 2)
    for value in (torch.inf, torch.nan):
        params_of(optimizer)[3].grad[-1] = value
        assert_same_bits(measure(optimizer, launcher, largest), torch.tensor(value, dtype=torch.float64))


IN_RULE: dict[str, Any] = {"maximize": True}  # which has the factor of gradients
IN_STAGE = {"max_grad_value": 0.02, "grad_norm_type": math.inf}
MEASURED = {"max_grad_norm": math.inf}


@pytest.mark.parametrize(
    ("options", "nonfinite", "scale"),
    [
        (IN_RULE, "as_torch", 1024.0),
        (IN_STAGE, "skip", 1.0),
        (MEASURED, "as_torch", 1.0),
        *slow([(IN_RULE, "skip", 1.0), (IN_RULE, "skip", 1024.0), (IN_STAGE, "as_torch", 1.0), (IN_STAGE, "as_torch", 1024.0)]),
    ],
    ids=str,
)
def test_clipping_by_a_norm_on_the_device(
    options: dict[str, Any],
    nonfinite: str,
    scale: float,
    use_backend: UseBackend,
    on_gpu: OnGpu,
) -> None:
    """One norm is below the limit; one is infinite: then there is no step, or one with gradients of 0 and NaN, as torch makes them, or
    with an infinite limit, one with gradients as they are."""
    launcher = on_gpu(90)
    generator = torch.Generator().manual_seed(0)
    grads = [[torch.randint(-100, 100, (count,), generator=generator).float() for count in (1300, 7)] for _ in range(4)]
    grads[1] = [grad / 2**14 for grad in grads[1]]
    grads[2][1][3] = torch.inf
    results = []
    for backend, own in (("triton", {"capturable": True}), ("cpu", {})):
        use_backend(backend)
        params = [torch.nn.Parameter(torch.ones_like(grad)) for grad in grads[0]]
        optimizer: Any = fused_opt.AdamW(params, **{"max_grad_norm": 0.5, **options, **own}, nonfinite_grad_norm=nonfinite)
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


# Of the rules of typical variants with stages: fused multiply-adds, divisions, roots; and their states.
WRITTEN = {"adam": (2, 2, 1, 2), "rmsprop": (2, 1, 1, 2), "sgd": (2, 0, 0, 1)}
STAGED = {name: variant for name, variant in kernel_costs.typical_variants().items() if variant.constants.get("STAGES")}


@pytest.mark.slow
@pytest.mark.parametrize("name", STAGED)
def test_operations_of_stages(name: str) -> None:
    """The pull to the anchor and the average are a fused multiply-add each; those of codes: see tests/test_kernel_costs.py."""
    constants = STAGED[name].constants
    fma, div, sqrt, states = next(written for rule, written in WRITTEN.items() if f"around {rule}," in name)
    coded = states * constants["CODED"]
    of_stages = sum(bool(constants["STAGES"] & stage) for stage in (stages.ANCHOR, stages.AVERAGE))
    finding = kernel_costs.measure((name, "sm_90"))
    assert finding.written == Operations(2 * (fma + 5 * coded + of_stages), 2 * (div + coded), 2 * sqrt)
    assert finding.broken == []


def test_typical_stages_are_all_stages() -> None:
    assert functools.reduce(operator.or_, (variant.constants["STAGES"] for variant in STAGED.values())) == 2 * stages.MASTER - 1
