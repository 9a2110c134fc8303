"""Quantization by Triton kernels: what `fused_opt._cpu` does for tensors on the CPU, for those on a GPU."""

from __future__ import annotations

import math
from typing import Any

import torch

from fused_opt.device_tables import current_device


def measure(values: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, block_size: int) -> None:
    """Set `scales` to the largest magnitude of each block; NaN where a value is not finite."""
    from fused_opt.kernels import variants

    values, codes = _in_memory_order(values, codes)
    shape = variants.Pieces.of(block_size, aligned=False)
    scales.zero_()
    counts = values.numel(), block_size, shape.parts
    _launch(variants.measure_variant(_name(values), shape), shape, values, (values, scales.view(torch.uint32), *counts), block_size)
    scales.masked_fill_(~scales.isfinite(), torch.nan)


def quantize(
    values: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    block_size: int,
    code: str | torch.Tensor,
    measured: bool,
    seed: int | torch.Tensor | None,
) -> None:
    """Set codes and, unless they are measured, scales. `code`: a name or a table; `seed`: as `encode` in fused_opt/quantization.py."""
    from fused_opt.kernels import variants

    values, codes = _in_memory_order(values, codes)
    shape = variants.Pieces.of(block_size, _aligned(values, codes))
    if isinstance(seed, int):
        seeds: torch.Tensor | None = torch.tensor([seed - 2**64 if seed >= 2**63 else seed], dtype=torch.int64, device=values.device)
    else:
        seeds = seed
    stride = None if seeds is None else int(isinstance(seed, torch.Tensor))
    variant = variants.quantize_variant(_name(values), _code_name(code), shape, measured, stride)
    counts = values.numel(), block_size, shape.parts
    _launch(variant, shape, values, (values, codes, scales, seeds, _table(code, values.device), *counts), block_size)


def dequantize(values: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, block_size: int, code: str | torch.Tensor) -> None:
    """Set values. Through a temporary tensor if they are not densely packed in the order of the codes."""
    from fused_opt.kernels import variants

    permuted, codes = _in_memory_order(values, codes, copy=False)
    made = permuted if permuted.is_contiguous() else torch.empty_like(permuted, memory_format=torch.contiguous_format)
    shape = variants.Pieces.of(block_size, _aligned(made, codes))
    variant = variants.dequantize_variant(_name(made), _code_name(code), shape)
    counts = made.numel(), block_size, shape.parts
    _launch(variant, shape, made, (made, codes, scales, _table(code, made.device), *counts), block_size)
    if made is not permuted:
        permuted.copy_(made)


def _launch(variant: Any, shape: Any, values: torch.Tensor, arguments: tuple[Any, ...], block_size: int) -> None:
    from fused_opt.kernels import launch

    if values.numel() == 0:
        return
    blocks = math.ceil(values.numel() / block_size)
    programs = math.ceil(blocks * shape.parts / shape.rows)
    with current_device(values.device):
        launch.launcher.prepare(variant, values.device, arguments)
        launch.launcher.launch(variant, values.device, programs, arguments)


def _in_memory_order(values: torch.Tensor, codes: torch.Tensor, copy: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """Both with dimensions permuted such that the codes are contiguous; the values, too, if `copy`."""
    order = sorted(range(codes.dim()), key=lambda d: -codes.stride()[d])
    values, codes = values.permute(order), codes.permute(order)
    return (values.contiguous() if copy else values), codes


def _aligned(*tensors: torch.Tensor) -> bool:
    return all(tensor.data_ptr() % 16 == 0 for tensor in tensors)


def _name(values: torch.Tensor) -> str:
    return str(values.dtype).removeprefix("torch.")


def _code_name(code: str | torch.Tensor) -> str:
    return code if isinstance(code, str) else "table"


def _table(code: str | torch.Tensor, device: torch.device) -> torch.Tensor | None:
    return None if isinstance(code, str) else code.to(device)
