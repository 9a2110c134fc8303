"""Steps by Triton's interpreter: the case table, bit for bit as the CPU's kernels.

By default a sample of it: tests/test_triton_ptx.py runs the whole table in a fraction of the time.
"""

from __future__ import annotations

import pytest

from fused_opt.bench.cases import Case
from helpers import assert_same_state
from triton_steps import BF16, FORMATS, FP32, FP32_INT8, SMALL, Format, UseBackend, compare, of_all_cases, step_by


def _cases() -> list[object]:
    """Those that take long are marked so."""
    cases = []
    for format_, case in of_all_cases(FORMATS):
        short = case.options == {"weight_decay": 0.1} and (format_ in (FP32, FP32_INT8, BF16) or case.optimizer == "AdamW")
        cases.append(pytest.param(format_, case, id=f"{format_}, {case}", marks=[] if short else [pytest.mark.slow]))
    return cases


@pytest.mark.parametrize(("format_", "case"), _cases())
def test_case_table(case: Case, format_: Format, use_backend: UseBackend) -> None:
    compare(use_backend, case, format_, SMALL, steps=2)


def test_scalars_computed_on_the_device(use_backend: UseBackend) -> None:
    case = Case("AdamW", {"weight_decay": 0.1})
    optimizer = step_by("triton", use_backend, case, FP32, SMALL, 3, capturable=True)
    assert optimizer._last_launched.scalar_launches == 1
    assert_same_state(optimizer, step_by("cpu", use_backend, case, FP32, SMALL, 3))
