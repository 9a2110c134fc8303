"""Stages on Triton: the same bits as those of the CPU's kernels, by the PTX for GPUs, executed on the CPU."""

from __future__ import annotations

import pytest

from fused_opt.bench.cases import Case
from test_triton_ptx import ARCHITECTURES, OnGpu, on_gpu  # noqa: F401
from triton_steps import BF16, BF16_INT8, LARGE, SMALL, STAGES_TOGETHER, Format, UseBackend, compare, stages_of_all_rules


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
