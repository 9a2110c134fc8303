"""Stages on Triton: the same bits as those of the CPU's kernels, by the PTX for GPUs, executed on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fused_opt.bench.cases import Case
from test_triton_ptx import OnGpu, on_gpu  # noqa: F401
from triton_steps import BF16, BF16_INT8, FP16, FP32, FP32_INT8, LARGE, SMALL, Format, UseBackend, compare

# Each stage by itself, and the formats of a parameter that can have it.
ALONE: dict[str, tuple[dict[str, Any], tuple[Format, ...]]] = {
    "clip": ({"max_grad_value": 0.01}, (FP32, BF16)),
    "subgradient": ({"l1": 0.05, "l1_method": "subgradient"}, (FP32, BF16)),
    "proximal": ({"l1": 0.1}, (FP32, BF16)),
    "anchor": ({"anchor_decay": 0.3}, (FP32, BF16)),
    "masks": ({"masks": True}, (FP32, BF16)),
    "ema": ({"average": "ema", "average_decay": 0.7}, (FP32, BF16, FP16)),
    "swa": ({"average": "swa", "average_start": 1, "average_every": 2}, (FP32, BF16)),
    "stochastic": ({"weights": "stochastic", "rounding_seed": 2**24 - 1}, (BF16,)),
    "kahan": ({"weights": "kahan"}, (BF16, FP16)),
    "split": ({"weights": "split"}, (BF16,)),
    "master": ({"weights": "master"}, (BF16, FP16)),
}


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize(("options", "format_"), [(options, format_) for options, formats in ALONE.values() for format_ in formats], ids=str)
def test_alone(options, format_, special, use_backend, on_gpu):
    on_gpu(90)
    masks = options.get("masks", False)
    compare(use_backend, Case("SGD", {"momentum": 0.9, **{k: v for k, v in options.items() if k != "masks"}}), format_, SMALL, steps=4, masks=masks, special=special)
