"""Stages by Triton's interpreter, bit for bit as the CPU's kernels. tests/test_triton_stages.py has more of them."""

from __future__ import annotations

import pytest

from fused_opt.bench.cases import Case
from triton_steps import MEDIUM, SMALL, STAGES_TOGETHER, Format, UseBackend, compare, stages_of_all_rules


@pytest.mark.parametrize(
    ("format_", "case"),
    [pytest.param(*each, id=str(each[1]), marks=[pytest.mark.slow] if each[0].states else []) for each in STAGES_TOGETHER],
)
def test_together(format_: Format, case: Case, use_backend: UseBackend) -> None:
    compare(use_backend, case, format_, MEDIUM, steps=2)


@pytest.mark.slow
@pytest.mark.parametrize(("format_", "case"), [each for each in stages_of_all_rules() if each[1].optimizer == "SGD"], ids=str)
def test_alone(format_: Format, case: Case, use_backend: UseBackend) -> None:
    compare(use_backend, case, format_, SMALL, steps=2)
