"""Steps by Triton's interpreter: the case table, bit for bit as the CPU's kernels.

Without 8-bit states, which take it ten times as long, by default; those by the command that CONTRIBUTING.md names.
"""

from __future__ import annotations

import pytest

from fused_opt.bench.cases import CASES, Case
from triton_steps import FORMATS, FP32, SMALL, Format, UseBackend, compare


def _cases() -> list[object]:
    """Those that take long are marked so."""
    cases = []
    for format_ in FORMATS:
        for case in CASES:
            if format_.allows(case):
                short = format_ is FP32 or (case.options == {"weight_decay": 0.1} and case.optimizer in ("AdamW", "RMSprop"))
                cases.append(pytest.param(format_, case, id=f"{format_}, {case}", marks=[] if short else [pytest.mark.slow]))
    return cases


@pytest.mark.parametrize(("format_", "case"), _cases())
def test_case_table(case: Case, format_: Format, use_backend: UseBackend) -> None:
    compare(use_backend, case, format_, SMALL, steps=2)


def test_scalars_computed_on_the_device(use_backend: UseBackend) -> None:
    from helpers import assert_same_state
    from triton_steps import step_by

    case = Case("AdamW", {"weight_decay": 0.1})
    optimizer = step_by("triton", use_backend, case, FP32, SMALL, 3, capturable=True)
    assert optimizer._last_launched.scalar_launches == 1
    assert_same_state(optimizer, step_by("cpu", use_backend, case, FP32, SMALL, 3))
