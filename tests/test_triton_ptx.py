"""Steps by the PTX that Triton makes for GPUs, executed on the CPU: bit for bit as the CPU's kernels, and faults where a GPU would."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import fused_opt
from fused_opt.bench.cases import CASES, Case
from helpers import assert_same_bits, assert_same_state, make_problem, params_of
from ptx import PtxFaultError
from ptx.stepping import OnGpu, gpu
from triton_steps import BF16, BF16_INT8, FORMATS, FP32, FP32_INT8, LARGE, SMALL, Format, UseBackend, compare, of_all_cases, step_by

ARCHITECTURES = (80, 90, 100)
# One for each rule, with what makes it longest.
TYPICAL = (
    Case("AdamW", {"weight_decay": 0.1, "amsgrad": True}),
    Case("RMSprop", {"momentum": 0.9, "weight_decay": 0.1}),
    Case("SGD", {"momentum": 0.9, "nesterov": True, "maximize": True}),
)


@pytest.fixture
def on_gpu() -> Iterator[OnGpu]:
    """Call it with an architecture to have Triton's kernels compiled for it, and run here."""
    with contextlib.ExitStack() as until_the_end:
        yield lambda architecture: until_the_end.enter_context(gpu(architecture))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_case_table(case: Case, use_backend: UseBackend, on_gpu: OnGpu) -> None:
    launcher = on_gpu(90)
    compare(use_backend, case, FP32, LARGE, steps=2)
    assert launcher.statistics.loaded[16] > launcher.statistics.loaded[4], "most of it by accesses of 16 bytes"


@pytest.mark.slow
@pytest.mark.parametrize(("format_", "case"), of_all_cases(FORMATS[1:]), ids=str)
def test_case_table_of_other_formats(format_: Format, case: Case, use_backend: UseBackend, on_gpu: OnGpu) -> None:
    on_gpu(90)
    compare(use_backend, case, format_, LARGE, steps=2)


@pytest.mark.parametrize("case", TYPICAL, ids=str)
@pytest.mark.parametrize("format_", FORMATS[1:], ids=str)
def test_formats(case: Case, format_: Format, use_backend: UseBackend, on_gpu: OnGpu) -> None:
    on_gpu(90)
    compare(use_backend, case, format_, SMALL, steps=2)


@pytest.mark.parametrize("format_", [FP32, BF16, FP32_INT8, BF16_INT8], ids=str)
@pytest.mark.parametrize("architecture", [80, 100])
def test_other_architectures(architecture: int, format_: Format, use_backend: UseBackend, on_gpu: OnGpu) -> None:
    on_gpu(architecture)
    compare(use_backend, TYPICAL[0], format_, SMALL, steps=2)


@pytest.mark.parametrize("block_size", [32, 1024, 4096])
def test_block_sizes(block_size: int, use_backend: UseBackend, on_gpu: OnGpu) -> None:
    on_gpu(90)
    compare(use_backend, Case("AdamW"), FP32_INT8, LARGE, steps=2, block_size=block_size)


@pytest.mark.parametrize("case", TYPICAL, ids=str)
def test_scalars_computed_on_the_device(case: Case, use_backend: UseBackend, on_gpu: OnGpu) -> None:
    """capturable=True, which SGD has not; there it is the learning rate that is on the device."""
    on_gpu(90)
    options = {"capturable": True} if case.optimizer != "SGD" else {}
    optimizer = step_by("triton", use_backend, case, FP32, SMALL, 5, **options)
    assert optimizer._last_launched.scalar_launches == bool(options)
    assert_same_state(optimizer, step_by("cpu", use_backend, case, FP32, SMALL, 5))


def test_learning_rates_on_the_device(use_backend: UseBackend, on_gpu: OnGpu) -> None:
    """Of either dtype; the one in memory counts, not the one of the first step."""
    on_gpu(90)
    results = []
    for backend in ("triton", "cpu"):
        use_backend(backend)
        values, grads = make_problem([(70,), (5,)], 4, torch.float32)
        params = [torch.nn.Parameter(value) for value in values]
        lrs = [torch.tensor(0.1), torch.tensor(0.01, dtype=torch.float64)]
        capturable = {"capturable": True} if backend == "triton" else {}
        optimizer = fused_opt.AdamW([{"params": [param], "lr": lr} for param, lr in zip(params, lrs, strict=True)], **capturable)
        for step_grads in grads:
            for param, grad in zip(params, step_grads, strict=True):
                param.grad = grad
            for lr in lrs:
                lr.mul_(0.7)
            optimizer.step()
        results.append(optimizer)
    assert_same_state(*results)


@pytest.mark.parametrize("format_", [FP32, BF16, FP32_INT8], ids=str)
@pytest.mark.parametrize("case", TYPICAL, ids=str)
def test_gradient_scaler(case: Case, format_: Format, use_backend: UseBackend, on_gpu: OnGpu) -> None:
    """The second of three steps is left out, as GradScaler asks it where a gradient overflowed. Gradients are unscaled in place."""
    on_gpu(90)
    results = []
    for backend in ("triton", "cpu"):
        use_backend(backend)
        values, grads = make_problem([(1300,), (7,)], 3, format_.param, decades=(-2, 1))
        params = [torch.nn.Parameter(value) for value in values]
        optimizer = getattr(fused_opt, case.optimizer)(params, **case.options, **format_.options)
        for step, step_grads in enumerate(grads):
            for param, grad in zip(params, step_grads, strict=True):
                param.grad = grad * 1024
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(1024.0), torch.tensor(float(step == 1))
            optimizer.step()
            if step != 1:
                for param, grad in zip(params, step_grads, strict=True):
                    assert_same_bits(param.grad, grad)
        del optimizer.grad_scale, optimizer.found_inf
        results.append(optimizer)
    assert_same_state(*results)
    if case.optimizer != "SGD":
        assert results[0].state[params_of(results[0])[0]]["step"] == 2


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("what", ["an element too many", "a promise of alignment that does not hold"])
def test_faults(what: str, architecture: int, use_backend: UseBackend, on_gpu: OnGpu) -> None:
    """What is wrong in a table is found, so what the tests above run is right."""
    from fused_opt.kernels import step

    launcher = on_gpu(architecture)
    column, value, message = {
        "an element too many": (step.COUNT.value, 1101, "outside of every tensor"),
        "a promise of alignment that does not hold": (step.ALIGNED.value, 1, "not a multiple of 16"),
    }[what]
    original = launcher.launch

    def tampered(variant: Any, device: torch.device, programs: int, arguments: Any) -> None:
        rows = arguments[0].clone()
        rows[0, column] = value
        original(variant, device, programs, (rows, *arguments[1:]))

    launcher.launch = tampered  # type: ignore[method-assign]
    use_backend("triton")
    storage = torch.zeros(1200)
    param = torch.nn.Parameter(storage[1:1101])
    param.grad = torch.ones(1101)[1:]
    with pytest.raises(PtxFaultError, match=message):
        fused_opt.SGD([param]).step()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"axis": 1, "seed": 2**64 - 1},
        pytest.param({"seed": 5}, marks=pytest.mark.slow),
        pytest.param({"block_size": 32}, marks=pytest.mark.slow),
        pytest.param({"block_size": 4096, "seed": 2**64 - 1}, marks=pytest.mark.slow),
        pytest.param({"block_size": None}, marks=pytest.mark.slow),
    ],
    ids=str,
)
@pytest.mark.parametrize("code", ["linear", "mulaw", "unsigned_mulaw", "dynamic"])
def test_quantization(code: str, options: dict[str, Any], use_backend: UseBackend, on_gpu: OnGpu) -> None:
    """Also where a tensor begins at an odd address, and of 16 bits."""
    launcher = on_gpu(90)
    x = torch.randn(3, 3001, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 3, 3001)
    for tensor in (x, x.bfloat16(), x[:, :1001], x.flatten()[1:]):
        values = tensor
        if code.startswith("unsigned"):
            values = tensor.abs()
            values.view(-1)[0] = -0.0
        if values.dim() == 1 and "axis" in options:
            continue
        made = []
        for backend in ("triton", "cpu"):
            use_backend(backend)
            launches = launcher.launched
            quantized = fused_opt.quantize_blockwise(values, code=code, **options)
            made.append((quantized, quantized.dequantize(), torch.empty_like(values.to(torch.float16))))
            fused_opt.dequantize_blockwise(quantized, out=made[-1][2])
            measured = options.get("block_size", 0) is None and values.numel() > 4096  # in a launch of its own
            assert launcher.launched - launches == (3 + measured if backend == "triton" else 0)
        (quantized, *values_made), (expected, *values_expected) = made
        assert_same_bits(quantized.codes, expected.codes)
        assert_same_bits(quantized.scales, expected.scales)
        for actual, wanted in zip(values_made, values_expected, strict=True):
            assert_same_bits(actual, wanted)
