"""Whether a GPU computes what the CPU does: steps, quantization, more than 2^31 elements; and how far torch's steps there are."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

import fused_opt
from fused_opt.bench.cases import Case
from fused_opt.bench.exact_sample import COMPARED_STEPS, TOLERATED, ExactSample
from fused_opt.bench.gpu_checks import CannotCheckError, Check, Extent, Found, brief
from fused_opt.bench.gpu_device import Gpu
from fused_opt.bench.gpu_steps import Comparison, Format, Place, cpu_path, elements, step, step_all
from fused_opt.bench.parity import DECADES, DEFAULT_DECADES, ZEROS
from fused_opt.bench.problem import Problem, make_problem
from fused_opt.bench.ulp import Difference
from fused_opt.quantization import CODES

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMATS = (
    *map(Format, DTYPES),
    Format(torch.float32, "int8"),
    Format(torch.bfloat16, "int8"),
    Format(torch.float16, "int8"),
    Format(torch.bfloat16, torch.float32),
    Format(torch.float32, torch.bfloat16),
)
MAIN_FORMATS = (Format(torch.float32), Format(torch.bfloat16), Format(torch.float32, "int8"))

# Pairs of these are values and gradients of the last tensor. In 16 bits some are others of them.
SPECIAL = (0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, 1e-45, -1e-45, 1e-38, 6e-8, 3e38, -3e38, 6e4)
SPECIAL_PLACE = Place((len(SPECIAL) ** 2,), offset=1, grad_offset=1)

# A tile has 1024 elements, a chunk, which is a program's share, 8192: no element, one, less than a tile, tiles and a tail, chunks and a
# tail; not aligned; aligned but for the gradient.
PLACES = (
    Place(()),
    Place((1,)),
    Place((7,)),
    Place((0, 3)),
    Place((31, 33)),
    Place((1024,)),
    Place((1154,)),
    Place((1060,), offset=3),
    Place((1030,), grad_offset=1),
    Place((8193,), offset=1, grad_offset=1),
    Place((2 * 8192 + 1024 + 17,)),
    Place((100_003,)),
    SPECIAL_PLACE,
)
MAIN_PLACES = (Place((1027,)), Place((0, 3)), SPECIAL_PLACE)

# Torch's implementations on the device: constructor arguments.
TORCH: dict[str, dict[str, bool]] = {"for-loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}

HUGE = 2**31 + 1027


@dataclass(frozen=True)
class Row:
    """A case in a format, on the GPU and on the CPU.

    Attributes:
        case, format: what stepped.
        paths: who, on the GPU and on the CPU.
        launches: of each step on the GPU.
        damaged: elements beside parameters and gradients that were changed.
        comparison: of the bits.
    """

    case: str
    format: str
    paths: list[list[str]]
    launches: list[int]
    damaged: int
    comparison: Comparison


def cpu_bits(gpu: Gpu, extent: Extent) -> Found:
    """Every case in every format."""
    found = Found()
    places = PLACES if extent.all_places else MAIN_PLACES
    rows = []
    for format_ in FORMATS if extent.all_formats else MAIN_FORMATS:
        for case in filter(format_.allows, extent.cases):
            row = compare(gpu, case, format_, places, extent.steps)
            rows.append(row)
            what = f"{case} in {format_}"
            different, first = row.comparison.different, row.comparison.first
            found.judge(not different, f"{what}: {different} values have not the CPU's bits; {first}", row.comparison.values)
            found.judge(row.paths == [["triton"], [cpu_path()]], f"{what} was stepped by {row.paths}, not by Triton and the CPU's kernels")
            found.judge(set(row.launches) == {1}, f"{what}: {row.launches} launches in the steps, not one in each")
            found.judge(not row.damaged, f"{what}: {row.damaged} elements beside the tensors were changed")
    found.data = {"steps": extent.steps, "tensors": len(places), "elements": elements(places), "rows": [asdict(row) for row in rows]}
    return found


def compare(gpu: Gpu, case: Case, format_: Format, places: Sequence[Place], steps: int) -> Row:
    """Step on both."""
    values, grads = _problem(format_.param, tuple(places), steps)
    with gpu.by_triton():
        ours = step_all(case, format_, places, values, grads, gpu.device)
    with gpu.by_cpu():
        expected = step_all(case, format_, places, values, grads, torch.device("cpu"))
    comparison = Comparison.of(ours.tensors, expected.tensors)
    return Row(str(case), str(format_), [ours.paths, expected.paths], ours.launches, ours.damaged, comparison)


@functools.lru_cache(maxsize=1)  # cases of one dtype follow each other
def _problem(dtype: torch.dtype, places: tuple[Place, ...], steps: int) -> Problem:
    decades = DECADES.get(dtype, DEFAULT_DECADES)
    values, grads = make_problem([place.shape for place in places], steps, dtype, decades=decades, zeros=ZEROS)
    special = torch.tensor(SPECIAL).to(dtype)
    values[-1] = special.repeat_interleave(len(special))
    for number, step_grads in enumerate(grads):
        step_grads[-1] = special.roll(3 * number).repeat(len(special))
    return values, grads


def torchs_steps(gpu: Gpu, extent: Extent) -> Found:
    """Ours and torch's on the device against a run in float64 on the CPU, and against each other."""
    found = Found()
    rows: list[dict[str, Any]] = []
    for dtype in DTYPES:
        values, grads = plain_problem(dtype, 100_003 if extent.all_places else 257)
        for case in extent.cases:
            exact = ExactSample(case, [values], [grads])
            with gpu.by_triton():
                ours = three_steps(fused_opt, case, {}, values, grads, gpu.device)
            error = exact.error([ours])
            what = f"{case} in {dtype}".replace("torch.", "")
            # With gradients that do not change the variance vanishes, and the subtraction that gives it magnifies rounding.
            tolerated = TOLERATED * (4 if case.options.get("centered") else 1)
            found.judge(error <= tolerated, f"{what}: the error is {error:.3g}, more than rounding explains", ours.numel())
            row: dict[str, Any] = {"case": str(case), "dtype": str(dtype), "error": error, "torch": {}}
            exist = inspect.signature(getattr(torch.optim, case.optimizer)).parameters
            for name, options in TORCH.items():
                if not options.keys() <= exist.keys():
                    continue
                try:
                    theirs = three_steps(torch.optim, case, options, values, grads, gpu.device)
                except Exception as failure:  # torch's own affair
                    row["torch"][name] = {"failure": brief(failure)}
                    continue
                error = exact.error([theirs])
                difference = asdict(Difference.of(ours, theirs))  # in ULP
                row["torch"][name] = {"error": error, "wrong": error > tolerated, "difference": difference}
            rows.append(row)
    found.data = {"steps": COMPARED_STEPS, "tolerated": TOLERATED, "rows": rows}
    return found


def plain_problem(dtype: torch.dtype, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As `ExactSample` needs it: gradients of magnitudes 1 to 2, which no dtype loses."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(count, generator=generator)
    grads = (torch.rand(count, generator=generator) + 1).copysign(torch.randn(count, generator=generator))
    return values.to(dtype), grads.to(dtype)


def three_steps(
    module: Any, case: Case, options: dict[str, bool], values: torch.Tensor, grads: torch.Tensor, device: torch.device
) -> torch.Tensor:
    """Where they lead from `values`."""
    param = torch.nn.Parameter(values.to(device, copy=True))
    optimizer = getattr(module, case.optimizer)([param], **case.options, **options)
    param.grad = grads.to(device)
    for _ in range(COMPARED_STEPS):
        optimizer.step()
    return param.detach().cpu()


# Arguments of quantize_blockwise beside the code.
QUANTIZED: tuple[dict[str, Any], ...] = (
    {},
    {"seed": 5},
    {"block_size": 32},
    {"block_size": 4096, "seed": 2**63 + 7},
    {"block_size": None},
    {"axis": 0, "seed": 1},
    {"axis": 1},
)
MAIN_QUANTIZED = QUANTIZED[:2]


def quantization(gpu: Gpu, extent: Extent) -> Found:
    """Codes, scales, and what is decoded from them."""
    found = Found()
    rows: list[dict[str, Any]] = []
    shape = (3, 5003) if extent.all_places else (3, 301)
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(shape, generator=generator) * torch.logspace(-5, 3, shape[1])
    for dtype in (*DTYPES, torch.float64) if extent.all_formats else (torch.float32, torch.bfloat16):
        for code in CODES:
            signed = values.abs() if code.startswith("unsigned") else values
            for options in QUANTIZED if extent.all_formats else MAIN_QUANTIZED:
                for offset in (0, 1):  # elements from an aligned address
                    what = f"{code} of {dtype}, {options}{', not aligned' if offset else ''}".replace("torch.", "")
                    comparison = _quantize_on_both(gpu, signed.to(dtype), code, options, offset)
                    rows.append({"what": what, **asdict(comparison)})
                    right = not comparison.different
                    found.judge(right, f"{what}: {comparison.different} values differ; {comparison.first}", comparison.values)
    found.data = {"rows": rows}
    return found


def _quantize_on_both(gpu: Gpu, values: torch.Tensor, code: str, options: dict[str, Any], offset: int) -> Comparison:
    storage = torch.zeros(offset + values.numel(), dtype=values.dtype, device=gpu.device)
    there = storage[offset:].view_as(values).copy_(values)
    with gpu.by_triton():
        ours = fused_opt.quantize_blockwise(there, code=code, **options)
        decoded = ours.dequantize()
    with gpu.by_cpu():
        expected = fused_opt.quantize_blockwise(values, code=code, **options)
        expected_decoded = expected.dequantize()
    return Comparison.of(
        {"codes": ours.codes.cpu(), "scales": ours.scales.cpu(), "values": decoded.cpu()},
        {"codes": expected.codes, "scales": expected.scales, "values": expected_decoded},
    )


def huge(gpu: Gpu, extent: Extent) -> Found:
    """A step of plain SGD on a parameter in bfloat16: 4.3 GB, and its gradient as much."""
    if not extent.huge:
        raise CannotCheckError("only in a full run")
    needed, free = 3 * 2 * HUGE, gpu.free_bytes()
    if free < needed:
        raise CannotCheckError(f"needs {needed / 1e9:.0f} GB of the GPU's memory, {free / 1e9:.1f} GB are free")
    param = torch.nn.Parameter(torch.zeros(HUGE, dtype=torch.bfloat16, device=gpu.device))
    param.grad = torch.ones_like(param)
    param.grad[-1] = 2.0  # at an index that 32 bits do not hold
    with gpu.by_triton():
        launches = step(fused_opt.SGD([param], lr=1.0))
    found = Found(data={"elements": HUGE, "launches": launches})
    values = param.detach()
    wrong = sum(int((values[at : min(at + 2**28, HUGE - 1)] != -1).sum()) for at in range(0, HUGE - 1, 2**28))
    found.judge(launches == 1, f"{launches} launches, not one")
    found.judge(not wrong, f"{wrong} of {HUGE} elements have not taken the step", HUGE - 1)
    found.judge(param[-1].item() == -2, f"the last element is {param[-1].item()} instead of -2")
    return found


CHECKS = (
    Check("cpu-bits", "every case on the GPU has the bits, and the 8-bit codes, of the CPU, by one launch a step", cpu_bits),
    Check("torch", "ours on the GPU is as exact as rounding allows; distance of torch's own steps there, for information", torchs_steps),
    Check("quantize", "quantize_blockwise and back on the GPU give what they do on the CPU", quantization),
    Check("huge", "more than 2^31 elements in a tensor", huge, dry=False),
)
